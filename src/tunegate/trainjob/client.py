"""TrainJobs through the Kubernetes API: submit, look, find out why one failed, delete.

Uses the `kubernetes` package only, which kfp brings along. Requests are repeated after 429, 5xx and dropped
connections; the name of a TrainJob follows from its work, so that creating one twice ends in 409 and not in two.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tunegate.resources import TRAINER_GROUP, TRAINER_VERSION
from tunegate.trainjob.errors import TrainJobConflictError, TrainJobError, TrainJobMissingError, TrainJobRefusedError
from tunegate.trainjob.objects import NODE, RUN_LABEL, run_label

#: What a stage on several nodes, and the exit handler after it, do: verb, resource, API group.
PERMISSIONS = (
    ("create", "trainjobs", TRAINER_GROUP),
    ("get", "trainjobs", TRAINER_GROUP),
    ("list", "trainjobs", TRAINER_GROUP),
    ("delete", "trainjobs", TRAINER_GROUP),
    ("list", "pods", ""),
    ("get", "pods/log", ""),
)
# JobSet, which a TrainJob becomes, has its name, and puts it on its pods.
_JOBSET_LABEL = "jobset.sigs.k8s.io/jobset-name"
_INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
_PLURAL = "trainjobs"
_RUNTIMES = {"TrainingRuntime": "trainingruntimes", "ClusterTrainingRuntime": "clustertrainingruntimes"}
_TRANSIENT = frozenset({429, 500, 502, 503, 504})
_WAITS = (1.0, 2.0, 4.0, 8.0)
_TIMEOUT = (10.0, 30.0)
_LOG_LINES = 20
_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class TrainJobs:
    """The TrainJobs of one namespace.

    Args:
        api: `kubernetes.client.ApiClient`.
        namespace: The namespace of the run.
        pause: Waits a number of seconds between tries.
    """

    def __init__(self, api: Any, namespace: str, *, pause: Callable[[float], None] = time.sleep) -> None:
        from kubernetes import client  # type: ignore[import-untyped]

        self.namespace = namespace
        self._pause = pause
        self._custom = client.CustomObjectsApi(api)
        self._core = client.CoreV1Api(api)
        self._authorization = client.AuthorizationV1Api(api)

    @classmethod
    def open(cls) -> TrainJobs:
        """Those of the pod's own namespace, with its service account; outside a cluster those of the kubeconfig.

        Raises:
            TrainJobRefusedError: There is neither a service account nor a kubeconfig.
        """
        from kubernetes import client, config

        configuration = client.Configuration()
        try:
            if (_SERVICE_ACCOUNT / "token").exists():
                config.load_incluster_config(client_configuration=configuration)
                namespace = (_SERVICE_ACCOUNT / "namespace").read_text().strip()
            else:
                config.load_kube_config(client_configuration=configuration)
                _, context = config.list_kube_config_contexts()
                namespace = context["context"].get("namespace") or "default"
        except (config.ConfigException, OSError, TypeError) as error:
            raise TrainJobRefusedError(
                f"the Kubernetes API cannot be used from here: {error}",
                key="TrainJob",
                fix="give the pod a service account whose token is mounted (automountServiceAccountToken: true)",
            ) from None
        configuration.verify_ssl = True
        configuration.retries = False
        return cls(client.ApiClient(configuration), namespace)

    def check_runtime(self, name: str, kind: str) -> None:
        """Check that the runtime which TrainJobs start from is there.

        Args:
            name: Its name.
            kind: `TrainingRuntime` or `ClusterTrainingRuntime`.

        Raises:
            TrainJobRefusedError: It is not, or Trainer itself is not installed.
        """
        where = (TRAINER_GROUP, TRAINER_VERSION)
        try:
            if kind == "ClusterTrainingRuntime":
                self._call("look up the runtime", self._custom.get_cluster_custom_object, *where, _RUNTIMES[kind], name)
            else:
                place = (*where, self.namespace, _RUNTIMES[kind], name)
                self._call("look up the runtime", self._custom.get_namespaced_custom_object, *place)
        except TrainJobMissingError:
            raise TrainJobRefusedError(
                f"there is no {kind} of this name in {self.namespace}",
                key="resources.trainer.runtime",
                value=name,
                fix="install Kubeflow Trainer 2.2 or newer, and the runtime with it: the chart's trainer.enabled, or "
                "manifests/addons/trainer",
            ) from None

    def check_permissions(self) -> None:
        """Check that this service account may do what a stage on several nodes does.

        Raises:
            TrainJobRefusedError: It may not; everything that is missing is named.
        """
        from kubernetes import client

        missing = []
        for verb, resource, group in PERMISSIONS:
            resource, _, subresource = resource.partition("/")
            attributes = client.V1ResourceAttributes(
                namespace=self.namespace, verb=verb, resource=resource, group=group, subresource=subresource or None
            )
            review = client.V1SelfSubjectAccessReview(
                spec=client.V1SelfSubjectAccessReviewSpec(resource_attributes=attributes)
            )
            answer = self._call("ask for permissions", self._authorization.create_self_subject_access_review, review)
            if not answer.status.allowed:
                missing.append(f"{verb} {resource}{'/' if subresource else ''}{subresource}")
        if missing:
            raise TrainJobRefusedError(
                f"the run's service account may not {', '.join(missing)}",
                key=f"TrainJob in {self.namespace}",
                fix="install the chart with trainer.enabled=true and start the run with its service account",
            )

    def find(self, name: str) -> dict[str, Any] | None:
        """A TrainJob, None when there is none."""
        try:
            found = self._call("look at the TrainJob", self._custom.get_namespaced_custom_object, *self._place, name)
        except TrainJobMissingError:
            return None
        return dict(found)

    def create(self, job: dict[str, Any]) -> dict[str, Any]:
        """Make a TrainJob.

        Raises:
            TrainJobConflictError: There is one of this name.
            TrainJobRefusedError: No permission, no Trainer, or the object is not accepted.
            TrainJobError: The API cannot be reached.
        """
        try:
            made = self._call("make the TrainJob", self._custom.create_namespaced_custom_object, *self._place, job)
        except TrainJobMissingError as error:
            raise TrainJobRefusedError(
                error.reason, key=error.key, fix="install Kubeflow Trainer 2.2 or newer (it makes the kind TrainJob)"
            ) from None
        return dict(made)

    def delete(self, name: str) -> bool:
        """Delete a TrainJob with its pods; False when there was none."""
        from kubernetes import client

        try:
            self._call(
                "delete the TrainJob",
                self._custom.delete_namespaced_custom_object,
                *self._place,
                name,
                body=client.V1DeleteOptions(propagation_policy="Background"),
            )
        except TrainJobMissingError:
            return False
        return True

    def of_run(self, run_id: str) -> list[str]:
        """Names of the TrainJobs of a run."""
        listed = self._call(
            "list the TrainJobs",
            self._custom.list_namespaced_custom_object,
            *self._place,
            label_selector=f"{RUN_LABEL}={run_label(run_id)}",
        )
        return [str(item["metadata"]["name"]) for item in listed.get("items", [])]

    def waiting(self, name: str) -> list[str]:
        """Why nodes of a TrainJob have not started, one sentence each; empty when all have."""
        return sorted({text for pod in self._pods(name) if (text := _why_waiting(pod))})

    def failures(self, name: str) -> list[str]:
        """What the nodes that failed say, the first failure first: what ended it is rarely the last."""
        failed = [(when, pod, text) for pod in self._pods(name) if (found := _how_ended(pod)) for when, text in [found]]
        failed.sort(key=lambda entry: entry[0])
        return [f"{_node_of(pod)} {text}{self._last_lines(pod, text)}" for _, pod, text in failed]

    def _last_lines(self, pod: Any, told: str) -> str:
        """The end of a node's log; empty where it says nothing that is not told already."""
        try:
            text = self._call(
                "read the log",
                self._core.read_namespaced_pod_log,
                pod.metadata.name,
                self.namespace,
                container=NODE,
                tail_lines=_LOG_LINES,
            )
        except TrainJobError:
            return ""  # the pod is gone, or reading logs is not allowed
        lines = [line for line in str(text or "").splitlines() if line.strip() and line.strip() not in told]
        return "".join(f"\n    {line}" for line in lines)

    def _pods(self, name: str) -> list[Any]:
        try:
            listed = self._call(
                "list the nodes' pods",
                self._core.list_namespaced_pod,
                self.namespace,
                label_selector=f"{_JOBSET_LABEL}={name}",
            )
        except TrainJobError:
            return []  # not being able to look at the nodes must not hide how the TrainJob itself is
        return sorted(listed.items, key=_index_of)

    @property
    def _place(self) -> tuple[str, str, str, str]:
        return TRAINER_GROUP, TRAINER_VERSION, self.namespace, _PLURAL

    def _call(self, doing: str, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call the API, again after what passes.

        Raises:
            TrainJobError: The API stayed away; one of its kinds where it said no.
        """
        import urllib3
        from kubernetes.client.exceptions import ApiException  # type: ignore[import-untyped]

        for wait in (*_WAITS, None):
            try:
                return method(*args, **options, _request_timeout=_TIMEOUT)
            except ApiException as error:
                if error.status not in _TRANSIENT or wait is None:
                    raise self._explain(doing, error) from None
                after = str((error.headers or {}).get("Retry-After", ""))
                self._pause(max(wait, min(float(after), 60.0) if after.isdigit() else 0.0))
            except urllib3.exceptions.HTTPError as error:
                if wait is None:
                    raise TrainJobError(
                        f"the Kubernetes API did not let us {doing}: {error}",
                        key="TrainJob",
                        fix="see whether it is up, then run the stage again: the TrainJob is found by its name",
                    ) from None
                self._pause(wait)
        raise AssertionError("the last try returns or raises")

    def _explain(self, doing: str, error: Any) -> TrainJobError:
        message = _message(error)
        reason = f"the Kubernetes API did not let us {doing}: {message}"
        key = f"TrainJob in {self.namespace}"
        if error.status == 404:
            return TrainJobMissingError(reason, key=key)
        if error.status == 409:
            return TrainJobConflictError(reason, key=key)
        if error.status == 401:
            return TrainJobRefusedError(reason, key=key, fix="mount a valid service account token into the pod")
        if error.status == 403 and "denied the request" not in message:
            return TrainJobRefusedError(
                reason,
                key=key,
                fix="give the run's service account the chart's permissions (trainer.enabled=true), or start the run "
                "with --service-account; tunegate cluster doctor says which are missing",
            )
        if error.status in _TRANSIENT:
            return TrainJobError(reason, key=key, fix="try again in a minute")
        return TrainJobRefusedError(reason, key=key, fix="correct what it names in the resources section")


def _message(error: Any) -> str:
    """The `message` of the Status object that the API server sends with an error."""
    try:
        content = json.loads(error.body or "")
    except ValueError:
        content = {}
    text = content.get("message") if isinstance(content, dict) else None
    return str(text or f"{error.status} {error.reason or ''}".strip())[:500]


def _index_of(pod: Any) -> int:
    index = str((pod.metadata.labels or {}).get(_INDEX_LABEL, ""))
    return int(index) if index.isdigit() else 0


def _node_of(pod: Any) -> str:
    return f"node {_index_of(pod)} ({pod.metadata.name})"


def _states(pod: Any) -> Iterable[Any]:
    return [status.state for status in (pod.status.container_statuses or []) if status.state]


def _why_waiting(pod: Any) -> str:
    if pod.status.phase != "Pending":
        return ""
    for state in _states(pod):
        if state.waiting and state.waiting.reason not in {None, "ContainerCreating", "PodInitializing"}:
            return f"{_node_of(pod)}: {state.waiting.reason}: {state.waiting.message or ''}".rstrip(": ")
    for condition in pod.status.conditions or []:
        if condition.type == "PodScheduled" and condition.status == "False":
            return f"node {_index_of(pod)} is not scheduled: {condition.message or condition.reason}"
    return ""


def _how_ended(pod: Any) -> tuple[str, str] | None:
    """When and how a node failed, None when it did not."""
    for state in _states(pod):
        ended = state.terminated
        if ended and ended.exit_code:
            when = ended.finished_at.isoformat() if ended.finished_at else ""
            why = f" ({ended.reason})" if ended.reason not in {None, "Error", "Completed"} else ""
            said = f": {ended.message.strip()}" if ended.message and ended.message.strip() else ""
            return when, f"ended with exit code {ended.exit_code}{why}{said}"
    if pod.status.phase == "Failed":
        # Evicted, or its node is gone: no container has anything to say.
        when = pod.metadata.creation_timestamp.isoformat() if pod.metadata.creation_timestamp else ""
        return when, f"failed: {pod.status.reason or 'no reason given'} {pod.status.message or ''}".rstrip()
    return None


def own_pod() -> tuple[str, str] | None:
    """Name and uid of the pod that this process runs in, as Kubeflow's launcher has them; None elsewhere."""
    name, uid = os.environ.get("KFP_POD_NAME"), os.environ.get("KFP_POD_UID")
    return (name, uid) if name and uid else None
