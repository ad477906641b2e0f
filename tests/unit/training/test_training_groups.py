"""GRPO and RLOO: advantages from several responses to one prompt, against closed forms and NumPy, and their effect."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from tunegate.config import build_spec
from tunegate.data.records import Prompt
from tunegate.errors import SpecError
from tunegate.training.advantages import group_advantages
from tunegate.training.kl import kl_estimate
from tunegate.training.losses import token_logprobs
from tunegate.training.policy import Policy
from tunegate.training.ppo import train_ppo
from tunegate.training.ppo_config import PPOSpec
from tunegate.training.scoring import Signal, score_policy
from tunegate.training.update import ppo_update, set_group_advantages

sys.modules["group_rewards"] = module = type(sys)("group_rewards")


def vowels(prompts, responses):
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in responses]


def longer(prompts, responses):
    return [float(len(text)) for text in responses]


module.vowels, module.longer = vowels, longer


def prompts(count: int, prefix: str) -> list[Prompt]:
    return [
        Prompt(id=f"{prefix}{n}", messages=[{"role": "user", "content": f"What about number {n}?"}])
        for n in range(count)
    ]


def spec(algorithm: str, **changes) -> PPOSpec:
    small = {
        "algorithm": algorithm, "group_size": 4, "reward_function": "group_rewards:vowels", "steps": 8,
        "prompts_per_update": 6, "max_new_tokens": 8, "max_prompt_tokens": 64, "epochs": 3, "learning_rate": 1e-2,
        "evaluate_every": 4, "precision": "fp32", "shaping": {"standardise_prompts": 12, "missing_eos": "none"},
        "kl": {"coefficient": 0.01, "early_stop": None, "limit": 100.0},
    }  # fmt: skip
    return PPOSpec(**(small | changes))


REWARDS = np.random.default_rng(5).normal(size=(3, 4))


def test_grpo_is_the_standard_score_within_the_group():
    found = group_advantages(torch.tensor(REWARDS), "grpo").numpy()
    expected = (REWARDS - REWARDS.mean(1, keepdims=True)) / REWARDS.std(1, keepdims=True)
    assert found == pytest.approx(expected, abs=1e-6)


def test_rloo_leaves_the_response_itself_out_of_its_baseline():
    found = group_advantages(torch.tensor(REWARDS), "rloo").numpy()
    for row, rewards in enumerate(REWARDS):
        for place, reward in enumerate(rewards):
            assert found[row, place] == pytest.approx(reward - np.delete(rewards, place).mean())


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_a_group_of_equal_rewards_teaches_nothing(algorithm):
    found = group_advantages(torch.full((2, 4), 3.7, dtype=torch.float64), algorithm)
    assert torch.allclose(found, torch.zeros_like(found), atol=1e-9)


@pytest.fixture
def rollout(tiny_model):
    """Two prompts, four responses each, with made-up scores."""
    torch.manual_seed(0)
    own = spec("rloo", prompts_per_update=2, epochs=1)
    policy = Policy(tiny_model, own)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.05)
    policy.refresh()
    rows = [policy.sampler.encode(p.messages, own.rollout_sampling) for p in prompts(2, "t") for _ in range(4)]
    completions = policy.sampler.generate_ids(rows, own.rollout_sampling, seed=[1])
    found = score_policy(policy, rows, completions, temperature=own.temperature)
    found.signals["reward"] = Signal(torch.randn(8))
    return policy, found, own


@pytest.mark.parametrize("placement", ["reward", "loss"])
@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_gradient_is_the_written_down_policy_gradient(rollout, algorithm, placement, monkeypatch):
    """-sum_i A_i sum_t grad log pi_t / tokens, with the KL in R or as k2 in the loss, at ratio 1."""
    policy, found, own = rollout
    own = own.model_copy(update={"algorithm": algorithm, "kl": own.kl.model_copy(update={"placement": placement})})
    policy.spec = own
    beta = 0.3
    advantages_BT = set_group_advantages(found, own, beta=beta if placement == "reward" else 0.0, multiplier=None)
    rewards = found.signals["reward"].scores_B.double()
    log_ratio_BT = (found.old_logprobs_BT - found.reference_logprobs_BT).double()
    if placement == "reward":
        rewards = rewards - beta * (log_ratio_BT * found.mask_BT).sum(1)
    by_hand = group_advantages(rewards.view(2, 4), algorithm).flatten()
    assert advantages_BT[found.mask_BT].numpy() == pytest.approx(
        by_hand[:, None].expand_as(found.mask_BT)[found.mask_BT].numpy(), abs=1e-5
    )

    caught: list[torch.Tensor] = []

    class Catch:
        def step(self):
            caught.extend(p.grad.clone() for p in policy.model.parameters() if p.requires_grad)
            policy.model.zero_grad()
            return type("Report", (), {"skipped": False, "gradient_norm": 0.0})

    ppo_update(policy, Catch(), {}, found, advantages_BT, own, beta=beta, seed=1, update=0)
    batch = found.batch(range(8), policy.chat.pad_id)
    hidden_ND = batch.predictors(policy.hidden(batch.batch, None))
    logprobs_N = token_logprobs(hidden_ND, policy.head(), batch.tokens_N, own.temperature)
    rows_N = batch.rows_N
    loss = -(by_hand[rows_N].to(logprobs_N) * logprobs_N).sum() / len(logprobs_N)
    if placement == "loss":
        reference_N = found.valid(found.reference_logprobs_BT, list(range(8)))
        loss = loss + beta * kl_estimate(logprobs_N, reference_N, "k2").mean()
    loss.backward()
    expected = [p.grad for p in policy.model.parameters() if p.requires_grad]
    for gradient, right in zip(caught, expected, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-3, atol=1e-6)


def test_a_cost_pulls_against_the_reward(rollout):
    """(A_r - lambda A_c) / (1 + lambda), both within the group."""
    _, found, own = rollout
    found.signals["cost"] = Signal(torch.randn(8))
    joined_BT = set_group_advantages(found, own, beta=0.0, multiplier=2.0)
    both = [
        group_advantages(found.signals[n].scores_B.double().view(2, 4), "rloo").flatten() for n in ("reward", "cost")
    ]
    expected = ((both[0] - 2.0 * both[1]) / 3.0)[:, None].expand_as(found.mask_BT)
    assert joined_BT[found.mask_BT].numpy() == pytest.approx(expected[found.mask_BT].numpy(), abs=1e-5)


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_the_policy_learns_without_a_critic(tiny_model, tmp_path, algorithm):
    own = spec(algorithm, steps=12, prompts_per_update=10, epochs=4, minibatches=2, method="full", learning_rate=3e-3)
    result = train_ppo(tiny_model, None, prompts(40, "t"), prompts(32, "h"), tmp_path, spec=own, seed=3)
    assert (result.algorithm, result.critic) == (algorithm, "none")
    assert result.reward_gain.low > 0.0
    assert result.after.kl_k3 > 0.01
    assert result.response_tokens == pytest.approx(sum(s.length * 40 for s in result.history), abs=8)


def test_a_cost_and_a_checkpoint_work_without_a_critic(tiny_model, tmp_path):
    """Safe RLHF and resuming share the machinery with PPO."""
    own = spec("grpo", steps=2, cost={"function": "group_rewards:longer", "limit": 5.0, "multiplier_rate": 0.01})
    few = prompts(8, "t"), prompts(4, "h")
    straight = train_ppo(tiny_model, None, *few, tmp_path / "a", spec=own, seed=3)
    assert straight.multiplier is not None and straight.history[0].cost is not None
    from tunegate.errors import TrainingStoppedError

    asked = iter([False, False, True])
    options = {"spec": own, "seed": 3, "checkpoints": tmp_path / "c"}
    with pytest.raises(TrainingStoppedError):
        train_ppo(tiny_model, None, *few, tmp_path / "b", stop_requested=lambda: next(asked), **options)
    resumed = train_ppo(tiny_model, None, *few, tmp_path / "b", **options)
    assert resumed.resumed_from == 1
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_the_spec_names_the_algorithm_once():
    assert build_spec({"last_stage": "grpo"}).rollouts.algorithm == "grpo"
    assert build_spec({}).rollouts.algorithm == "ppo"
    with pytest.raises(SpecError, match="set last_stage: rloo"):
        build_spec({"ppo": {"algorithm": "rloo"}})
