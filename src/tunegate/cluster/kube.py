"""The Kubernetes API, read only: what `logs` and `doctor` look at. All of it is optional for the rest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunegate.cluster.connection import ConnectionSpec
from tunegate.cluster.pods import stage_of
from tunegate.resources import TRAINER_GROUP, TRAINER_VERSION
from tunegate.trainjob.objects import NODE, STAGE_LABEL, run_label
from tunegate.trainjob.objects import RUN_LABEL as RECORD_LABEL

RUN_LABEL = "pipeline/runid"
# Argo writes the path of the node here, e.g. `run-x.root.tune-and-gate.sft.executor`.
_NODE_ANNOTATION = "workflows.argoproj.io/node-name"
_MAIN_CONTAINER = "main"
_TIMEOUT = (5.0, 30.0)
_KUEUE_VERSIONS = ("v1beta2", "v1beta1")


@dataclass(frozen=True)
class Pod:
    """A pod of a run that runs (or ran) a stage."""

    name: str
    stage: str
    phase: str
    started: str
    container: str = _MAIN_CONTAINER


class Kube:
    """Looks at one namespace.

    Args:
        namespace: The namespace that runs are in.
        context: Context of the kubeconfig; None takes the current one, or the pod's own service account.

    Raises:
        kubernetes.config.ConfigException: There is neither a kubeconfig nor a service account.
    """

    def __init__(self, namespace: str, *, context: str | None = None) -> None:
        from kubernetes import client, config  # type: ignore[import-untyped]

        configuration = client.Configuration()
        if context is None and Path("/var/run/secrets/kubernetes.io/serviceaccount/token").exists():
            config.load_incluster_config(client_configuration=configuration)
        else:
            config.load_kube_config(client_configuration=configuration, context=context)
        configuration.verify_ssl = True
        configuration.retries = 1
        api = client.ApiClient(configuration)
        self.namespace = namespace
        self.host = configuration.host
        self._core = client.CoreV1Api(api)
        self._apps = client.AppsV1Api(api)
        self._authorization = client.AuthorizationV1Api(api)
        self._custom = client.CustomObjectsApi(api)
        self._models = client

    def pods(self, run_id: str, record_id: str) -> list[Pod]:
        """The pods of a run that carry out stages, in the order of their start.

        Args:
            run_id: Kubeflow's id of the run, which its pods are labelled with.
            record_id: The id of its records, which the nodes of its TrainJobs are labelled with.
        """
        pods = []
        for selector, container in (
            (f"{RUN_LABEL}={run_id}", _MAIN_CONTAINER),
            (f"{RECORD_LABEL}={run_label(record_id)}", NODE),
        ):
            listed = self._core.list_namespaced_pod(self.namespace, label_selector=selector, _request_timeout=_TIMEOUT)
            for item in listed.items:
                if stage := _stage_of_pod(item.metadata):
                    started = item.metadata.creation_timestamp.isoformat() if item.metadata.creation_timestamp else ""
                    pods.append(Pod(item.metadata.name, stage, item.status.phase or "", started, container))
        return sorted(pods, key=lambda p: p.started)

    def log(self, pod: Pod, *, follow: bool = False) -> Iterator[str]:
        """The lines of a pod's log."""
        stream = self._core.read_namespaced_pod_log(
            pod.name,
            self.namespace,
            container=pod.container,
            follow=follow,
            _preload_content=False,
            _request_timeout=None if follow else _TIMEOUT,
        )
        for line in stream:
            yield line.decode(errors="replace")

    def service_account(self, name: str) -> Any | None:
        """A service account (`V1ServiceAccount`), None when there is none."""
        return self._find(self._core.read_namespaced_service_account, name)

    def config_map(self, name: str) -> Any | None:
        """A ConfigMap (`V1ConfigMap`), None when there is none."""
        return self._find(self._core.read_namespaced_config_map, name)

    def secret_keys(self, name: str) -> set[str] | None:
        """The keys of a Secret, None when there is none; its values are not looked at."""
        secret = self._find(self._core.read_namespaced_secret, name)
        return None if secret is None else set(secret.data or {})

    def deployment_variable(self, namespace: str, deployment: str, variable: str) -> str | None:
        """An environment variable of a Deployment's first container, None where it has no plain value."""
        found = self._apps.read_namespaced_deployment(deployment, namespace, _request_timeout=_TIMEOUT)
        variables = found.spec.template.spec.containers[0].env or []
        return next((entry.value for entry in variables if entry.name == variable), None)

    def local_queue(self, name: str) -> Any | None:
        """A LocalQueue of Kueue, None when there is none."""
        for version in _KUEUE_VERSIONS:
            found = self._find(
                lambda queue, namespace, version=version, **more: self._custom.get_namespaced_custom_object(
                    "kueue.x-k8s.io", version, namespace, "localqueues", queue, **more
                ),
                name,
            )
            if found is not None:
                return found
        return None

    def training_runtime(self, name: str, kind: str) -> Any | None:
        """A runtime of Kubeflow Trainer, None when there is none (or no Trainer).

        Args:
            name: Its name.
            kind: `TrainingRuntime` or `ClusterTrainingRuntime`.
        """
        if kind == "ClusterTrainingRuntime":
            return self._find(
                lambda runtime, _, **more: self._custom.get_cluster_custom_object(
                    TRAINER_GROUP, TRAINER_VERSION, "clustertrainingruntimes", runtime, **more
                ),
                name,
            )
        return self._find(
            lambda runtime, namespace, **more: self._custom.get_namespaced_custom_object(
                TRAINER_GROUP, TRAINER_VERSION, namespace, "trainingruntimes", runtime, **more
            ),
            name,
        )

    def may(self, service_account: str, verb: str, resource: str, group: str = "", name: str = "") -> bool:
        """Whether a service account of the namespace may do something there.

        Args:
            service_account: Its name.
            verb: E.g. `get`.
            resource: E.g. `configmaps`, or with a subresource `pods/log`.
            group: API group; empty for the core.
            name: The one object that it is about; empty for any.
        """
        models = self._models
        resource, _, subresource = resource.partition("/")
        review = models.V1SubjectAccessReview(
            spec=models.V1SubjectAccessReviewSpec(
                user=f"system:serviceaccount:{self.namespace}:{service_account}",
                groups=["system:serviceaccounts", f"system:serviceaccounts:{self.namespace}", "system:authenticated"],
                resource_attributes=models.V1ResourceAttributes(
                    namespace=self.namespace,
                    verb=verb,
                    resource=resource,
                    group=group,
                    subresource=subresource or None,
                    name=name or None,
                ),
            )
        )
        answer = self._authorization.create_subject_access_review(review, _request_timeout=_TIMEOUT)
        return bool(answer.status.allowed)

    def allocatable(self, resource: str) -> dict[str, int]:
        """How many of a resource (e.g. `nvidia.com/gpu`) each node offers, nodes without any left out."""
        offered = {}
        for node in self._core.list_node(_request_timeout=_TIMEOUT).items:
            count = int((node.status.allocatable or {}).get(resource, 0))
            if count and not node.spec.unschedulable:
                offered[node.metadata.name] = count
        return offered

    def quota_left(self, resource: str) -> int | None:
        """How many of an accelerator the namespace's quotas leave, None when no quota limits it."""
        key = f"requests.{resource}"
        left = []
        for quota in self._core.list_namespaced_resource_quota(self.namespace, _request_timeout=_TIMEOUT).items:
            hard = (quota.status.hard or {}).get(key)
            if hard is not None:
                left.append(int(hard) - int((quota.status.used or {}).get(key, 0)))
        return min(left) if left else None

    def _find(self, read: Any, name: str) -> Any | None:
        from kubernetes.client.exceptions import ApiException  # type: ignore[import-untyped]

        try:
            return read(name, self.namespace, _request_timeout=_TIMEOUT)
        except ApiException as error:
            if error.status == 404:
                return None
            raise


def _stage_of_pod(metadata: Any) -> str | None:
    labelled = stage_of((metadata.labels or {}).get(STAGE_LABEL, ""))
    if labelled:
        return labelled
    parts = (metadata.annotations or {}).get(_NODE_ANNOTATION, "").split(".")
    # Drivers are pods of their own (`….sft-driver`); only `executor` (with `(0)` on retries) runs the stage.
    if len(parts) < 2 or not parts[-1].startswith("executor"):
        return None
    return next((stage for part in reversed(parts[:-1]) if (stage := stage_of(part.split("(")[0]))), None)


def open_kube(spec: ConnectionSpec, namespace: str | None) -> Kube | None:
    """The Kubernetes API, or None when it cannot be set up from here."""
    from kubernetes.config import ConfigException  # type: ignore[import-untyped]

    try:
        return Kube(namespace or spec.kfp_namespace, context=spec.context)
    except (ConfigException, OSError, TypeError):
        return None
