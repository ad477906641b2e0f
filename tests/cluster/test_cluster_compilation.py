"""Compiling for a cluster: resources, image and defaults in the IR, checked with KFP's own protobuf messages."""

import functools

import pytest
import yaml
from google.protobuf import json_format
from kfp.kubernetes import kubernetes_executor_config_pb2
from kfp.pipeline_spec import pipeline_spec_pb2
from pydantic import ValidationError

from tunegate.cluster.compilation import (
    check_ir,
    coerce_parameters,
    compile_pipeline,
    kubernetes_manifests,
    load_documents,
    parse_parameters,
    pipeline_names,
)
from tunegate.errors import SpecError
from tunegate.resources import TRAINING_STAGES, ResourcesSpec

OF_THE_POD = {"node_selector", "tolerations"}
PARAMETERS = OF_THE_POD | {"cpu", "memory", "accelerator", "accelerators"}
RESOURCES = ResourcesSpec.model_validate(
    {
        "image": "registry.example.com/tunegate@sha256:" + "0" * 64,
        "image_pull_secrets": ["registry"],
        "image_pull_policy": "IfNotPresent",
        "defaults": {"cpu": "500m", "memory": "2Gi", "retry": {"count": 3, "backoff_seconds": 30}},
        "training": {
            "cpu": "8",
            "cpu_limit": "16",
            "memory": "64Gi",
            "accelerator": "nvidia.com/gpu",
            "shared_memory": "16Gi",
            "ephemeral_storage": "200Gi",
            "node_selector": {"node.kubernetes.io/instance-type": "g6.xlarge"},
            "tolerations": [{"key": "nvidia.com/gpu", "effect": "NoSchedule"}],
            "timeout_seconds": 7200,
        },
        "stages": {"ppo": {"accelerators": 4, "ephemeral_storage_class": "fast"}, "evaluate": {"retry": {"count": 0}}},
        "secrets": [{"name": "s3", "keys": {"accesskey": "AWS_ACCESS_KEY_ID", "secretkey": "AWS_SECRET_ACCESS_KEY"}}],
        "config_maps": [{"name": "tunegate-config", "keys": ["MLFLOW_TRACKING_URI"], "optional": True}],
        "environment": {"AWS_REGION": "eu-central-1"},
        "certificates": {"config_map": "own-ca"},
        "labels": {"team": "assistants"},
        "annotations": {"sidecar.istio.io/inject": "false"},
        "queue": "gpu",
        "run_as_user": 10001,
    }
)


@pytest.fixture(scope="module")
def compiled():
    return compile_pipeline(spec=RESOURCES)


@pytest.fixture(scope="module")
def plain():
    return compile_pipeline()


@functools.cache
def executors(pipeline):
    """Container and Kubernetes configuration of each executor, read back through the protobuf messages."""
    documents = load_documents(pipeline.ir)
    spec = json_format.ParseDict(documents[0], pipeline_spec_pb2.PipelineSpec())
    deployment = json_format.ParseDict(
        json_format.MessageToDict(spec.deployment_spec), pipeline_spec_pb2.PipelineDeploymentConfig()
    )
    configured = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return {
        name.removeprefix("exec-"): (
            executor.container,
            json_format.ParseDict(configured.get(name, {}), kubernetes_executor_config_pb2.KubernetesExecutorConfig()),
        )
        for name, executor in deployment.executors.items()
    }


@functools.cache
def tasks(pipeline):
    spec = load_documents(pipeline.ir)[0]
    dags = [spec["root"], *spec["components"].values()]
    return {name: task for dag in dags for name, task in dag.get("dag", {}).get("tasks", {}).items()}


