"""The chart, rendered by the real Helm engine in every case of helm/tunegate/ci."""

import functools
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from kubernetes_support import (
    CASES,
    CHART,
    CUSTOM,
    GOLDEN,
    KUBERNETES_VERSIONS,
    assert_consistent,
    assert_custom,
    assert_golden,
    assert_launcher,
    assert_least_privilege,
    assert_restricted,
    assert_valid,
    case_namespace,
    case_text,
    case_values,
    containers_of,
    pod_templates,
    read_documents,
    render_chart,
    rules_of,
)

MEANT_TO_EXIST = {
    "Secret/tunegate-s3",
    "Secret/tunegate-postgresql",
    "Secret/pg-app",
    "Secret/mlpipeline-minio-artifact",
    "Secret/mlflow-token",
    "Secret/tunegate-registry",
    "ConfigMap/site-ca",
    "ServiceAccount/default-editor",
    "ServiceAccount/mlflow",
}
"""Named by values, made by the site."""


@functools.cache
def objects(case):
    return read_documents(case_text(case))


def named(case, kind, suffix=""):
    return [o for o in objects(case) if o["kind"] == kind and o["metadata"]["name"].endswith(suffix)]


def container_of(case, kind, suffix, name):
    (item,) = named(case, kind, suffix)
    ((_, _, spec),) = pod_templates([item])
    return next(c for c in containers_of(spec) if c["name"] == name)


def selects(selector, labels):
    """Whether a label selector takes a pod, by the rules of Kubernetes."""
    if not selector.get("matchLabels", {}).items() <= labels.items():
        return False
    for expression in selector.get("matchExpressions", []):
        value = labels.get(expression["key"])
        inside = value in expression["values"]
        if inside is not (expression["operator"] == "In"):
            return False
    return True


def environment(container):
    return {v["name"]: v.get("value", v.get("valueFrom")) for v in container["env"]}


def test_there_are_enough_cases():
    assert len(CASES) >= 8


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_lints_without_a_warning(case, version):
    import helm_python

    values = case_values(case)
    report = helm_python.lint(
        CHART, values, strict=True, namespace=case_namespace(values), kube_version=f"v{version}.0"
    )
    assert report["errors"] == []
    assert [m for m in report["messages"] if m["severity"] > 1] == []


@pytest.mark.parametrize("case", CASES)
def test_matches_the_committed_render(case):
    assert_golden(GOLDEN / "chart" / f"{case}.yaml", case_text(case))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_the_kubernetes_api_accepts_every_object(case, version):
    for item in objects(case):
        if item["kind"] in CUSTOM:
            assert_custom(item)
        else:
            assert_valid(item, version)
    for where, metadata, spec in pod_templates(o for o in objects(case) if o["kind"] in CUSTOM):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": where, **metadata}, "spec": spec}
        assert_valid(pod, version)


@pytest.mark.parametrize("case", CASES)
def test_pods_are_restricted(case):
    templates = list(pod_templates(objects(case)))
    assert templates
    for where, _, spec in templates:
        assert_restricted(where, spec, chosen_user=case != "openshift")
        if "TrainingRuntime" not in where:
            assert spec["automountServiceAccountToken"] is False, where


@pytest.mark.parametrize("case", CASES)
def test_references_and_selectors_fit(case):
    assert_consistent(objects(case), outside=MEANT_TO_EXIST)


@pytest.mark.parametrize("case", CASES)
def test_permissions_are_least(case):
    assert_least_privilege(objects(case))


