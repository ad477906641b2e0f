"""What every side of a comparison shares: how steps are timed and how figures are written.

Only the standard library at module level: this file is imported in the project's environment and in the peers'.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any


@dataclass
class Figures:
    """What one process measured.

    Attributes:
        job: Name of the job, e.g. `ppo/ours-shared`.
        unit: What `units` counts: `update`, `token`, `pair`.
        seconds: Wall-clock time of each timed step; the first, which touches memory for the first time, is left out.
        cpu_seconds: Processor time of each timed step, over all threads: hardly touched by what else the machine does.
        units: Work of each timed step.
        losses: Training loss of every step, the first included.
        scores: Mean score of each update's responses (PPO).
        kl: KL(policy, reference) of each update's responses, nats a response (PPO).
        tokens: Response tokens that were trained on, mean of an update (PPO).
        threads: That torch computed with.
        peak_bytes: Largest resident memory of the process; on a GPU the most memory allocated there.
        flops: Multiply-and-add operations x 2 of the matrix products of each timed step, where they were counted.
        versions: Of the packages that matter.
        settings: What the job was run with.
    """

    job: str
    unit: str
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    units: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    tokens: float | None = None
    threads: int = 0
    peak_bytes: int = 0
    flops: list[float] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Fill in memory and versions, and write."""
        import torch

        self.threads = torch.get_num_threads()
        self.peak_bytes = peak_bytes()
        self.versions = versions()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


class StepClock:
    """Wall-clock times at the ends of steps."""

    def __init__(self) -> None:
        self.marks: list[float] = []
        self.cpu_marks: list[float] = []

    def tick(self) -> None:
        """A step has ended."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())
        self.cpu_marks.append(time.process_time())

    def into(self, figures: Figures) -> None:
        """Write down the times between the marks."""
        figures.seconds = [after - before for before, after in pairwise(self.marks)]
        figures.cpu_seconds = [after - before for before, after in pairwise(self.cpu_marks)]


def peak_bytes() -> int:
    """Most memory in use so far."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    """Of the packages that decide about speed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for name in ("torch", "transformers", "accelerate", "peft", "trl", "tunegate"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text())