def test_training_stages_get_their_sizes_as_parameters(compiled):
    for stage, task in zip(TRAINING_STAGES, ("sft", "guard", "reward-model", "ppo", "evaluate"), strict=True):
        container, _ = executors(compiled)[task]
        assert (
            container.resources.resource_cpu_request == f"{{{{$.inputs.parameters['pipelinechannel--{stage}_cpu']}}}}"
        )
        assert container.resources.resource_memory_limit.endswith(f"--{stage}_memory']}}}}")
        assert container.resources.resource_memory_request == container.resources.resource_memory_limit
        assert container.resources.resource_cpu_limit == "16"
        assert container.resources.accelerator.resource_type.endswith(f"--{stage}_accelerator']}}}}")
        inputs = tasks(compiled)[task]["inputs"]["parameters"]
        added = {name.partition("_")[2] for name in inputs if name.startswith(f"pipelinechannel--{stage}_")}
        assert added >= PARAMETERS - OF_THE_POD, "the driver resolves them from the task's inputs"
    parameters = load_documents(compiled.ir)[0]["root"]["inputDefinitions"]["parameters"]
    assert parameters["sft_accelerator"]["defaultValue"] == "nvidia.com/gpu"
    assert parameters["sft_node_selector"]["parameterType"] == "STRUCT"
    assert parameters["sft_tolerations"]["parameterType"] == "LIST"
    assert parameters["sft_tolerations"]["defaultValue"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    ]
    assert "Labels" in parameters["sft_node_selector"]["description"]
    assert parameters["sft_memory"]["defaultValue"] == "64Gi"
    assert parameters["ppo_accelerators"]["defaultValue"] == "4"
    assert parameters["ingest_memory"]["defaultValue"] == "2Gi"
    assert "ingest_accelerators" not in parameters
    assert {parameters[p]["parameterType"] for p in ("sft_cpu", "sft_accelerators")} == {"STRING"}
    assert "requests" in parameters["sft_cpu"]["description"]


def test_the_driver_finds_placement_among_the_inputs_of_the_dag_above(compiled):
    """It resolves these in the parent DAG's inputs, where a nested DAG has another name for them than the root."""
    spec = load_documents(compiled.ir)[0]
    dags = {"root": spec["root"], **{n: c for n, c in spec["components"].items() if "dag" in c}}
    for task, (_, pod) in executors(compiled).items():
        if not pod.node_selector.HasField("node_selector_json"):
            continue
        (above,) = [dag for dag in dags.values() if task in dag["dag"]["tasks"]]
        known = above["inputDefinitions"]["parameters"]
        assert pod.node_selector.node_selector_json.component_input_parameter in known
        assert pod.tolerations[0].toleration_json.component_input_parameter in known


def test_sizes_can_be_fixed_instead():
    fixed = compile_pipeline(spec=RESOURCES.model_copy(update={"parameters": False}))
    container, _ = executors(fixed)["ppo"]
    assert container.resources.resource_cpu_request == "8"
    assert container.resources.resource_memory_request == "64Gi"
    assert container.resources.accelerator.resource_count == "4"
    assert container.resources.accelerator.resource_type == "nvidia.com/gpu"
    assert "ppo_cpu" not in fixed.parameters
    _, pod = executors(fixed)["ppo"]
    assert dict(pod.node_selector.labels) == {"node.kubernetes.io/instance-type": "g6.xlarge"}
    assert [(t.key, t.operator, t.effect) for t in pod.tolerations] == [("nvidia.com/gpu", "Exists", "NoSchedule")]


