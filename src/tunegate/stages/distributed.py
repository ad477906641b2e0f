"""One process of a training stage on several nodes: `torchrun --module tunegate.stages.distributed TASK_URI`.

Every node fetches the inputs from S3 once; all ranks do the stage's work together; rank 0 logs to the stage's MLflow
run and puts outputs and outcome on S3, where the stage's own pod waits for them. A rank that fails says why on S3 and
in its container's termination message.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

from tunegate.config import TuneSpec
from tunegate.errors import StorageError, TunegateError
from tunegate.stages.context import Outcome, Output, StageContext, fetch_artifact, open_tracker, scratch, seal
from tunegate.stages.nodes import (
    ERROR_FILE,
    ERROR_FOLDER,
    OUTCOME_FILE,
    SIGN_OF_LIFE,
    Done,
    Failure,
    Task,
    Work,
    read_file,
    read_task,
    spec_of,
    write_file,
)
from tunegate.stages.observe import StageObserver
from tunegate.storage.manifest import verify
from tunegate.storage.runs import OutputRef, RunStore
from tunegate.tracking.tracker import PLACEHOLDER_PREFIX, Tracker

# Ranks wait for each other while one fetches models or measures; the default of ten minutes is for collectives.
_PATIENCE = timedelta(hours=3)
# The stage's pod may be moved to another machine, which must be started and pull the image first.
_FORGOTTEN_SECONDS = 1800.0
_LOOK_SECONDS = 60.0
_TERMINATION_LOG = Path("/dev/termination-log")
_TERMINATION_BYTES = 4096


@dataclass(frozen=True)
class _Rank:
    """This process among all."""

    rank: int
    local_rank: int
    size: int

    @classmethod
    def of_environment(cls) -> _Rank:
        """As torchrun says."""
        return cls(*(int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))


class _SilentObserver(StageObserver):
    """For the ranks besides 0, which would say the same."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Ignore."""

    def event(self, kind: str, **content: Any) -> None:
        """Ignore."""

    def quiet(self) -> StageObserver:
        """Itself."""
        return self


def main(arguments: list[str]) -> int:
    """Do this rank's part of the work described at the URI in the first argument; the exit status."""
    place = _Rank.of_environment()
    task, folder = read_task(arguments[0])
    spec = spec_of(task)
    run = RunStore(spec.storage.root, task.run_id)
    try:
        with _process_group(place), _stopping_when_forgotten(run, folder, place):
            _work(task, folder, spec, run, place)
    except BaseException as error:
        _tell(run, folder, place.rank, error)
        if isinstance(error, TunegateError):
            print(error, file=sys.stderr)
            return error.exit_code
        raise
    return 0


@contextmanager
def _process_group(place: _Rank) -> Iterator[None]:
    import torch
    from torch import distributed

    if torch.cuda.is_available():
        torch.cuda.set_device(place.local_rank)
        distributed.init_process_group("cpu:gloo,cuda:nccl", timeout=_PATIENCE)
    else:
        distributed.init_process_group("gloo", timeout=_PATIENCE)
    yield
    # Only at a good end: after an error other ranks may be waiting in a collective, and torchrun ends them.
    distributed.destroy_process_group()


