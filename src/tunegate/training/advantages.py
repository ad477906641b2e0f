"""From scores to advantages: token rewards, generalised advantage estimation, whitening. Pure tensor functions.

Everything is fp32 or fp64, and outside the action mask every result is 0. The mask of a response covers its tokens
through the first stop token, inclusive, and is left-aligned: row b is valid in columns 0 .. T_b - 1.

Shape suffixes: B responses, T response tokens (padded), K models of an ensemble.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunegate.training.ranks import sum_over_ranks

WHITENING_EPSILON = 1e-8
"""Added to the variance before the square root."""


def masked_moments(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and (biased) variance over the valid elements of all ranks.

    Returns:
        Mean, variance, count: 0-dimensional, fp64.
    """
    valid = values[mask].double()
    first = sum_over_ranks(torch.stack([valid.sum(), torch.as_tensor(valid.numel(), dtype=torch.float64).to(valid)]))
    mean = first[0] / first[1]
    squares = sum_over_ranks((valid - mean).square().sum())
    return mean, squares / first[1], first[1]


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the valid elements of all ranks, 0-dimensional fp64."""
    return masked_moments(values, mask)[0]


def whiten(values: Tensor, mask: Tensor, *, keep_mean: bool = False) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over the valid elements of all ranks.

    Args:
        values: What to whiten.
        mask: True at valid elements, the shape of `values`.
        keep_mean: Add the mean back: for rewards, whose sign matters.
    """
    mean, variance, _ = masked_moments(values, mask)
    whitened = (values - mean) * torch.rsqrt(variance + WHITENING_EPSILON)
    if keep_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0.0).to(values.dtype)


def shape_scores(
    scores_B: Tensor,
    finished_B: Tensor,
    lengths_B: Tensor,
    *,
    clip: float | None,
    missing_eos: str,
    missing_eos_penalty: float,
    length_penalty: float,
) -> Tensor:
    """The final reward of each response: the score clipped, then penalised.

    The penalty for a missing stop token comes after clipping, so that no score is high enough to hide it.

    Args:
        scores_B: Standardised scores.
        finished_B: True where the response ended with its stop token.
        lengths_B: Response tokens.
        clip: Scores are clipped to +- this; None leaves them.
        missing_eos: `subtract` the penalty from the score of an unfinished response, `replace` the score by minus the
            penalty, or `none`.
        missing_eos_penalty: See `missing_eos`.
        length_penalty: Subtracted a token.
    """
    shaped_B = scores_B if clip is None else scores_B.clamp(-clip, clip)
    if missing_eos == "subtract":
        shaped_B = torch.where(finished_B, shaped_B, shaped_B - missing_eos_penalty)
    elif missing_eos == "replace":
        shaped_B = torch.where(finished_B, shaped_B, torch.full_like(shaped_B, -missing_eos_penalty))
    return shaped_B - length_penalty * lengths_B.to(shaped_B.dtype)


def token_rewards(scores_B: Tensor, kl_BT: Tensor, mask_BT: Tensor, beta: float) -> Tensor:
    """r_t = -beta kl_t + [t is the last token] score (Ziegler et al. 2019, eq. 2).

    Args:
        scores_B: Final reward of each response.
        kl_BT: KL estimate of each token (nats).
        mask_BT: Valid tokens; at least one in every row.
        beta: KL coefficient.
    """
    rewards_BT = torch.where(mask_BT, -beta * kl_BT, 0.0)
    last_B1 = mask_BT.sum(dim=1, keepdim=True) - 1
    return rewards_BT.scatter_add(1, last_B1, scores_B[:, None].to(rewards_BT.dtype))


