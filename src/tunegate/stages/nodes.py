"""The work of a training stage: in this process, or on several nodes by a TrainJob.

For several nodes the inputs and a description of the work are put on S3, where every node fetches them; the nodes run
`tunegate.stages.distributed`, which is the same work under torchrun; rank 0 puts the outputs and the outcome back.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import BaseModel, ConfigDict

from tunegate.config import TuneSpec
from tunegate.errors import SpecError, TrainingStoppedError, TunegateError
from tunegate.finding import Finding
from tunegate.resources import ResourcesSpec, StageName
from tunegate.stages.context import Outcome, Output, StageContext, fetch_artifact
from tunegate.storage.manifest import digest_json
from tunegate.storage.runs import OutputRef, RunStore
from tunegate.storage.stores import open_store
from tunegate.trainjob.objects import VARIABLE

Work = Callable[[StageContext, Mapping[str, Path], Mapping[str, Path]], Outcome]
"""What a stage does, given its inputs and the (empty) folders of its outputs."""

TASK_FILE, OUTCOME_FILE = "task.json", "outcome.json"
#: Written again and again by the stage's pod while it follows its nodes; they end when it stays the same for long.
SIGN_OF_LIFE = "alive"
ERROR_FOLDER = "error"
ERROR_FILE = f"{ERROR_FOLDER}/failure.json"
_BEAT_SECONDS = 60.0


class Task(BaseModel):
    """What the nodes are to do."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = 1
    stage: StageName
    run_id: str
    spec: dict[str, Any]
    inputs: dict[str, str]
    """Digest of each input artifact by role; they lie at `artifacts/<digest>` below the storage root."""
    outputs: dict[str, str]
    """Kind of each output artifact by role."""
    sections: list[str]
    mlflow_run_id: str


class Done(BaseModel):
    """What rank 0 hands back."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = 1
    summary: str
    figures: dict[str, float]
    values: dict[str, str]
    verdict: str | None
    files: dict[str, str]
    """Small files for the report, by name; all of them are text."""
    outputs: dict[str, OutputRef]
    curve: list[dict[str, float]]


class Failure(BaseModel):
    """Why a rank gave up."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = 1
    rank: int
    reason: str
    key: str | None = None
    fix: str | None = None
    exit_code: int = 1


def run_work(
    context: StageContext,
    work: Work,
    *,
    inputs: Mapping[str, Path],
    outputs: Mapping[str, Output],
    sections: Sequence[str],
) -> Outcome:
    """Do a training stage's work here, or on as many nodes as its pod was given for it.

    Args:
        context: The stage's.
        work: The work.
        inputs: Input artifacts by role.
        outputs: Output artifacts by role; their folders are filled.
        sections: The spec sections that shape the outcome.

    Raises:
        TunegateError: As raised by the work, also when it was raised on a node.
        TrainJobFailedError: Nodes failed without a word of their own.
        SpecError: Several nodes were asked for, and the storage is no S3.
    """
    resources = resources_for_nodes()
    if resources is None or context.stage not in resources.distributed:
        return work(context, inputs, {role: output.path for role, output in outputs.items()})
    return _on_nodes(context, resources, inputs=inputs, outputs=outputs, sections=sections)


def resources_for_nodes() -> ResourcesSpec | None:
    """The `resources` section of this pod's TrainJobs, None where there are none."""
    text = os.environ.get(VARIABLE, "")
    return ResourcesSpec.model_validate_json(text) if text else None


def check_nodes() -> list[Finding]:
    """Whether stages that ask for several nodes will get them: the runtime is there, and the permissions."""
    resources = resources_for_nodes()
    if resources is None or not resources.distributed:
        return []
    from tunegate.trainjob.client import TrainJobs

    try:
        jobs = TrainJobs.open()
        jobs.check_runtime(resources.trainer.runtime, resources.trainer.kind)
        jobs.check_permissions()
    except TunegateError as error:
        return [Finding("Trainer", "failure", f"{error.key}: {error.reason}", error.fix or "")]
    return [Finding("Trainer", "ok", f"{', '.join(resources.distributed)} may run on several nodes")]


def _on_nodes(
    context: StageContext,
    resources: ResourcesSpec,
    *,
    inputs: Mapping[str, Path],
    outputs: Mapping[str, Output],
    sections: Sequence[str],
) -> Outcome:
    from tunegate.trainjob.client import TrainJobs, own_pod
    from tunegate.trainjob.errors import TrainJobFailedError
    from tunegate.trainjob.follow import run_to_end
    from tunegate.trainjob.objects import Owner, job_name, train_job

    root = context.spec.storage.root
    if not root.startswith("s3://"):
        raise SpecError(
            "nodes share no disk, so training on several needs storage on S3",
            key="storage.root",
            value=root,
            fix="s3://bucket/prefix",
        )
    task = Task(
        stage=context.stage,  # type: ignore[arg-type]  # one of resources.distributed
        run_id=context.run.run_id,
        spec=context.spec.model_dump(mode="json"),
        inputs=context.digests,
        outputs={role: output.kind for role, output in outputs.items()},
        sections=list(sections),
        mlflow_run_id=context.mlflow_run_id,
    )
    # The same work has the same name, so that a stage whose pod was lost finds the TrainJob that it had made.
    identity = digest_json(task.model_dump(exclude={"mlflow_run_id"}))
    name = job_name(task.stage, identity)
    folder = f"distributed/{name}"
    for role, path in inputs.items():
        context.run.store.put_tree(f"artifacts/{context.digests[role]}", path)
    jobs = TrainJobs.open()
    jobs.check_runtime(resources.trainer.runtime, resources.trainer.kind)

    def fresh() -> None:
        """Leave only the description of the work: what an earlier TrainJob has left is not this one's."""
        context.run.store.remove(f"runs/{context.run.run_id}/{folder}")
        write_file(context.run, folder, TASK_FILE, task)

    pod = own_pod()
    job = train_job(
        name=name,
        namespace=jobs.namespace,
        stage=task.stage,
        run_id=context.run.run_id,
        resources=resources,
        task_uri=f"{context.run.uri}/{folder}/{TASK_FILE}",
        owner=Owner(*pod) if pod else None,
    )
    with _showing_life(context.run, folder), _deleting_on_sigterm(lambda: jobs.delete(name)):
        try:
            run_to_end(jobs, job, note=context.observer.note, fresh=fresh)
        except TrainJobFailedError as error:
            raise _of_ranks(context.run, folder, error) from error
    return _take(context, folder, outputs)