@pytest.mark.parametrize("case", CASES)
def test_everything_is_in_the_namespace_and_labelled(case):
    names = [(o["kind"], o["metadata"]["name"]) for o in objects(case)]
    assert len(names) == len(set(names))
    for item in objects(case):
        assert item["metadata"]["namespace"] == case_namespace(case_values(case)), item["metadata"]["name"]
        assert item["metadata"]["labels"]["app.kubernetes.io/part-of"] == "tunegate"
        assert item["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "Helm"


@pytest.mark.parametrize("case", CASES)
def test_no_secret_is_made_and_no_credential_is_written_down(case):
    assert named(case, "Secret") == []
    for where, _, spec in pod_templates(objects(case)):
        for container in containers_of(spec):
            for variable in container.get("env", []):
                if re.search("PASSWORD|SECRET|TOKEN$|ACCESS_KEY", variable["name"]):
                    assert "value" not in variable, f"{where} {variable['name']}"


@pytest.mark.parametrize("case", [c for c in CASES if c != "bring-your-own"])
def test_the_launcher_finds_the_bucket(case):
    (launcher,) = named(case, "ConfigMap", "kfp-launcher")
    assert_launcher(launcher)
    values = case_values(case)
    default = yaml.safe_load(launcher["data"]["providers"])["s3"]["default"]
    assert launcher["data"]["defaultPipelineRoot"].startswith(f"s3://{values['s3']['bucket']}/")
    assert default["credentials"]["fromEnv"] is not bool(values["s3"].get("existingSecret"))
    assert default["disableSSL"] is values["s3"].get("endpoint", "").startswith("http://")


def test_the_launcher_of_another_service_and_of_aws():
    (launcher,) = named("customized", "ConfigMap", "kfp-launcher")
    assert yaml.safe_load(launcher["data"]["providers"])["s3"]["default"]["endpoint"] == "s3.example.com:8443"
    assert launcher["data"]["defaultPipelineRoot"] == "s3://tunegate/pipelines"
    (launcher,) = named("aws", "ConfigMap", "kfp-launcher")
    default = yaml.safe_load(launcher["data"]["providers"])["s3"]["default"]
    assert default["endpoint"] == "s3.amazonaws.com"
    assert default["credentials"] == {"fromEnv": True}


def test_runs_may_read_one_secret_with_keys_and_none_with_roles():
    def readable(case):
        return [r["resourceNames"] for r in rules_of(objects(case), "-runner") if r["resources"] == ["secrets"]]

    assert readable("standalone") == [["tunegate-s3"]]
    assert readable("customized") == [["tunegate-s3", "hub-token"]]
    assert readable("aws") == []


def test_trainjobs_are_permitted_only_where_trainer_is_used():
    groups = {case: {g for r in rules_of(objects(case), "-runner") for g in r["apiGroups"]} for case in CASES}
    assert {case for case in CASES if "trainer.kubeflow.org" in groups[case]} == {"trainer", "trainer-cpu"}


def test_the_runner_s_account_may_be_used_by_those_who_are_named():
    (rule,) = rules_of(objects("tenant"), "-runner-user")
    assert rule == {
        "apiGroups": [""],
        "resources": ["serviceaccounts"],
        "resourceNames": ["tunegate-runner"],
        "verbs": ["use"],
    }
    (binding,) = named("tenant", "RoleBinding", "-runner-user")
    assert [s["name"] for s in binding["subjects"]] == ["alice@example.com", "default-editor"]
    assert named("standalone", "RoleBinding", "-runner-user") == []


def test_the_publisher_has_rights_only_where_kubeflow_asks_for_them():
    assert rules_of(objects("standalone"), "-publisher") == []
    assert rules_of(objects("tenant"), "-publisher") == [
        {"apiGroups": ["pipelines.kubeflow.org"], "resources": ["pipelines"], "verbs": ["get", "list", "create"]}
    ]


def test_the_publisher_uploads_after_install_and_upgrade_with_a_token_for_kubeflow():
    (job,) = named("tenant", "Job")
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "post-install,post-upgrade"
    container = container_of("tenant", "Job", "-publish", "publish")
    assert container["command"] == ["tunegate", "cluster", "upload", "--all"]
    path = environment(container)["KF_PIPELINES_SA_TOKEN_PATH"]
    mount = next(m for m in container["volumeMounts"] if path.startswith(m["mountPath"]))
    volume = next(v for v in job["spec"]["template"]["spec"]["volumes"] if v["name"] == mount["name"])
    (source,) = volume["projected"]["sources"]
    assert source["serviceAccountToken"]["audience"] == "pipelines.kubeflow.org"
    assert path == f"{mount['mountPath']}/{source['serviceAccountToken']['path']}"


def test_the_audit_calls_the_command_line():
    command = container_of("tenant", "CronJob", "-audit", "audit")["command"]
    assert command == ["tunegate", "registry", "audit", "tunegate-model", "--enforce"]
    command = container_of("customized", "CronJob", "-audit", "audit")["command"]
    assert command == ["tunegate", "registry", "audit", "assistant"]


def test_the_configuration_says_where_everything_is():
    data = named("tenant", "ConfigMap", "tunegate-config")[0]["data"]
    assert data["MLFLOW_TRACKING_URI"] == "http://tunegate-mlflow.team-a.svc.cluster.local:5000"
    assert data["KF_PIPELINES_ENDPOINT"] == "http://ml-pipeline.kubeflow.svc.cluster.local:8888"
    assert data["TUNEGATE_KFP_NAMESPACE"] == "team-a"
    assert data["TUNEGATE_S3_ROOT"] == "s3://example-tunegate/team-a"
    assert "AWS_ENDPOINT_URL_S3" not in data
    data = named("external-mlflow", "ConfigMap", "tunegate-config")[0]["data"]
    assert data["MLFLOW_TRACKING_URI"] == "https://mlflow.example.com"
    assert data["AWS_ENDPOINT_URL_S3"] == "http://minio.storage.svc.cluster.local:9000"
    assert data["HF_HOME"] == "/tmp/huggingface"
    assert "TUNEGATE_KFP_NAMESPACE" not in data


@pytest.mark.parametrize("case", [c for c in CASES if c != "external-mlflow"])
def test_mlflow_understands_its_arguments(case):
    """Parsed by MLflow's own command line, options and types."""
    from mlflow.cli import cli

    container = container_of(case, "Deployment", "-mlflow", "mlflow")
    program, name = container["command"]
    assert program == "mlflow"
    command = cli.get_command(None, name)
    with command.make_context(name, list(container["args"])) as context:
        parameters = context.params
    assert parameters["host"] == "0.0.0.0"
    assert parameters["port"] == 5000
    proxied = case_values(case)["mlflow"].get("proxyArtifacts", True)
    root = parameters["artifacts_destination" if proxied else "default_artifact_root"]
    assert root.startswith("s3://")
    assert root.endswith("/mlflow")
    assert parameters["serve_artifacts"] is proxied
    migrate = container_of(case, "Deployment", "-mlflow", "migrate")
    assert migrate["command"][:3] == ["mlflow", "db", "upgrade"]
    assert environment(migrate)["MLFLOW_BACKEND_STORE_URI"] == environment(container)["MLFLOW_BACKEND_STORE_URI"]


@pytest.mark.parametrize(
    ("case", "host", "answered"),
    [
        ("standalone", "tunegate-mlflow:5000", True),
        ("standalone", "tunegate-mlflow.kubeflow.svc.cluster.local:5000", True),
        ("standalone", "tunegate-mlflow.kubeflow", True),
        ("standalone", "localhost:5000", True),
        ("standalone", "tunegate-mlflow.evil.example", False),
        ("standalone", "10.1.2.3:5000", False),
        ("aws", "10.1.2.3:5000", True),
        ("aws", "172.20.0.9:5000", True),
        ("aws", "172.15.0.9:5000", False),
        ("aws", "100.64.7.9:5000", True),
        ("aws", "100.127.7.9:5000", True),
        ("aws", "100.128.7.9:5000", False),
        ("aws", "mlflow.example.com", True),
        ("customized", "mlflow.internal:8443", True),
        ("customized", "llm-tuning-mlflow:80", True),
    ],
)
def test_mlflow_answers_under_its_names_only(case, host, answered):
    """By MLflow's own check; a wrong list turns every client away with 403."""
    from mlflow.server.security_utils import is_allowed_host_header

    arguments = dict(a.lstrip("-").split("=", 1) for a in container_of(case, "Deployment", "-mlflow", "mlflow")["args"])
    assert is_allowed_host_header(arguments["allowed-hosts"].split(","), host) is answered


def test_pages_of_the_ingress_may_change_things():
    arguments = container_of("aws", "Deployment", "-mlflow", "mlflow")["args"]
    assert "--cors-allowed-origins=https://mlflow.example.com" in arguments


def test_the_database_password_is_never_in_a_uri():
    variables = environment(container_of("standalone", "Deployment", "-mlflow", "mlflow"))
    assert variables["MLFLOW_BACKEND_STORE_URI"] == "postgresql+psycopg2://"
    assert variables["PGHOST"] == "postgres.databases.svc.cluster.local"
    assert variables["PGPASSWORD"] == {"secretKeyRef": {"name": "tunegate-postgresql", "key": "password"}}
    from sqlalchemy.engine import make_url

    assert make_url(variables["MLFLOW_BACKEND_STORE_URI"]).drivername == "postgresql+psycopg2"


def test_no_sidecar_stands_between_the_pods_of_runs_and_the_server():
    """Kubeflow's runs have no Istio sidecar, and a profile's policy turns away what comes without one."""
    for where, metadata, _ in pod_templates(objects("trainer")):
        assert metadata["labels"]["sidecar.istio.io/inject"] == "false", where


def test_sqlite_is_one_pod_on_a_volume_that_outlives_the_release():
    (deployment,) = named("kind", "Deployment")
    assert deployment["spec"]["replicas"] == 1
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}
    (claim,) = named("kind", "PersistentVolumeClaim")
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert "--workers=1" in container_of("kind", "Deployment", "-mlflow", "mlflow")["args"]


