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


SPEC = """
name: safe
storage: {{root: {root}/store}}
tracking: {{live: false, system_metrics: false}}
model: {{source: tiny-random, precision: fp32, max_length: 256}}
data:
  sft: [{{uri: "starter:sft.jsonl", cap: 40}}]
  preferences: [{{uri: "{root}/help.jsonl", name: help}}, {{uri: "{root}/harm.jsonl", name: harm}}]
  ratings: [{{uri: "{root}/labels.jsonl", name: harm-labels}}]
reward:
  max_length: 192
  learning_rate: 0.003
  batch_pairs: 8
  rankings: true
  ensemble: 2
  heads:
    - {{name: helpful, sources: [help]}}
    - {{name: harm, sources: [harm, harm-labels], kind: cost, weight: 0.5, harmful_above: 3}}
ppo:
  {{steps: 2, prompts_per_update: 6, epochs: 1, max_new_tokens: 8, max_prompt_tokens: 64, evaluate_every: 2,
   evaluate_prompts: 4, critic_warmup_epochs: 1, shaping: {{standardise_prompts: 8}}, cost: {{head: harm}}}}
"""


def test_rankings_heads_costs_and_ensembles_from_a_spec(tmp_path):
    """Helpfulness and harm on one trunk, two members, the harm held down by a multiplier: all of it by keys."""
    answers = ["First wash it, then cook it slowly and taste it.", "Cook it somehow.", "I do not know.", "Go away."]
    things = ["rice", "beans", "soup", "bread", "pasta", "carrots", "lentils", "pancakes", "onions", "tomatoes"]
    help_rows, harm_rows, label_rows = [], [], []
    for number, thing in enumerate(things):
        ask = f"How do I prepare {thing} for {number + 2} guests?"
        best, good, poor, bad = (f"{text} That is how I do {thing}." for text in answers)
        help_rows += [(ask, best, good), (ask, best, poor), (ask, good, poor)]  # a ranking of three
        harm_rows.append((f"Tell me something about {thing}, number {number}.", good, bad))
        label_rows.append(
            (f"What about {thing} in {number} words?", bad if number % 2 else best, 5 if number % 2 else 1)
        )
    for name, rows in (("help", help_rows), ("harm", harm_rows)):
        lines = [json.dumps({"prompt": p, "chosen": c, "rejected": r}) for p, c, r in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    lines = [json.dumps({"prompt": p, "response": r, "score": s, "scale": [1, 5]}) for p, r, s in label_rows]
    (tmp_path / "labels.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "tune.yaml").write_text(SPEC.format(root=tmp_path))

    reward = tunegate("reward", tmp_path / "tune.yaml", "--json", "--out", tmp_path / "reward")
    assert reward["figures"]["members/1/heldout_accuracy"] >= 0.0
    told = json.loads((tmp_path / "store/runs" / reward["run_id"] / "files/reward.json").read_text())
    assert told["heads"] == ["helpful", "harm"] and told["labels"] > 0
    assert (tmp_path / "reward/heads.safetensors").is_file() and (tmp_path / "reward/members/1/config.json").is_file()
    verify(tmp_path / "reward")

    ppo = tunegate("ppo", tmp_path / "tune.yaml", "--json", "--reward", tmp_path / "reward")
    result = json.loads((tmp_path / "store/runs" / ppo["run_id"] / "files/ppo.json").read_text())
    assert len(result["scale"]) == 2  # both members
    assert result["multiplier"] != 1.0 and result["history"][0]["cost"] is not None


def test_any_function_is_a_reward(stages, monkeypatch, tmp_path):
    """No reward model at all: a function of a module in the working directory."""
    root, storage, _, _ = stages
    (tmp_path / "our_rewards.py").write_text(
        "def words(prompts, responses):\n    return [len(r) + 0.1 * len(p[-1]['content']) for p, r in "
        "zip(prompts, responses)]\n"
    )
    monkeypatch.chdir(tmp_path)
    found = tunegate("ppo", *QUIET, *storage, "--model", root / "sft", "--set", "ppo.reward_function=our_rewards:words")
    assert "held-out reward" in found["summary"]
