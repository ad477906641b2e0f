"""Puts the `resources` section into the tasks of a pipeline while it is compiled, through kfp-kubernetes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast, get_args

from tunegate.resources import TRAINING_STAGES, ResourcesSpec, StageName, StageResources
from tunegate.trainjob.objects import (
    CERTIFICATE_VARIABLES,
    PART_OF_LABEL,
    QUEUE_LABEL,
    SCRATCH_PATH,
    STAGE_LABEL,
    VARIABLE,
)

#: Tasks whose name in the pipeline is not that of their stage.
_STAGES = {"validate-data": "validate", "reward-model": "reward", "fetch-model": "fetch"}

# Not the longest wait, as KFP's name for it says: Argo counts it from the start of the first try, makes no further try
# after it, and kills the one that runs. With KFP's default of an hour no longer training would be tried again.
_RETRY_WINDOW = "365d"


def stage_of(task_name: str) -> StageName | None:
    """The stage that a task of a pipeline runs, None for a task of another kind."""
    name = _STAGES.get(task_name, task_name)
    return cast("StageName", name) if name in get_args(StageName) else None


def resource_parameters(spec: ResourcesSpec) -> dict[str, Any]:
    """Pipeline parameters for what `spec` sets and Kubeflow can take when a run starts, with their defaults.

    Sizes and counts are strings (`{"sft_memory": "32Gi"}`): the backend reads them into the pod as Kubernetes
    quantities. Node selectors are mappings, tolerations lists, both as a PodSpec has them. What is not here (volumes,
    retries, timeouts, secrets, labels) Kubeflow only takes compiled into the pipeline.
    """
    parameters: dict[str, Any] = {}
    if not spec.parameters:
        return parameters
    for stage in get_args(StageName):
        sizes = spec.pod_of(stage)
        values: dict[str, Any] = {
            "cpu": sizes.cpu,
            "memory": sizes.memory,
            "accelerator": sizes.accelerator,
            "accelerators": str(sizes.accelerators) if sizes.accelerator else None,
            "node_selector": sizes.node_selector,
            "tolerations": [toleration.as_object() for toleration in sizes.tolerations],
        }
        parameters.update({f"{stage}_{kind}": value for kind, value in values.items() if value})
    return parameters


def apply_resources(tasks: Mapping[str, Any], spec: ResourcesSpec, parameters: Mapping[str, Any] | None = None) -> None:
    """Give each task of a pipeline under construction what its stage gets.

    Args:
        tasks: The pipeline's `kfp.dsl.PipelineTask`s by name.
        spec: The `resources` section.
        parameters: Pipeline channels that take the place of fixed values, by the names of `resource_parameters`.
    """
    given = parameters or {}
    for name, task in tasks.items():
        stage = stage_of(name)
        sizes = spec.pod_of(stage) if stage else spec.defaults
        prefix = f"{stage}_"
        channels = {key.removeprefix(prefix): value for key, value in given.items() if key.startswith(prefix)}
        _size(task, sizes, channels)
        _place(task, sizes, channels)
        _volumes(task, sizes)
        _environment(task, spec)
        distributed = stage in spec.distributed
        # A TrainJob waits in the queue itself; its stage's pod has nothing to wait for.
        _metadata(task, spec, stage or name, queued=stage in TRAINING_STAGES and not distributed)
        if spec.image:
            task.set_container_image(spec.image)
        if distributed or (spec.distributed and stage in {"preflight", "finish"}):
            task.set_env_variable(VARIABLE, _for_trainjobs(spec, task))


def _for_trainjobs(spec: ResourcesSpec, task: Any) -> str:
    """What a stage on several nodes builds its TrainJob from, as JSON."""
    return spec.model_copy(update={"image": task.container_spec.image}).model_dump_json(exclude_unset=True)


def _size(task: Any, sizes: StageResources, channels: Mapping[str, Any]) -> None:
    if sizes.cpu:
        task.set_cpu_request(channels.get("cpu", sizes.cpu))
    if sizes.cpu_limit:
        task.set_cpu_limit(sizes.cpu_limit)
    if sizes.memory:
        task.set_memory_request(channels.get("memory", sizes.memory))
        task.set_memory_limit(channels.get("memory", sizes.memory))
    if sizes.accelerator and (sizes.accelerators or "accelerators" in channels):
        task.set_accelerator_type(channels.get("accelerator", sizes.accelerator))
        task.set_accelerator_limit(channels.get("accelerators", sizes.accelerators))
    if sizes.retry.count:
        task.set_retry(
            num_retries=sizes.retry.count,
            backoff_duration=f"{sizes.retry.backoff_seconds}s",
            backoff_factor=sizes.retry.factor,
            backoff_max_duration=_RETRY_WINDOW,
        )


def _place(task: Any, sizes: StageResources, channels: Mapping[str, Any]) -> None:
    from kfp import kubernetes

    if "node_selector" in channels:
        kubernetes.add_node_selector_json(task, channels["node_selector"])
    else:
        for key, value in sizes.node_selector.items():
            kubernetes.add_node_selector(task, key, value)
    if "tolerations" in channels:
        kubernetes.add_toleration_json(task, channels["tolerations"])
    for toleration in sizes.tolerations if "tolerations" not in channels else ():
        kubernetes.add_toleration(
            task,
            key=toleration.key,
            operator=toleration.operator,
            value=toleration.value,
            effect=toleration.effect,
            toleration_seconds=toleration.seconds,
        )
    if sizes.timeout_seconds:
        kubernetes.set_timeout(task, sizes.timeout_seconds)


def _volumes(task: Any, sizes: StageResources) -> None:
    from kfp import kubernetes

    if sizes.shared_memory:
        kubernetes.empty_dir_mount(task, "shared-memory", "/dev/shm", medium="Memory", size_limit=sizes.shared_memory)
    if not sizes.ephemeral_storage:
        return
    if sizes.ephemeral_storage_class:
        kubernetes.add_ephemeral_volume(
            task,
            "scratch",
            SCRATCH_PATH,
            access_modes=["ReadWriteOnce"],
            size=sizes.ephemeral_storage,
            storage_class_name=sizes.ephemeral_storage_class,
        )
    else:
        kubernetes.empty_dir_mount(task, "scratch", SCRATCH_PATH, size_limit=sizes.ephemeral_storage)
    task.set_env_variable("TUNEGATE_SCRATCH", SCRATCH_PATH)


def _environment(task: Any, spec: ResourcesSpec) -> None:
    from kfp import kubernetes

    for name, value in spec.environment.items():
        task.set_env_variable(name, value)
    for config_map in spec.config_maps:
        keys = {key: key for key in config_map.keys}
        kubernetes.use_config_map_as_env(task, config_map.name, keys, optional=config_map.optional)
    for secret in spec.secrets:
        kubernetes.use_secret_as_env(task, secret.name, secret.keys, optional=secret.optional)
    if spec.certificates:
        kubernetes.use_config_map_as_volume(task, spec.certificates.config_map, spec.certificates.mount_path)
        for name in CERTIFICATE_VARIABLES:
            task.set_env_variable(name, spec.certificates.file)
    if spec.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(spec.image_pull_secrets))
    if spec.image_pull_policy:
        kubernetes.set_image_pull_policy(task, spec.image_pull_policy)
    if spec.run_as_user is not None:
        kubernetes.set_security_context(task, run_as_user=spec.run_as_user, run_as_non_root=True)


def _metadata(task: Any, spec: ResourcesSpec, component: str, *, queued: bool) -> None:
    from kfp import kubernetes

    labels = {PART_OF_LABEL: "tunegate", STAGE_LABEL: component, **spec.labels}
    if spec.queue and queued:
        labels[QUEUE_LABEL] = spec.queue
    for key, value in labels.items():
        kubernetes.add_pod_label(task, key, value)
    for key, value in spec.annotations.items():
        kubernetes.add_pod_annotation(task, key, value)