def test_images_are_pinned_by_digest_where_one_is_given():
    digests = {c["image"] for _, _, spec in pod_templates(objects("aws")) for c in containers_of(spec)}
    assert digests == {f"ghcr.io/tunegate/tunegate-python@sha256:{1:064d}"}
    (runtime,) = named("trainer", "TrainingRuntime")
    ((_, _, spec),) = pod_templates([runtime])
    assert spec["containers"][0]["image"] == "ghcr.io/tunegate/tunegate-python:0.1.0-cuda"
    (runtime,) = named("trainer-cpu", "TrainingRuntime")
    ((_, _, spec),) = pod_templates([runtime])
    assert spec["containers"][0]["image"] == "ghcr.io/tunegate/tunegate-python:0.1.0"


def test_an_air_gapped_site_allows_only_its_own_addresses():
    policies = {p["metadata"]["name"]: p["spec"] for p in named("air-gapped", "NetworkPolicy")}
    dns = [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]
    for name, policy in policies.items():
        for rule in policy["egress"]:
            assert "to" in rule or rule["ports"] == dns, f"{name} lets {rule} out"
    for _, _, spec in pod_templates(objects("air-gapped")):
        assert spec["imagePullSecrets"] == [{"name": "tunegate-registry"}]
        assert any(v["name"] == "ca" for v in spec["volumes"])


