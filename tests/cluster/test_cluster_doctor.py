"""The doctor against a cluster that is well, and against each thing that can be wrong with one."""

import json

import pytest
from fake_kubeflow import FakeKubeflow

from tunegate.cluster.client import Cluster
from tunegate.cluster.compilation import CompiledPipeline
from tunegate.cluster.connection import ConnectionSpec, connect
from tunegate.cluster.doctor import examine, worst
from tunegate.cluster.kube import Kube
from tunegate.cluster.probes import ImageReference, probe_image
from tunegate.errors import TunegateError
from tunegate.resources import ResourcesSpec, StageResources
from tunegate.storage.probe import probe_s3
from tunegate.tracking.probe import probe_mlflow

COMPILED = CompiledPipeline("instruction-tuning", "pipelineInfo: {name: instruction-tuning}", "ab12" * 16, "")
DIGEST = "sha256:" + "1" * 64
CORE = "/api/v1/namespaces/kubeflow"
RESOURCES = ResourcesSpec.model_validate(
    {
        "training": {"accelerator": "nvidia.com/gpu", "accelerators": 2},
        "secrets": [{"name": "s3", "keys": {"accesskey": "AWS_ACCESS_KEY_ID"}}],
        "config_maps": [{"name": "tunegate-config", "keys": ["AWS_REGION"]}],
        "certificates": {"config_map": "own-ca"},
        "image_pull_secrets": ["registry"],
        "queue": "gpu",
    }
)


@pytest.fixture(scope="module")
def s3():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3, monkeypatch):
    import boto3

    for name, value in {
        "AWS_ENDPOINT_URL_S3": s3,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="models")
    return client


@pytest.fixture
def kubeflow():
    fake = FakeKubeflow()
    fake.kubernetes = {
        f"{CORE}/serviceaccounts/pipeline-runner": {
            "metadata": {
                "name": "pipeline-runner",
                "annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/t"},
            }
        },
        f"{CORE}/configmaps/kfp-launcher": {"data": {"defaultPipelineRoot": "s3://models/kfp"}},
        f"{CORE}/configmaps/tunegate-config": {"data": {"AWS_REGION": "eu-central-1"}},
        f"{CORE}/configmaps/own-ca": {"data": {"ca.crt": "…"}},
        f"{CORE}/secrets/s3": {"data": {"accesskey": "aGlkZGVu"}},
        f"{CORE}/secrets/registry": {"data": {".dockerconfigjson": "e30="}},
        f"{CORE}/resourcequotas": {
            "items": [{"status": {"hard": {"requests.nvidia.com/gpu": "8"}, "used": {"requests.nvidia.com/gpu": "4"}}}]
        },
        "/api/v1/nodes": {
            "items": [
                {"metadata": {"name": "a"}, "spec": {}, "status": {"allocatable": {"nvidia.com/gpu": "4"}}},
                {"metadata": {"name": "b"}, "spec": {}, "status": {"allocatable": {"cpu": "8"}}},
            ]
        },
        "/apis/kueue.x-k8s.io/v1beta1/namespaces/kubeflow/localqueues/gpu": {"metadata": {"name": "gpu"}},
    }
    fake.registry = {f"team/tunegate:{DIGEST}": DIGEST, "team/tunegate:1.0": DIGEST}
    yield fake
    fake.close()


@pytest.fixture
def kube(kubeflow, tmp_path, monkeypatch):
    file = tmp_path / "kubeconfig"
    file.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "c",
                "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
                "clusters": [{"name": "c", "cluster": {"server": kubeflow.url}}],
                "users": [{"name": "u", "user": {"token": "t"}}],
            }
        )
    )
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(file))
    return Kube("kubeflow")


def consult(kubeflow, kube, **changes):
    def open_cluster():
        return Cluster(connect(ConnectionSpec(host=kubeflow.url, auth="none")), pause=lambda _: None)

    arguments = {
        "connect": open_cluster,
        "kube": kube,
        "compiled": COMPILED,
        "image": f"{kubeflow.address}/team/tunegate@{DIGEST}",
        "resources": RESOURCES,
        "root": "s3://models/prod",
        "tracking_uri": kubeflow.url,
        "service_account": "pipeline-runner",
        **changes,
    }
    findings = list(examine(**arguments))
    return {f.check: f for f in findings}, findings


def test_healthy_cluster_has_nothing_to_mend(kubeflow, kube, bucket):
    Cluster(connect(ConnectionSpec(host=kubeflow.url, auth="none"))).upload(COMPILED)
    found, findings = consult(kubeflow, kube)
    assert [f for f in findings if f.level != "ok"] == []
    assert worst(findings) == 0
    assert "multipart uploads" in found["S3"].message
    assert bucket.list_objects_v2(Bucket="models").get("KeyCount") == 0, "the doctor leaves nothing behind"
    assert "role arn:aws:iam::1:role/t" in found["service account"].message
    assert "4 nvidia.com/gpu on 1 nodes; the quota leaves 4" in found["accelerators"].message
    assert "aGlkZGVu" not in repr(findings)


