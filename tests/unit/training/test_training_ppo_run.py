"""Whole PPO runs on a tiny model: learning, resuming, watchdogs, what is saved and reported."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tunegate.data.records import Prompt
from tunegate.errors import DataError, SpecError, TrainingError, TrainingStoppedError
from tunegate.observer import RecordingObserver
from tunegate.training.checkpoint import CheckpointFolder
from tunegate.training.heldout import measure, paired_difference
from tunegate.training.ppo import train_ppo
from tunegate.training.ppo_config import PPOSpec, WatchdogSpec
from tunegate.training.ppo_results import PPOResult
from tunegate.training.reward_model import RewardModel
from tunegate.training.rollout import Generator
from tunegate.training.update import set_advantages
from tunegate.training.watchdogs import RolloutSigns, Watchdogs, distinct_2, identical_share

TOPICS = ["bread", "rice", "a bicycle", "the moon", "tea", "a fence", "garlic", "a violin", "a cat", "snow"]


def prompts(count: int, prefix: str) -> list[Prompt]:
    return [
        Prompt(
            id=f"{prefix}{number}",
            messages=[{"role": "user", "content": f"What about {TOPICS[number % 10]} {number}?"}],
            source="even" if number % 2 == 0 else "odd",
        )
        for number in range(count)
    ]


TRAIN, HELDOUT = prompts(20, "t"), prompts(12, "h")

# Rewards live in a module, as a user's would.
sys.modules["tiny_rewards"] = module = type(sys)("tiny_rewards")


def vowels(prompts, responses):
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in responses]


def longer(prompts, responses):
    return [float(len(text)) for text in responses]


def constant(prompts, responses):
    return [1.0] * len(responses)


for function in (vowels, longer, constant):
    setattr(module, function.__name__, function)

SMALL = {
    "reward_function": "tiny_rewards:vowels",
    "steps": 4,
    "prompts_per_update": 10,
    "max_new_tokens": 8,
    "max_prompt_tokens": 64,
    "epochs": 2,
    "minibatches": 2,
    "learning_rate": 1e-2,
    "evaluate_every": 2,
    "critic_warmup_epochs": 3,
    "shaping": {"standardise_prompts": 12, "missing_eos": "none"},
    "kl": {"coefficient": 0.01, "early_stop": None, "limit": 100.0},
    "precision": "fp32",
}


def run(tiny_model: Path, out: Path, *, reward: Path | None = None, observer=None, **options) -> PPOResult:
    given = {name: options.pop(name) for name in ("checkpoints", "judge", "stop_requested") if name in options}
    seed = options.pop("seed", 3)
    spec = PPOSpec(**(SMALL | options))
    return train_ppo(tiny_model, reward, TRAIN, HELDOUT, out, spec=spec, seed=seed, observer=observer, **given)


@pytest.fixture(scope="module")
def learned(tiny_model, tmp_path_factory):
    """One run that learns, with everything it reported."""
    out, observer = tmp_path_factory.mktemp("ppo") / "policy", RecordingObserver()
    result = run(tiny_model, out, observer=observer, steps=8, prompts_per_update=20, epochs=4)
    return out, result, observer


def test_the_policy_learns(learned):
    """More vowels on prompts it was not trained on, by an interval that excludes 0, at a KL that is reported."""
    _, result, _ = learned
    assert result.reward_gain.mean > 0.3
    assert result.reward_gain.low > 0.0
    assert result.after.reward - result.before.reward == pytest.approx(result.reward_gain.mean)
    assert result.after.kl > 0.05
    assert result.after.kl_k3 > 0.05
    assert result.kept_update > 0
    assert result.stopped is None


def test_the_reference_is_where_it_starts(learned):
    """KL 0 before the first update; standardised scores of the reference near 0."""
    _, result, _ = learned
    assert result.before.kl == pytest.approx(0.0, abs=1e-4)
    assert result.evaluations[0].update == 0
    assert result.history[0].kl == pytest.approx(0.0, abs=1e-4)
    assert abs(result.before.score) < 1.0
    scale = result.scale[0]
    assert scale.gain == pytest.approx(1 / scale.deviation)
    assert scale.bias == pytest.approx(-scale.mean / scale.deviation)


def test_the_result_is_a_plain_model_folder(learned):
    """Adapters are merged; transformers loads it; it says what the best policy said."""
    from transformers import AutoModelForCausalLM

    out, result, _ = learned
    assert PPOResult.model_validate_json((out / "training.json").read_text()) == result
    assert not list(out.glob("adapter*"))
    model = AutoModelForCausalLM.from_pretrained(out)
    assert not any("lora" in name for name, _ in model.named_parameters())
    spec = PPOSpec(**SMALL)
    generator = Generator.load(out, precision="fp32")
    rows = [generator.encode(prompt.messages, spec.rollout_sampling) for prompt in HELDOUT]
    again = generator.generate_ids(rows, spec.rollout_sampling, seed=[3, 2])
    assert [completion.text for completion in again][:8] == [example.after for example in result.examples]


def test_figures_by_update_and_by_source(learned):
    """What is reported, masked; the learning rate falls linearly."""
    _, result, observer = learned
    rates = [summary.learning_rate for summary in result.history]
    assert rates == pytest.approx([1e-2 * (1 - update / 8) for update in range(8)])
    for name in ("kl", "entropy", "clip_fraction", "explained_variance", "length", "finished", "score", "reward"):
        assert len(observer.series(f"ppo/{name}")) == 8
    assert {name for _, values in observer.history for name in values} >= {"ppo/score/even", "ppo/score/odd"}
    assert result.by_source.keys() == {"even", "odd"}
    halves = result.by_source["even"], result.by_source["odd"]
    assert sum(half.after * half.n for half in halves) / 12 == pytest.approx(result.after.score)
    assert all(summary.steps == 8 for summary in result.history)
    assert result.response_tokens == pytest.approx(sum(s.length * 20 for s in result.history), abs=8)


def test_defaults():
    """Seeds, Adam's epsilon, linear decay; the defaults."""
    spec = PPOSpec()
    assert (spec.gamma, spec.gae_lambda, spec.clip, spec.epochs) == (1.0, 0.95, 0.2, 4)
    assert (spec.value_coefficient, spec.kl.coefficient, spec.temperature) == (0.1, 0.05, 0.7)
    assert PPOSpec(method="full").policy_learning_rate == 3e-6
    assert (spec.adam_epsilon, spec.schedule, spec.shaping.missing_eos_penalty) == (1e-5, "linear", 1.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"kl": {"controller": "adaptive", "target": 0.5, "horizon": 50, "early_stop": None, "limit": 100.0}},
        {"method": "full", "learning_rate": 1e-3, "critic": "separate", "critic_warmup_epochs": 1},
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(tiny_model, tiny_reward, tmp_path, changes):
    """Policy, critic, both optimizers, schedule, KL controller, sampler; bit by bit."""
    options = changes | {"reward_function": None, "reward": tiny_reward, "prompts_per_update": 6, "epochs": 1}
    straight = run(tiny_model, tmp_path / "a", checkpoints=tmp_path / "ca", checkpoint_every=1, **options)

    asked = iter([False] * 4 + [True])  # twice an update: before it, and when its rollout is drawn
    with pytest.raises(TrainingStoppedError, match="update 2 of 4"):
        run(tiny_model, tmp_path / "b", checkpoints=tmp_path / "cb", stop_requested=lambda: next(asked), **options)
    torch.manual_seed(99)  # whatever the process did in between
    resumed = run(tiny_model, tmp_path / "b", checkpoints=tmp_path / "cb", **options)
    assert (straight.resumed_from, resumed.resumed_from) == (None, 2)

    changing = {"resumed_from", "seconds", "peak_memory_bytes"}
    timing = {"seconds_generate", "seconds_score", "seconds_update", "seconds_evaluate"}
    both = [result.model_dump(mode="json", exclude=changing | timing) for result in (straight, resumed)]
    for dumped in both:
        for summary in dumped["history"]:
            for name in timing - {"seconds_evaluate"}:
                del summary[name]
    assert both[0] == both[1]
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    states = [torch.load(max((tmp_path / c).glob("step-*")) / "state.pt", weights_only=True) for c in ("ca", "cb")]
    assert states[0]["optimizers"].keys() == {"policy", "reward"}
    for name, optimizer in states[0]["optimizers"].items():
        other = states[1]["optimizers"][name]
        assert all(torch.equal(tensor, other["masters"][key]) for key, tensor in optimizer["masters"].items())
        moments = optimizer["adamw"]["state"], other["adamw"]["state"]
        assert all(torch.equal(m[k], moments[1][i][k]) for i, m in moments[0].items() for k in m)
    assert states[0]["kl"] == states[1]["kl"]
    assert torch.equal(states[0]["rng"]["torch"], states[1]["rng"]["torch"])


