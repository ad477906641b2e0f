"""`tunegate cluster doctor`: looks at everything a run on the cluster will need, and says what to change."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from tunegate.cluster.client import ALLOW_LIST, Cluster
from tunegate.cluster.errors import ClusterError
from tunegate.cluster.probes import probe_image
from tunegate.errors import TunegateError
from tunegate.finding import Finding
from tunegate.resources import ResourcesSpec, StageName
from tunegate.storage.probe import probe_s3
from tunegate.tracking.probe import probe_mlflow
from tunegate.trainjob.client import PERMISSIONS

if TYPE_CHECKING:
    from tunegate.cluster.compilation import CompiledPipeline
    from tunegate.cluster.kube import Kube


@dataclass(frozen=True)
class _Permission:
    """What pods do in their namespace, and why."""

    verb: str
    resource: str
    why: str
    group: str = ""
    name: str = ""
    """The one object that it is about; empty for any."""

    @property
    def role(self) -> str:
        """Arguments of `kubectl create role` that grant it."""
        full = f"{self.resource}.{self.group}" if self.group else self.resource
        return f"--verb={self.verb} --resource={full}" + (f" --resource-name={self.name}" if self.name else "")


_LAUNCHER = "kfp-launcher"
#: What Kubeflow gives runs that ask for no account: for one user, and for several.
_DEFAULT_ACCOUNTS = frozenset({"pipeline-runner", "default-editor"})
_POD_PERMISSIONS = (
    _Permission("create", "workflowtaskresults", "Argo's executor reports a task's result", "argoproj.io"),
    _Permission("patch", "workflowtaskresults", "Argo's executor reports a task's result", "argoproj.io"),
    _Permission("get", "configmaps", "Kubeflow's driver and launcher look up the bucket", name=_LAUNCHER),
)
#: What a stage on several nodes does besides.
_TRAINER_PERMISSIONS = tuple(
    _Permission(verb, resource, "a stage on several nodes follows its TrainJob", group)
    for verb, resource, group in PERMISSIONS
)
# Display names of tasks, which the pipelines use, break the lookup of inputs in older backends
# (kubeflow/pipelines issue 11173).
_OLDEST = (2, 15)


def examine(
    *,
    connect: Callable[[], Cluster],
    kube: Kube | None,
    compiled: CompiledPipeline,
    image: str,
    resources: ResourcesSpec,
    root: str | None,
    tracking_uri: str | None,
    service_account: str,
    kfp_namespace: str = "kubeflow",
) -> Iterator[Finding]:
    """Run every check; one that cannot be made is skipped and says why.

    Args:
        connect: Opens the connection to Kubeflow Pipelines; may raise.
        kube: The Kubernetes API, None when it cannot be reached.
        compiled: The pipeline as it would be uploaded.
        image: The image that it runs on.
        resources: The `resources` section.
        root: Storage root, None when not known.
        tracking_uri: MLflow, None when not known.
        service_account: Service account that the pods run as.
        kfp_namespace: Namespace of Kubeflow Pipelines itself.
    """
    yield from _kubeflow(connect, compiled)
    if root:
        yield probe_s3(root)
    else:
        yield Finding(
            "S3", "failure", "no storage root is named", "--storage-root s3://bucket/prefix, or TUNEGATE_ROOT"
        )
    yield probe_mlflow(tracking_uri)
    yield probe_image(image)
    if kube is None:
        yield Finding(
            "Kubernetes",
            "skipped",
            "there is no kubeconfig here, so service accounts, secrets and GPU quota were not looked at",
            "export KUBECONFIG=…, or run the doctor in the cluster: kubectl run … tunegate cluster doctor",
        )
        return
    checks: list[Callable[[], Iterator[Finding]]] = [
        lambda: _service_account(kube, service_account, resources),
        lambda: _allow_list(kube, service_account, kfp_namespace),
        lambda: _launcher(kube),
        lambda: _objects(kube, resources),
        lambda: _accelerators(kube, resources),
        lambda: _queue(kube, resources),
        lambda: _trainer(kube, resources),
    ]
    for check in checks:
        yield from _tolerant(check)


def _kubeflow(connect: Callable[[], Cluster], compiled: CompiledPipeline) -> Iterator[Finding]:
    check = "Kubeflow Pipelines"
    try:
        cluster = connect()
        health = cluster.health
        users = "several users" if health.multi_user else "one user"
        place = f", namespace {cluster.namespace}" if cluster.namespace else ""
        pipeline = cluster.find_pipeline(compiled.name)
        version = cluster.server_version
        said = f"{cluster.connection.host} answers{f' ({version})' if version else ''}"
        if version and _release(version) < _OLDEST:
            wanted = ".".join(map(str, _OLDEST))
            yield Finding(check, "failure", f"{said}, which is older than {wanted}", f"upgrade to {wanted} or newer")
        else:
            yield Finding(check, "ok", f"{said}; it serves {users}{place}, logged in by {_auth(cluster)}")
        if pipeline is None:
            yield Finding("pipeline", "warning", f"{compiled.name} was not uploaded yet", "tunegate cluster upload")
            return
        names = [v.name or v.display_name for v in cluster.versions(pipeline.pipeline_id)]
        if compiled.version in names:
            yield Finding("pipeline", "ok", f"{compiled.version} is uploaded")
        else:
            yield Finding(
                "pipeline",
                "warning",
                f"this code is {compiled.version}, the newest upload {names[0] if names else '(none)'}",
                "tunegate cluster upload",
            )
    except TunegateError as error:
        yield Finding(check, "failure", f"{error.key or ''}: {error.reason}".lstrip(": "), error.fix or "")


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _auth(cluster: Cluster) -> str:
    return cluster.connection.spec.auth or "none"


def _tolerant(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of a check on Kubernetes; no permission to look is no failure of the cluster."""
    import urllib3
    from kubernetes.client.exceptions import ApiException  # type: ignore[import-untyped]

    try:
        yield from check()
    except ApiException as error:
        yield Finding(
            "Kubernetes",
            "skipped",
            f"not allowed to look ({error.status} {error.reason})",
            "ask for the ClusterRole view, and for creating subjectaccessreviews",
        )
    except urllib3.exceptions.HTTPError as error:
        yield Finding("Kubernetes", "skipped", f"the API cannot be reached: {error}", "kubectl get nodes must work")


