"""MLflow as a team runs it: a server process on PostgreSQL with artifacts in S3, all on loopback, all restartable."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

# The MLflow server process is shared with the tests of the room next door.
sys.path.insert(0, str(Path(__file__).parents[1] / "tracking"))
from mlflow_server import MlflowServer

BUCKET = "models"
_CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def postgres_programs() -> Path:
    """The folder of PostgreSQL's programs; Debian keeps them off the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found and (program := shutil.which("initdb")):
        found = [Path(program)]
    if not found:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    return found[-1].parent


class Postgres:
    """One database on loopback, run by an unprivileged user, since PostgreSQL refuses root."""

    def __init__(self) -> None:
        self._programs = postgres_programs()
        memory = Path("/dev/shm")
        base = tempfile.mkdtemp(prefix="tunegate-pg-", dir=memory if os.access(memory, os.W_OK) else None)
        self.folder = Path(base)
        self.port = free_port()
        self._user: dict[str, Any] = {}
        if os.geteuid() == 0:
            names = [entry.pw_name for entry in pwd.getpwall() if entry.pw_name in ("postgres", "nobody")]
            account = pwd.getpwnam(sorted(names)[-1])
            os.chown(base, account.pw_uid, account.pw_gid)
            self._user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        self._data = self.folder / "data"
        self._process: subprocess.Popen[bytes] | None = None
        subprocess.run(
            [self._programs / "initdb", "-D", self._data, "-U", "mlflow", "-A", "trust", "--no-sync", "-E", "UTF8"],
            check=True,
            capture_output=True,
            cwd=self.folder,
            **self._user,
        )

    @property
    def uri(self) -> str:
        return f"postgresql+psycopg2://mlflow@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        import psycopg2

        settings = ["-c", "fsync=off", "-c", "full_page_writes=off", "-c", "listen_addresses=127.0.0.1"]
        with (self.folder / "log").open("a") as log:
            self._process = subprocess.Popen(
                [self._programs / "postgres", "-D", self._data, "-p", str(self.port), "-k", self.folder, *settings],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                **self._user,
            )
        deadline = time.monotonic() + 240
        while True:
            try:
                psycopg2.connect(host="127.0.0.1", port=self.port, user="mlflow", dbname="postgres").close()
            except psycopg2.OperationalError:
                assert self._process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < deadline, (self.folder / "log").read_text()
                time.sleep(0.05)
            else:
                return

    def stop(self) -> None:
        """Cut every connection at once, as when the machine is lost (SIGQUIT: immediate shutdown)."""
        if self._process is not None:
            self._process.send_signal(3)
            self._process.wait(timeout=240)
            self._process = None

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


class Service:
    """PostgreSQL, S3 (moto) and an MLflow server that joins them."""

    def __init__(self, folder: Path) -> None:
        self.postgres = Postgres()
        self.postgres.start()
        self._s3 = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._s3.start()
        host, port = self._s3.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        self.s3 = boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )
        self.s3.create_bucket(Bucket=BUCKET)
        self.mlflow = MlflowServer(
            folder,
            self.postgres.uri,
            artifacts=f"s3://{BUCKET}/mlflow",
            environment={**_CREDENTIALS, "MLFLOW_S3_ENDPOINT_URL": endpoint},
        )
        try:
            self.mlflow.start()
        except BaseException:
            self.close()  # nobody else will
            raise

    @property
    def uri(self) -> str:
        return self.mlflow.uri

    def close(self) -> None:
        self.mlflow.stop()
        self._s3.stop()
        self.postgres.close()

    @contextmanager
    def artifacts(self, location: str) -> Iterator[Path]:
        """The objects behind an `mlflow-artifacts:/…` location as a folder; what is changed in it is written back."""
        prefix = "mlflow/" + location.removeprefix("mlflow-artifacts:").strip("/") + "/"
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            before = {}
            for key in self._keys(prefix):
                path = folder / key.removeprefix(prefix)
                path.parent.mkdir(parents=True, exist_ok=True)
                before[key] = self.s3.get_object(Bucket=BUCKET, Key=key)["Body"].read()
                path.write_bytes(before[key])
            assert before, f"nothing lies at {location}"
            yield folder
            self._write_back(folder, prefix, before)

    def _keys(self, prefix: str) -> list[str]:
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", [])]

    def _write_back(self, folder: Path, prefix: str, before: Mapping[str, bytes]) -> None:
        after = {prefix + p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        for key in before.keys() - after.keys():
            self.s3.delete_object(Bucket=BUCKET, Key=key)
        for key, data in after.items():
            if before.get(key) != data:
                self.s3.put_object(Bucket=BUCKET, Key=key, Body=data)