@contextmanager
def _showing_life(run: RunStore, folder: str) -> Iterator[None]:
    """Within the context the nodes see that somebody waits for them; they end when this process was killed."""
    over = threading.Event()

    def beat() -> None:
        while not over.is_set():
            with suppress(TunegateError):
                run.store.put(f"runs/{run.run_id}/{folder}/{SIGN_OF_LIFE}", os.urandom(8).hex().encode())
            over.wait(_BEAT_SECONDS)

    thread = threading.Thread(target=beat, name="sign-of-life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(5.0)


@contextmanager
def _deleting_on_sigterm(delete: Callable[[], object]) -> Iterator[None]:
    """Within the context SIGTERM deletes the TrainJob and ends the process.

    A run that is stopped must not leave its nodes at work; a pod that is moved loses no more than what was trained
    since the last checkpoint, from which its next try makes the nodes go on. KFP's launcher, up to 2.17 at least, ends
    at SIGTERM without a word to its child, and the container with it: see `_showing_life`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        try:
            delete()
        finally:
            raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _take(context: StageContext, folder: str, outputs: Mapping[str, Output]) -> Outcome:
    """Bring what rank 0 has put on S3 here."""
    data = read_file(context.run, folder, OUTCOME_FILE)
    if data is None:
        raise TunegateError(
            "the TrainJob is complete, but there is no outcome",
            key=f"{context.run.uri}/{folder}/{OUTCOME_FILE}",
            fix="see the log of node 0: kubectl logs, or tunegate cluster logs",
        )
    done = Done.model_validate_json(data)
    for role, output in outputs.items():
        fetch_artifact(done.outputs[role], context.run, output.path)
    context.observer.rows.extend(done.curve)
    return Outcome(
        summary=done.summary,
        figures=done.figures,
        values=done.values,
        verdict=done.verdict,
        files={name: text.encode() for name, text in done.files.items()},
    )


def _of_ranks(run: RunStore, folder: str, failed: TunegateError) -> TunegateError:
    """The error that a rank gave up with, else that of the TrainJob."""
    data = read_file(run, folder, ERROR_FILE)
    if data is None:
        return failed
    said = Failure.model_validate_json(data)
    key = said.key or f"rank {said.rank}"
    if said.exit_code == TrainingStoppedError.exit_code:
        return TrainingStoppedError(said.reason, key=key, fix=said.fix)
    return _RankError(said.reason, key=key, fix=said.fix, exit_code=said.exit_code)


class _RankError(TunegateError):
    """The error of a rank, with the exit code that it had there."""

    def __init__(self, reason: str, *, key: str, fix: str | None, exit_code: int) -> None:
        super().__init__(reason, key=key, fix=fix)
        self.exit_code = exit_code  # type: ignore[misc]  # a class's own for every other kind


def write_file(run: RunStore, folder: str, name: str, content: BaseModel) -> None:
    """Put a small file into the folder of a TrainJob's work."""
    run.store.put(f"runs/{run.run_id}/{folder}/{name}", content.model_dump_json(indent=2).encode())


def read_file(run: RunStore, folder: str, name: str) -> bytes | None:
    """Read a small file of a TrainJob's work, None when there is none."""
    return run.store.get(f"runs/{run.run_id}/{folder}/{name}")


def delete_train_jobs(run_id: str, note: Callable[[str], None]) -> None:
    """Delete the TrainJobs of a run, if its stages may have made some; for the exit handler, which must not fail here.

    Args:
        run_id: Id of the run.
        note: Told what was deleted, and what went wrong.
    """
    if resources_for_nodes() is None:
        return
    from tunegate.trainjob.client import TrainJobs

    try:
        jobs = TrainJobs.open()
        for name in jobs.of_run(run_id):
            if jobs.delete(name):
                note(f"deleted the TrainJob {name}")
    except TunegateError as error:
        note(f"TrainJobs may be left over: {error}")


def read_task(uri: str) -> tuple[Task, str]:
    """The description of the work at `uri`, and its folder below the run's.

    Raises:
        StorageError: S3 cannot be read.
        SpecError: There is none.
    """
    place, _, name = uri.rpartition("/")
    data = open_store(place).get(name)
    if data is None:
        raise SpecError("there is no description of the work", key="task", value=uri, fix="see the stage that made it")
    return Task.model_validate_json(data), f"distributed/{place.rpartition('/')[2]}"


def spec_of(task: Task) -> TuneSpec:
    """The run spec of the work."""
    return TuneSpec.model_validate(task.spec)
