"""A TrainJob from its submission to its end, over outages, retries of the stage, and jobs that vanish."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from tunegate.trainjob.client import TrainJobs
from tunegate.trainjob.errors import (
    TrainJobConflictError,
    TrainJobError,
    TrainJobFailedError,
    TrainJobRefusedError,
)
from tunegate.trainjob.objects import TASK_ANNOTATION

POLL_SECONDS = 10.0
# The API server of a cluster that is being upgraded is away for minutes; the nodes train on meanwhile.
_PATIENCE_SECONDS = 900.0
_GONE_TIMES = 3
_DELETION_SECONDS = 300.0


def run_to_end(
    jobs: TrainJobs,
    job: Mapping[str, Any],
    *,
    note: Callable[[str], None],
    fresh: Callable[[], None] = lambda: None,
    pause: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Submit a TrainJob, or take up the one that an earlier try of the stage has made, and wait until it is complete.

    Args:
        jobs: The namespace's TrainJobs.
        job: The object, see `objects.train_job`.
        note: Told what changes.
        fresh: Called before a new TrainJob is made, to clear what an earlier one has left.
        pause: Waits a number of seconds.
        clock: Monotonic seconds.

    Raises:
        TrainJobFailedError: It failed; the message has what its nodes said.
        TrainJobRefusedError: It cannot be made.
        TrainJobError: The API stayed away.
    """
    name = str(job["metadata"]["name"])
    _submit(jobs, job, note=note, fresh=fresh, pause=pause, clock=clock)
    heard = clock()
    told, gone = "", 0
    while True:
        try:
            found = jobs.find(name)
        except TrainJobRefusedError:
            raise
        except TrainJobError as error:
            if clock() - heard > _PATIENCE_SECONDS:
                raise
            note(f"{error.reason}; {name} goes on, trying again")
            pause(POLL_SECONDS)
            continue
        heard = clock()
        if found is None:
            gone += 1
            if gone > _GONE_TIMES:
                raise TrainJobFailedError(
                    "somebody or something keeps deleting it", key=f"TrainJob {name}", fix="see who deletes TrainJobs"
                )
            note(f"{name} is gone; starting it again from the last checkpoint")
            _submit(jobs, job, note=note, fresh=fresh, pause=pause, clock=clock)
            continue
        state, message = state_of(found)
        if state == "Complete":
            return
        if state == "Failed":
            raise _failure(jobs, found, message)
        shown = _progress(jobs, found, state, message)
        if shown != told:
            told = shown
            note(f"{name}: {shown}")
        pause(POLL_SECONDS)


def state_of(job: Mapping[str, Any]) -> tuple[str, str]:
    """`Complete`, `Failed`, `Suspended` or empty, and what Trainer says about it."""
    conditions = {c["type"]: c for c in (job.get("status") or {}).get("conditions") or [] if c.get("status") == "True"}
    for kind in ("Failed", "Complete", "Suspended"):
        if kind in conditions:
            reason, message = conditions[kind].get("reason", ""), conditions[kind].get("message", "")
            return kind, f"{reason}: {message}".strip(": ")
    return "", ""


def _submit(
    jobs: TrainJobs,
    job: Mapping[str, Any],
    *,
    note: Callable[[str], None],
    fresh: Callable[[], None],
    pause: Callable[[float], None],
    clock: Callable[[], float],
) -> None:
    name, task = str(job["metadata"]["name"]), job["metadata"]["annotations"][TASK_ANNOTATION]
    started = clock()
    while True:
        found = jobs.find(name)
        if found is not None:
            metadata = found["metadata"]
            going = not metadata.get("deletionTimestamp")
            if going and (metadata.get("annotations") or {}).get(TASK_ANNOTATION) != task:
                raise TrainJobRefusedError(
                    "there is one of this name for other work", key=f"TrainJob {name}", fix=f"kubectl delete {name}"
                )
            state, _ = state_of(found)
            if going and state != "Failed":
                note(f"{name} was started by an earlier try of this stage; following it")
                return
            if going:
                note(f"{name} failed in an earlier try; starting it again from the last checkpoint")
                jobs.delete(name)
            if clock() - started > _DELETION_SECONDS:
                raise TrainJobError(
                    f"it is still being deleted after {_DELETION_SECONDS:g} s",
                    key=f"TrainJob {name}",
                    fix=f"see what holds it: kubectl get trainjob {name} -o yaml (finalizers)",
                )
            pause(POLL_SECONDS)
            continue
        fresh()
        try:
            jobs.create(dict(job))
        except TrainJobConflictError:
            continue  # a twin was faster, or the answer to our own first try was lost
        note(f"{name} is submitted: {job['spec']['trainer']['numNodes']} nodes")
        return


def _progress(jobs: TrainJobs, job: Mapping[str, Any], state: str, message: str) -> str:
    if state == "Suspended":
        return f"waiting for its turn ({message})" if message else "waiting for its turn"
    nodes = int(job["spec"]["trainer"]["numNodes"])
    if waiting := jobs.waiting(str(job["metadata"]["name"])):
        return "; ".join(waiting)
    active = any(status.get("active") for status in (job.get("status") or {}).get("jobsStatus") or [])
    return f"{nodes} nodes are training" if active else f"{nodes} nodes are starting"


def _failure(jobs: TrainJobs, job: Mapping[str, Any], message: str) -> TrainJobFailedError:
    name = str(job["metadata"]["name"])
    said = jobs.failures(name)
    lines = "".join(f"\n  - {line}" for line in said)
    if message.startswith("DeadlineExceeded"):
        fix = "raise timeout_seconds of the stage in the resources section; a retry goes on from the last checkpoint"
    elif any("OOMKilled" in line for line in said):
        fix = "give each node more memory, or train on more nodes; a retry goes on from the last checkpoint"
    else:
        fix = "mend what the nodes say; a retry of the stage goes on from the last checkpoint"
    return TrainJobFailedError(
        f"training failed: {message or 'no reason given'}{lines}", key=f"TrainJob {name}", fix=fix
    )
