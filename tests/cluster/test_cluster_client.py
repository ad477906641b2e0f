"""Requests to Kubeflow Pipelines over real HTTP: what goes right, and everything that goes wrong on the way."""

import json
import ssl

import pytest
from fake_kubeflow import DROP, FakeKubeflow

from tunegate.cluster.client import Cluster, ConflictError, MissingError
from tunegate.cluster.compilation import CompiledPipeline
from tunegate.cluster.connection import ConnectionSpec, connect
from tunegate.cluster.errors import ClusterError, RefusedError
from tunegate.errors import SpecError

IR = """
pipelineInfo: {name: instruction-tuning}
root:
  inputDefinitions:
    parameters:
      storage_root: {parameterType: STRING, defaultValue: ''}
"""
COMPILED = CompiledPipeline("instruction-tuning", IR, "ab12" * 16, "what it does")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in ("HOST", "NAMESPACE", "TOKEN", "TOKEN_FILE", "USERNAME", "PASSWORD", "CA_FILE", "AUTH"):
        monkeypatch.delenv(f"TUNEGATE_KFP_{name}", raising=False)
    for name in ("KF_PIPELINES_ENDPOINT", "REQUESTS_CA_BUNDLE", "KF_PIPELINES_SA_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def kubeflow():
    fake = FakeKubeflow()
    yield fake
    fake.close()


@pytest.fixture
def waits():
    return []


@pytest.fixture
def cluster(kubeflow, waits):
    return Cluster(connect(ConnectionSpec(host=kubeflow.url)), pause=waits.append)


def test_upload_creates_then_versions_then_does_nothing(kubeflow, cluster):
    first = cluster.upload(COMPILED)
    again = cluster.upload(COMPILED)
    changed = cluster.upload(CompiledPipeline("instruction-tuning", IR, "cd34" * 16, "what it does"))
    assert first.created and not again.created and changed.created
    assert first.version.endswith("-ab12ab12ab12")
    assert again.version_id == first.version_id != changed.version_id
    assert again.pipeline_id == first.pipeline_id == changed.pipeline_id
    assert len(kubeflow.pipelines) == 1 and len(kubeflow.versions) == 2
    stored = kubeflow.versions[first.version_id]
    assert stored.pipeline_spec["pipelineInfo"] == {"name": "instruction-tuning"}


def test_upload_finds_its_version_beyond_the_first_page(kubeflow, cluster):
    first = cluster.upload(COMPILED)
    for number in range(7):
        cluster.upload(CompiledPipeline("instruction-tuning", IR, f"{number:064d}"[::-1], ""))
    assert cluster.upload(COMPILED).version_id == first.version_id


def test_upload_whose_answer_is_lost_ends_with_the_version_once(kubeflow, cluster):
    kubeflow.fail(DROP, path="upload_version", after=True)
    result = cluster.upload(COMPILED)
    assert len(kubeflow.versions) == 1
    assert result.version_id in kubeflow.versions and not result.created


def test_twin_that_creates_the_pipeline_first_is_no_error(kubeflow, cluster):
    twin = Cluster(connect(ConnectionSpec(host=kubeflow.url)))
    find, asked = cluster.find_pipeline, []

    def find_late(name, *, shared=False):
        if not asked:
            asked.append(name)
            found = find(name, shared=shared)
            twin.upload(COMPILED)
            return found
        return find(name, shared=shared)

    cluster.find_pipeline = find_late
    assert not cluster.upload(COMPILED).created
    assert len(kubeflow.pipelines) == 1


def test_pipelines_of_a_multi_user_kubeflow_lie_in_the_namespace():
    fake = FakeKubeflow(multi_user=True)
    try:
        with pytest.raises(SpecError, match="your namespace must be named"):
            Cluster(connect(ConnectionSpec(host=fake.url))).upload(COMPILED)
        alice = Cluster(connect(ConnectionSpec(host=fake.url, namespace="alice")))
        alice.upload(COMPILED)
        assert [p.namespace for p in fake.pipelines.values()] == ["alice"]
        bob = Cluster(connect(ConnectionSpec(host=fake.url, namespace="bob")))
        with pytest.raises(RefusedError, match="was not uploaded yet"):
            bob.pipeline("instruction-tuning")
    finally:
        fake.close()


def test_busy_server_is_asked_again_after_what_it_says(kubeflow, cluster, waits):
    kubeflow.fail((429, {"Retry-After": "7"}, None), 503, 502)
    assert cluster.runs() == []
    assert waits == [7.0, 2.0, 4.0]


def test_dropped_connections_are_tried_again_and_then_told(kubeflow, cluster, waits):
    kubeflow.fail(DROP, DROP)
    assert cluster.runs() == []
    kubeflow.fail(*[DROP] * 5)
    with pytest.raises(ClusterError) as caught:
        cluster.run("some-run")
    assert not isinstance(caught.value, RefusedError) and caught.value.exit_code == 1
    assert waits == [1.0, 2.0, 1.0, 2.0, 4.0, 8.0]


def test_server_that_is_not_there_is_named():
    cluster = Cluster(connect(ConnectionSpec(host="http://127.0.0.1:1")), pause=lambda _: None)
    with pytest.raises(ClusterError, match=r"http://127\.0\.0\.1:1.*Fix: check --host"):
        cluster.runs()


def test_internal_error_is_told_with_the_server_s_words_and_not_repeated(kubeflow, cluster, waits):
    kubeflow.fail((500, {}, json.dumps({"code": 13, "message": "InternalServerError: the database is gone"})))
    with pytest.raises(ClusterError, match="the database is gone"):
        cluster.runs()
    assert waits == []


def test_expired_token_says_how_to_renew_it(kubeflow):
    kubeflow.token = "good"
    cluster = Cluster(connect(ConnectionSpec(host=kubeflow.url, token="old")))
    with pytest.raises(RefusedError, match=r"token is expired.*set TUNEGATE_KFP_TOKEN") as caught:
        cluster.runs()
    assert caught.value.exit_code == 2
    assert "old" not in str(caught.value)


def test_rotated_token_file_is_read_anew(kubeflow, tmp_path):
    file = tmp_path / "token"
    file.write_text("first\n")
    kubeflow.token = "first"
    cluster = Cluster(connect(ConnectionSpec(host=kubeflow.url, token_file=str(file))))
    assert cluster.runs() == []
    kubeflow.token = "second"
    file.write_text("second\n")
    assert cluster.runs() == []


def test_missing_permission_names_the_role(kubeflow, cluster):
    kubeflow.fail((403, {}, json.dumps({"code": 7, "message": "User 'x' is not authorized"})))
    with pytest.raises(RefusedError, match=r"is not authorized.*kubeflow-pipelines-edit"):
        cluster.runs()


def test_conflict_is_told(kubeflow, cluster):
    cluster.upload(COMPILED)
    kubeflow.fail(409, path="/runs")
    with pytest.raises(ConflictError):
        cluster.create_run(
            name="x", version=cluster.version(next(iter(kubeflow.pipelines))), parameters={}, experiment="e"
        )


def test_login_page_in_place_of_data_is_recognised(kubeflow, cluster):
    kubeflow.fail((200, {"Content-Type": "text/html"}, "<html>Sign in</html>"))
    with pytest.raises(RefusedError, match=r"web page instead of data.*TUNEGATE_KFP_TOKEN"):
        cluster.runs()
    kubeflow.fail((302, {"Location": "/dex/auth"}, ""))
    with pytest.raises(RefusedError, match="redirects to a login page"):
        cluster.runs()


def test_run_is_created_with_version_parameters_and_experiment(kubeflow, cluster):
    uploaded = cluster.upload(COMPILED)
    version = cluster.version(uploaded.pipeline_id)
    made = cluster.create_run(
        name="nightly",
        version=version,
        parameters={"storage_root": "s3://b/p"},
        experiment="tunegate",
        pipeline_root="s3://b/kfp",
        service_account="runner",
    )
    stored = kubeflow.runs[made.run_id]
    assert stored.pipeline_version_reference.pipeline_version_id == uploaded.version_id
    assert stored.runtime_config.parameters == {"storage_root": "s3://b/p"}
    assert (stored.runtime_config.pipeline_root, stored.service_account) == ("s3://b/kfp", "runner")
    assert kubeflow.experiments[stored.experiment_id].display_name == "tunegate"
    cluster.create_run(name="again", version=version, parameters={}, experiment="tunegate")
    assert len(kubeflow.experiments) == 1


@pytest.mark.parametrize(("status", "code"), [(400, 3), (403, 7)])
def test_an_account_that_kubeflow_does_not_allow_comes_with_the_way_out(kubeflow, cluster, status, code):
    version = cluster.version(cluster.upload(COMPILED).pipeline_id)
    message = 'service account "tunegate-runner" is not in the allowed service accounts list'
    body = json.dumps({"code": code, "message": message})
    kubeflow.fail((status, {}, body), path="/runs")
    with pytest.raises(RefusedError) as caught:
        cluster.create_run(name="r", version=version, parameters={}, experiment="e", service_account="tunegate-runner")
    assert message in caught.value.reason and "ALLOWEDSERVICEACCOUNTS" in caught.value.fix
    assert caught.value.key == "--service-account"
    kubeflow.fail((status, {}, body), path="/recurringruns")
    with pytest.raises(RefusedError, match="ALLOWEDSERVICEACCOUNTS"):
        cluster.schedule(
            name="s",
            version=version,
            parameters={},
            experiment="e",
            cron="0 0 3 * * *",
            service_account="tunegate-runner",
        )


@pytest.mark.parametrize("fault", [DROP, 503])
def test_run_whose_answer_is_lost_is_found_and_not_started_twice(kubeflow, cluster, fault):
    uploaded = cluster.upload(COMPILED)
    version = cluster.version(uploaded.pipeline_id)
    cluster.experiment_id("tunegate")
    kubeflow.fail(fault, path="/runs", after=True)
    made = cluster.create_run(name="nightly", version=version, parameters={}, experiment="tunegate")
    assert len(kubeflow.runs) == 1 and made.run_id in kubeflow.runs


def test_run_that_may_not_have_started_is_told_and_not_repeated(kubeflow, cluster):
    uploaded = cluster.upload(COMPILED)
    version = cluster.version(uploaded.pipeline_id)
    cluster.experiment_id("tunegate")
    kubeflow.fail(DROP, path="/runs")
    with pytest.raises(ClusterError, match="see whether it happened all the same"):
        cluster.create_run(name="nightly", version=version, parameters={}, experiment="tunegate")
    assert len(kubeflow.calls("POST", "/runs$")) == 1


def test_create_is_repeated_when_the_server_says_later(kubeflow, cluster, waits):
    uploaded = cluster.upload(COMPILED)
    version = cluster.version(uploaded.pipeline_id)
    cluster.experiment_id("tunegate")
    kubeflow.fail(429, path="/runs")
    cluster.create_run(name="nightly", version=version, parameters={}, experiment="tunegate")
    assert len(kubeflow.runs) == 1 and waits == [1.0]


def test_runs_are_found_by_id_beginning_name_and_last(kubeflow, cluster):
    older = kubeflow.add_run(name="older")
    newer = kubeflow.add_run(name="newer")
    newer.created_at = newer.created_at.replace(hour=10)
    assert cluster.find_run(older.run_id).display_name == "older"
    assert cluster.find_run(older.run_id[:13]).display_name == "older"
    assert cluster.find_run("newer").run_id == newer.run_id
    assert cluster.find_run("last").run_id == newer.run_id
    with pytest.raises(MissingError, match="no such run"):
        cluster.find_run("zzz")
    with pytest.raises(MissingError, match="not found"):
        cluster.find_run("00000000-0000-0000-0000-000000000000")


def test_version_that_is_not_there_names_those_that_are(kubeflow, cluster):
    uploaded = cluster.upload(COMPILED)
    with pytest.raises(RefusedError, match=f"one of {uploaded.version}"):
        cluster.version(uploaded.pipeline_id, "nothing")


def test_schedule_is_pinned_to_its_version_and_can_be_deleted(kubeflow, cluster):
    uploaded = cluster.upload(COMPILED)
    version = cluster.version(uploaded.pipeline_id)
    cluster.schedule(name="weekly", version=version, parameters={}, experiment="e", cron="0 0 3 * * 1")
    cluster.schedule(name="often", version=version, parameters={}, experiment="e", every_seconds=3600)
    weekly, often = cluster.schedules()
    assert weekly.pipeline_version_reference.pipeline_version_id == uploaded.version_id
    assert weekly.trigger.cron_schedule.cron == "0 0 3 * * 1" and weekly.no_catchup
    assert often.trigger.periodic_schedule.interval_second == "3600"
    cluster.unschedule("weekly")
    assert [s.display_name for s in cluster.schedules()] == ["often"]
    with pytest.raises(MissingError, match="one of often"):
        cluster.unschedule("weekly")


def test_dex_login_and_a_session_that_ended(kubeflow):
    kubeflow.dex = {"user": "a@b.c", "password": "hidden", "cookie": "oauth2_proxy_kubeflow=one"}
    spec = ConnectionSpec(host=f"{kubeflow.url}/pipeline", username="a@b.c", password="hidden")
    opened = connect(spec)
    opened.api.configuration.host = kubeflow.url  # the fake serves the API at its root
    cluster = Cluster(opened, pause=lambda _: None)
    assert cluster.runs() == []
    kubeflow.dex["cookie"] = "oauth2_proxy_kubeflow=two"
    assert cluster.runs() == []
    assert len(kubeflow.calls("POST", "/dex/auth/local/login")) == 2


def test_wrong_dex_password_is_told_without_it(kubeflow):
    kubeflow.dex = {"user": "a@b.c", "password": "hidden", "cookie": "session=1"}
    with pytest.raises(RefusedError, match="Dex refuses") as caught:
        connect(ConnectionSpec(host=f"{kubeflow.url}/pipeline", username="a@b.c", password="wrong-password"))
    assert "wrong-password" not in str(caught.value)


def test_kubeconfig_goes_through_the_service_proxy(kubeflow, tmp_path, monkeypatch):
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": kubeflow.url, "insecure-skip-tls-verify": True}}],
        "users": [{"name": "u", "user": {"token": "from-kubeconfig"}}],
    }
    file = tmp_path / "config"
    file.write_text(json.dumps(config))
    monkeypatch.setenv("KUBECONFIG", str(file))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(file))
    opened = connect(ConnectionSpec(kfp_namespace="kfp"))
    assert opened.spec.auth == "kubeconfig"
    assert opened.host == f"{kubeflow.url}/api/v1/namespaces/kfp/services/ml-pipeline:http/proxy"
    assert opened.api.configuration.verify_ssl is True
    for _ in range(2):
        with pytest.raises(MissingError):
            Cluster(opened).runs()
        assert kubeflow.requests[-1][1].startswith("/api/v1/namespaces/kfp/services/ml-pipeline:http/proxy/apis/")
    assert kubeflow.requests[-1][3]["Authorization"] == "Bearer from-kubeconfig"
    with pytest.raises(RefusedError, match="get-contexts"):
        connect(ConnectionSpec(context="elsewhere"))


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"auth": "bearer", "host": "http://h"}, "--auth"),
        ({"auth": "dex", "host": "http://h", "username": "u"}, "--auth"),
        ({"auth": "magic"}, "--auth"),
        ({"auth": "bearer", "token": "t"}, "--host"),
        ({"host": "http://h", "ca_file": "/nowhere/ca.pem"}, "--ca-file"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(settings, key):
    with pytest.raises(SpecError) as caught:
        ConnectionSpec(**settings).resolved({})
    assert caught.value.key == key and caught.value.fix


@pytest.mark.parametrize(
    ("settings", "environment", "auth"),
    [
        ({"host": "h"}, {}, "none"),
        ({}, {}, "kubeconfig"),
        ({}, {"KF_PIPELINES_ENDPOINT": "http://h", "TUNEGATE_KFP_TOKEN": "t"}, "bearer"),
        ({"host": "h"}, {"TUNEGATE_KFP_USERNAME": "u", "TUNEGATE_KFP_PASSWORD": "p"}, "dex"),
        ({}, {"KF_PIPELINES_SA_TOKEN_PATH": "/token"}, "in-cluster"),
        ({"auth": "kubeconfig"}, {"TUNEGATE_KFP_TOKEN": "t"}, "kubeconfig"),
    ],
)
def test_the_way_to_log_in_follows_from_what_is_there(settings, environment, auth):
    assert ConnectionSpec(**settings).resolved(environment).auth == auth


def test_host_without_a_scheme_is_reached_over_tls():
    assert (
        ConnectionSpec(host="kubeflow.example.com/pipeline/").resolved({}).host
        == "https://kubeflow.example.com/pipeline"
    )


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """A certificate authority of one's own and a server certificate for 127.0.0.1 that it signed."""
    import ipaddress
    from datetime import UTC, datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = tmp_path_factory.mktemp("tls")
    now = datetime.now(UTC)

    def certificate(subject, key, issuer, issuer_key, extension, authority):
        usage = dict.fromkeys(
            ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only"), False
        )
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
            .add_extension(
                x509.KeyUsage(
                    digital_signature=True,
                    key_cert_sign=authority,
                    crl_sign=authority,
                    decipher_only=False,
                    **usage,
                ),
                critical=True,
            )
        )
        if extension is not None:
            builder = builder.add_extension(extension, critical=False)
        return builder.sign(issuer_key, hashes.SHA256())

    def name(text):
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca = certificate(name("own authority"), ca_key, name("own authority"), ca_key, None, True)
    alternative = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    server = certificate(name("kubeflow"), key, name("own authority"), ca_key, alternative, False)
    pem = serialization.Encoding.PEM
    (folder / "ca.pem").write_bytes(ca.public_bytes(pem))
    (folder / "server.pem").write_bytes(
        server.public_bytes(pem)
        + key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder


def test_tls_is_checked_against_the_authority_that_is_named(authority):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority / "server.pem")
    fake = FakeKubeflow(ssl_context=context)
    try:
        trusted = connect(ConnectionSpec(host=fake.url, ca_file=str(authority / "ca.pem")))
        assert Cluster(trusted).runs() == []
        with pytest.raises(ClusterError, match=r"certificate.*--ca-file"):
            Cluster(connect(ConnectionSpec(host=fake.url)), pause=lambda _: None).runs()
    finally:
        fake.close()
