"""Preflight in a pod: it finds what the doctor finds from outside, all at once, before any money is spent."""

import json

import pytest
from fake_kubeflow import FakeKubeflow
from fake_kubernetes import FakeKubernetes

from tunegate.config import build_spec
from tunegate.errors import SpecError, StorageError
from tunegate.stages import preflight
from tunegate.stages.checks import check_services
from tunegate.storage.runs import RunStore
from tunegate.trainjob import client as trainjob_client

PLACEHOLDER = "{{$.pipeline_root}}"


@pytest.fixture(scope="module")
def moto():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(moto, monkeypatch):
    import boto3

    for name, value in {
        "AWS_ENDPOINT_URL_S3": moto,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="runs")
    return client


@pytest.fixture
def services(s3, monkeypatch):
    """MLflow that answers, and the spec of a run that uses it."""
    fake = FakeKubeflow()
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("TUNEGATE_TRAINJOB", raising=False)
    yield fake
    fake.close()


def spec(services, **changes):
    layer = {"storage": {"root": "s3://runs/team"}, "tracking": {"uri": services.url}}
    return build_spec({**layer, **changes})


def test_services_that_answer_are_fine(services, s3):
    check_services(spec(services))
    assert s3.list_objects_v2(Bucket="runs").get("KeyCount") == 0, "the probe leaves nothing behind"


def test_everything_that_is_wrong_is_in_one_message(services):
    services.mlflow["registered-models/search"] = 403
    with pytest.raises(StorageError) as caught:
        check_services(spec(services, storage={"root": "s3://nowhere/team"}))
    text = str(caught.value)
    assert "S3: s3://nowhere/team" in text and "aws s3 mb s3://nowhere" in text
    assert "tracking works, but the model registry does not" in text and "postgresql://" in text


def test_a_store_on_the_pod_s_own_disk_is_refused(services):
    with pytest.raises(StorageError, match="lies on this machine"):
        check_services(spec(services, tracking={"uri": "sqlite:////tmp/mlflow.db"}))
    with pytest.raises(SpecError, match=r"tracking\.uri"):
        check_services(spec(services, tracking={"uri": None}))


def test_a_run_that_cannot_work_ends_in_preflight_with_a_record_of_why(services, tmp_path):
    services.mlflow["experiments/search"] = 403
    with pytest.raises(StorageError):
        preflight.run(
            spec=tmp_path / "spec",
            parameters={"tracking_uri": services.url},
            overrides={},
            profile="smoke",
            spec_uri="",
            run_id="",
            job_id="job-1",
            storage_root="s3://runs/team",
            pipeline_root=PLACEHOLDER,
        )
    record = RunStore("s3://runs/team", "job-1").read_stage("preflight")
    assert record.status == "failed" and "MLFLOW_TRACKING_TOKEN" in record.error


def test_nodes_that_would_not_come_are_told_before_the_first_stage(services, tmp_path, monkeypatch):
    kubernetes = FakeKubernetes()
    monkeypatch.setattr(trainjob_client, "_SERVICE_ACCOUNT", tmp_path / "none")
    location = "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION"
    monkeypatch.setattr(location, str(kubernetes.kubeconfig(tmp_path / "kubeconfig")))
    monkeypatch.setenv("TUNEGATE_TRAINJOB", json.dumps({"stages": {"ppo": {"nodes": 2}}}))
    check_services(spec(services))
    kubernetes.denied = {"create trainjobs", "get pods/log"}
    with pytest.raises(StorageError, match=r"may not create trainjobs, get pods/log.*trainer\.enabled=true"):
        check_services(spec(services))
    kubernetes.runtimes = set()
    with pytest.raises(StorageError, match="there is no TrainingRuntime"):
        check_services(spec(services))
    kubernetes.close()
