"""The TrainJob of a stage, as an object of the Kubernetes API.

Kubeflow Trainer joins it with a TrainingRuntime (`helm/tunegate/templates/trainer.yaml`, `manifests/addons/trainer`):
the runtime says what every node looks like, the TrainJob brings the command, the number of nodes and their sizes.
Trainer puts torchrun's rendezvous into the nodes' environment as `PET_*` variables, which torchrun reads as defaults of
its options (kubeflow/trainer, `pkg/runtime/framework/plugins/torch/torch.go`).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

from tunegate.resources import TRAINER_GROUP, TRAINER_VERSION, ResourcesSpec, StageName, StageResources

PART_OF_LABEL = "app.kubernetes.io/part-of"
STAGE_LABEL = "app.kubernetes.io/component"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
RUN_LABEL = "tunegate.io/run"
TASK_ANNOTATION = "tunegate.io/task"
"""Where the description of the work lies; a TrainJob with another one is not the same work."""

VARIABLE = "TUNEGATE_TRAINJOB"
"""Environment variable of a stage's pod with the `resources` section that its TrainJob is built from, as JSON."""

SCRATCH_PATH = "/workspace"
NODE = "node"
"""Name of the runtime's replicated job and of its container, where Trainer looks for them."""

ENTRY_POINT = "tunegate.stages.distributed"
# Python's ssl module, requests (MLflow) and boto3 each look at a variable of their own.
CERTIFICATE_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE")
_MANAGER = "tunegate.io/stage"
# Less than the runtime's terminationGracePeriodSeconds: torchrun gives its ranks this long to write a checkpoint.
_SHUTDOWN_SECONDS = 270
_LABEL_VALUE = re.compile(r"^[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$")


@dataclass(frozen=True)
class Owner:
    """The pod that a TrainJob is made by; with it, the TrainJob goes."""

    name: str
    uid: str


def job_name(stage: StageName, identity: str) -> str:
    """Name of the TrainJob for one piece of work: the same work always has the same name.

    Short, since JobSet appends `-node-0-<index>-<five characters>` for the pods, whose names are host names.

    Args:
        stage: The stage.
        identity: Whatever tells this work from all other.
    """
    return f"tunegate-{stage}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


def run_label(run_id: str) -> str:
    """The value of the label that finds a run's TrainJobs: its id, or a digest where that is too long for a label."""
    return run_id if _LABEL_VALUE.match(run_id) else hashlib.sha256(run_id.encode()).hexdigest()[:40]


def processes_per_node(resources: ResourcesSpec, sizes: StageResources) -> int:
    """How many training processes each node starts."""
    if sizes.processes_per_node:
        return sizes.processes_per_node
    return (sizes.accelerators or 1) if sizes.accelerator else resources.trainer.processes_per_node


def train_job(
    *,
    name: str,
    namespace: str,
    stage: StageName,
    run_id: str,
    resources: ResourcesSpec,
    task_uri: str,
    owner: Owner | None = None,
) -> dict[str, Any]:
    """The TrainJob that does a stage's work on several nodes.

    Args:
        name: Its name, see `job_name`.
        namespace: The namespace of the run.
        stage: The stage.
        run_id: Id of the run.
        resources: The `resources` section; `image` is set.
        task_uri: Where the description of the work lies on S3.
        owner: The stage's pod, if it is known.
    """
    sizes = resources.of(stage)
    labels = {PART_OF_LABEL: "tunegate", STAGE_LABEL: stage, RUN_LABEL: run_label(run_id), **resources.labels}
    metadata: dict[str, Any] = {
        "name": name,
        "namespace": namespace,
        "labels": {**labels, **({QUEUE_LABEL: resources.queue} if resources.queue else {})},
        "annotations": {TASK_ANNOTATION: task_uri, **resources.annotations},
    }
    if owner is not None:
        metadata["ownerReferences"] = [{"apiVersion": "v1", "kind": "Pod", "name": owner.name, "uid": owner.uid}]
    trainer: dict[str, Any] = {
        "numNodes": sizes.nodes,
        "numProcPerNode": processes_per_node(resources, sizes),
        "command": ["torchrun"],
        "args": ["--module", ENTRY_POINT, task_uri],
        "env": _environment(resources),
    }
    if resources.image:
        trainer["image"] = resources.image
    if amounts := _amounts(sizes):
        trainer["resourcesPerNode"] = amounts
    spec: dict[str, Any] = {
        "runtimeRef": {
            "apiGroup": TRAINER_GROUP,
            "kind": resources.trainer.kind,
            "name": resources.trainer.runtime,
        },
        "trainer": trainer,
        "runtimePatches": [_patch(resources, sizes, labels)],
    }
    if sizes.timeout_seconds:
        spec["activeDeadlineSeconds"] = sizes.timeout_seconds
    return {
        "apiVersion": f"{TRAINER_GROUP}/{TRAINER_VERSION}",
        "kind": "TrainJob",
        "metadata": metadata,
        "spec": spec,
    }


