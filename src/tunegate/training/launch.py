"""Trainers in several processes of one machine: the same call, run by torchrun, with one result.

The call is pickled into a folder of its own, torchrun starts `tunegate.training.worker` in every process, and rank 0
writes what the trainer reports, what it returns, or why it failed. SIGTERM to the caller reaches every process, and all
of them stop at the same step.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from tunegate.errors import TrainingError
from tunegate.observer import NullObserver, Observer
from tunegate.training.config import DistributedSpec

Result = TypeVar("Result")

JOB, EVENTS, RESULT, ERROR = "job.pickle", "events.jsonl", "result.pickle", "error.pickle"
_POLL_SECONDS = 0.1


def process_count(spec: DistributedSpec) -> int:
    """How many processes the spec means on this machine."""
    if spec.processes != "auto":
        return spec.processes
    import torch

    return max(1, torch.cuda.device_count())


def launch(
    trainer: Callable[..., Result],
    *inputs: Any,
    distributed: DistributedSpec,
    observer: Observer | None = None,
    stop_requested: Callable[[], bool] | None = None,
    **options: Any,
) -> Result:
    """Call a trainer, in as many processes as the spec says, or in step with the other ranks where it runs on some.

    Args:
        trainer: A function of an importable module.
        inputs: Its positional arguments; what crosses into other processes is pickled.
        distributed: Processes and sharding.
        observer: Told what rank 0 reports.
        stop_requested: When true, all processes are told to stop.
        options: Its other keyword arguments.

    Returns:
        What the trainer returned on rank 0.

    Raises:
        TunegateError: As raised by the trainer on rank 0.
        TrainingError: If a process ended without saying why.
    """
    from tunegate.training.ranks import world

    observer = observer or NullObserver()
    if world()[1] > 1:  # this process is a rank itself, e.g. on a node of a TrainJob
        options |= {"sharding": distributed.sharding}
        return trainer(*inputs, observer=observer, stop_requested=stop_requested, **options)
    count = process_count(distributed)
    if count == 1:
        return trainer(*inputs, observer=observer, stop_requested=stop_requested, **options)
    options |= {"sharding": distributed.sharding}
    with tempfile.TemporaryDirectory(prefix="tunegate-ranks-") as name:
        folder = Path(name)
        (folder / JOB).write_bytes(pickle.dumps((os.getpid(), trainer, inputs, options)))
        (folder / EVENTS).touch()
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(_command(count, folder), env=_environment(count), stdout=log, stderr=log,
                                       start_new_session=True)  # fmt: skip
        try:
            status = _follow(process, folder, observer, stop_requested)
        finally:
            if process.poll() is None:
                _signal_ranks(folder, signal.SIGKILL)
                process.kill()
                process.wait()
        if (folder / RESULT).is_file():
            found: Result = pickle.loads((folder / RESULT).read_bytes())
            return found
        raise _failure(folder, status)


def _command(count: int, folder: Path) -> list[str]:
    """A session of its own keeps the terminal's and the pod's signals from torchrun; they are passed on by hand."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    return [*run, "-m", "tunegate.training.worker", str(folder)]


def _environment(count: int) -> dict[str, str]:
    threads = max(1, (os.cpu_count() or 1) // count)
    # What the caller could import by the state of its path, the processes must find as well: a module with a reward
    # function in the working directory, say.
    path = os.pathsep.join(dict.fromkeys(entry or os.getcwd() for entry in sys.path))  # noqa: PTH109
    return {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONPATH": path}


def _follow(
    process: subprocess.Popen[bytes],
    folder: Path,
    observer: Observer,
    stop_requested: Callable[[], bool] | None,
) -> int:
    told = False
    with (folder / EVENTS).open() as reader:
        while True:
            ended = process.poll()
            for event in _lines(reader):
                getattr(observer, event["call"])(*event["arguments"])
            if ended is not None:
                return ended
            if not told and stop_requested is not None and stop_requested():
                told = True
                _signal_ranks(folder, signal.SIGTERM)
            time.sleep(_POLL_SECONDS)


def _lines(reader: Any) -> Iterator[dict[str, Any]]:
    """Complete lines that have been written since the last call."""
    while True:
        place = reader.tell()
        line = reader.readline()
        if not line.endswith("\n"):
            reader.seek(place)
            return
        yield json.loads(line)


def _signal_ranks(folder: Path, number: signal.Signals) -> None:
    for file in folder.glob("rank-*.pid"):
        with suppress(ProcessLookupError, ValueError):
            os.kill(int(file.read_text()), number)


def _failure(folder: Path, status: int) -> Exception:
    """What the trainer raised on rank 0, or what the processes last said."""
    if (folder / ERROR).is_file():
        kind, reason, key, value, fix = pickle.loads((folder / ERROR).read_bytes())
        error: Exception = kind(reason, key=key, value=value, fix=fix)
        return error
    said = (folder / "log").read_text(errors="replace").strip().splitlines()
    print("\n".join(said[-120:]), file=sys.stderr)
    # torchrun puts its own report last; what counts is what a rank said: `[rank0]: RuntimeError: ...`.
    of_ranks = [line.split("]:", 1)[1] for line in said if line.startswith("[rank")]
    errors = [line for line in of_ranks or said if "Error" in line]
    reason = errors[-1] if errors else said[-1] if said else "no message"
    return TrainingError(
        f"a training process ended with status {status}: {reason.strip()}",
        key="distributed.processes",
        fix="look at the log above for the first process that failed; too little memory is the usual cause",
    )
