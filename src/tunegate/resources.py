"""What the pods of a pipeline get from the cluster: the `resources` section of the run spec.

Nothing here changes what a stage computes; runs on one machine ignore it. It is put into the pipeline when it is
compiled for a cluster (`tunegate cluster compile --spec SPEC.yaml`).
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args

from pydantic import Field, StringConstraints, model_validator

from tunegate.section import Section

StageName = Literal[
    "preflight",
    "ingest",
    "fetch",
    "validate",
    "sft",
    "guard",
    "reward",
    "ppo",
    "evaluate",
    "decide",
    "register",
    "promote",
    "finish",
]
#: The stages that load a model and compute with it; `resources.training` applies to them.
TRAINING_STAGES: tuple[StageName, ...] = ("sft", "guard", "reward", "ppo", "evaluate")
#: The stages that can train on more than one node.
DISTRIBUTED_STAGES: tuple[StageName, ...] = ("sft", "reward", "ppo")
#: API group and version of Kubeflow Trainer's TrainJobs and TrainingRuntimes.
TRAINER_GROUP = "trainer.kubeflow.org"
TRAINER_VERSION = "v1alpha1"

CpuQuantity = Annotated[str, StringConstraints(pattern=r"^([0-9]*[.])?[0-9]+m?$")]
ByteQuantity = Annotated[str, StringConstraints(pattern=r"^[0-9]+(E|Ei|P|Pi|T|Ti|G|Gi|M|Mi|K|Ki)?$")]
# DNS-1123 subdomain, the form of the name of a Secret, ConfigMap or ServiceAccount.
ObjectName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]
LabelValue = Annotated[str, StringConstraints(pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$")]
_LABEL_KEY = re.compile(r"^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$")
_ENVIRONMENT_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
_LONGEST_WAIT_SECONDS = 86400


def _check_label_keys(field: str, labels: dict[str, str]) -> None:
    for key in labels:
        if not _LABEL_KEY.match(key):
            raise ValueError(f"{key!r} in `{field}` is no label key; use e.g. `team` or `example.com/team`")


def _cores(quantity: str) -> float:
    return float(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)


_UNITS: dict[str, int] = {"": 1, **{unit: 1000**i for i, unit in enumerate("KMGTPE", 1)}}
_UNITS |= {f"{unit}i": 1024**i for i, unit in enumerate("KMGTPE", 1)}


def _bytes(quantity: str) -> int:
    digits = quantity.rstrip("EPTGMKi")
    return int(digits) * _UNITS[quantity[len(digits) :]]


class TolerationSpec(Section):
    """A taint that the pods of a stage put up with."""

    key: str | None = None
    """Key of the taint; null with `operator: Exists` tolerates every taint."""

    operator: Literal["Equal", "Exists"] = "Exists"
    """Whether the value must be equal, or the key only has to exist."""

    value: str | None = None
    """Value of the taint, for `operator: Equal`."""

    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint; null means every effect."""

    seconds: int | None = Field(default=None, ge=0)
    """How long a pod stays on a node that gets the taint, in seconds; only with `effect: NoExecute`."""

    @model_validator(mode="after")
    def _consistent(self) -> TolerationSpec:
        if self.operator == "Exists" and self.value is not None:
            raise ValueError("`operator: Exists` takes no value; leave the value out, or use `operator: Equal`")
        if self.operator == "Equal" and self.key is None:
            raise ValueError("`operator: Equal` needs the key of the taint")
        if self.seconds is not None and self.effect != "NoExecute":
            raise ValueError("`seconds` only means something with `effect: NoExecute`")
        return self

    def as_object(self) -> dict[str, str | int]:
        """The toleration as a PodSpec has it."""
        values = {
            "key": self.key,
            "operator": self.operator,
            "value": self.value,
            "effect": self.effect,
            "tolerationSeconds": self.seconds,
        }
        return {name: value for name, value in values.items() if value is not None}


class RetrySpec(Section):
    """How often a stage whose pod failed is tried again. Stages resume: what is finished is not done twice."""

    count: int = Field(default=2, ge=0, le=20)
    """Number of retries; two carry a stage over a lost spot node and a short outage, without hiding a real fault."""

    backoff_seconds: int = Field(default=60, ge=1, le=3600)
    """Seconds before the first retry."""

    factor: int = Field(default=2, ge=1, le=10)
    """Each further wait is this many times longer."""

    @model_validator(mode="after")
    def _soon(self) -> RetrySpec:
        last = self.backoff_seconds * self.factor ** max(self.count - 1, 0)
        if last > _LONGEST_WAIT_SECONDS:
            raise ValueError(
                f"the wait before the last of {self.count} retries would be {last / 86400:.1f} days, over one"
            )
        return self