def _service_account(kube: Kube, name: str, resources: ResourcesSpec) -> Iterator[Finding]:
    check = "service account"
    account = kube.service_account(name)
    if account is None:
        yield Finding(
            check,
            "failure",
            f"{name} does not exist in the namespace {kube.namespace}",
            f"kubectl -n {kube.namespace} create serviceaccount {name}, or --service-account NAME",
        )
        return
    needed = _POD_PERMISSIONS + (_TRAINER_PERMISSIONS if resources.distributed else ())
    missing = [p for p in needed if not kube.may(name, p.verb, p.resource, p.group, p.name)]
    for permission in missing:
        role = f"tunegate-{permission.verb}-{permission.resource.replace('/', '-')}"
        yield Finding(
            check,
            "failure",
            f"{name} may not {permission.verb} {permission.name or permission.resource}: {permission.why}",
            f"kubectl -n {kube.namespace} create role {role} {permission.role} && kubectl -n {kube.namespace} create "
            f"rolebinding {role} --role={role} --serviceaccount={kube.namespace}:{name}",
        )
    annotations = account.metadata.annotations or {}
    aws_role = annotations.get("eks.amazonaws.com/role-arn")
    if not missing:
        yield Finding(
            check, "ok", f"{kube.namespace}/{name} has what pods need" + (f"; AWS role {aws_role}" if aws_role else "")
        )


def _allow_list(kube: Kube, name: str, kfp_namespace: str) -> Iterator[Finding]:
    """Whether Kubeflow lets a run have this account; older releases have no such list and let it have any."""
    if name in _DEFAULT_ACCOUNTS:
        return
    listed = kube.deployment_variable(kfp_namespace, "ml-pipeline", ALLOW_LIST) or ""
    if name in re.split(r"[\s,;]+", listed):
        yield Finding("allowed accounts", "ok", f"Kubeflow lets runs have {name}")
        return
    accounts = ",".join(filter(None, [listed.strip(), name]))
    yield Finding(
        "allowed accounts",
        "warning",
        f"{name} is not in {ALLOW_LIST} of the ml-pipeline deployment; releases that have this list refuse such runs",
        f"kubectl -n {kfp_namespace} set env deployment/ml-pipeline {ALLOW_LIST}={accounts}",
    )


def _launcher(kube: Kube) -> Iterator[Finding]:
    found = kube.config_map(_LAUNCHER)
    root = ((found.data or {}) if found else {}).get("defaultPipelineRoot", "")
    if root.startswith("s3://"):
        yield Finding("artifacts", "ok", f"Kubeflow keeps artifacts at {root}")
    else:
        what = f"it says {root}" if root else "it names no defaultPipelineRoot" if found else "there is none"
        yield Finding(
            "artifacts",
            "warning",
            f"the ConfigMap {_LAUNCHER} in {kube.namespace} does not send artifacts to S3: {what}",
            f"kubectl -n {kube.namespace} create configmap {_LAUNCHER} --from-literal="
            "defaultPipelineRoot=s3://bucket/prefix, or tunegate cluster run --pipeline-root s3://…",
        )


