"""One process of a training in several; started by torchrun, see `tunegate.training.launch`."""

from __future__ import annotations

import json
import os
import pickle
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import distributed

from tunegate.errors import TunegateError
from tunegate.observer import NullObserver, Observer
from tunegate.training.launch import ERROR, EVENTS, JOB, RESULT
from tunegate.training.stopping import stop_on_sigterm

_PARENT_POLL_SECONDS = 1.0


class _Reporter:
    """Passes what a trainer reports on to the caller's observer, as JSON lines."""

    def __init__(self, file: Path) -> None:
        self._stream = file.open("a", buffering=1)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """See `Observer.metrics`."""
        self._write("metrics", {name: float(value) for name, value in values.items()}, step)

    def progress(self, done: float, total: float, unit: str, label: str = "") -> None:
        """See `Observer.progress`."""
        self._write("progress", done, total, unit, label)

    def note(self, message: str) -> None:
        """See `Observer.note`."""
        self._write("note", message)

    def _write(self, call: str, *arguments: object) -> None:
        self._stream.write(json.dumps({"call": call, "arguments": arguments}) + "\n")


def main(folder: Path) -> int:
    """Run the job in `folder` as one rank; returns the exit status."""
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    with stop_on_sigterm() as stop_requested:
        (folder / f"rank-{rank}.pid").write_text(str(os.getpid()))
        caller, trainer, inputs, options = pickle.loads((folder / JOB).read_bytes())
        _die_with(caller)
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank)
            distributed.init_process_group("cpu:gloo,cuda:nccl")
        else:
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
            distributed.init_process_group("gloo")
        observer: Observer = _Reporter(folder / EVENTS) if rank == 0 else NullObserver()
        try:
            result = trainer(*inputs, observer=observer, stop_requested=stop_requested, **options)
        except TunegateError as error:
            if rank == 0:
                content = (type(error), error.reason, error.key, error.value, error.fix)
                (folder / ERROR).write_bytes(pickle.dumps(content))
            return error.exit_code
        if rank == 0:
            (folder / RESULT).write_bytes(pickle.dumps(result))
        distributed.barrier()
    distributed.destroy_process_group()
    return 0


def _die_with(caller: int) -> None:
    """End this process when the one that asked for the training is gone, so that no rank outlives its stage."""

    def watch() -> None:
        while True:
            try:
                os.kill(caller, 0)
            except ProcessLookupError:
                os._exit(1)
            time.sleep(_PARENT_POLL_SECONDS)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
