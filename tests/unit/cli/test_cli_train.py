"""`tunegate sft`, `reward` and `ppo` on the tiny model: each alone, one after the other."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from tunegate.cli import app as home
from tunegate.cli import train  # noqa: F401  (registers the commands)
from tunegate.errors import SpecError
from tunegate.storage.manifest import read_manifest, verify
from tunegate.training.dpo_results import DPOResult
from tunegate.training.ppo_results import PPOResult

QUIET = ["--profile", "smoke", "--set", "tracking.live=false", "--json"]


@pytest.fixture(autouse=True)
def here(tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.getbasetemp())


def tunegate(*words: object) -> dict:
    done = CliRunner().invoke(home.app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout[done.stdout.index("{\n") :])


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """SFT and the reward model, each from its own command."""
    root = tmp_path_factory.mktemp("alone")
    storage = ["--set", f"storage.root={root / 'store'}"]
    sft = tunegate("sft", *QUIET, *storage, "--out", root / "sft")
    reward = tunegate("reward", *QUIET, *storage, "--model", root / "sft", "--out", root / "reward")
    return root, storage, sft, reward


def test_each_stage_leaves_a_sealed_model_and_a_record(stages):
    root, _, sft, reward = stages
    assert (sft["stage"], sft["status"], reward["stage"], reward["verdict"]) == ("sft", "done", "reward", "PROMOTE")
    assert sft["figures"]["heldout/nll_after"] < sft["figures"]["heldout/nll_before"]
    for folder in ("sft", "reward"):
        assert verify(root / folder).kind in {"model", "reward_model"}
    assert read_manifest(root / "reward").parents["sft_model"] == read_manifest(root / "sft").digest
    assert reward["judge"] is not None
    assert (root / "store/runs" / sft["run_id"] / "files/report.html").is_file()


@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "rloo", "dpo"])
def test_every_last_stage_is_a_key_away(stages, algorithm):
    root, storage, _, reward = stages
    models = ["--model", root / "sft", "--reward", root / "reward", "--judge", reward["judge"]]
    sizes = [
        "dpo.max_steps=2",
        "dpo.max_length=160",
        "dpo.max_new_tokens=8",
        "dpo.evaluate_prompts=4",
        "ppo.group_size=2",
    ]
    settings = [word for key in (f"last_stage={algorithm}", *sizes) for word in ("--set", key)]
    found = tunegate("ppo", *QUIET, *storage, *models, *settings)
    text = (root / "store/runs" / found["run_id"] / "files/ppo.json").read_text()
    result = (DPOResult if algorithm == "dpo" else PPOResult).model_validate_json(text)
    assert result.algorithm == algorithm
    assert result.judge_gain is not None
    assert "held-out reward" in found["summary"]
    again = tunegate("ppo", *QUIET, *storage, *models, *settings, "--run-id", found["run_id"])
    assert again["reused_from"] == found["run_id"]


def test_a_model_of_ones_own_is_sealed_before_it_is_used(stages, tmp_path):
    """A folder from elsewhere has no manifest; it is not changed."""
    import shutil

    root, storage, _, _ = stages
    shutil.copytree(root / "sft", tmp_path / "own", ignore=shutil.ignore_patterns("manifest.json"))
    found = tunegate("sft", *QUIET, *storage, "--model", tmp_path / "own", "--set", "sft.max_steps=1")
    assert found["status"] == "done"
    assert not (tmp_path / "own/manifest.json").exists()


def test_what_is_missing_is_named(stages, tmp_path):
    _, storage, _, _ = stages
    runner = CliRunner()
    for words, kind, message in (
        (["sft"], SpecError, "nothing to train"),
        (["ppo", *QUIET, *storage], SpecError, "needs a reward"),
        (["sft", *QUIET, *storage, "--model", tmp_path / "gone"], SpecError, "no such folder"),
    ):
        done = runner.invoke(home.app, [str(word) for word in words])
        assert isinstance(done.exception, kind), done.exception
        assert message in str(done.exception)