def test_checkpoints_of_another_run_are_not_resumed(tiny_model, tmp_path):
    """The fingerprint covers spec, seed, models and prompts."""
    run(tiny_model, tmp_path / "a", checkpoints=tmp_path / "c", steps=1)
    other = run(tiny_model, tmp_path / "b", checkpoints=tmp_path / "c", steps=1, seed=4)
    assert other.resumed_from is None
    same = run(tiny_model, tmp_path / "b", checkpoints=tmp_path / "c", steps=1, seed=4)
    assert same.resumed_from == 1


def test_a_full_disk_does_not_pass_silently(tiny_model, tmp_path, monkeypatch):
    from tunegate.errors import StorageError

    def full(*_args, **_kwargs):
        raise StorageError("no space left on device")

    monkeypatch.setattr(CheckpointFolder, "save", full)
    with pytest.raises(StorageError, match="no space"):
        run(tiny_model, tmp_path / "a", checkpoints=tmp_path / "c", steps=1)


def test_reward_model_judge_cost_and_ensemble(tiny_model, tiny_reward, tmp_path):
    """Every source of feedback in one run."""
    result = run(
        tiny_model,
        tmp_path / "out",
        reward=tiny_reward,
        judge=tiny_reward,
        reward_function=None,
        steps=2,
        ensemble={"members": [str(tiny_reward)], "combine": "mean_minus_variance"},
        cost={"function": "tiny_rewards:longer", "limit": 5.0, "multiplier_rate": 0.01},
    )
    assert len(result.scale) == 2
    assert result.judge_gain is not None and result.judge_gain.n == 12
    assert result.before.judge is not None and result.before.cost is not None
    first, second = result.history
    assert first.multiplier == pytest.approx(math.exp(0.01 * 1.0 * (first.cost - 5.0)))
    assert second.multiplier == pytest.approx(
        first.multiplier * math.exp(0.01 * first.multiplier * (second.cost - 5.0))
    )
    # Both members are one model, so the judge, on its own scale, moves with the standardised score.
    assert result.judge_gain.mean * result.scale[0].gain == pytest.approx(result.score_gain.mean, rel=1e-3)


