"""Tests and sample sizes for what the gates decide on; the intervals are in `statistics`.

A gate on a rate decides by the interval that is shown, so the sample sizes take the same bounds: `required_n_limit` and
`n_to_decide_limit` ask the interval itself. Tests that claim an error rate of their own (`sign_test`,
`binomial_exceeds`) stay exact, that is, they never claim more than they hold; where a mid-P interval at level c lies
wholly above a limit, the one-sided exact p-value is at most 1 - c, since it is at most twice the mid-P value.

Sources:
    Holm 1979, Scandinavian J. of Statistics 6; Tango 1998, Statistics in Medicine 17 (variance of a paired difference
    at the margin).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import special, stats

from tunegate.evaluation.statistics import (
    PROPORTION_BOUNDS,
    Interval,
    ProportionMethod,
    tango_variance,
)

SEARCH_LIMIT = 1_000_000
"""The largest sample size that the searches below try; beyond it the answer is "not by more of the same"."""


# --------------------------------------------------------------------------------------------------------- tests


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p-value of the exact binomial test that decided pairs fall either way with equal chance."""
    if wins + losses == 0:
        return 1.0
    return float(stats.binomtest(wins, wins + losses, 0.5).pvalue)


def binomial_exceeds(successes: int, n: int, limit: float) -> float:
    """One-sided exact p-value against "the rate is at most `limit`"."""
    if n == 0:
        return 1.0
    return float(stats.binomtest(successes, n, limit, alternative="greater").pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given; reject where they are at most alpha."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return [float(value) for value in adjusted]


# -------------------------------------------------------------------------------------------------- sample sizes


def required_n_limit(
    rate: float, limit: float, *, confidence: float = 0.95, power: float = 0.8, method: ProportionMethod = "mid-p"
) -> int | None:
    """Prompts needed so that the interval of a proportion clears `limit` with probability `power`.

    Args:
        rate: The true rate that is assumed.
        limit: The limit; the upper bound must not be above it when rate < limit, the lower bound must be above it
            otherwise.
        confidence: Two-sided level of the interval.
        power: Wanted probability.
        method: The interval that decides.

    Returns:
        An n at which the power is reached, counted over the binomial distribution; the smallest up to the saw-tooth of
        counts; None beyond `SEARCH_LIMIT`.
    """
    if rate == limit:
        return None

    def reached(n: int) -> bool:
        return _power_limit(n, rate, limit, confidence, method) >= power

    return _smallest(reached)


def _power_limit(n: int, rate: float, limit: float, confidence: float, method: ProportionMethod) -> float:
    """Probability that the interval of n draws at `rate` lies on the right side of `limit`."""
    bounds = PROPORTION_BOUNDS[method]
    # Both bounds rise with the count: bisect for the number of counts whose bound lies below the limit or on it.
    side = 1 if rate < limit else 0
    first, last = 0, n + 1
    while first < last:
        middle = (first + last) // 2
        if bounds(middle, n, confidence)[side] <= limit:
            first = middle + 1
        else:
            last = middle
    below = float(stats.binom.cdf(first - 1, n, rate))
    return below if rate < limit else 1.0 - below


def required_n_paired(
    margin: float, difference: float, discordance: float, *, confidence: float = 0.95, power: float = 0.8
) -> int | None:
    """Pairs needed to show that a paired difference of proportions is below `margin` (normal approximation).

    n = (z_conf sd_0 + z_power sd_1)^2 / (margin - difference)^2 with sd_1^2 = discordance - difference^2 and sd_0^2
    the variance that the score test would estimate at the margin (Tango 1998). Non-inferiority: `margin` > 0 and
    worse = positive. Superiority: `margin` = 0 and `difference` < 0.

    Args:
        margin: Largest difference (new minus old, positive = worse) that is accepted.
        difference: The true difference that is assumed, < margin.
        discordance: Share of pairs in which the two differ, >= |difference|.
        confidence: Two-sided level of the interval.
        power: Wanted probability.

    Returns:
        Pairs, or None when the difference is not below the margin or n exceeds `SEARCH_LIMIT`.
    """
    if difference >= margin:
        return None
    discordance = max(discordance, abs(difference))
    z_conf, z_power = float(special.ndtri((1 + confidence) / 2)), float(special.ndtri(power))
    worse, better = (discordance + difference) / 2.0, (discordance - difference) / 2.0
    at_margin = math.sqrt(max(tango_variance(worse, better, margin), 0.0))
    at_truth = math.sqrt(max(discordance - difference**2, 0.0))
    n = math.ceil(((z_conf * at_margin + z_power * at_truth) / (margin - difference)) ** 2)
    return max(n, 1) if n <= SEARCH_LIMIT else None


def required_n_win_rate(
    win_rate: float, *, tie_rate: float = 0.0, margin: float = 0.0, confidence: float = 0.95, power: float = 0.8
) -> int | None:
    """Pairs needed to show that a win rate (ties one half) is above 0.5 - margin."""
    # In terms of (loss - win) / n the win rate is 0.5 - d / 2, so everything doubles.
    return required_n_paired(2 * margin, 1.0 - 2 * win_rate, 1.0 - tie_rate, confidence=confidence, power=power)


def n_to_decide_limit(
    successes: int, n: int, limit: float, *, confidence: float = 0.95, method: ProportionMethod = "mid-p"
) -> int | None:
    """How many observations in all would take the interval off `limit` if the share stays what it is.

    Returns:
        The n, at least the present one, or None if the share lies on the limit or n exceeds `SEARCH_LIMIT`.
    """
    if n == 0 or successes / n == limit:
        return None
    share, bounds = successes / n, PROPORTION_BOUNDS[method]

    def decided(size: int) -> bool:
        low, high = bounds(share * size, size, confidence)
        return high <= limit if share < limit else low > limit

    return _smallest(decided, start=n)


def n_to_decide_mean(interval: Interval, limit: float) -> int | None:
    """The same for any interval whose width falls with the square root of n."""
    if interval.n == 0 or not all(map(math.isfinite, (interval.estimate, interval.low, interval.high))):
        return None
    gap = abs(interval.estimate - limit)
    half = interval.high - interval.estimate if limit > interval.estimate else interval.estimate - interval.low
    if gap == 0:
        return None
    n = math.ceil(interval.n * max(1.0, (half / gap) ** 2))
    return n if n <= SEARCH_LIMIT else None


def _smallest(reached: Callable[[int], bool], start: int = 1) -> int | None:
    """The smallest n >= start with `reached(n)`, taking it to be monotone up to the saw-tooth of exact tests."""
    high = max(start, 1)
    while not reached(high):
        high *= 2
        if high > SEARCH_LIMIT:
            return None
    low = max(start, high // 2)
    while low < high:
        middle = (low + high) // 2
        if reached(middle):
            high = middle
        else:
            low = middle + 1
    return high