def test_network_policies_reach_the_pods_they_are_about():
    from tunegate.cluster.pods import PART_OF_LABEL, STAGE_LABEL

    policies = {p["metadata"]["name"]: p["spec"]["podSelector"] for p in named("trainer", "NetworkPolicy")}
    labels = {where: meta["labels"] for where, meta, _ in pod_templates(objects("trainer"))}
    labels["a pod of a run"] = {PART_OF_LABEL: "tunegate", STAGE_LABEL: "sft", "pipeline/runid": "1"}
    labels["a pod of somebody else"] = {"pipeline/runid": "2"}
    reached = {
        name: {where for where, have in labels.items() if selects(selector, have)}
        for name, selector in policies.items()
    }
    assert reached == {
        "tunegate-mlflow": {"Deployment/tunegate-mlflow"},
        "tunegate-jobs": {"Job/tunegate-publish", "CronJob/tunegate-audit", "Pod/tunegate-test"},
        "tunegate-runs": {"TrainingRuntime/tunegate-torch", "a pod of a run"},
    }


@pytest.mark.parametrize("case", CASES)
def test_the_resources_of_runs_are_a_valid_section(case, tmp_path):
    """Read by the code that the upload job reads it with."""
    from tunegate.cluster.submission import read_resources

    (item,) = named(case, "ConfigMap", "-resources")
    (tmp_path / "resources.yaml").write_text(item["data"]["resources.yaml"])
    spec = read_resources(tmp_path / "resources.yaml")
    (config,) = named(case, "ConfigMap", "-config")
    assert {c.name: set(c.keys) for c in spec.config_maps} == {config["metadata"]["name"]: set(config["data"])}
    values = case_values(case)
    assert (spec.image or "").startswith(values.get("image", {}).get("repository", "ghcr.io/tunegate/tunegate-python"))
    assert (spec.run_as_user is None) is (case == "openshift")
    secrets = {s.name: set(s.keys.values()) for s in spec.secrets}
    keys = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    expected = {name: keys for name in [values["s3"].get("existingSecret")] if name}
    tracking = values.get("tracking", {})
    if "existingSecret" in tracking:
        expected[tracking["existingSecret"]] = set(tracking["secretKeys"])
    assert secrets == expected
    assert (spec.certificates is not None) is ("ca" in values)