def test_critic_knows_something_from_the_start(tiny_model, tiny_reward, tmp_path):
    """The reward model's reading, put on the scale of the returns, does no harm before the first step."""
    result = run(tiny_model, tmp_path / "o", reward=tiny_reward, reward_function=None, steps=1, critic_warmup_epochs=0)
    assert result.history[0].explained_variance > -0.3


def test_switched_off_it_passes_the_policy_through(tiny_model, tmp_path):
    result = run(tiny_model, tmp_path / "out", enabled=False)
    assert (result.method, result.updates, result.kept_update) == ("disabled", 0, 0)
    assert result.reward_gain.mean == 0.0
    from safetensors.torch import load_file

    saved, given = load_file(tmp_path / "out/model.safetensors"), load_file(tiny_model / "model.safetensors")
    assert saved.keys() == given.keys() and all(torch.equal(saved[name], given[name]) for name in given)


def test_the_best_policy_within_the_kl_limit_is_kept(tiny_model, tmp_path):
    """With a KL limit that no policy keeps, the reference itself is the best; `last` takes the last."""
    limits = {"coefficient": 0.0, "early_stop": None, "limit": 1e-6}
    best = run(tiny_model, tmp_path / "best", steps=2, kl=limits)
    assert (best.kept_update, best.candidates, best.after) == (0, 1, best.before)
    last = run(tiny_model, tmp_path / "last", steps=2, kl=limits, keep="last")
    assert (last.kept, last.kept_update, last.after.update) == ("last", 2, 2)


