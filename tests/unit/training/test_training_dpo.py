"""Direct preference optimisation: its losses and its gradient against closed forms and plain autograd, its effect."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_samples import make_preferences
from transformers import AutoModelForCausalLM

from tunegate.data.records import Prompt
from tunegate.errors import DataError, TrainingStoppedError
from tunegate.observer import RecordingObserver
from tunegate.training.chat import Chat
from tunegate.training.dpo import response_logprobs, train_dpo
from tunegate.training.dpo_config import DPOSpec
from tunegate.training.dpo_results import DPOResult
from tunegate.training.losses import preference_loss
from tunegate.training.policy import Policy
from tunegate.training.reward_data import encode_pairs

PAIRS, HELDOUT = make_preferences(40), make_preferences(12, seed=9)
PROMPTS = [Prompt(id=f"h{n}", messages=[{"role": "user", "content": f"What about {n}?"}]) for n in range(6)]
SMALL = {
    "batch_pairs": 8, "max_length": 96, "max_new_tokens": 8, "max_prompt_tokens": 64, "learning_rate": 3e-3,
    "precision": "fp32", "microbatch_tokens": 200,
}  # fmt: skip


def run(tiny_model, out, **options):
    given = {
        k: options.pop(k) for k in ("reward", "judge", "checkpoints", "stop_requested", "observer") if k in options
    }
    spec = DPOSpec(**(SMALL | options))
    return train_dpo(tiny_model, PAIRS, HELDOUT, PROMPTS, out, spec=spec, seed=3, **given)


CHOSEN, REJECTED = torch.tensor([0.7, -2.0, 0.0]).double(), torch.tensor([0.2, 1.0, 0.0]).double()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_sigmoid_loss_is_that_of_the_paper(smoothing):
    """-(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h); log 2 where policy and reference agree."""
    found = preference_loss(CHOSEN, REJECTED, beta=0.5, label_smoothing=smoothing)
    h = (CHOSEN - REJECTED).numpy()
    expected = (1 - smoothing) * np.log1p(np.exp(-0.5 * h)) + smoothing * np.log1p(np.exp(0.5 * h))
    assert found.numpy() == pytest.approx(expected)
    assert float(found[2]) == pytest.approx(math.log(2))


def test_ipo_loss_aims_at_a_fixed_difference():
    found = preference_loss(CHOSEN, REJECTED, beta=0.5, kind="ipo")
    assert found.numpy() == pytest.approx(((CHOSEN - REJECTED).numpy() - 1.0) ** 2)


def test_gradient_of_the_loss_is_the_closed_form():
    """-beta sigmoid(-beta h) for the chosen response, its negative for the rejected one (eq. 7's gradient)."""
    chosen, rejected = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    preference_loss(chosen, rejected, beta=0.5).sum().backward()
    expected = -0.5 * torch.sigmoid(-0.5 * (CHOSEN - REJECTED))
    torch.testing.assert_close(chosen.grad, expected)
    torch.testing.assert_close(rejected.grad, -expected)


@pytest.fixture
def written_down(tiny_model):
    """Log-probabilities of whole responses by plain transformers, one row at a time, differentiable."""
    chat = Chat.load(tiny_model)
    items = encode_pairs(chat, PAIRS[:6], 96, use_margin=False).items

    def logprobs(model):
        rows = []
        for item in items:
            for response in item.responses:
                ids = torch.tensor([[*item.prompt, *response]])
                log_softmax = model(ids, use_cache=False).logits[0].log_softmax(-1)
                start = len(item.prompt)
                rows.append(sum(log_softmax[t - 1, ids[0, t]] for t in range(start, ids.shape[1])))
        return torch.stack(rows)

    return items, logprobs


@pytest.mark.parametrize("method", ["lora", "full"])
def test_log_probabilities_are_those_of_the_responses_alone(tiny_model, written_down, method):
    """At temperature 1, the end of turn included, the prompt excluded; policy and reference agree at the start."""
    items, logprobs = written_down
    policy = Policy(tiny_model, DPOSpec(**(SMALL | {"method": method})).policy)
    with torch.no_grad():
        expected = logprobs(AutoModelForCausalLM.from_pretrained(tiny_model))
        torch.testing.assert_close(response_logprobs(policy, items), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(response_logprobs(policy, items, reference=True), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("budget", [64, 4000])
def test_a_step_is_the_gradient_of_the_mean_loss_whatever_the_microbatch(
    tiny_model, written_down, tmp_path, budget, monkeypatch
):
    """One whole-model step of train_dpo, against autograd of the formula on plain transformers."""
    from tunegate.training.optim import Optimizer

    caught = {}

    def catch(self):
        caught.update({n: m.grad.clone() for n, m in zip(self.names, self._masters, strict=True)})
        return original(self)

    original = Optimizer.step
    monkeypatch.setattr(Optimizer, "step", catch)
    spec = DPOSpec(
        **(SMALL | {"method": "full", "max_steps": 1, "batch_pairs": 6, "microbatch_tokens": budget, "sft_weight": 0.3})
    )
    train_dpo(tiny_model, PAIRS[:6], HELDOUT, PROMPTS, tmp_path / "o", spec=spec, seed=3)

    items, logprobs = written_down
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    rows = logprobs(model)
    reference = rows.detach()
    ratios = (rows - reference).view(-1, 2)
    lengths = torch.tensor([len(item.responses[0]) for item in items])
    loss = -torch.nn.functional.logsigmoid(0.1 * (ratios[:, 0] - ratios[:, 1])) - 0.3 * rows[::2] / lengths
    loss.mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(caught[name], parameter.grad, rtol=2e-3, atol=1e-6, msg=name)


def test_the_policy_learns_the_preferences_and_the_reward_is_reported(tiny_model, tiny_reward, tmp_path):
    observer = RecordingObserver()
    result = run(tiny_model, tmp_path / "o", epochs=2, reward=tiny_reward, judge=tiny_reward, observer=observer)
    first, last = result.preferences[0], result.preferences[-1]
    assert (first.step, first.accuracy.value) == (0, 0.5)
    assert first.loss == pytest.approx(math.log(2), abs=1e-4)
    assert last.loss < 0.5 and last.accuracy.value == 1.0 and last.margin > 0.5
    assert result.before.kl == pytest.approx(0.0, abs=1e-3) and result.after.kl_k3 > 0.0
    assert result.reward_gain.n == 6 and result.judge_gain.mean == pytest.approx(result.reward_gain.mean, rel=1e-4)
    assert len(observer.series("dpo/loss")) == result.steps == 10
    assert DPOResult.model_validate_json((tmp_path / "o/training.json").read_text()) == result
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "o")  # adapters are merged into a plain folder
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_the_best_by_held_out_loss_is_kept(tiny_model, tmp_path):
    """A learning rate that ruins the policy: then the best is an earlier one."""
    result = run(tiny_model, tmp_path / "o", epochs=2, learning_rate=0.5, evaluate_every=1, loss="ipo")
    losses = [point.loss for point in result.preferences]
    assert result.kept_update == result.preferences[int(np.argmin(losses))].step
    last = run(tiny_model, tmp_path / "l", epochs=1, keep="last")
    assert last.kept_update == last.steps


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_resumed_training_is_bit_equal(tiny_model, tmp_path, method):
    options = {"epochs": 2, "method": method, "evaluate_every": 2, "checkpoint_every": 2}
    run(tiny_model, tmp_path / "a", **options)
    asked = iter([False] * 5 + [True])
    with pytest.raises(TrainingStoppedError, match="step 5 of 10"):
        run(tiny_model, tmp_path / "b", checkpoints=tmp_path / "c", stop_requested=lambda: next(asked), **options)
    torch.manual_seed(99)
    resumed = run(tiny_model, tmp_path / "b", checkpoints=tmp_path / "c", **options)
    assert resumed.resumed_from == 5
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_cannot_be_is_refused(tiny_model, tmp_path):
    with pytest.raises(DataError, match="no training preference fits"):
        train_dpo(tiny_model, [], [], [], tmp_path, spec=DPOSpec(**SMALL), seed=1)
    with pytest.raises(ValueError, match="dropout"):
        DPOSpec(lora={"dropout": 0.1})


def test_switched_off_it_passes_the_policy_through(tiny_model, tmp_path):
    result = run(tiny_model, tmp_path / "o", enabled=False)
    assert (result.method, result.steps) == ("disabled", 0)
    saved, given = load_file(tmp_path / "o/model.safetensors"), load_file(tiny_model / "model.safetensors")
    assert all(torch.equal(saved[name], given[name]) for name in given)
