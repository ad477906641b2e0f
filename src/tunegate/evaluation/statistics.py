"""Intervals, tests and sample sizes for what the gates decide on.

Two-sided intervals at `confidence` c everywhere: each bound alone is a one-sided bound at (1 + c) / 2, so "the upper
bound is below the limit" errs with probability (1 - c) / 2 or, for the exact intervals, less. The interval that a
report shows is the interval that decides. The mathematics (quantiles, exact tests, root finding, the bootstrap) is
SciPy's.

Sources:
    Clopper and Pearson 1934, Biometrika 26; Wilson 1927, JASA 22; Korn and Graubard 1998, Survey Methodology 24
    (Clopper-Pearson with an effective sample size); Tango 1998, Statistics in Medicine 17 (score interval of a
    difference of paired proportions); Agresti and Min 2005, Statistics in Medicine 24 (pseudo-observations for the
    same); Cochran 1977, Sampling Techniques (linearised ratio); Efron 1987, JASA 82 (BCa); Hesterberg 2015, The
    American Statistician 69 (its level for small samples); Schuirmann 1987, J. Pharmacokinetics and Biopharmaceutics 15
    (TOST); Holm 1979, Scandinavian J. of Statistics 6; Dubois et al. 2024, arXiv 2404.04475 (length control).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats

from tunegate.errors import TunegateError

FloatArray = NDArray[np.float64]
ProportionMethod = Literal["clopper-pearson", "wilson"]

SEARCH_LIMIT = 1_000_000
"""The largest sample size that the searches below try; beyond it the answer is "not by more of the same"."""


class StatisticsError(TunegateError):
    """A statistic was asked of numbers that it is not defined for."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A point estimate and its two-sided interval.

    Attributes:
        estimate: The point estimate.
        low: Lower bound.
        high: Upper bound.
        n: Observations: prompts, pairs or tokens, as the caller counts them.
        clusters: Independent units among them; equal to `n` when every observation is its own.
        method: How the bounds were found.
    """

    estimate: float
    low: float
    high: float
    n: int
    clusters: int
    method: str


def _check_confidence(confidence: float) -> None:
    if not 0.5 <= confidence < 1.0:
        raise StatisticsError("a confidence level lies in [0.5, 1)", key="confidence", value=confidence)


def _finite(values: ArrayLike, name: str) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise StatisticsError("one value an observation is needed", key=name, value=array.shape)
    if not np.isfinite(array).all():
        raise StatisticsError("there is a value that is not finite", key=name)
    return array


# --------------------------------------------------------------------------------------------------- proportions


def clopper_pearson(successes: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Exact bounds of a proportion: each covers with at least (1 + confidence) / 2, whatever the truth.

    Args:
        successes: Count in [0, n]; fractional when an effective sample size is used.
        n: Trials, > 0; 0 gives the bounds (0, 1).
        confidence: Two-sided level.

    Returns:
        Lower and upper bound.
    """
    _check_confidence(confidence)
    if n <= 0:
        return 0.0, 1.0
    if not 0 <= successes <= n:
        raise StatisticsError("successes must lie between 0 and n", key="successes", value=(successes, n))
    tail = (1.0 - confidence) / 2.0
    low = 0.0 if successes == 0 else float(special.betaincinv(successes, n - successes + 1.0, tail))
    high = 1.0 if successes == n else float(special.betaincinv(successes + 1.0, n - successes, 1.0 - tail))
    return low, high