def test_placement_volumes_secrets_and_metadata(compiled):
    container, pod = executors(compiled)["sft"]
    assert pod.node_selector.node_selector_json.component_input_parameter.endswith("--sft_node_selector")
    (toleration,) = pod.tolerations
    assert toleration.toleration_json.component_input_parameter.endswith("--sft_tolerations")
    assert pod.active_deadline_seconds == 7200
    volumes = {v.mount_path: (v.medium, v.size_limit) for v in pod.empty_dir_mounts}
    assert volumes == {"/dev/shm": ("Memory", "16Gi"), "/workspace": ("", "200Gi")}
    assert {e.name: e.value for e in container.env} == {
        "AWS_REGION": "eu-central-1",
        "TUNEGATE_SCRATCH": "/workspace",
        "SSL_CERT_FILE": "/etc/tunegate/ca/ca.crt",
        "REQUESTS_CA_BUNDLE": "/etc/tunegate/ca/ca.crt",
        "AWS_CA_BUNDLE": "/etc/tunegate/ca/ca.crt",
    }
    (secret,) = pod.secret_as_env
    assert secret.secret_name == "s3"
    assert {k.secret_key: k.env_var for k in secret.key_to_env}["secretkey"] == "AWS_SECRET_ACCESS_KEY"
    (config_map,) = pod.config_map_as_env
    assert (config_map.config_map_name, config_map.optional) == ("tunegate-config", True)
    assert [(k.config_map_key, k.env_var) for k in config_map.key_to_env] == [("MLFLOW_TRACKING_URI",) * 2]
    assert [(m.config_map_name, m.mount_path) for m in pod.config_map_as_volume] == [("own-ca", "/etc/tunegate/ca")]
    assert dict(pod.pod_metadata.labels) == {
        "app.kubernetes.io/part-of": "tunegate",
        "app.kubernetes.io/component": "sft",
        "kueue.x-k8s.io/queue-name": "gpu",
        "team": "assistants",
    }
    assert dict(pod.pod_metadata.annotations) == {"sidecar.istio.io/inject": "false"}
    assert (pod.security_context.run_as_user, pod.security_context.run_as_non_root) == (10001, True)
    assert [s.secret_name for s in pod.image_pull_secret] == ["registry"]
    assert pod.image_pull_policy == "IfNotPresent"
    assert container.image == RESOURCES.image


def test_each_stage_gets_its_own(compiled):
    found = executors(compiled)
    _, ppo = found["ppo"]
    assert [(v.volume_name, v.size, v.storage_class_name) for v in ppo.generic_ephemeral_volume] == [
        ("scratch", "200Gi", "fast")
    ]
    container, preflight = found["preflight"]
    assert not container.resources.accelerator.resource_type
    assert "kueue.x-k8s.io/queue-name" not in preflight.pod_metadata.labels
    assert dict(found["validate-data"][1].pod_metadata.labels)["app.kubernetes.io/component"] == "validate"
    assert all(c.image == RESOURCES.image for c, _ in found.values())
    policy = tasks(compiled)["sft"]["retryPolicy"]
    assert policy == {
        "maxRetryCount": 3,
        "backoffDuration": "30s",
        "backoffFactor": 2.0,
        "backoffMaxDuration": "31536000s",
    }
    assert "retryPolicy" not in tasks(compiled)["evaluate"]


def test_a_stage_on_several_nodes_asks_for_them_from_a_small_pod():
    content = {
        "image": "registry.example.com/tunegate:1",
        "defaults": {"cpu": "1", "memory": "4Gi"},
        "training": {"memory": "64Gi", "accelerator": "nvidia.com/gpu", "accelerators": 8, "retry": {"count": 4}},
        "stages": {"sft": {"nodes": 4}, "evaluate": {"retry": {"count": 2}}},
        "queue": "gpu",
    }
    spread = compile_pipeline(spec=ResourcesSpec.model_validate(content))
    container, pod = executors(spread)["sft"]
    assert not container.resources.accelerator.resource_type, "it would hold a GPU and wait"
    assert container.resources.resource_memory_limit.endswith("--sft_memory']}}")
    assert "sft_accelerators" not in spread.parameters and "ppo_accelerators" in spread.parameters
    assert load_documents(spread.ir)[0]["root"]["inputDefinitions"]["parameters"]["sft_memory"]["defaultValue"] == "4Gi"
    assert "kueue.x-k8s.io/queue-name" not in pod.pod_metadata.labels, "the TrainJob waits in the queue"
    assert "kueue.x-k8s.io/queue-name" in executors(spread)["ppo"][1].pod_metadata.labels
    assert tasks(spread)["sft"]["retryPolicy"]["maxRetryCount"] == 4
    told = {
        name: [e.value for e in container.env if e.name == "TUNEGATE_TRAINJOB"]
        for name, (container, _) in executors(spread).items()
    }
    assert {name for name, values in told.items() if values} == {"preflight", "sft", "finish"}
    assert ResourcesSpec.model_validate_json(told["sft"][0]).of("sft") == ResourcesSpec.model_validate(content).of(
        "sft"
    )
    assert ResourcesSpec.model_validate_json(told["sft"][0]).of("evaluate").retry.count == 2
    assert ResourcesSpec.model_validate_json(told["sft"][0]).image == "registry.example.com/tunegate:1"