def generalised_advantages(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """GAE (arXiv 1506.02438, eq. 16).

    delta_t = r_t + gamma V_{t+1} - V_t with V = 0 after the last token; A_t = delta_t + gamma lambda A_{t+1};
    returns = A + V, taken before any whitening.

    Args:
        rewards_BT: Reward of each token.
        values_BT: V_old: expected return from before the token is said.
        mask_BT: Valid tokens.
        gamma: Discount.
        gae_lambda: Lambda.

    Returns:
        Advantages and returns, [B, T], 0 outside the mask.
    """
    values_BT = torch.where(mask_BT, values_BT, 0.0)
    advantages_BT = torch.zeros_like(rewards_BT)
    next_advantage_B = torch.zeros_like(rewards_BT[:, 0])
    next_value_B = torch.zeros_like(next_advantage_B)
    for t in range(rewards_BT.shape[1] - 1, -1, -1):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        # An invalid token must not feed the last valid one, whatever the padding holds.
        next_advantage_B = torch.where(mask_BT[:, t], delta_B + gamma * gae_lambda * next_advantage_B, 0.0)
        next_value_B = values_BT[:, t]
        advantages_BT[:, t] = next_advantage_B
    return advantages_BT, torch.where(mask_BT, advantages_BT + values_BT, 0.0)


GROUP_EPSILON = 1e-8
"""Added to a group's variance before the square root: a group whose rewards are all equal teaches nothing."""


def group_advantages(rewards_PG: Tensor, algorithm: str) -> Tensor:
    """How much better each response is than the others to its prompt, [P, G].

    `grpo`: (R - mean) / sqrt(var + 1e-8) of the group (DeepSeekMath, arXiv 2402.03300, section 4.1.2, with the biased
    variance). `rloo`: R less the mean of the *other* responses, an unbiased baseline (Kool et al. 2019; Ahmadian et al.
    2024, arXiv 2402.14740, eq. 5).

    Args:
        rewards_PG: Final reward of each response, a row a prompt.
        algorithm: Which.
    """
    mean_P1 = rewards_PG.mean(dim=1, keepdim=True)
    if algorithm == "grpo":
        return (rewards_PG - mean_P1) * torch.rsqrt(rewards_PG.var(dim=1, correction=0, keepdim=True) + GROUP_EPSILON)
    count = rewards_PG.shape[1]
    return (rewards_PG - mean_P1) * (count / (count - 1))  # R - (sum - R) / (G - 1)


def safe_advantages(reward_advantages: Tensor, cost_advantages: Tensor, multiplier: float) -> Tensor:
    """A = (A_r - lambda A_c) / (1 + lambda) (Safe RLHF, arXiv 2310.12773, appendix B)."""
    return (reward_advantages - multiplier * cost_advantages) / (1.0 + multiplier)


def ensemble_scores(scores_KB: Tensor, combine: str, variance_weight: float) -> Tensor:
    """One score from several models' (arXiv 2310.02743, section 3.2), [B].

    Args:
        scores_KB: Standardised scores, a row a model.
        combine: `min`, or `mean_minus_variance`.
        variance_weight: k of mean - k var (biased variance over the models).
    """
    if combine == "min":
        return scores_KB.min(dim=0).values
    return scores_KB.mean(dim=0) - variance_weight * scores_KB.var(dim=0, correction=0)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(R - V) / Var(R) over valid tokens of all ranks: 1 is a perfect critic, 0 one that says a constant.

    NaN if the returns do not vary.
    """
    _, error_variance, _ = masked_moments(returns - values, mask)
    _, return_variance, _ = masked_moments(returns, mask)
    return float(1.0 - error_variance / return_variance) if float(return_variance) > 0.0 else float("nan")


def regression_line(values: Tensor, targets: Tensor, mask: Tensor) -> tuple[float, float]:
    """Slope and intercept of the least-squares line from values to targets, over valid elements of all ranks.

    A negative slope is taken as 0: a reading that predicts the contrary predicts nothing.
    """
    value_mean, value_variance, _ = masked_moments(values, mask)
    target_mean, _, _ = masked_moments(targets, mask)
    covariance = masked_mean((values - value_mean) * (targets - target_mean), mask)
    slope = float(covariance / value_variance) if float(value_variance) > 0.0 else 0.0
    slope = max(0.0, slope)
    return slope, float(target_mean) - slope * float(value_mean)