def wilson(successes: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Score bounds of a proportion: nominal coverage on average over the truth, shorter than the exact ones."""
    _check_confidence(confidence)
    if n <= 0:
        return 0.0, 1.0
    if not 0 <= successes <= n:
        raise StatisticsError("successes must lie between 0 and n", key="successes", value=(successes, n))
    z = float(special.ndtri((1.0 + confidence) / 2.0))
    share = successes / n
    centre = (share + z * z / (2.0 * n)) / (1.0 + z * z / n)
    half = z / (1.0 + z * z / n) * math.sqrt(share * (1.0 - share) / n + z * z / (4.0 * n * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def proportion(
    successes: float, n: int, confidence: float = 0.95, method: ProportionMethod = "clopper-pearson"
) -> Interval:
    """A share with its bounds; with n = 0 the estimate is NaN and the bounds are (0, 1)."""
    bounds = clopper_pearson if method == "clopper-pearson" else wilson
    low, high = bounds(successes, n, confidence)
    return Interval(successes / n if n else math.nan, low, high, n, n, method)


def clustered_proportion(
    outcomes: ArrayLike, clusters: Sequence[str], confidence: float = 0.95, method: ProportionMethod = "clopper-pearson"
) -> Interval:
    """A share of correlated yes/no outcomes (several attacks on one prompt), with Korn and Graubard's bounds.

    The sample size is replaced by n* = p (1 - p) / v, where v is the variance of the share between clusters
    (linearised ratio), shrunk by (t_{n-1} / t_{k-1})^2 for the few degrees of freedom, and never above n. A share of
    exactly 0 or 1 tells nothing about the correlation: then every cluster counts once.

    Args:
        outcomes: [N], 0 or 1.
        clusters: N labels.
        confidence: Two-sided level.
        method: The bounds that the effective counts are put into.
    """
    values = _finite(outcomes, "outcomes")
    n = len(values)
    _, index = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
    k = int(index.max()) + 1 if n else 0
    if k == n:
        return proportion(float(values.sum()), n, confidence, method)
    share = float(values.mean())
    effective = float(k)
    if 0.0 < share < 1.0 and k > 1:
        residuals = np.bincount(index, weights=values - share, minlength=k)
        variance = k / (k - 1.0) * float(residuals @ residuals) / n**2
        tail = (1.0 + confidence) / 2.0
        shrink = (special.stdtrit(n - 1, tail) / special.stdtrit(k - 1, tail)) ** 2
        effective = min(float(n), shrink * share * (1.0 - share) / variance) if variance > 0 else float(k)
    bounds = clopper_pearson if method == "clopper-pearson" else wilson
    low, high = bounds(share * effective, effective, confidence)
    return Interval(share, low, high, n, k, f"{method}, effective n {effective:.1f}")


# ------------------------------------------------------------------------------------------- paired differences


def paired_proportions(only_first: int, only_second: int, n: int, confidence: float = 0.95) -> Interval:
    """Tango's score interval of P(first) - P(second) from n pairs.

    It inverts the score test of the difference, so it agrees with McNemar's test at 0, and it does not collapse to a
    point when no pair disagrees (there the bounds are +-z^2 / (n + z^2)).

    Args:
        only_first: Pairs in which only the first happened (b).
        only_second: Pairs in which only the second happened (c).
        n: All pairs, those that agree included.
        confidence: Two-sided level.
    """
    _check_confidence(confidence)
    b, c = only_first, only_second
    if b < 0 or c < 0 or b + c > n:
        raise StatisticsError("counts of pairs must be >= 0 and add up to at most n", key="pairs", value=(b, c, n))
    if n == 0:
        return Interval(math.nan, -1.0, 1.0, 0, 0, "tango")
    z = float(special.ndtri((1.0 + confidence) / 2.0))
    estimate = (b - c) / n

    def score(delta: float) -> float:
        variance = n * _variance_under(b / n, c / n, delta)
        gap = b - c - n * delta
        if variance <= 0.0:
            return 0.0 if gap == 0 else math.copysign(math.inf, gap)
        return gap / math.sqrt(variance)

    low = _solve(lambda d: score(d) - z, -1.0, estimate)
    high = _solve(lambda d: score(d) + z, estimate, 1.0)
    return Interval(estimate, low, high, n, n, "tango")


def _variance_under(only_first: float, only_second: float, delta: float) -> float:
    """Variance of one pair's difference at the maximum likelihood estimate under a true difference of `delta`.

    Tango 1998: P(only second) is estimated as the larger root of a quadratic under P(first) - P(second) = delta.

    Args:
        only_first: Observed share of pairs in which only the first happened.
        only_second: The same for the second.
        delta: The difference that is supposed.
    """
    linear = -only_first - only_second + (2.0 - only_first + only_second) * delta
    root = math.sqrt(max(linear * linear + 8.0 * only_second * delta * (1.0 - delta), 0.0))
    return (root - linear) / 2.0 + delta * (1.0 - delta)


def _solve(function: Callable[[float], float], left: float, right: float) -> float:
    """The zero of a function that falls from left to right; an end where it has none."""
    edge = 1e-12
    left, right = max(left, -1.0 + edge), min(right, 1.0 - edge)
    if left >= right or function(left) <= 0:
        return max(-1.0, round(left, 11))
    if function(right) >= 0:
        return min(1.0, round(right, 11))
    return float(optimize.brentq(function, left, right, xtol=1e-10))


def clustered_difference(differences: ArrayLike, clusters: Sequence[str], confidence: float = 0.95) -> Interval:
    """Mean of paired differences in [-1, 1] that may be correlated within clusters.

    When every cluster has one difference out of -1, 0, 1 this is `paired_proportions`, otherwise `bounded_difference`
    of the cluster means.

    Args:
        differences: [N], each in [-1, 1].
        clusters: N labels.
        confidence: Two-sided level.
    """
    values = _finite(differences, "differences")
    if len(values) == 0:
        return Interval(math.nan, -1.0, 1.0, 0, 0, "tango")
    means = cluster_means(values, clusters)
    if len(means) == len(values) and np.isin(values, (-1.0, 0.0, 1.0)).all():
        return paired_proportions(int((values > 0).sum()), int((values < 0).sum()), len(values), confidence)
    return replace(bounded_difference(means, confidence), n=len(values))


def bounded_difference(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Mean of independent differences in [-1, 1], by Student's t with two pseudo-observations.

    Agresti and Min's four half pairs (+1, -1, 0, 0) keep the interval from collapsing when nothing differs. The
    estimate itself stays the plain mean.

    Args:
        values: [N], one a cluster.
        confidence: Two-sided level.
    """
    _check_confidence(confidence)
    means = _finite(values, "values")
    k = len(means)
    if k == 0:
        return Interval(math.nan, -1.0, 1.0, 0, 0, "agresti-min")
    total = k + 2.0
    centre = float(means.sum()) / total
    variance = (float(means @ means) + 1.0) / total - centre**2
    half = float(special.stdtrit(k + 1, (1.0 + confidence) / 2.0)) * math.sqrt(variance / total)
    estimate = float(means.mean())
    low, high = max(-1.0, centre - half), min(1.0, centre + half)
    return Interval(estimate, min(low, estimate), max(high, estimate), k, k, "agresti-min")


def linearised_ratio(sums: ArrayLike, masses: ArrayLike) -> FloatArray:
    """One value a cluster whose mean is the ratio R = sum(s) / sum(m): z_j = R + (s_j - R m_j) / mean(m).

    Their spread is that of the linearised ratio (Cochran 1977, Sampling Techniques, eq. 6.13), so that intervals for
    means of independent values serve ratios, and differences of ratios over the same clusters.

    Args:
        sums: [K] numerators.
        masses: [K] denominators, >= 0, not all 0.
    """
    s, m = _finite(sums, "sums"), _finite(masses, "masses")
    if len(s) != len(m) or (m < 0).any() or not m.sum():
        raise StatisticsError("a ratio needs one mass >= 0 a cluster, not all 0", key="masses", value=m.tolist()[:5])
    ratio = s.sum() / m.sum()
    return np.asarray(ratio + (s - ratio * m) / m.mean(), dtype=np.float64)


def cluster_means(values: ArrayLike, clusters: Sequence[str]) -> FloatArray:
    """The mean of `values` in each cluster, in the order of the sorted labels."""
    array = _finite(values, "values")
    if len(array) != len(clusters):
        raise StatisticsError("one cluster label a value is needed", key="clusters", value=(len(array), len(clusters)))
    _, index = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
    return np.asarray(np.bincount(index, weights=array) / np.bincount(index), dtype=np.float64)


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """The mean of independent values, by Student's t; fewer than two values give infinite bounds."""
    _check_confidence(confidence)
    array = _finite(values, "values")
    n = len(array)
    if n < 2:
        return Interval(float(array[0]) if n else math.nan, -math.inf, math.inf, n, n, "t")
    half = float(special.stdtrit(n - 1, (1.0 + confidence) / 2.0)) * float(array.std(ddof=1)) / math.sqrt(n)
    mean = float(array.mean())
    return Interval(mean, mean - half, mean + half, n, n, "t")


def bootstrap_mean(
    values: ArrayLike,
    clusters: Sequence[str] | None = None,
    *,
    weights: ArrayLike | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Weighted mean sum(w x) / sum(w), with BCa bounds from resampling whole clusters (SciPy's `bootstrap`).

    The level is widened for few clusters (Hesterberg 2015, The American Statistician 69, the "expanded" percentile).

    For a paired comparison `values` are the differences of the two roles on the same prompt. With `weights` = tokens
    and `values` = nats per token it is a mean over tokens whose prompts stay together.

    Args:
        values: [N].
        clusters: N labels; None: every value on its own.
        weights: [N], > 0; None: all 1.
        confidence: Two-sided level.
        resamples: Bootstrap resamples.
        seed: Of the resampling.

    Returns:
        The interval; a point when all values are equal, infinite bounds below two clusters. "bootstrap percentile"
        where BCa is undefined (acceleration or bias out of range).
    """
    _check_confidence(confidence)
    array = _finite(values, "values")
    n = len(array)
    weight = np.ones(n) if weights is None else _finite(weights, "weights")
    if (weight <= 0).any():
        raise StatisticsError("weights must be positive", key="weights")
    labels = [str(i) for i in range(n)] if clusters is None else list(clusters)
    if n == 0:
        return Interval(math.nan, -math.inf, math.inf, 0, 0, "bootstrap BCa")
    _, index = np.unique(np.asarray(labels, dtype=object).astype(str), return_inverse=True)
    sums, masses = np.bincount(index, weights=array * weight), np.bincount(index, weights=weight)
    k = len(sums)
    estimate = float(sums.sum() / masses.sum())
    if k < 2:
        return Interval(estimate, -math.inf, math.inf, n, k, "bootstrap BCa")
    if np.ptp(sums / masses) == 0:
        return Interval(estimate, estimate, estimate, n, k, "all equal")

    def ratio(sums: FloatArray, masses: FloatArray, axis: int = -1) -> FloatArray:
        return np.asarray(sums.sum(axis=axis) / masses.sum(axis=axis), dtype=np.float64)

    # Resampling k clusters understates their spread by (k - 1) / k and knows no t quantile: widen the level for both.
    widened = math.sqrt(k / (k - 1.0)) * float(special.stdtrit(k - 1, (1.0 + confidence) / 2.0))
    level = 1.0 - 2.0 * float(special.ndtr(-widened))
    rng = np.random.default_rng(seed)
    for method in ("BCa", "percentile"):
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SciPy warns where BCa is undefined; the bounds are then NaN, see below
            found = stats.bootstrap(
                (sums, masses),
                ratio,
                paired=True,
                vectorized=True,
                n_resamples=resamples,
                confidence_level=level,
                method=method,
                rng=rng,
            ).confidence_interval
        if math.isfinite(found.low) and math.isfinite(found.high):
            break
    return Interval(estimate, float(found.low), float(found.high), n, k, f"bootstrap {method}, {resamples} resamples")


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


@dataclass(frozen=True, slots=True)
class Equivalence:
    """Outcome of two one-sided tests.

    Attributes:
        p_value: The larger of the two one-sided p-values; equivalent where it is at most alpha.
        low: Lower bound of the two-sided 1 - 2 alpha interval.
        high: Upper bound of it.
        equivalent: The whole interval lies inside the margins.
    """

    p_value: float
    low: float
    high: float
    equivalent: bool


def tost(differences: ArrayLike, margin: float, alpha: float = 0.05) -> Equivalence:
    """Two one-sided t-tests that the mean difference lies inside (-margin, margin).

    Args:
        differences: [N] independent paired differences (one a template), N >= 2.
        margin: Equivalence margin, > 0, in the unit of the differences.
        alpha: Level of each test; the interval returned has level 1 - 2 alpha.
    """
    values = _finite(differences, "differences")
    if margin <= 0:
        raise StatisticsError("an equivalence margin must be positive", key="margin", value=margin)
    if len(values) < 2:
        return Equivalence(1.0, -math.inf, math.inf, False)
    interval = mean_interval(values, 1.0 - 2.0 * alpha)
    if np.ptp(values) == 0:
        inside = abs(interval.estimate) < margin
        return Equivalence(0.0 if inside else 1.0, interval.estimate, interval.estimate, inside)
    above = stats.ttest_1samp(values, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(values, margin, alternative="less").pvalue
    p_value = float(max(above, below))
    return Equivalence(p_value, interval.low, interval.high, p_value <= alpha)


def non_inferior(interval: Interval, margin: float, *, higher_is_better: bool) -> bool:
    """Whether a difference (new minus old) is shown to be worse by less than `margin` (>= 0)."""
    return interval.low > -margin if higher_is_better else interval.high < margin


# ----------------------------------------------------------------------------------------------- length control


def length_controlled_win_rate(outcomes: ArrayLike, length_difference: ArrayLike, confidence: float = 0.95) -> Interval:
    """Win rate at equal length: logistic regression of the outcome on the length difference, read at zero.

    After AlpacaEval 2 (Dubois et al. 2024): logit P(win) = theta + phi tanh(d / sd(d)), reported as
    sigmoid(theta). Ties count one half. phi has a N(0, 2^2) prior and theta a N(0, 4^2) prior, so that separable data
    keep finite estimates. The interval is the delta method on theta with the sandwich covariance (robust to ties not
    being Bernoulli), Student's t with n - 2 degrees of freedom, transformed by the sigmoid. Where all outcomes are
    equal the sandwich is no evidence; then the bounds are the exact ones of the raw share.

    Args:
        outcomes: [N], 1 win, 0.5 tie, 0 loss of the first model.
        length_difference: [N], first minus second, any unit.
        confidence: Two-sided level.
    """
    _check_confidence(confidence)
    y, d = _finite(outcomes, "outcomes"), _finite(length_difference, "length_difference")
    n = len(y)
    if n < 3 or np.ptp(y) == 0:
        low, high = clopper_pearson(float(y.sum()), n, confidence)
        return Interval(float(y.mean()) if n else math.nan, low, high, n, n, "clopper-pearson (too few to fit)")
    spread = float(d.std())
    x = np.tanh(d / spread) if spread > 0 else np.zeros(n)
    design = np.column_stack([np.ones(n), x])
    precision = np.diag([1.0 / 16.0, 1.0 / 4.0])
    coefficients = np.zeros(2)
    for _ in range(50):
        p = special.expit(design @ coefficients)
        hessian = design.T @ (design * (p * (1 - p))[:, None]) + precision
        step = np.linalg.solve(hessian, design.T @ (y - p) - precision @ coefficients)
        coefficients += step
        if np.abs(step).max() < 1e-10:
            break
    p = special.expit(design @ coefficients)
    inverse = np.linalg.inv(design.T @ (design * (p * (1 - p))[:, None]) + precision)
    leverage = np.einsum("ni,ij,nj->n", design, inverse, design) * p * (1 - p)
    # HC3: residuals grown by 1 / (1 - leverage), without which the sandwich is too small at the n of a gate.
    scores = design * ((y - p) / np.maximum(1.0 - leverage, 0.1))[:, None]
    error = math.sqrt((inverse @ (scores.T @ scores) @ inverse)[0, 0])
    half = float(special.stdtrit(n - 2, (1.0 + confidence) / 2.0)) * error
    theta = float(coefficients[0])
    low, high = float(special.expit(theta - half)), float(special.expit(theta + half))
    return Interval(float(special.expit(theta)), low, high, n, n, "logistic on length difference, HC3")


# -------------------------------------------------------------------------------------------------- sample sizes


def required_n_limit(rate: float, limit: float, *, confidence: float = 0.95, power: float = 0.8) -> int | None:
    """Prompts needed so that the exact bound of a proportion clears `limit` with probability `power`.

    Args:
        rate: The true rate that is assumed.
        limit: The limit; the upper bound must fall below it when rate < limit, the lower bound above it otherwise.
        confidence: Two-sided level of the interval.
        power: Wanted probability.

    Returns:
        An n at which the exact binomial power is reached, the smallest up to the saw-tooth of exact tests; None
        beyond `SEARCH_LIMIT`.
    """
    if rate == limit:
        return None

    def reached(n: int) -> bool:
        return _power_limit(n, rate, limit, confidence) >= power

    return _smallest(reached)


def _power_limit(n: int, rate: float, limit: float, confidence: float) -> float:
    """Probability that the Clopper-Pearson interval of n draws at `rate` lies on the right side of `limit`."""
    tail = (1.0 - confidence) / 2.0
    if rate < limit:
        # upper bound < limit  <=>  P(X <= x | limit) < tail
        x = int(stats.binom.ppf(tail, n, limit))
        while x >= 0 and stats.binom.cdf(x, n, limit) >= tail:
            x -= 1
        return float(stats.binom.cdf(x, n, rate)) if x >= 0 else 0.0
    x = int(stats.binom.isf(tail, n, limit))
    while x <= n and stats.binom.sf(x - 1, n, limit) >= tail:
        x += 1
    return float(stats.binom.sf(x - 1, n, rate)) if x <= n else 0.0


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
    at_margin = math.sqrt(max(_variance_under(worse, better, margin), 0.0))
    at_truth = math.sqrt(max(discordance - difference**2, 0.0))
    n = math.ceil(((z_conf * at_margin + z_power * at_truth) / (margin - difference)) ** 2)
    return max(n, 1) if n <= SEARCH_LIMIT else None


def required_n_win_rate(
    win_rate: float, *, tie_rate: float = 0.0, margin: float = 0.0, confidence: float = 0.95, power: float = 0.8
) -> int | None:
    """Pairs needed to show that a win rate (ties one half) is above 0.5 - margin."""
    # In terms of (loss - win) / n the win rate is 0.5 - d / 2, so everything doubles.
    return required_n_paired(2 * margin, 1.0 - 2 * win_rate, 1.0 - tie_rate, confidence=confidence, power=power)


def required_n_mean(
    margin: float, difference: float, deviation: float, *, confidence: float = 0.95, power: float = 0.8
) -> int | None:
    """Observations needed to show that a mean paired difference with this standard deviation is below `margin`."""
    if difference >= margin:
        return None
    z = float(special.ndtri((1 + confidence) / 2) + special.ndtri(power))
    n = math.ceil((z * deviation / (margin - difference)) ** 2) + 2
    return n if n <= SEARCH_LIMIT else None


def n_to_decide_limit(successes: int, n: int, limit: float, *, confidence: float = 0.95) -> int | None:
    """How many observations in all would take the exact interval off `limit` if the share stays what it is.

    Returns:
        The n, at least the present one, or None if the share lies on the limit or n exceeds `SEARCH_LIMIT`.
    """
    if n == 0 or successes / n == limit:
        return None
    share = successes / n

    def decided(size: int) -> bool:
        low, high = clopper_pearson(share * size, size, confidence)
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