class StageResources(Section):
    """What the pod of one stage gets. What is left out comes from `training` and then from `defaults`."""

    cpu: CpuQuantity | None = None
    """Cores requested, e.g. `"8"` or `"500m"`; null leaves it to the cluster."""

    cpu_limit: CpuQuantity | None = None
    """Cores at most. Null sets no limit, so that idle cores of the node can be used."""

    memory: ByteQuantity | None = None
    """Memory requested and at most, e.g. `"32Gi"`; both are the same so that a pod is never evicted for its memory."""

    accelerator: str | None = Field(default=None, pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$")
    """Resource name of the accelerator, e.g. `nvidia.com/gpu` or `amd.com/gpu`."""

    accelerators: int = Field(default=1, ge=0, le=16)
    """Number of accelerators a pod, when `accelerator` is set; 0 asks for none."""

    shared_memory: ByteQuantity | None = None
    """Size of `/dev/shm`, counted against `memory`. Containers have 64 MB, too little for NCCL and data loaders."""

    ephemeral_storage: ByteQuantity | None = None
    """Size of the scratch volume at `/workspace`, where checkpoints lie until they are on S3."""

    ephemeral_storage_class: ObjectName | None = None
    """Storage class of the scratch volume; null takes the node's own disk."""

    node_selector: dict[str, LabelValue] = Field(default_factory=dict)
    """Labels that a node must have, e.g. `{"node.kubernetes.io/instance-type": "p5.48xlarge"}`."""

    tolerations: list[TolerationSpec] = Field(default_factory=list)
    """Taints that the pod tolerates, e.g. `[{"key": "nvidia.com/gpu"}]`."""

    retry: RetrySpec = RetrySpec()
    """Retries after a pod failed."""

    timeout_seconds: int | None = Field(default=None, ge=1)
    """The pod is ended after this many seconds; null waits for ever."""

    nodes: int = Field(default=1, ge=1, le=256)
    """Nodes that the stage trains on (SFT, reward model and PPO). With more than one its pod asks Kubeflow Trainer for
    them, and what is said here about sizes and placement is what each node gets."""

    processes_per_node: int | None = Field(default=None, ge=1, le=64)
    """Training processes on each node, with `nodes` above 1; null starts one an accelerator."""

    @model_validator(mode="after")
    def _consistent(self) -> StageResources:
        _check_label_keys("node_selector", self.node_selector)
        return self


class SecretSpec(Section):
    """Keys of a Secret as environment variables. The values never reach the spec, the pipeline or a log."""

    name: ObjectName
    """Name of the Secret in the namespace of the run."""

    keys: dict[str, str] = Field(min_length=1)
    """Environment variable for each key, e.g. `{"accesskey": "AWS_ACCESS_KEY_ID"}`."""

    optional: bool = False
    """Start the pod even when the Secret does not exist."""

    @model_validator(mode="after")
    def _valid_names(self) -> SecretSpec:
        for variable in self.keys.values():
            if not _ENVIRONMENT_NAME.match(variable):
                raise ValueError(f"{variable!r} is no name of an environment variable; use letters, digits and _")
        return self


class ConfigMapSpec(Section):
    """Keys of a ConfigMap as environment variables of the same names."""

    name: ObjectName
    """Name of the ConfigMap in the namespace of the run, e.g. `tunegate-config` of the Helm chart."""

    keys: list[str] = Field(min_length=1)
    """Keys that become environment variables, e.g. `["AWS_REGION", "MLFLOW_TRACKING_URI"]`."""

    optional: bool = False
    """Start the pod even when the ConfigMap or one of the keys does not exist."""

    @model_validator(mode="after")
    def _valid_names(self) -> ConfigMapSpec:
        for variable in self.keys:
            if not _ENVIRONMENT_NAME.match(variable):
                raise ValueError(f"{variable!r} is no name of an environment variable; use letters, digits and _")
        return self


class CertificateSpec(Section):
    """A ConfigMap with the certificate authority that signed S3, MLflow or the proxy."""

    config_map: ObjectName
    """Name of the ConfigMap in the namespace of the run."""

    key: str = Field(default="ca.crt", min_length=1)
    """Key of the PEM bundle in it. The bundle replaces the public authorities, so it must hold all that are needed."""

    mount_path: str = Field(default="/etc/tunegate/ca", pattern=r"^/[^:]+$")
    """Folder that the ConfigMap is mounted at."""

    @property
    def file(self) -> str:
        """The bundle's path in the container."""
        return f"{self.mount_path.rstrip('/')}/{self.key}"


class TrainerSpec(Section):
    """Kubeflow Trainer, which stages with more than one node train on; their TrainJobs start from its runtime."""

    runtime: ObjectName = "tunegate-torch"
    """Name of the runtime; the Helm chart (`trainer.enabled`) and `manifests/addons/trainer` make it."""

    kind: Literal["TrainingRuntime", "ClusterTrainingRuntime"] = "TrainingRuntime"
    """Whether the runtime is one of the namespace or of the whole cluster."""

    processes_per_node: int = Field(default=1, ge=1, le=64)
    """Training processes on each node of a stage that says neither `processes_per_node` nor `accelerator`."""


class ResourcesSpec(Section):
    """CPU, memory, accelerators, placement, retries, secrets and image of the pods; ignored by runs on one machine."""

    image: str | None = Field(default=None, min_length=1, pattern=r"^\S+$")
    """Image of every stage, best pinned: `registry/name@sha256:…`. Null takes the one that the pipeline was built
    with."""

    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    """When nodes pull the image; null leaves it to Kubernetes (`Always` for the tag `latest`, else `IfNotPresent`)."""

    image_pull_secrets: list[ObjectName] = Field(default_factory=list)
    """Secrets with credentials of the registry."""

    defaults: StageResources = StageResources()
    """What every stage gets."""

    training: StageResources = StageResources()
    """What SFT, reward model, PPO and evaluation get, on top of `defaults`."""

    stages: dict[StageName, StageResources] = Field(default_factory=dict)
    """What single stages get, on top of `defaults` and `training`, by the stage's name."""

    secrets: list[SecretSpec] = Field(default_factory=list)
    """Secrets as environment variables of every stage."""

    config_maps: list[ConfigMapSpec] = Field(default_factory=list)
    """ConfigMaps as environment variables of every stage."""

    environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables of every stage, e.g. `AWS_ENDPOINT_URL_S3`; readable in the pipeline, so no secrets."""

    certificates: CertificateSpec | None = None
    """A certificate authority of one's own for S3, MLflow and the proxy."""

    labels: dict[str, LabelValue] = Field(default_factory=dict)
    """Labels of every pod."""

    annotations: dict[str, str] = Field(default_factory=dict)
    """Annotations of every pod."""

    queue: LabelValue | None = None
    """Kueue's LocalQueue that the pods of `training` stages wait in (label `kueue.x-k8s.io/queue-name`)."""

    trainer: TrainerSpec = TrainerSpec()
    """Kubeflow Trainer, for stages with `nodes` above 1."""

    run_as_user: int | None = Field(default=None, ge=1)
    """Numeric user of the pods; null takes the image's own, which is not root."""

    parameters: bool = True
    """Make what Kubeflow can take when a run starts parameters of the pipeline, for each stage that sets it:
    `sft_cpu`, `sft_memory`, `sft_accelerator`, `sft_accelerators`, `sft_node_selector`, `sft_tolerations`, …, so that
    they can be changed in the Kubeflow UI."""

    @model_validator(mode="after")
    def _consistent(self) -> ResourcesSpec:
        _check_label_keys("labels", self.labels)
        if self.defaults.nodes > 1:
            raise ValueError("`nodes` goes under `training` or a single stage: only trainers run on several nodes")
        for stage in get_args(StageName):
            if stage not in DISTRIBUTED_STAGES and stage in self.stages and self.stages[stage].nodes > 1:
                raise ValueError(f"{stage} runs on one node; `nodes` is for {', '.join(DISTRIBUTED_STAGES)}")
            if conflict := _conflict(self.of(stage)):
                raise ValueError(f"{stage}: {conflict}")
        for name, value in self.environment.items():
            if not _ENVIRONMENT_NAME.match(name):
                raise ValueError(f"{name!r} is no name of an environment variable; use letters, digits and _")
            if re.search(r"(^|_)(SECRET|PASSWORD|TOKEN)(_|$)", name, re.IGNORECASE) and value:
                raise ValueError(
                    f"the value of {name} would be readable in the pipeline; put it into a Secret and name that under "
                    "`secrets`"
                )
        return self

    def of(self, stage: StageName) -> StageResources:
        """What a stage gets: `defaults`, then `training` where it applies, then the stage's own, later ones winning."""
        layers = [self.defaults]
        if stage in TRAINING_STAGES:
            layers.append(self.training)
        if stage in self.stages:
            layers.append(self.stages[stage])
        merged: dict[str, object] = {}
        for layer in layers:
            merged.update({name: getattr(layer, name) for name in layer.model_fields_set})
        if stage not in DISTRIBUTED_STAGES:
            merged["nodes"] = 1
        return StageResources(**merged)  # type: ignore[arg-type]  # checked by pydantic

    @property
    def distributed(self) -> list[StageName]:
        """The stages that train on more than one node."""
        return [stage for stage in DISTRIBUTED_STAGES if self.of(stage).nodes > 1]

    def pod_of(self, stage: StageName) -> StageResources:
        """What the pod of a stage's task gets.

        The same as the stage, but for one on several nodes: its pod computes nothing itself, so it takes no
        accelerator from them and gets what `defaults` say, with the stage's retries.
        """
        whole = self.of(stage)
        if whole.nodes == 1:
            return whole
        own = {"retry": whole.retry} if "retry" in whole.model_fields_set else {}
        return self.defaults.model_copy(update=own)


def _conflict(stage: StageResources) -> str | None:
    """What does not go together in the merged settings of a stage."""
    if stage.cpu and stage.cpu_limit and _cores(stage.cpu_limit) < _cores(stage.cpu):
        return "`cpu_limit` must be at least `cpu`"
    if stage.shared_memory and stage.memory and _bytes(stage.shared_memory) > _bytes(stage.memory):
        return "`shared_memory` counts against `memory`, so it must not be larger"
    if stage.ephemeral_storage_class and not stage.ephemeral_storage:
        return "`ephemeral_storage_class` needs `ephemeral_storage`, the size of the volume"
    if stage.nodes > 1 and stage.ephemeral_storage_class:
        return "`ephemeral_storage_class` is for one node; the runtime says which scratch volume several nodes get"
    return None
