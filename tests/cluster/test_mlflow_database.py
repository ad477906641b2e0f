"""The MLflow server of chart and manifests logs in to PostgreSQL with what the Secret holds."""

import os
import re
import socket
import struct
import threading

import pytest
from kubernetes_support import (
    MANIFESTS,
    build_kustomization,
    case_values,
    containers_of,
    pod_templates,
    read_documents,
    render_chart,
)

_SSL_REQUEST = 80877103
USER, PASSWORD = "the user", "p@ss:w/rd?&%"


class FakePostgres:
    """Reads who logs in and with which password, then refuses (PostgreSQL's protocol 3.0, section Message Flow)."""

    def __init__(self):
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        self.login, self.password, self.wanted_tls = {}, None, False
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                connection, _ = self.server.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as reader:
                self._answer(connection, reader)

    def _answer(self, connection, reader):
        length, code = struct.unpack("!ii", reader.read(8))
        if code == _SSL_REQUEST:
            self.wanted_tls = True
            connection.sendall(b"N")
            head = reader.read(8)
            if not head:
                return
            length, _ = struct.unpack("!ii", head)
        words = reader.read(length - 8).rstrip(b"\0").split(b"\0")
        self.login = dict(zip(words[::2], words[1::2], strict=True))
        connection.sendall(b"R" + struct.pack("!ii", 8, 3))  # asks for a password in clear text
        assert reader.read(1) == b"p"
        (length,) = struct.unpack("!i", reader.read(4))
        self.password = reader.read(length - 4).rstrip(b"\0")
        body = b"SFATAL\0C28P01\0Mthat is enough\0\0"
        connection.sendall(b"E" + struct.pack("!i", len(body) + 4) + body)


@pytest.fixture
def postgres():
    fake = FakePostgres()
    yield fake
    fake.server.close()


def chart_objects():
    rendered = render_chart(case_values("standalone"))
    return read_documents("".join(f"---\n{b}\n" for p, b in rendered.items() if p.endswith(".yaml")))


def manifest_objects():
    return read_documents(build_kustomization(MANIFESTS / "overlays" / "air-gapped"))


SOURCES = {
    "chart": (chart_objects, {"username": USER, "password": PASSWORD}),
    "manifests": (manifest_objects, {"PGUSER": USER, "PGPASSWORD": PASSWORD}),
}


def environment(container, objects, secret):
    """What the container's process sees, as the kubelet puts it together."""
    maps = {o["metadata"]["name"]: o["data"] for o in objects if o["kind"] == "ConfigMap"}
    found = {}
    for source in container.get("envFrom", []):
        if "configMapRef" in source:
            found.update(maps[source["configMapRef"]["name"]])
        elif source["secretRef"]["name"] == "tunegate-postgresql":
            found.update(secret)
        else:
            assert source["secretRef"]["optional"], "every other Secret may be absent"
    for variable in container["env"]:
        reference = variable.get("valueFrom", {}).get("secretKeyRef")
        if reference is None:
            found[variable["name"]] = variable["value"]
        elif reference["name"] == "tunegate-postgresql":
            found[variable["name"]] = secret[reference["key"]]
    return found


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", ["mlflow", "migrate"])
def test_the_server_logs_in_with_the_secret(source, name, postgres, monkeypatch):
    import sqlalchemy

    make, secret = SOURCES[source]
    objects = make()
    (spec,) = (s for w, _, s in pod_templates(objects) if w == "Deployment/tunegate-mlflow")
    container = next(c for c in containers_of(spec) if c["name"] == name)
    variables = environment(container, objects, secret)
    for variable in list(os.environ):
        if variable.startswith("PG"):
            monkeypatch.delenv(variable)
    assert variables["PGSSLMODE"] in {"require", "verify-full"}, "the login never goes over the wire in clear text"
    for variable, value in {**variables, "PGHOST": "127.0.0.1", "PGPORT": str(postgres.port)}.items():
        if variable.startswith("PG"):
            monkeypatch.setenv(variable, value)
    uri = variables["MLFLOW_BACKEND_STORE_URI"]
    if name == "migrate":
        given = container["command"][-1]
        uri = re.sub(r"\$\((\w+)\)", lambda match: variables[match[1]], given)
    with pytest.raises(sqlalchemy.exc.OperationalError):
        sqlalchemy.create_engine(uri).connect()
    assert postgres.wanted_tls or variables["PGSSLMODE"] == "verify-full"
    assert postgres.login == {}, "without TLS nobody logs in"
    monkeypatch.setenv("PGSSLMODE", "disable")
    with pytest.raises(sqlalchemy.exc.OperationalError, match="that is enough"):
        sqlalchemy.create_engine(uri).connect()
    assert postgres.login[b"user"].decode() == USER
    assert postgres.password.decode() == PASSWORD
    assert postgres.login[b"database"].decode() == variables["PGDATABASE"]
    assert PASSWORD not in str(container), "neither the process list nor the object has it"


def test_the_image_has_what_the_server_imports():
    """The chart's server runs on the project's own image, whose packages are those of docker/constraints.txt."""
    import tomllib

    from kubernetes_support import REPOSITORY
    from packaging.requirements import Requirement

    pins = {line.partition("==")[0] for line in (REPOSITORY / "docker" / "constraints.txt").read_text().splitlines()}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    server = {Requirement(text).name for text in project["optional-dependencies"]["server"]}
    assert server == {"psycopg2-binary", "prometheus-flask-exporter"}
    assert server <= pins