@contextmanager
def _stopping_when_forgotten(run: RunStore, folder: str, place: _Rank) -> Iterator[None]:
    """Within the context all ranks write a checkpoint and end when nobody has followed them for half an hour.

    The stage's pod deletes the TrainJob, or the run's exit handler does. Where both were killed, accelerators would be
    held for a run that is long over. Rank 0 is told to stop, and the trainers agree on it between steps.
    """
    if place.rank != 0:
        yield
        return
    over = threading.Event()

    def look() -> None:
        last: bytes | None = b""
        since = time.monotonic()
        while not over.wait(_LOOK_SECONDS):
            try:
                sign = read_file(run, folder, SIGN_OF_LIFE)
            except TunegateError:  # then the stage's pod may be unable to write, too
                since = time.monotonic()
                continue
            if sign != last:
                last, since = sign, time.monotonic()
            elif time.monotonic() - since > _FORGOTTEN_SECONDS:
                minutes = _FORGOTTEN_SECONDS / 60
                print(f"the stage's pod has shown no sign of life for {minutes:.0f} minutes: stopping", file=sys.stderr)
                os.kill(os.getpid(), signal.SIGTERM)
                return

    threading.Thread(target=look, name="sign-of-life", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _work(task: Task, folder: str, spec: TuneSpec, run: RunStore, place: _Rank) -> None:
    from torch import distributed

    if place.rank == 0:  # left by ranks that were suspended and are back
        run.store.remove(f"runs/{run.run_id}/{folder}/{ERROR_FOLDER}")
    here = scratch(spec, run.run_id) / folder
    here.mkdir(parents=True, exist_ok=True)
    inputs = {role: here / "inputs" / role for role in task.inputs}
    if place.local_rank == 0:
        for role, path in inputs.items():
            _fetch(task.inputs[role], spec, run, path)
    distributed.barrier()
    work: Work = import_module(f"tunegate.stages.{task.stage}").work
    with tempfile.TemporaryDirectory(prefix=f"rank-{place.rank}-", dir=here) as made:
        outputs = {role: Path(made) / role for role in task.outputs}
        for path in outputs.values():
            path.mkdir()
        context = _context(task, spec, run, place, Path(made))
        outcome = work(context, inputs, outputs)
        if place.rank == 0:
            context.tracker.flush()
            done = _done(task, outcome, context, outputs)
            write_file(run, folder, OUTCOME_FILE, done)
        distributed.barrier()


def _fetch(digest: str, spec: TuneSpec, run: RunStore, path: Path) -> None:
    """Bring an input here, unless an earlier attempt on this node has."""
    with suppress(StorageError):
        if verify(path).digest == digest:
            return
    shutil.rmtree(path, ignore_errors=True)
    fetch_artifact(OutputRef(uri=f"{spec.storage.root}/artifacts/{digest}", digest=digest, kind=""), run, path)
    if verify(path).digest != digest:
        raise StorageError("it is not the artifact that was asked for", key=str(path), value=digest)


def _context(task: Task, spec: TuneSpec, run: RunStore, place: _Rank, buffer: Path) -> StageContext:
    """The stage's context on this rank; only rank 0 is heard."""
    tracker: Tracker
    observer: StageObserver
    # A placeholder stands for a run that MLflow could not take yet; only the stage's own pod knows what it becomes.
    heard = place.rank == 0 and not task.mlflow_run_id.startswith(PLACEHOLDER_PREFIX)
    if heard:
        tracker = open_tracker(spec, run.run_id)
    else:
        tracker = Tracker.open("", "", artifact_location=None, buffer=buffer / "unsent", live=False)
    if place.rank == 0:
        observer = StageObserver(task.stage, tracker=tracker, mlflow_run_id=task.mlflow_run_id)
    else:
        observer = _SilentObserver(task.stage)
    return StageContext(
        task.stage, spec, run, observer, tracker, task.mlflow_run_id, spec.stage_seed(task.stage), dict(task.inputs)
    )


def _done(task: Task, outcome: Outcome, context: StageContext, outputs: Mapping[str, Path]) -> Done:
    refs = {
        role: seal(Output(outputs[role], kind), context.digests, context.spec, task.sections, context.run, task.stage)
        for role, kind in task.outputs.items()
    }
    return Done(
        summary=outcome.summary,
        figures={name: float(value) for name, value in outcome.figures.items()},
        values=outcome.values,
        verdict=outcome.verdict,
        files={name: data.decode() for name, data in outcome.files.items()},
        outputs=refs,
        curve=context.observer.rows,
    )


def _tell(run: RunStore, folder: str, rank: int, error: BaseException) -> None:
    """Say why this rank gives up where the stage's pod and Kubernetes look; the first rank to say so is heard."""
    if isinstance(error, TunegateError):
        failure = Failure(rank=rank, reason=error.reason, key=error.key, fix=error.fix, exit_code=error.exit_code)
        shown = str(error)
    else:
        failure = Failure(rank=rank, reason=f"{type(error).__name__}: {error}")
        shown = "".join(traceback.format_exception(error))
    with suppress(OSError):
        _TERMINATION_LOG.write_text(f"rank {rank}: {shown}"[-_TERMINATION_BYTES:])
    with suppress(TunegateError):
        if run.store.get(f"runs/{run.run_id}/{folder}/{ERROR_FILE}") is None:
            write_file(run, folder, ERROR_FILE, failure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