def test_the_upload_job_compiles_with_the_resources_of_runs(tmp_path):
    from tunegate.cluster.compilation import compile_pipeline
    from tunegate.cluster.submission import read_resources

    container = container_of("trainer", "Job", "-publish", "publish")
    path = environment(container)["TUNEGATE_RESOURCES"]
    mount = next(m for m in container["volumeMounts"] if path.startswith(m["mountPath"] + "/"))
    (job,) = named("trainer", "Job")
    volume = next(v for v in job["spec"]["template"]["spec"]["volumes"] if v["name"] == mount["name"])
    (item,) = named("trainer", "ConfigMap", volume["configMap"]["name"])
    (tmp_path / "resources.yaml").write_text(item["data"][path.removeprefix(mount["mountPath"] + "/")])
    compiled = compile_pipeline("instruction-tuning", spec=read_resources(tmp_path / "resources.yaml"), defaults={})
    pipeline, platform = yaml.safe_load_all(compiled.ir)
    executors = pipeline["deploymentSpec"]["executors"]
    assert {e["container"]["image"] for e in executors.values() if "container" in e} == {
        "ghcr.io/tunegate/tunegate-python:0.1.0-cuda"
    }
    pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert all("configMapAsEnv" in pod for pod in pods.values())


@pytest.mark.parametrize(("kind", "name"), [("Job", "publish"), ("CronJob", "audit")], ids=["publish", "audit"])
def test_jobs_call_commands_that_exist(kind, name):
    """Parsed by Tunegate's own command line; an option that it doesn't know is an error even beside --help."""
    from typer.testing import CliRunner

    from tunegate.cli import cluster, models  # noqa: F401  (they register their commands)
    from tunegate.cli.app import app

    program, *arguments = container_of("tenant", kind, f"-{name}", name)["command"]
    assert program == "tunegate"
    result = CliRunner().invoke(app, [*arguments, "--help"])
    assert result.exit_code == 0, result.output
    assert arguments[1] in result.output
    assert CliRunner().invoke(app, [*arguments, "--no-such-option", "--help"]).exit_code != 0