def _amounts(sizes: StageResources) -> dict[str, dict[str, str]]:
    """What each node requests and may use at most, as for the pod of a stage on one node."""
    accelerators = {sizes.accelerator: str(sizes.accelerators)} if sizes.accelerator and sizes.accelerators else {}
    requests = {"cpu": sizes.cpu, "memory": sizes.memory, **accelerators}
    limits = {"cpu": sizes.cpu_limit, "memory": sizes.memory, **accelerators}
    chosen = {
        "requests": {name: amount for name, amount in requests.items() if amount},
        "limits": {name: amount for name, amount in limits.items() if amount},
    }
    return {kind: amounts for kind, amounts in chosen.items() if amounts}


def _environment(resources: ResourcesSpec) -> list[dict[str, Any]]:
    """The environment of a stage's pod, by name, later ones winning as they do there."""
    variables: dict[str, dict[str, Any]] = {
        "TUNEGATE_SCRATCH": {"value": SCRATCH_PATH},
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": {"value": str(_SHUTDOWN_SECONDS)},
    }
    variables.update({name: {"value": value} for name, value in resources.environment.items()})
    for config_map in resources.config_maps:
        for key in config_map.keys:
            reference = {"name": config_map.name, "key": key, "optional": config_map.optional}
            variables[key] = {"valueFrom": {"configMapKeyRef": reference}}
    for secret in resources.secrets:
        for key, name in secret.keys.items():
            reference = {"name": secret.name, "key": key, "optional": secret.optional}
            variables[name] = {"valueFrom": {"secretKeyRef": reference}}
    if resources.certificates:
        variables.update({name: {"value": resources.certificates.file} for name in CERTIFICATE_VARIABLES})
    return [{"name": name, **variable} for name, variable in variables.items()]


def _patch(resources: ResourcesSpec, sizes: StageResources, labels: dict[str, str]) -> dict[str, Any]:
    """What the pods of this stage have that the runtime does not know: labels, placement, volumes."""
    pod: dict[str, Any] = {}
    if sizes.node_selector:
        pod["nodeSelector"] = dict(sizes.node_selector)
    if sizes.tolerations:
        pod["tolerations"] = [toleration.as_object() for toleration in sizes.tolerations]
    if resources.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in resources.image_pull_secrets]
    if resources.run_as_user is not None:
        pod["securityContext"] = {"runAsNonRoot": True, "runAsUser": resources.run_as_user}
    volumes: list[dict[str, Any]] = []
    if sizes.shared_memory:
        volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": sizes.shared_memory}})
    if sizes.ephemeral_storage:
        volumes.append({"name": "workspace", "emptyDir": {"sizeLimit": sizes.ephemeral_storage}})
    if resources.certificates:
        volumes.append({"name": "stage-ca", "configMap": {"name": resources.certificates.config_map}})
        mount = {"name": "stage-ca", "mountPath": resources.certificates.mount_path, "readOnly": True}
        pod["containers"] = [{"name": NODE, "volumeMounts": [mount]}]
    if volumes:
        pod["volumes"] = volumes
    template: dict[str, Any] = {"metadata": {"labels": labels, "annotations": dict(resources.annotations)}}
    if pod:
        template["spec"] = pod
    job = {"name": NODE, "template": {"spec": {"template": template}}}
    return {"manager": _MANAGER, "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [job]}}}}
