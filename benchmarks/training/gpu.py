"""The comparison on a GPU in one command: a 135M and a 1B model, batches of 64, prompts of 256, responses of 128.

    python benchmarks/training/gpu.py --out benchmarks/training/results

Models have random weights, so nothing is downloaded. Where packages cannot be downloaded either, `--wheels FOLDER`
names a folder with `common/*.whl` (what the machine lacks for Tunegate), `trl-1.12/*.whl` and `trl-1.16/*.whl` (each
release with what it needs besides); they are unpacked beside the work. `--device cpu --tiny` tries the path out in
minutes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODELS = ("random-135m", "random-1b")
SIZES = {
    "sft-steps": 11,
    "reward-steps": 6,
    "ppo-updates": 3,
    "ppo-batch": 64,
    "ppo-micro": 16,
    "prompt": 256,
    "response": 128,
    "max-length": 1024,
}
TINY = SIZES | {
    "sft-steps": 3,
    "reward-steps": 2,
    "ppo-updates": 2,
    "ppo-batch": 8,
    "ppo-micro": 4,
    "response": 8,
}


def unpack(wheels: Path, work: Path) -> tuple[Path, Path]:
    """Unpack wheels; returns the folder of the common packages and the one of the peers'."""
    for group in ("common", "trl-1.12", "trl-1.16"):
        target, files = work / "packages" / group, sorted((wheels / group).glob("*.whl"))
        if files and not target.is_dir():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
            subprocess.run([*pip, "--target", str(target), *map(str, files)], check=True)
    return work / "packages" / "common", work / "packages"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(".tunegate/bench-gpu"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--suites", nargs="+", default=["ppo", "sft", "reward"])
    parser.add_argument("--slices", type=int, default=2)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a two-layer model and few steps")
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--peers", type=Path, default=HERE / ".peers")
    parser.add_argument("--limit", type=float, default=520.0, help="start nothing new after so many seconds")
    given = parser.parse_args()
    until = time.monotonic() + given.limit
    peers = given.peers
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1] / "src")])}
    if given.wheels is not None:
        common, peers = unpack(given.wheels, given.work)
        environment["PYTHONPATH"] += os.pathsep + str(common)
    for model in ["random-tiny"] if given.tiny else given.models:
        work = given.work / model
        sizes = [part for name, value in (TINY if given.tiny else SIZES).items() for part in (f"--{name}", str(value))]
        if not (work / "sizes.json").is_file():
            _run([HERE / "workload.py", "--work", work, "--model", model, *sizes], environment)
        for suite in given.suites:
            left = until - time.monotonic()
            out = given.out / f"{given.device}-{model}-{suite}.json"
            options = ["--slices", given.slices, "--device", given.device, "--peers", peers, "--limit", max(0.0, left)]
            _run([HERE / "compare.py", "--work", work, "--suite", suite, *options, "--out", out], environment)
            _run([HERE / "render.py", "compare", out, work / "images"], environment)


def _run(command: Sequence[object], environment: dict[str, str]) -> None:
    subprocess.run([sys.executable, *map(str, command)], check=True, env=environment)


if __name__ == "__main__":
    main()