def test_two_releases_share_nothing():
    def identities(name, namespace):
        values = {**case_values("tenant")}
        rendered = render_chart(values, name=name, namespace=namespace)
        text = "".join(f"---\n{body}\n" for path, body in rendered.items() if path.endswith(".yaml"))
        return {(o["kind"], o["metadata"]["namespace"], o["metadata"]["name"]) for o in read_documents(text)}

    assert not identities("tunegate", "team-a") & identities("tunegate", "team-b")


def test_the_longest_release_name_still_gives_valid_names():
    name = "a" * 53
    rendered = render_chart(case_values("standalone"), name=name)
    for item in read_documents("".join(f"---\n{b}\n" for p, b in rendered.items() if p.endswith(".yaml"))):
        assert len(item["metadata"]["name"]) <= 63
        if item["kind"] == "CronJob":  # Kubernetes appends eleven characters for the Job
            assert len(item["metadata"]["name"]) <= 52
        assert all(len(value) <= 63 for value in item["metadata"]["labels"].values())


@pytest.mark.parametrize("case", CASES)
def test_the_notes_tell_how_to_go_on(case):
    values = case_values(case)
    notes = render_chart(values, namespace=case_namespace(values))["templates/NOTES.txt"]
    assert f"helm test tunegate --namespace {case_namespace(values)}" in notes
    account = "default-editor" if case == "bring-your-own" else ("llm-tuning" if case == "customized" else "tunegate")
    assert account in notes
    assert "<no value>" not in notes
    assert "%!" not in notes


def test_the_package_holds_what_helm_needs_and_no_more(tmp_path):
    import tarfile

    import helm_python

    archive = helm_python.package(CHART, destination=tmp_path)
    with tarfile.open(archive) as packed:
        names = {name.removeprefix("tunegate/") for name in packed.getnames()}
    top = {name.split("/")[0] for name in names}
    assert top == {"Chart.yaml", "README.md", "values.yaml", "values.schema.json", "templates", "files"}


class _Site(BaseHTTPRequestHandler):
    """Kubeflow's health and MLflow's registry, as far as the connection test asks."""

    def do_GET(self):
        body = {} if self.path.endswith("/healthz") else {"registered_models": [{"name": "assistant"}]}
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def log_message(self, *arguments):
        pass


def test_helm_test_says_what_answers_and_what_does_not(monkeypatch, capsys):
    """The script that `helm test` runs, against servers on this machine; S3 is moto's."""
    import boto3
    from moto import mock_aws

    (pod,) = named("standalone", "Pod")
    interpreter, flag, script = pod["spec"]["containers"][0]["command"]
    assert (interpreter, flag) == ("python", "-c")
    assert script == (CHART / "files" / "connections.py").read_text()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for name, value in {
        "KF_PIPELINES_ENDPOINT": address,
        "MLFLOW_TRACKING_URI": address,
        "TUNEGATE_S3_ROOT": "s3://site/tunegate",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    program = compile(script, "connections.py", "exec")
    try:
        with mock_aws():
            s3 = boto3.client("s3")
            with pytest.raises(SystemExit) as stopped:
                exec(program, {"__name__": "__main__"})
            said = capsys.readouterr().out
            assert stopped.value.code == 1
            assert "failure  S3: s3://site/tunegate/helm-test: PutObject failed with NoSuchBucket" in said
            assert "fix: aws s3 mb s3://site" in said
            assert "ok  Kubeflow Pipelines" in said
            s3.create_bucket(Bucket="site")
            with pytest.raises(SystemExit) as stopped:
                exec(program, {"__name__": "__main__"})
            said = capsys.readouterr().out
            assert stopped.value.code == 0, said
            assert "ok  MLflow: http" in said
            assert "ok  S3: s3://site/tunegate/helm-test" in said
            assert s3.list_objects_v2(Bucket="site")["KeyCount"] == 0, "the test leaves something behind"
    finally:
        server.shutdown()
        server.server_close()
