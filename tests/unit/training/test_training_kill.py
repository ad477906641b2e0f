"""Trainings that are killed, again and again, end where they would have ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, dict]:
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(HERE / "killed_training.py"), str(tmp_path_factory.mktemp("killed"))],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "dpo"])
def test_ten_kills_at_random_moments_change_no_weight(reports, stage):
    """kill -9 ten times, the newest checkpoint damaged now and then, and once SIGTERM: bit-equal weights on a CPU."""
    report = reports[stage]
    assert report["kills"] == 10
    assert report["damaged"] >= 1
    assert set(report["found"]) == {report["expected"]}
    assert any(step for step in report["resumed"]), "no training went on from a checkpoint"
    # SIGTERM ends with the documented status for "try again"; started again, the training ends.
    assert report["terminated"] == [75, 0]
    assert report["kept"] == 2
