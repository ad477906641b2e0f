"""The PPO update: several passes over one rollout.

Shape suffixes: B responses, T response tokens (padded), N response tokens of a microbatch (row by row).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tunegate.training.advantages import (
    generalised_advantages,
    group_advantages,
    safe_advantages,
    shape_scores,
    token_rewards,
    whiten,
)
from tunegate.training.batching import shuffled, token_budget_batches
from tunegate.training.critic import Critic
from tunegate.training.kl import kl_estimate
from tunegate.training.losses import logprobs_and_entropy, policy_loss, token_logprobs, value_loss
from tunegate.training.optim import Optimizer
from tunegate.training.policy import Policy
from tunegate.training.ppo_config import PPOSpec
from tunegate.training.ranks import gather, share, sum_over_ranks
from tunegate.training.scoring import Rollout
from tunegate.training.sharding import in_step

EARLY_STOP_FACTOR = 1.5
"""An update ends early when KL(new, old) exceeds this many times its target."""


@dataclass
class Learner:
    """What is trained on one signal beside the policy: a critic and its optimizer."""

    critic: Critic
    optimizer: Optimizer


@dataclass
class UpdateFigures:
    """Means over the optimizer steps of one update, each weighted by tokens within its step.

    Attributes:
        policy_loss: L_pg.
        value_loss: L_v, by signal.
        clip_fraction: Share of tokens at which the clipped term was the larger one.
        divergence: k3 estimate of KL(old, new) at the last step (nats a token).
        policy_norm: Gradient norm before clipping.
        value_norm: Likewise, by signal.
        steps: Optimizer steps taken.
        skipped: Steps that were skipped because a gradient was not finite.
        stopped_early: True if KL(old, new) ended the update.
    """

    policy_loss: float = 0.0
    value_loss: dict[str, float] = field(default_factory=dict)
    clip_fraction: float = 0.0
    divergence: float = 0.0
    policy_norm: float = 0.0
    value_norm: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    skipped: int = 0
    stopped_early: bool = False


def final_rewards(rollout: Rollout, spec: PPOSpec) -> Tensor:
    """The reward of each whole response, without the KL term, [B]."""
    shaping = spec.shaping
    return shape_scores(
        rollout.signals["reward"].scores_B,
        rollout.finished_B,
        rollout.lengths_B,
        clip=shaping.clip,
        missing_eos=shaping.missing_eos,
        missing_eos_penalty=shaping.missing_eos_penalty,
        length_penalty=shaping.length_penalty,
    )


def set_advantages(rollout: Rollout, spec: PPOSpec, *, beta: float, multiplier: float | None) -> Tensor:
    """From scores and values to the advantages that the policy is trained on.

    Sets advantages and returns of every signal. The KL penalty belongs to the reward alone.

    Args:
        rollout: With scores and values.
        spec: Shaping, discount, whitening.
        beta: KL coefficient, 0 where the KL is part of the loss.
        multiplier: Lambda of the cost; None without a cost.

    Returns:
        Advantages, [B, T], 0 outside the mask.
    """
    mask_BT = rollout.mask_BT
    kl_BT = kl_estimate(rollout.old_logprobs_BT, rollout.reference_logprobs_BT, spec.kl.used_estimator)
    for name, signal in rollout.signals.items():
        if name == "reward":
            rewards_BT = token_rewards(final_rewards(rollout, spec), kl_BT, mask_BT, beta)
            if spec.whiten_rewards:
                rewards_BT = whiten(rewards_BT, mask_BT, keep_mean=True)
        else:
            rewards_BT = token_rewards(signal.scores_B, kl_BT, mask_BT, 0.0)
        signal.advantages_BT, signal.returns_BT = generalised_advantages(
            rewards_BT, signal.values_BT, mask_BT, gamma=spec.gamma, gae_lambda=spec.gae_lambda
        )
    advantages_BT = rollout.signals["reward"].advantages_BT
    if multiplier is not None:
        advantages_BT = safe_advantages(advantages_BT, rollout.signals["cost"].advantages_BT, multiplier)
    return whiten(advantages_BT, mask_BT) if spec.whiten_advantages else advantages_BT


def set_group_advantages(rollout: Rollout, spec: PPOSpec, *, beta: float, multiplier: float | None) -> Tensor:
    """Advantages without a critic: every token of a response gets what the response is worth within its group.

    The reward of a response is its final reward less beta times its KL; the groups are made whole over all ranks.

    Args:
        rollout: With scores; `group_size` responses to each prompt in a row, shared out over the ranks.
        spec: Algorithm, group size, shaping.
        beta: KL coefficient, 0 where the KL is part of the loss.
        multiplier: Lambda of the cost; None without a cost.

    Returns:
        Advantages, [B, T], 0 outside the mask.
    """
    mask_BT = rollout.mask_BT
    kl_BT = kl_estimate(rollout.old_logprobs_BT, rollout.reference_logprobs_BT, spec.kl.used_estimator)
    for name, signal in rollout.signals.items():
        rewards_B = signal.scores_B
        if name == "reward":
            rewards_B = final_rewards(rollout, spec) - beta * torch.where(mask_BT, kl_BT, 0.0).sum(dim=1)
        every = torch.tensor(gather(rewards_B.tolist(), spec.responses_per_update), dtype=torch.float64)
        compared = group_advantages(every.view(-1, spec.group_size), spec.algorithm).flatten()
        advantages_B = torch.tensor(share(compared.tolist()), dtype=rewards_B.dtype, device=rewards_B.device)
        signal.advantages_BT = torch.where(mask_BT, advantages_B[:, None], 0.0)
        signal.values_BT = signal.returns_BT = torch.zeros_like(signal.advantages_BT)
    advantages_BT = rollout.signals["reward"].advantages_BT
    if multiplier is not None:
        advantages_BT = safe_advantages(advantages_BT, rollout.signals["cost"].advantages_BT, multiplier)
    return advantages_BT


def ppo_update(
    policy: Policy,
    policy_optimizer: Optimizer,
    learners: Mapping[str, Learner],
    rollout: Rollout,
    advantages_BT: Tensor,
    spec: PPOSpec,
    *,
    beta: float,
    seed: int,
    update: int,
) -> UpdateFigures:
    """Improve policy and critics by `epochs` passes over a rollout (arXiv 1707.06347, algorithm 1).

    Args:
        policy: The policy that drew the rollout.
        policy_optimizer: Of its trained parameters.
        learners: Critic and optimizer of each signal.
        rollout: With advantages and returns; this rank's share.
        advantages_BT: From `set_advantages`.
        spec: Passes, clipping, coefficients.
        beta: KL coefficient, used here only where the KL is part of the loss.
        seed: Of the permutations.
        update: Number of the update, for the permutations.
    """
    figures = UpdateFigures(value_loss=dict.fromkeys(learners, 0.0), value_norm=dict.fromkeys(learners, 0.0))
    in_lockstep = policy.sharded or any(learner.critic.sharded for learner in learners.values())
    steps = 0
    for epoch in range(spec.epochs):
        # Everything of the rollout stays frozen; only the order is new.
        order = shuffled(len(rollout), seed=seed, epoch=update * spec.epochs + epoch)
        for start in range(spec.minibatches):
            rows = order[start :: spec.minibatches]
            # The denominator of every mean: tokens of the whole minibatch on all ranks.
            tokens = float(sum_over_ranks(rollout.lengths_B[rows].sum()))
            sums = torch.zeros(3, device=rollout.mask_BT.device)
            parts = token_budget_batches([rollout.row_lengths[row] for row in rows], spec.microbatch_tokens)
            micros = [
                ([rows[place] for place in part], weight)
                for part, weight in in_step(parts, parts[0], needed=in_lockstep)
            ]
            first_pass, rollout.first_pass = rollout.first_pass, None
            for micro, weight in [(first_pass.rows, 1.0)] if first_pass is not None else micros:
                entropy = torch.zeros((), device=rollout.mask_BT.device)
                if first_pass is not None:
                    logprobs_N = first_pass.output_N
                else:
                    batch = rollout.batch(micro, policy.chat.pad_id)
                    hidden_ND = batch.predictors(policy.hidden(batch.batch, rollout.stem(micro)))
                    if spec.entropy_coefficient > 0.0:
                        logprobs_N, entropy_N = logprobs_and_entropy(
                            hidden_ND, policy.head(), batch.tokens_N, spec.temperature, entropy="trained"
                        )
                        entropy = entropy_N.sum() / tokens
                    else:
                        logprobs_N = token_logprobs(hidden_ND, policy.head(), batch.tokens_N, spec.temperature)
                surrogate = policy_loss(
                    logprobs_N,
                    rollout.valid(rollout.old_logprobs_BT, micro),
                    rollout.valid(advantages_BT, micro),
                    clip=spec.clip,
                    tokens=tokens,
                )
                loss = surrogate.loss - spec.entropy_coefficient * entropy
                if spec.kl.placement == "loss":
                    reference_N = rollout.valid(rollout.reference_logprobs_BT, micro)
                    loss = loss + beta * kl_estimate(logprobs_N, reference_N, "k2").sum() / tokens
                (weight * loss).backward()  # type: ignore[no-untyped-call]
                sums += weight * torch.stack([surrogate.loss.detach(), surrogate.clipped, surrogate.divergence])
            loss_sum, clipped, divergence = sum_over_ranks(sums).tolist()
            figures.divergence = divergence
            if spec.kl.early_stop is not None and divergence > EARLY_STOP_FACTOR * spec.kl.early_stop:
                # The figure is a sum over ranks, so every rank stops at the same step.
                figures.stopped_early = True
                policy_optimizer.zero_grad()
                return _mean(figures, steps)
            report = policy_optimizer.step()  # sums over ranks, clips, skips what is not finite
            figures.skipped += report.skipped
            # No trained weight is shared, so one after the other: only one's activations and gradients are held.
            for name, learner in learners.items():
                signal = rollout.signals[name]
                value_sum = torch.zeros((), device=rollout.mask_BT.device)
                first_pass, signal.first_pass = signal.first_pass, None
                for micro, weight in [(first_pass.rows, 1.0)] if first_pass is not None else micros:
                    if first_pass is not None:
                        values_N = first_pass.output_N
                    else:
                        batch = rollout.batch(micro, policy.chat.pad_id)
                        values_N = learner.critic.values(batch, signal.features_of(micro))
                    critic_loss = value_loss(
                        values_N,
                        rollout.valid(signal.values_BT, micro),
                        rollout.valid(signal.returns_BT, micro),
                        clip=spec.value_clip,
                        tokens=tokens,
                    )
                    (weight * spec.value_coefficient * critic_loss).backward()  # type: ignore[no-untyped-call]
                    value_sum += weight * critic_loss.detach()
                figures.value_norm[name] += learner.optimizer.step().gradient_norm
                figures.value_loss[name] += float(sum_over_ranks(value_sum))
            steps += 1
            figures.policy_loss += loss_sum
            figures.clip_fraction += clipped
            figures.policy_norm += report.gradient_norm
    return _mean(figures, steps)


def _mean(figures: UpdateFigures, steps: int) -> UpdateFigures:
    """Turn sums over steps into means."""
    figures.steps = steps
    for name in ("policy_loss", "clip_fraction", "policy_norm"):
        setattr(figures, name, getattr(figures, name) / max(1, steps))
    for by_signal in (figures.value_loss, figures.value_norm):
        for name in by_signal:
            by_signal[name] /= max(1, steps)
    return figures


def warm_up_critic(
    learner: Learner, rollout: Rollout, name: str, spec: PPOSpec, *, pad_id: int, epochs: int, seed: int
) -> float:
    """Train a critic alone, on returns that a standing policy earned.

    Args:
        learner: Critic and optimizer.
        rollout: The reference's responses, with returns.
        name: The signal.
        spec: Minibatches, microbatches.
        pad_id: Padding token.
        epochs: Passes.
        seed: Of the permutations.

    Returns:
        Mean squared error over the last pass, halved.
    """
    signal = rollout.signals[name]
    loss_sum = 0.0
    for epoch in range(epochs):
        order = shuffled(len(rollout), seed=seed, epoch=epoch)
        loss_sum = 0.0
        for start in range(spec.minibatches):
            rows = order[start :: spec.minibatches]
            tokens = float(sum_over_ranks(rollout.lengths_B[rows].sum()))
            parts = token_budget_batches([rollout.row_lengths[row] for row in rows], spec.microbatch_tokens)
            for part, weight in in_step(parts, parts[0], needed=learner.critic.sharded):
                micro = [rows[place] for place in part]
                values_N = learner.critic.values(rollout.batch(micro, pad_id), signal.features_of(micro))
                error_N = values_N - rollout.valid(signal.returns_BT, micro)
                loss = weight * 0.5 * error_N.square().sum() / tokens
                loss.backward()  # type: ignore[no-untyped-call]
                loss_sum += float(loss.detach()) / spec.minibatches
            learner.optimizer.step()
    return loss_sum
