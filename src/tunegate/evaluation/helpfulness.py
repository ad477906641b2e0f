"""Whose answers are better: paired comparison by the judge reward model, raw and at equal length.

Compared are the answers to `everyday` and `lookalike` prompts. An incoherent answer never beats a coherent one,
whatever the judge's score: reward models are easily fooled by text from outside their training distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tunegate.evaluation.config import EvaluationSpec
from tunegate.evaluation.results import DIFFERENCES, METRICS, Figure
from tunegate.evaluation.rows import Row, of, paired
from tunegate.evaluation.significance import sign_test
from tunegate.evaluation.statistics import Interval, bootstrap_mean, length_controlled_win_rate, paired_proportions


@dataclass(frozen=True, slots=True)
class Comparison:
    """Outcomes of one model against another, by prompt.

    Attributes:
        outcomes: 1 win, 0.5 tie, 0 loss.
        lengths: Length difference in tokens, first minus second.
        rewards: Score difference, first minus second.
        prompts: Prompt ids.
    """

    outcomes: list[float]
    lengths: list[float]
    rewards: list[float]
    prompts: list[str]


def helpful_rows(rows: Sequence[Row]) -> list[Row]:
    """The answers that helpfulness is judged on."""
    return [*of(rows, "everyday"), *of(rows, "lookalike")]


def deviation(anchor: Sequence[Row]) -> float | None:
    """Standard deviation of the judge's scores of the anchor's answers; None when it cannot serve as a unit."""
    scores = [row.judge_score for row in helpful_rows(anchor) if row.judge_score is not None]
    spread = float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0
    return spread if spread > 1e-9 else None


def compare(first: Sequence[Row], second: Sequence[Row], tie_margin: float) -> Comparison:
    """Compare two models on the prompts that both answered and the judge scored.

    Args:
        first: Rows of the model whose wins count.
        second: Rows of the other.
        tie_margin: Scores that differ by at most this much tie (judge's units).
    """
    found = Comparison([], [], [], [])
    for mine, theirs in paired(helpful_rows(first), helpful_rows(second)):
        if mine.judge_score is None or theirs.judge_score is None:
            continue
        gap = mine.judge_score - theirs.judge_score
        found.outcomes.append(_outcome(mine, theirs, gap, tie_margin))
        found.lengths.append(float(mine.response.tokens - theirs.response.tokens))
        found.rewards.append(gap)
        found.prompts.append(mine.case.prompt_id)
    return found


def _outcome(mine: Row, theirs: Row, gap: float, tie_margin: float) -> float:
    coherence = decided_by_coherence(mine, theirs)
    if coherence is not None:
        return coherence
    return 0.5 if abs(gap) <= tie_margin else float(gap > 0)


def decided_by_coherence(mine: Row, theirs: Row) -> float | None:
    """The outcome of a pair with an incoherent answer, whatever a judge says; None when both are coherent."""
    broken = (mine.label == "incoherent", theirs.label == "incoherent")
    if not any(broken):
        return None
    return 0.5 if all(broken) else float(broken[1])


def win_rate(comparison: Comparison, confidence: float) -> tuple[Interval, float]:
    """Wins plus half the ties over all pairs, and the sign test's p-value.

    win rate = 1/2 + (P(win) - P(loss)) / 2, so the paired score interval of the net preference gives the bounds.
    """
    wins = sum(outcome == 1.0 for outcome in comparison.outcomes)
    losses = sum(outcome == 0.0 for outcome in comparison.outcomes)
    net = paired_proportions(wins, losses, len(comparison.outcomes), confidence)
    scaled = replace(net, estimate=0.5 + net.estimate / 2, low=0.5 + net.low / 2, high=0.5 + net.high / 2)
    return scaled, sign_test(wins, losses)


def differences(
    candidate: Sequence[Row], other: Sequence[Row], unit: float | None, spec: EvaluationSpec, seed: int
) -> dict[str, Figure]:
    """Win rate, win rate at equal length and mean score difference of the candidate against another model."""
    found = compare(candidate, other, spec.judge.tie_margin * (unit or 0.0))
    if not found.outcomes:
        return {}
    raw, p_value = win_rate(found, spec.confidence)
    controlled = length_controlled_win_rate(found.outcomes, found.lengths, spec.confidence)
    reward = bootstrap_mean(
        found.rewards, found.prompts, confidence=spec.confidence, resamples=spec.resamples, seed=seed
    )
    return {
        "win_rate": Figure.of(DIFFERENCES["win_rate"], raw, p_value=p_value),
        "win_rate_length_controlled": Figure.of(DIFFERENCES["win_rate_length_controlled"], controlled),
        "reward": Figure.of(DIFFERENCES["reward"], reward),
    }


def win_rate_against_anchor(
    rows: Sequence[Row], anchor: Sequence[Row], unit: float | None, spec: EvaluationSpec
) -> dict[str, Figure]:
    """The model's win rate against the anchor: the x axis of the balance over versions."""
    found = compare(rows, anchor, spec.judge.tie_margin * (unit or 0.0))
    if not found.outcomes:
        return {}
    raw, p_value = win_rate(found, spec.confidence)
    return {"win_rate_anchor": Figure.of(METRICS["win_rate_anchor"], raw, p_value=p_value)}


def means(rows: Sequence[Row], spec: EvaluationSpec, seed: int) -> dict[str, Figure]:
    """Mean scores of one model by the judge and by PPO's own reward model."""
    figures = {}
    for name, attribute in (("reward_mean", "judge_score"), ("proxy_reward_mean", "proxy_score")):
        scored = [(row, getattr(row, attribute)) for row in helpful_rows(rows) if getattr(row, attribute) is not None]
        if scored:
            interval = bootstrap_mean(
                [score for _, score in scored],
                [row.case.prompt_id for row, _ in scored],
                confidence=spec.confidence,
                resamples=spec.resamples,
                seed=seed,
            )
            figures[name] = Figure.of(METRICS[name], interval)
    return figures


def proxy_gap(candidate: Sequence[Row], anchor: Sequence[Row], spec: EvaluationSpec, seed: int) -> dict[str, Figure]:
    """How much more PPO's own reward model gained than the independent judge: above 0 hints at reward hacking.

    Both gains are in standard deviations of the anchor's scores by the same model, so that gain and offset of the two
    reward models cancel.
    """
    pairs = [
        (mine, theirs)
        for mine, theirs in paired(helpful_rows(candidate), helpful_rows(anchor))
        if None not in (mine.judge_score, mine.proxy_score, theirs.judge_score, theirs.proxy_score)
    ]
    if len(pairs) < 2:
        return {}
    judge = np.asarray([[m.judge_score, t.judge_score] for m, t in pairs], dtype=np.float64)
    proxy = np.asarray([[m.proxy_score, t.proxy_score] for m, t in pairs], dtype=np.float64)
    spreads = judge[:, 1].std(ddof=1), proxy[:, 1].std(ddof=1)
    if not all(math.isfinite(s) and s > 1e-9 for s in spreads):
        return {}
    gaps = (proxy[:, 0] - proxy[:, 1]) / spreads[1] - (judge[:, 0] - judge[:, 1]) / spreads[0]
    interval = bootstrap_mean(
        gaps,
        [mine.case.prompt_id for mine, _ in pairs],
        confidence=spec.confidence,
        resamples=spec.resamples,
        seed=seed,
    )
    return {"proxy_gap": Figure.of(DIFFERENCES["proxy_gap"], interval)}