# -- watchdogs ----------------------------------------------------------------------------------------------------

CALM = {"kl": 1.0, "entropy": 2.0, "length": 20.0, "distinct_2": 0.8, "identical": 0.1, "explained_variance": 0.5}


@pytest.mark.parametrize(
    ("name", "change", "figures"),
    [
        ("kl_blow_up", {"kl": 31.0}, ["31.0", "30"]),
        ("kl_blow_up", {"kl": math.nan}, ["nan"]),
        ("entropy_collapse", {"entropy": 0.09}, ["2.000", "0.090"]),
        ("one_answer", {"identical": 0.6}, ["60%"]),
        ("one_answer", {"distinct_2": 0.2}, ["0.80", "0.20"]),
        ("length_drift", {"length": 61.0}, ["20.0", "61.0"]),
        ("length_drift", {"length": 6.0}, ["20.0", "6.0"]),
        ("useless_critic", {"explained_variance": -0.5}, ["-0.50"]),
    ],
)
def test_each_trouble_is_named_with_its_figures(name, change, figures):
    dogs = Watchdogs(WatchdogSpec(explained_variance_floor=0.0))
    assert dogs.after_rollout(RolloutSigns(**CALM)) == []
    (alarm,) = dogs.after_rollout(RolloutSigns(**(CALM | change)))
    assert alarm.name == name
    assert all(figure in alarm.message for figure in figures)
    assert dogs.alarms == {name: 1}
    again = Watchdogs(WatchdogSpec())
    again.load_state_dict(dogs.state_dict())
    assert again.first == dogs.first and again.alarms == dogs.alarms


def test_reward_hacking_needs_both_to_move_beyond_noise():
    dogs = Watchdogs(WatchdogSpec(judge_drop=2.0))
    noise = np.random.default_rng(0).normal(scale=0.5, size=40)
    assert dogs.after_evaluation(noise + 1.0, None) == []
    assert dogs.after_evaluation(noise + 1.0, noise + 0.5) == []
    assert dogs.after_evaluation(noise + 1.0, noise - noise.mean() - 0.05) == []
    (alarm,) = dogs.after_evaluation(noise + 1.0, noise - 1.0)
    assert alarm.name == "reward_hacking"


def test_diversity_measures():
    assert distinct_2(["a b c", "a b d"]) == pytest.approx(3 / 4)
    assert distinct_2(["one", ""]) == 1.0
    assert identical_share(["x", "y", "x", "x"]) == 0.75


def test_watchdog_stops_and_the_last_good_policy_is_saved(tiny_model, tmp_path):
    observer = RecordingObserver()
    result = run(
        tiny_model,
        tmp_path / "out",
        observer=observer,
        learning_rate=0.1,
        keep="last",
        watchdogs={"action": "stop", "kl_limit": 0.5},
        evaluate_every=1,
    )
    assert result.stopped == "kl_blow_up"
    assert result.kept == "best"
    assert result.updates < 4
    event = result.events[0]
    assert (event.name, event.action, event.update) == ("kl_blow_up", "stop", result.updates)
    assert any("kl_blow_up" in note for note in observer.notes)
    assert result.history[-1].steps == 0  # nothing was learned from the bad rollout


def test_watchdog_backs_off_once_then_stops(tiny_model, tmp_path):
    result = run(
        tiny_model,
        tmp_path / "out",
        learning_rate=0.1,
        steps=8,
        watchdogs={"action": "back_off", "kl_limit": 0.5},
        evaluate_every=8,
    )
    assert [event.action for event in result.events] == ["back_off", "stop"]
    assert result.kl_coefficient == pytest.approx(0.02)
    first = result.events[0].update
    assert abs(result.history[first].kl) < 1e-3  # counted from 1: the rollout after it is the last good policy's
    steady = [s.learning_rate / (1 - (s.update - 1) / 8) for s in result.history if s.steps]
    assert set(np.round(steady, 6)) == {0.1, 0.05}