def test_each_thing_that_is_wrong_comes_with_the_line_that_mends_it(kubeflow, kube, bucket):
    kubeflow.kubernetes = {
        f"{CORE}/secrets/s3": {"data": {"other": "eA=="}},
        f"{CORE}/resourcequotas": {"items": []},
        "/api/v1/nodes": {"items": []},
    }
    kubeflow.mlflow["registered-models/search"] = 403
    found, findings = consult(kubeflow, kube, root="s3://nowhere/prod", image=f"{kubeflow.address}/team/tunegate:9.9")
    assert worst(findings) == 1
    fixes = {f.check: f.fix for f in findings if f.level == "failure"}
    assert fixes["S3"] == "aws s3 mb s3://nowhere"
    assert "--backend-store-uri" in fixes["MLflow"] and "registry does not" in found["MLflow"].message
    assert "resources.image" in fixes["image"]
    assert fixes["service account"].startswith("kubectl -n kubeflow create serviceaccount pipeline-runner")
    assert "device plugin" in fixes["accelerators"]
    assert "own-ca --from-file=ca.crt=CA.pem" in fixes["certificates"]
    assert "docker-registry registry" in fixes["secret"]
    assert any(f.fix.endswith("create secret generic s3 --from-literal=accesskey=…") for f in findings)
    assert "LocalQueue" in fixes["queue"]
    assert found["pipeline"].fix == "tunegate cluster upload"
    assert "defaultPipelineRoot=s3://" in found["artifacts"].fix
    assert all(f.fix for f in findings if f.level in {"failure", "warning"})


def test_service_account_without_permissions_gets_the_role_that_it_lacks(kubeflow, kube, bucket):
    kubeflow.allowed = lambda attributes: attributes["resource"] != "workflowtaskresults"
    _, findings = consult(kubeflow, kube)
    lacking = [f for f in findings if f.check == "service account"]
    assert len(lacking) == 2 and all(f.level == "failure" for f in lacking)
    assert "--verb=create --resource=workflowtaskresults.argoproj.io" in lacking[0].fix
    assert "--serviceaccount=kubeflow:pipeline-runner" in lacking[0].fix


def test_what_is_asked_for_is_what_the_chart_gives(kubeflow, kube, bucket):
    asked = []
    kubeflow.allowed = lambda attributes: asked.append(attributes) or True
    consult(kubeflow, kube)
    found = {(a["verb"], a["resource"], a.get("name")) for a in asked}
    assert found == {
        ("create", "workflowtaskresults", None),
        ("patch", "workflowtaskresults", None),
        ("get", "configmaps", "kfp-launcher"),
    }


SPREAD = RESOURCES.model_copy(update={"stages": {"ppo": StageResources(nodes=3)}})
RUNTIME = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/kubeflow/trainingruntimes/tunegate-torch"


def test_several_nodes_need_a_runtime_permissions_and_enough_accelerators(kubeflow, kube, bucket):
    kubeflow.allowed = lambda attributes: attributes.get("subresource") != "log"
    found, findings = consult(kubeflow, kube, resources=SPREAD)
    assert found["trainer"].level == "failure" and "--set trainer.enabled=true" in found["trainer"].fix
    (lacking,) = [f for f in findings if f.check == "service account"]
    assert "pods/log" in lacking.message and "--verb=get --resource=pods/log" in lacking.fix
    assert "asks for 6 nvidia.com/gpu on its nodes together, the cluster has 4" in found["accelerators"].message
    kubeflow.allowed = lambda attributes: True
    kubeflow.kubernetes[RUNTIME] = {"metadata": {"name": "tunegate-torch"}}
    kubeflow.kubernetes["/api/v1/nodes"]["items"][1]["status"]["allocatable"]["nvidia.com/gpu"] = "4"
    found, _ = consult(kubeflow, kube, resources=SPREAD)
    assert found["trainer"].level == found["service account"].level == "ok"
    assert "asks for 6 nvidia.com/gpu, the quota of kubeflow leaves 4" in found["accelerators"].message


def test_an_account_of_one_s_own_must_be_allowed(kubeflow, kube, bucket):
    def deployed(*variables):
        container = {"name": "ml-pipeline-api-server", "env": list(variables)}
        template = {"metadata": {}, "spec": {"containers": [container]}}
        kubeflow.kubernetes["/apis/apps/v1/namespaces/kubeflow/deployments/ml-pipeline"] = {
            "metadata": {"name": "ml-pipeline"},
            "spec": {"selector": {}, "template": template},
        }

    kubeflow.kubernetes[f"{CORE}/serviceaccounts/tunegate-runner"] = {"metadata": {"name": "tunegate-runner"}}
    deployed({"name": "ALLOWEDSERVICEACCOUNTS", "value": "other"})
    found, _ = consult(kubeflow, kube, service_account="tunegate-runner")
    assert found["allowed accounts"].level == "warning"
    assert found["allowed accounts"].fix.endswith("ALLOWEDSERVICEACCOUNTS=other,tunegate-runner")
    deployed({"name": "ALLOWEDSERVICEACCOUNTS", "value": "other, tunegate-runner"})
    found, _ = consult(kubeflow, kube, service_account="tunegate-runner")
    assert found["allowed accounts"].level == "ok"
    deployed()
    assert "allowed accounts" not in consult(kubeflow, kube)[0], "Kubeflow's own account is always allowed"


