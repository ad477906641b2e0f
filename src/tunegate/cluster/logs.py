"""The logs of a run's stages: from the pods through Kubernetes, else through KFP, else what the records say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tunegate.cluster.client import Cluster
from tunegate.cluster.errors import ClusterError
from tunegate.cluster.follow import record_id, record_store, task_stages
from tunegate.cluster.kube import Kube
from tunegate.errors import StorageError


@dataclass(frozen=True)
class StageLog:
    """The log of one try of a stage."""

    stage: str
    origin: str
    """Name of the pod, or where else the text is from."""
    lines: Iterator[str]


def stage_logs(
    cluster: Cluster,
    run: Any,
    *,
    stage: str | None = None,
    kube: Kube | None = None,
    root: str | None = None,
    live: bool = False,
) -> Iterator[StageLog]:
    """The logs of a run, stage by stage.

    Args:
        cluster: Kubeflow Pipelines.
        run: `V2beta1Run`.
        stage: Only this stage.
        kube: The Kubernetes API, if it can be reached.
        root: Storage root, where the run's parameters do not name it.
        live: Go on with the log of a pod that is still running.
    """
    told: set[str] = set()
    for log in _from_pods(kube, run, live):
        if stage in {None, log.stage}:
            told.add(log.stage)
            yield log
    for name, task in task_stages(run):
        if stage not in {None, name} or name in told:
            continue
        for pod in _pods_of(run, task):
            text = _archived(cluster, run.run_id, pod)
            if text:
                told.add(name)
                yield StageLog(name, pod, iter(text.splitlines(keepends=True)))
    yield from _from_records(run, stage, told, root)


def _from_pods(kube: Kube | None, run: Any, live: bool) -> Iterator[StageLog]:
    if kube is None:
        return
    import urllib3
    from kubernetes.client.exceptions import ApiException  # type: ignore[import-untyped]

    try:
        for pod in kube.pods(run.run_id, record_id(run)):
            if pod.phase != "Pending":
                yield StageLog(pod.stage, pod.name, kube.log(pod, follow=live and pod.phase == "Running"))
    except (ApiException, urllib3.exceptions.HTTPError):
        return  # no permission, or no way there: KFP has the logs as well


def _pods_of(run: Any, task: Any) -> list[str]:
    """Pods of a task and of the tasks below it, since KFP runs a stage in an `executor` of its own."""
    details = run.run_details.task_details or []
    below = [t for t in details if t.parent_task_id and t.parent_task_id == task.task_id]
    names = [t.pod_name for t in (task, *below)]
    names += [child.pod_name for child in task.child_tasks or []]
    return list(dict.fromkeys(name for name in names if name and "-driver" not in name))


def _archived(cluster: Cluster, run_id: str, pod: str) -> str:
    try:
        return cluster.pod_log(run_id, pod)
    except ClusterError:
        return ""  # the pod is gone and nothing was archived; the records still have the error


def _from_records(run: Any, stage: str | None, told: set[str], root: str | None) -> Iterator[StageLog]:
    store = record_store(run, root)
    if store is None:
        return
    try:
        records = store.stages()
    except StorageError:
        return
    for record in records:
        if stage in {None, record.stage} and record.stage not in told and (text := record.error or record.summary):
            yield StageLog(record.stage, f"record at {store.uri}", iter([f"{record.status}: {text}\n"]))
