"""Losses of the reward model, per item; callers average them.

Shape suffix: B pairs or ratings.
"""

from __future__ import annotations

from torch import Tensor, nn


def pairwise_loss(chosen_B: Tensor, rejected_B: Tensor, margin_B: Tensor, *, centering: float) -> Tensor:
    """-log sigmoid(r_c - r_r - margin) + lambda (r_c + r_r)^2, [B].

    Args:
        chosen_B: Raw scores of the preferred responses.
        rejected_B: Raw scores of the others.
        margin_B: How much better the preferred one is said to be; 0 without a margin (Llama 2, arXiv 2307.09288,
            eq. 2).
        centering: lambda, which keeps scores near 0 (Eisenstein et al. 2023, arXiv 2312.09244, eq. 5).
    """
    ranking_B = -nn.functional.logsigmoid(chosen_B - rejected_B - margin_B)
    return ranking_B + centering * (chosen_B + rejected_B).square()


def sign_loss(cost_B: Tensor, sign_B: Tensor) -> Tensor:
    """-log sigmoid(s C), [B]: puts the border between harmful and harmless at a cost of 0 (Safe RLHF, eq. 5).

    Args:
        cost_B: Raw costs.
        sign_B: s, 1 for responses that are harmful and -1 for those that are not.
    """
    return -nn.functional.logsigmoid(sign_B * cost_B)


def pointwise_loss(raw_B: Tensor, target_B: Tensor, *, huber_delta: float | None) -> Tensor:
    """(r - z)^2, or the Huber loss of r - z, [B].

    Args:
        raw_B: Raw scores.
        target_B: Ratings, standardised on the training split.
        huber_delta: Where the Huber loss turns linear; None means squared error.
    """
    if huber_delta is None:
        return (raw_B - target_B).square()
    return nn.functional.huber_loss(raw_B, target_B, reduction="none", delta=huber_delta)