# -- held-out measurements ----------------------------------------------------------------------------------------


def test_measurements_use_the_same_noise(tiny_model):
    """Two measurements of one policy are equal, so a difference between two policies is a difference of policies."""
    from tunegate.observer import NullObserver
    from tunegate.training.policy import Policy
    from tunegate.training.scoring import Scorer

    spec = PPOSpec(**SMALL)
    policy = Policy(tiny_model, spec)
    found = [
        measure(
            policy,
            HELDOUT,
            {"reward": Scorer(function=vowels)},
            spec,
            update=update,
            seed=[1, 2],
            observer=NullObserver(),
        )
        for update in (0, 5)
    ]
    assert found[0].texts == found[1].texts and found[0].values == found[1].values
    assert found[0].array("score") == pytest.approx(vowels([], found[0].texts))


def test_paired_bootstrap_interval():
    """Against the normal approximation of the mean of differences, and exact where nothing varies."""
    numbers = np.random.default_rng(0)
    before = numbers.normal(size=400)
    after = before + numbers.normal(0.3, 1.0, size=400)
    found = paired_difference(before, after, seed=0)
    change = after - before
    half = 1.96 * change.std(ddof=1) / 20
    assert found.mean == pytest.approx(change.mean())
    assert found.low == pytest.approx(change.mean() - half, abs=0.02)
    assert found.high == pytest.approx(change.mean() + half, abs=0.02)
    same = paired_difference(before, before, seed=0)
    assert (same.mean, same.low, same.high) == (0.0, 0.0, 0.0)


# -- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"reward_function": "nowhere:nothing"}, SpecError, "no such function"),
        ({"reward_function": "tiny_rewards:missing"}, SpecError, "no such function"),
        ({"reward_function": None}, SpecError, "needs a reward"),
        ({"reward_function": "tiny_rewards:constant"}, TrainingError, "same score"),
        ({"max_prompt_tokens": 8}, DataError, "0 of 20"),
        ({"lora": {"targets": "no_such_layer"}}, SpecError, "fit nowhere"),
    ],
)
def test_foreseen_errors_name_what_is_wrong(tiny_model, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        run(tiny_model, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minibatches": 8, "prompts_per_update": 4}, "minibatches"),
        ({"kl": {"placement": "loss", "estimator": "k1"}}, "k2"),
        ({"cost": {}}, "exactly one source"),
        ({"cost": {"function": "a:b", "multiplier": 20.0}}, "multiplier_cap"),
        ({"ensemble": {"members": ["x"]}, "reward_function": "a:b"}, "ensemble"),
        ({"reward_function": "not a function"}, "pattern"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_impossible_specs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PPOSpec(**changes)


def test_gradients_that_stay_not_finite_end_the_run(tiny_model, tmp_path, monkeypatch):
    """A few are skipped; a whole series is an error that says what to do."""

    def broken(rollout, spec, **options):
        return set_advantages(rollout, spec, **options) * float("nan")

    monkeypatch.setattr("tunegate.training.ppo.set_advantages", broken)
    with pytest.raises(TrainingError, match="not finite") as caught:
        run(tiny_model, tmp_path / "out", max_bad_steps=4, critic_warmup_epochs=0)
    assert caught.value.key == "ppo.learning_rate"


def test_the_saved_spec_is_json(learned):
    out, _, _ = learned
    assert json.loads((out / "training.json").read_text())["schema_version"] == 1


def test_reward_model_with_other_tokens_serves_as_a_reward(tiny_model, tiny_reward, tmp_path, monkeypatch):
    """Its score is of the text; the critic then reads the reference instead."""
    monkeypatch.setattr("tunegate.training.scoring.Scorer.can_read", lambda self, chat: False)
    observer = RecordingObserver()
    result = run(tiny_model, tmp_path / "o", reward=tiny_reward, reward_function=None, steps=1, observer=observer)
    assert result.updates == 1
    assert any("other tokens" in note for note in observer.notes)
    assert RewardModel.load(tiny_reward).head.gain == 2.0