def test_the_image_of_trainjobs_is_the_pipeline_s_own_where_none_is_named():
    from tunegate.components.image import IMAGE

    spread = compile_pipeline(spec=ResourcesSpec.model_validate({"stages": {"ppo": {"nodes": 2}}}))
    container, _ = executors(spread)["ppo"]
    (told,) = [e.value for e in container.env if e.name == "TUNEGATE_TRAINJOB"]
    assert ResourcesSpec.model_validate_json(told).image == IMAGE


def test_the_dag_is_the_pipeline_s_own(compiled, plain):
    assert tasks(compiled).keys() == tasks(plain).keys()
    one, other = load_documents(compiled.ir)[0], load_documents(plain.ir)[0]
    assert one["pipelineInfo"] == other["pipelineInfo"]
    added = compiled.parameters.keys() - plain.parameters.keys()
    assert {name.partition("_")[2] for name in added} == PARAMETERS


def test_version_follows_the_content(compiled, plain):
    assert plain.version == compile_pipeline().version
    assert plain.version.startswith("instruction-tuning-0.") and plain.version.endswith(plain.digest[:12])
    assert compiled.version != plain.version
    rooted = compile_pipeline(defaults={"storage_root": "s3://b/p", "registry_promote": "true", "ppo_steps": "7"})
    assert rooted.version != plain.version
    defaults = load_documents(rooted.ir)[0]["root"]["inputDefinitions"]["parameters"]
    assert defaults["storage_root"]["defaultValue"] == "s3://b/p"
    assert defaults["registry_promote"]["defaultValue"] is True
    assert defaults["ppo_steps"]["defaultValue"] == 7


def test_kubernetes_resources_hold_the_same_pipeline(compiled):
    pipeline, version = yaml.safe_load_all(kubernetes_manifests(compiled, namespace="alice"))
    assert {pipeline["apiVersion"], version["apiVersion"]} == {"pipelines.kubeflow.org/v2beta1"}
    assert (pipeline["kind"], version["kind"]) == ("Pipeline", "PipelineVersion")
    assert version["spec"]["pipelineName"] == pipeline["metadata"]["name"] == "instruction-tuning"
    assert version["metadata"] == {"name": compiled.version, "namespace": "alice"}
    check_ir([version["spec"]["pipelineSpec"], version["spec"]["platformSpec"]])
    assert [version["spec"]["pipelineSpec"], version["spec"]["platformSpec"]] == load_documents(compiled.ir)


def test_kubernetes_resources_have_the_fields_that_kfp_writes(plain, tmp_path):
    from kfp import compiler
    from kfp.compiler.compiler_utils import KubernetesManifestOptions
    from tunegate.pipelines.instruction_tuning.pipeline import instruction_tuning

    options = KubernetesManifestOptions(namespace="alice", include_pipeline_manifest=True)
    path = tmp_path / "kfp.yaml"
    compiler.Compiler().compile(
        instruction_tuning, str(path), kubernetes_manifest_options=options, kubernetes_manifest_format=True
    )
    theirs = {d["kind"]: d for d in yaml.safe_load_all(path.read_text())}
    ours = {d["kind"]: d for d in yaml.safe_load_all(kubernetes_manifests(plain, namespace="alice"))}
    assert theirs.keys() == ours.keys()
    for kind, manifest in theirs.items():
        assert manifest["apiVersion"] == ours[kind]["apiVersion"]
        assert manifest["spec"].keys() <= ours[kind]["spec"].keys()


def test_every_pipeline_compiles():
    for name in pipeline_names():
        check_ir(load_documents(compile_pipeline(name).ir))


