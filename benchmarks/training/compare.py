"""Tunegate beside TRL on the same work, in turns: ours, theirs, ours, theirs, and so on.

    python benchmarks/training/compare.py --work .tunegate/bench --suite cpu --slices 2

Each measurement is a process of its own, so peak memory is that of one side alone. A slice runs every job once; a
machine that is slower for a while is slower for all of them. What is done already is not done again, so a broken run
can be taken up. The figures of all slices are joined in one JSON file: for each step the least and the median time over
the slices, added up over the steps.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PPO_PEER, SFT_PEER = "trl-1.12", "trl-1.16"


@dataclass(frozen=True)
class Job:
    """One thing to measure.

    Attributes:
        name: `stage/side-variant`.
        script: Beside this file.
        peer: Folder of the peer's virtual environment under `--peers`; None is the environment of this process.
        arguments: After the script's name.
        slices: Run in so many slices only; None is all.
    """

    name: str
    script: str
    peer: str | None
    arguments: tuple[str, ...]
    slices: int | None = None


def _ours(stage: str, variant: str, slices: int | None = None) -> Job:
    return Job(f"{stage}/ours-{variant}", "ours.py", None, (stage, "--variant", variant), slices)


def _trl(stage: str, variant: str, slices: int | None = None) -> Job:
    peer = PPO_PEER if stage == "ppo" else SFT_PEER
    return Job(f"{stage}/trl-{variant}", f"trl_{stage}.py", peer, ("--variant", variant), slices)


SUITES: dict[str, tuple[Job, ...]] = {
    "ppo": (
        _ours("ppo", "like"),
        _trl("ppo", "fp32"),
        _ours("ppo", "shared"),
        _trl("ppo", "fp32-whole", 1),
        _trl("ppo", "bf16", 1),
    ),
    "sft": (
        _ours("sft", "bf16"),
        _trl("sft", "bf16-padded"),
        _trl("sft", "bf16-packed"),
        _ours("sft", "fp32", 1),
        _trl("sft", "fp32-padded", 1),
        _trl("sft", "fp32-packed", 1),
    ),
    "reward": (
        _ours("reward", "bf16"),
        _trl("reward", "bf16"),
        _ours("reward", "fp32", 1),
        _trl("reward", "fp32", 1),
    ),
}
SUITES["all"] = tuple(job for jobs in list(SUITES.values()) for job in jobs)


def run(
    jobs: Sequence[Job], work: Path, peers: Path, *, slices: int, device: str, lock: Path | None, limit: float | None
) -> None:
    """Measure what is not measured yet.

    Args:
        jobs: In turns.
        work: Folder of `workload.py`; measurements go to `runs/` in it.
        peers: Folder of the peers' virtual environments.
        slices: Times that each job is run.
        device: `cpu` or `cuda`.
        lock: A file that is locked while a process measures; None locks nothing.
        limit: Start nothing new after so many seconds.
    """
    started = time.monotonic()
    for number in range(slices):
        peak = work / "runs" / f"peak-{number}.json"
        if not peak.is_file():
            with _locked(lock):
                peak.parent.mkdir(exist_ok=True)
                peak.write_text(json.dumps(matrix_peak(device)) + "\n")
        for job in jobs:
            out = work / "runs" / f"{job.name.replace('/', '-')}-{number}.json"
            if out.is_file() or (job.slices is not None and number >= job.slices):
                continue
            if limit is not None and time.monotonic() - started > limit:
                return
            _measure(job, work, peers, out, device, lock)
    for job in jobs:
        out = work / "runs" / f"{job.name.replace('/', '-')}-flops.json"
        if job.peer is None and not out.is_file() and (limit is None or time.monotonic() - started < limit):
            _measure(job, work, peers, out, device, lock, extra=("--flops",))


def _measure(
    job: Job, work: Path, peers: Path, out: Path, device: str, lock: Path | None, extra: Sequence[str] = ()
) -> None:
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    python = sys.executable
    if job.peer is not None and (peers / job.peer / "bin" / "python").is_file():
        python = str(peers / job.peer / "bin" / "python")
    elif job.peer is not None:  # a folder of packages (`pip install --target`), before those of this environment
        environment["PYTHONPATH"] = os.pathsep.join([str(peers / job.peer), environment.get("PYTHONPATH", "")])
    command = [python, str(HERE / job.script), *job.arguments, "--work", str(work), "--out", str(out), *extra]
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with _locked(lock):
        started = time.monotonic()
        log = out.with_suffix(".log")
        with log.open("w") as stream:
            done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=environment, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{job.name} failed, see {log}:\n" + "".join(log.read_text()[-2000:]))
    print(f"{job.name}: {time.monotonic() - started:.0f} s", flush=True)


@contextmanager
def _locked(lock: Path | None) -> Iterator[None]:
    if lock is None:
        yield
        return
    with lock.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def matrix_peak(device: str) -> dict[str, float]:
    """Operations a second of the largest square matrix products that the machine is fast at, bf16 and fp32."""
    import torch

    size, least = (8192, 1.0) if device == "cuda" else (4096, 3.0)
    found = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
        best, until = float("inf"), time.perf_counter() + least
        while time.perf_counter() < until:
            started = time.perf_counter()
            left @ right
            if device == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - started)
        found[name] = 2 * size**3 / best
    return found


def join(work: Path, jobs: Sequence[Job], device: str) -> dict[str, Any]:
    """All measurements of a folder as one result."""
    runs = work / "runs"
    peaks = [json.loads(path.read_text()) for path in sorted(runs.glob("peak-*.json"))]
    peak = {name: max(found[name] for found in peaks) for name in ("bf16", "fp32")}
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"device": _device_name(device), "cores": os.cpu_count(), "matrix_peak": peak},
        "work": json.loads((work / "sizes.json").read_text()),
        "jobs": {},
    }
    for job in jobs:
        stem = job.name.replace("/", "-")
        files = [path for path in sorted(runs.glob(f"{stem}-*.json")) if path.stem.removeprefix(f"{stem}-").isdigit()]
        if not files:
            continue
        found = [json.loads(path.read_text()) for path in files]
        by_step = list(zip(*(one["seconds"] for one in found), strict=True))
        units = [statistics.mean(values) for values in zip(*(one["units"] for one in found), strict=True)]
        least, middle = sum(map(min, by_step)), sum(map(statistics.median, by_step))
        cpu = sum(map(min, zip(*(one["cpu_seconds"] for one in found), strict=True)))
        entry = {
            "slices": len(found),
            "unit": found[0]["unit"],
            "units": sum(units),
            "seconds_min": least,
            "seconds_median": middle,
            "seconds_by_slice": [one["seconds"] for one in found],
            "cpu_seconds_min": cpu,
            "rate_best": sum(units) / least,
            "rate_median": sum(units) / middle,
            "rate_cpu": sum(units) / cpu,
            "peak_bytes": max(one["peak_bytes"] for one in found),
            "tokens": statistics.mean(one["tokens"] for one in found) if found[0]["tokens"] is not None else None,
            **{name: found[0][name] for name in ("losses", "scores", "kl", "threads", "versions", "settings")},
        }
        counted = runs / f"{stem}-flops.json"
        if counted.is_file():
            flops = json.loads(counted.read_text())["flops"]
            entry["flops"] = sum(flops)
            entry["share_of_peak"] = sum(flops) / least / peak["fp32" if "like" in stem or "fp32" in stem else "bf16"]
        result["jobs"][job.name] = entry
    return result


def _device_name(device: str) -> str:
    if device == "cuda":
        import torch

        return str(torch.cuda.get_device_name())
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder that workload.py wrote")
    parser.add_argument("--suite", choices=sorted(SUITES), default="all")
    parser.add_argument("--only", action="append", help="jobs by name, e.g. ppo/ours-shared; may be repeated")
    parser.add_argument("--slices", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--peers", type=Path, default=HERE / ".peers")
    parser.add_argument("--lock", type=Path, help="file that is locked while a process measures")
    parser.add_argument("--limit", type=float, help="start nothing new after so many seconds")
    parser.add_argument("--out", type=Path, help="where the joined result goes")
    given = parser.parse_args()
    jobs = [job for job in SUITES[given.suite] if given.only is None or job.name in given.only]
    run(jobs, given.work, given.peers, slices=given.slices, device=given.device, lock=given.lock, limit=given.limit)
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(join(given.work, jobs, given.device), indent=1) + "\n")


if __name__ == "__main__":
    main()