def test_kueue_s_older_api_is_found_too(kubeflow, kube, bucket):
    place = "/apis/kueue.x-k8s.io/{}/namespaces/kubeflow/localqueues/gpu"
    kubeflow.kubernetes[place.format("v1beta2")] = kubeflow.kubernetes.pop(place.format("v1beta1"))
    found, _ = consult(kubeflow, kube)
    assert found["queue"].level == "ok"


def test_quota_that_is_used_up_is_told(kubeflow, kube, bucket):
    kubeflow.kubernetes[f"{CORE}/resourcequotas"]["items"][0]["status"]["used"]["requests.nvidia.com/gpu"] = "7"
    found, _ = consult(kubeflow, kube)
    assert found["accelerators"].level == "failure" and "leaves 1" in found["accelerators"].message


def test_what_may_not_be_looked_at_is_skipped_not_failed(kubeflow, kube, bucket):
    kubeflow.kubernetes["/api/v1/nodes"] = 403
    _, findings = consult(kubeflow, kube)
    assert [f.level for f in findings if "not allowed to look" in f.message] == ["skipped"]
    assert worst(findings) == 0


def test_without_kubernetes_the_rest_is_still_checked(kubeflow, bucket):
    found, findings = consult(kubeflow, None)
    assert found["Kubernetes"].level == "skipped" and found["S3"].level == "ok"
    assert worst(findings) == 0


def test_refused_login_is_one_finding_and_the_rest_goes_on(kubeflow, kube, bucket):
    kubeflow.token = "other"
    found, findings = consult(kubeflow, kube)
    assert found["Kubeflow Pipelines"].level == "failure" and "TUNEGATE_KFP_TOKEN" in found["Kubeflow Pipelines"].fix
    assert found["S3"].level == "ok" and worst(findings) == 1


@pytest.mark.parametrize(("release", "level"), [("2.14.4", "failure"), ("2.15.0", "ok"), ("dev_local", "ok")])
def test_kubeflow_that_is_too_old_is_told(kubeflow, bucket, release, level):
    kubeflow.release = release
    found, _ = consult(kubeflow, None)
    assert found["Kubeflow Pipelines"].level == level


def test_s3_probe_names_what_is_denied(bucket, monkeypatch):
    from botocore.exceptions import ClientError

    original = __import__("boto3").client

    def client(*args, **kwargs):
        made = original(*args, **kwargs)

        def refuse(**_):
            raise ClientError({"Error": {"Code": "AccessDenied"}}, "CreateMultipartUpload")

        made.create_multipart_upload = refuse
        return made

    monkeypatch.setattr("boto3.client", client)
    finding = probe_s3("s3://models/prod")
    assert finding.level == "failure"
    assert "writing, reading and listing worked" in finding.message
    assert finding.fix == "allow s3:PutObject on arn:aws:s3:::models/*"


def test_s3_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    finding = probe_s3("s3://models/prod")
    assert finding.level == "failure" and "AWS_ENDPOINT_URL_S3" in finding.fix
    assert probe_s3("/tmp/here").level == "failure"


def test_mlflow_probe_tells_apart_absent_local_and_forbidden(kubeflow, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert probe_mlflow(None).level == "warning"
    assert "lies on this machine" in probe_mlflow("sqlite:////tmp/mlflow.db").message
    kubeflow.mlflow["experiments/search"] = 403
    finding = probe_mlflow(kubeflow.url)
    assert finding.level == "failure" and "MLFLOW_TRACKING_TOKEN" in finding.fix


def test_image_probe_pins_tags_and_tolerates_registries_out_of_reach(kubeflow):
    finding = probe_image(f"{kubeflow.address}/team/tunegate:1.0")
    assert finding.level == "warning" and finding.fix == f"resources.image: {kubeflow.address}/team/tunegate@{DIGEST}"
    assert probe_image("127.0.0.1:1/team/tunegate:1.0").level == "warning"
    assert probe_image("Not an image").level == "failure"


@pytest.mark.parametrize(
    ("image", "parts"),
    [
        ("tunegate", ("registry-1.docker.io", "library/tunegate", None, None)),
        ("team/tunegate:1.0", ("registry-1.docker.io", "team/tunegate", "1.0", None)),
        ("ghcr.io/a/b/c:x", ("ghcr.io", "a/b/c", "x", None)),
        ("localhost:5000/a", ("localhost:5000", "a", None, None)),
        (f"r.io:8443/a:1@{DIGEST}", ("r.io:8443", "a", "1", DIGEST)),
    ],
)
def test_image_references_are_taken_apart_as_docker_does(image, parts):
    found = ImageReference.parse(image)
    assert (found.registry, found.name, found.tag, found.digest) == parts


def test_broken_image_reference_is_refused():
    with pytest.raises(TunegateError, match="no image reference"):
        ImageReference.parse("a@sha256:123")