def test_unknown_pipeline_and_fields_are_refused(plain):
    with pytest.raises(SpecError, match=r"one of .*instruction-tuning"):
        compile_pipeline("nothing")
    broken = load_documents(plain.ir)
    broken[0]["root"]["dag"]["tasks"]["finish"]["colour"] = "red"
    with pytest.raises(SpecError, match="colour"):
        check_ir(broken)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("STRING", "1e3", "1e3"),
        ("NUMBER_INTEGER", "40", 40),
        ("NUMBER_DOUBLE", "1e-5", 1e-5),
        ("BOOLEAN", "true", True),
        ("STRUCT", "{ppo: {steps: 3}}", {"ppo": {"steps": 3}}),
        ("LIST", "[1, a]", [1, "a"]),
    ],
)
def test_parameters_are_read_as_their_type(kind, text, value):
    assert coerce_parameters({"x": kind}, {"x": text}) == {"x": value}


@pytest.mark.parametrize(
    ("kind", "text"),
    [("NUMBER_INTEGER", "4.5"), ("NUMBER_INTEGER", "many"), ("BOOLEAN", "perhaps"), ("STRUCT", "[1]"), ("LIST", "a")],
)
def test_wrong_values_are_refused(kind, text):
    with pytest.raises(SpecError, match="the parameter wants"):
        coerce_parameters({"x": kind}, {"x": text})


def test_unknown_long_and_doubled_parameters_are_refused():
    with pytest.raises(SpecError, match="did you mean ppo_steps"):
        coerce_parameters({"ppo_steps": "NUMBER_INTEGER"}, {"ppo_update": "1"})
    with pytest.raises(SpecError, match="10000 bytes"):
        coerce_parameters({"overrides": "STRUCT"}, {"overrides": {"text": "x" * 10_000}})
    with pytest.raises(SpecError, match="given twice"):
        parse_parameters(["a=1", "a=2"])
    with pytest.raises(SpecError, match="key=value"):
        parse_parameters(["a"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"defaults": {"memory": "8 GB"}}, "pattern"),
        ({"defaults": {"cpu": "4", "cpu_limit": "500m"}}, "cpu_limit"),
        ({"defaults": {"memory": "8Gi"}, "training": {"shared_memory": "9G"}}, "counts against `memory`"),
        ({"stages": {"sft": {"ephemeral_storage_class": "fast"}}}, "needs `ephemeral_storage`"),
        ({"stages": {"reward_model": {}}}, "reward"),
        ({"defaults": {"tolerations": [{"key": "a", "value": "b"}]}}, "takes no value"),
        ({"defaults": {"tolerations": [{"operator": "Equal", "value": "b"}]}}, "needs the key"),
        ({"defaults": {"node_selector": {"not a key": "b"}}}, "no label key"),
        ({"environment": {"AWS_SECRET_ACCESS_KEY": "x"}}, "put it into a Secret"),
        ({"secrets": [{"name": "s3", "keys": {"a": "NOT VALID"}}]}, "no name of an environment variable"),
        ({"labels": {"team": "two words"}}, "pattern"),
        ({"defaults": {"retry": {"count": 12}}}, "would be 1.4 days"),
        ({"defaults": {"retry": {"factor": 1.5}}}, "integer"),
        ({"defaults": {"gpu": 1}}, "Extra inputs"),
        ({"defaults": {"nodes": 2}}, "goes under `training`"),
        ({"stages": {"evaluate": {"nodes": 2}}}, "evaluate runs on one node"),
        ({"training": {"nodes": 2, "ephemeral_storage": "1Gi", "ephemeral_storage_class": "a"}}, "is for one node"),
    ],
)
def test_impossible_resources_are_refused(content, words):
    with pytest.raises(ValidationError) as caught:
        ResourcesSpec.model_validate(content)
    assert words in str(caught.value)


def test_nothing_asked_for_leaves_pods_to_the_cluster(plain):
    for container, pod in executors(plain).values():
        assert not container.HasField("resources") and not container.env
        assert pod.pod_metadata.labels["app.kubernetes.io/part-of"] == "tunegate"
        assert not pod.tolerations and not pod.empty_dir_mounts