def _objects(kube: Kube, resources: ResourcesSpec) -> Iterator[Finding]:
    """Secrets and ConfigMaps that the pods name; without them a pod never starts."""
    for secret in resources.secrets:
        keys = kube.secret_keys(secret.name)
        lacking = sorted(secret.keys.keys() - (keys or set()))
        if keys is not None and not lacking:
            yield Finding("secret", "ok", f"{secret.name} has {', '.join(sorted(secret.keys))}")
        elif not secret.optional:
            what = f"has no {', '.join(lacking)}" if keys is not None else f"does not exist in {kube.namespace}"
            literals = " ".join(f"--from-literal={key}=…" for key in lacking)
            yield Finding(
                "secret",
                "failure",
                f"{secret.name} {what}",
                f"kubectl -n {kube.namespace} create secret generic {secret.name} {literals}",
            )
    for config_map in resources.config_maps:
        found = kube.config_map(config_map.name)
        lacking = sorted(set(config_map.keys) - set((found.data or {}) if found else ()))
        if found is not None and not lacking:
            yield Finding("configuration", "ok", f"{config_map.name} has {', '.join(config_map.keys)}")
        elif not config_map.optional:
            yield Finding(
                "configuration",
                "failure",
                f"the ConfigMap {config_map.name} lacks {', '.join(lacking)}",
                f"kubectl -n {kube.namespace} edit configmap {config_map.name}",
            )
    for name in resources.image_pull_secrets:
        if kube.secret_keys(name) is None:
            yield Finding(
                "secret",
                "failure",
                f"the pull secret {name} does not exist in {kube.namespace}",
                f"kubectl -n {kube.namespace} create secret docker-registry {name} --docker-server=…",
            )
    if certificates := resources.certificates:
        bundle = kube.config_map(certificates.config_map)
        if bundle is None or certificates.key not in (bundle.data or {}):
            yield Finding(
                "certificates",
                "failure",
                f"the ConfigMap {certificates.config_map} with {certificates.key} does not exist in {kube.namespace}",
                f"kubectl -n {kube.namespace} create configmap {certificates.config_map} "
                f"--from-file={certificates.key}=CA.pem",
            )
        else:
            yield Finding("certificates", "ok", f"{certificates.config_map} has {certificates.key}")


def _accelerators(kube: Kube, resources: ResourcesSpec) -> Iterator[Finding]:
    largest_pod: dict[str, int] = {}
    together: dict[str, int] = {}
    for stage in get_args(StageName):
        sizes = resources.of(stage)
        if sizes.accelerator:
            largest_pod[sizes.accelerator] = max(largest_pod.get(sizes.accelerator, 0), sizes.accelerators)
            together[sizes.accelerator] = max(together.get(sizes.accelerator, 0), sizes.accelerators * sizes.nodes)
    if not largest_pod:
        yield Finding("accelerators", "ok", "no stage asks for one; training runs on CPU")
    for name, count in largest_pod.items():
        nodes = kube.allocatable(name)
        left = kube.quota_left(name)
        largest = max(nodes.values(), default=0)
        if largest < count:
            yield Finding(
                "accelerators",
                "failure",
                f"a stage asks for {count} {name} in one pod, the largest node offers {largest}",
                "add such a node and the device plugin, or set resources.training.accelerators lower",
            )
        elif sum(nodes.values()) < together[name]:
            yield Finding(
                "accelerators",
                "failure",
                f"a stage asks for {together[name]} {name} on its nodes together, the cluster has "
                f"{sum(nodes.values())}",
                "add nodes, or set resources.training.nodes or accelerators lower",
            )
        elif left is not None and left < together[name]:
            yield Finding(
                "accelerators",
                "failure",
                f"a stage asks for {together[name]} {name}, the quota of {kube.namespace} leaves {left}",
                f"raise requests.{name} in the ResourceQuota, or wait for other runs to end",
            )
        else:
            quota = "no quota limits it" if left is None else f"the quota leaves {left}"
            yield Finding("accelerators", "ok", f"{sum(nodes.values())} {name} on {len(nodes)} nodes; {quota}")


def _queue(kube: Kube, resources: ResourcesSpec) -> Iterator[Finding]:
    if not resources.queue:
        return
    if kube.local_queue(resources.queue) is None:
        yield Finding(
            "queue",
            "failure",
            f"Kueue has no LocalQueue {resources.queue} in {kube.namespace}",
            "create the LocalQueue, or leave resources.queue out",
        )
    else:
        yield Finding("queue", "ok", f"the LocalQueue {resources.queue} exists")


def _trainer(kube: Kube, resources: ResourcesSpec) -> Iterator[Finding]:
    stages = resources.distributed
    if not stages:
        return
    trainer = resources.trainer
    where = f"{trainer.kind} {trainer.runtime}"
    if kube.training_runtime(trainer.runtime, trainer.kind) is None:
        yield Finding(
            "trainer",
            "failure",
            f"{', '.join(stages)} ask for several nodes, but there is no {where}",
            "install Kubeflow Trainer 2.2 or newer, then helm upgrade … --set trainer.enabled=true, or kubectl apply "
            f"-n {kube.namespace} -k manifests/addons/trainer",
        )
    else:
        yield Finding("trainer", "ok", f"{', '.join(stages)} run on several nodes by the {where}")


def worst(findings: list[Finding]) -> int:
    """The exit code: 1 when something has to be mended, else 0."""
    return ClusterError.exit_code if any(f.level == "failure" for f in findings) else 0


__all__ = ["Finding", "examine", "worst"]
