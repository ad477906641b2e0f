"""Intervals for what the gates decide on; tests and sample sizes are in `significance`.

Two-sided intervals at `confidence` c everywhere, with tails of equal size: each bound alone is a one-sided bound at
(1 + c) / 2, so "the upper bound is below the limit" errs with probability about (1 - c) / 2. The interval that a report
shows is the interval that decides. How often they cover is simulated in `benchmarks/gates/coverage.py`. Quantiles and
root finding are SciPy's.

Sources:
    Lancaster 1961, JASA 56; Berry and Armitage 1995, The Statistician 44; Agresti and Gottard 2007, Computational
    Statistics and Data Analysis 51 (mid-P); Clopper and Pearson 1934, Biometrika 26; Wilson 1927, JASA 22; Korn and
    Graubard 1998, Survey Methodology 24 (bounds of a proportion with an effective sample size); Tango 1998, Statistics
    in Medicine 17 (score interval of a difference of paired proportions); Owen 1988, Biometrika 75, and 2001, Empirical
    Likelihood (means); Honda and Takemura 2010, COLT (the same with known ends of the support); Cochran 1977, Sampling
    Techniques (linearised ratio); Hall 1988, Annals of Statistics 16, and Davison and Hinkley 1997, Bootstrap Methods
    and their Application, section 5.2 (bootstrap-t); Dubois et al. 2024, arXiv 2404.04475 (length control).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special

from tunegate.errors import TunegateError

FloatArray = NDArray[np.float64]
ProportionMethod = Literal["mid-p", "wilson", "clopper-pearson"]


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


def mid_p(successes: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Mid-P bounds of a proportion: the exact binomial tails, with half the weight on what was seen.

    The upper bound solves P(X < x | p) + P(X = x | p) / 2 = (1 - confidence) / 2, the lower one the mirror image
    (Lancaster 1961; Agresti and Gottard 2007). Clopper and Pearson's bounds count the whole of P(X = x) and so cover
    more than they say; these cover what they say on average over the truth, in both tails, and as near to it at a
    single truth as counts allow. With nothing seen the upper bound is 1 - (1 - confidence)^(1/n).

    Args:
        successes: Count in [0, n]; fractional when an effective sample size is used (incomplete beta functions).
        n: Trials, > 0; 0 gives the bounds (0, 1).
        confidence: Two-sided level.

    Returns:
        Lower and upper bound.
    """
    _check_counts(successes, n, confidence)
    if n <= 0:
        return 0.0, 1.0
    tail = (1.0 - confidence) / 2.0
    return 1.0 - _mid_p_upper(n - successes, n, tail), _mid_p_upper(successes, n, tail)


def _mid_p_upper(successes: float, n: float, tail: float) -> float:
    if successes >= n:
        return 1.0

    def excess(p: float) -> float:
        at_most = float(special.betainc(n - successes, successes + 1.0, 1.0 - p))
        fewer = float(special.betainc(n - successes + 1.0, successes, 1.0 - p)) if successes > 0 else 0.0
        return (at_most + fewer) / 2.0 - tail

    return float(optimize.brentq(excess, successes / n, 1.0, xtol=1e-13))


def clopper_pearson(successes: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Guaranteed bounds of a proportion: each covers with at least (1 + confidence) / 2, whatever the truth.

    The price is that they cover more often than they say: at 400 trials and a rate of 6% 96.6% for 95%.

    Args:
        successes: Count in [0, n]; fractional when an effective sample size is used.
        n: Trials, > 0; 0 gives the bounds (0, 1).
        confidence: Two-sided level.

    Returns:
        Lower and upper bound.
    """
    _check_counts(successes, n, confidence)
    if n <= 0:
        return 0.0, 1.0
    tail = (1.0 - confidence) / 2.0
    low = 0.0 if successes == 0 else float(special.betaincinv(successes, n - successes + 1.0, tail))
    high = 1.0 if successes == n else float(special.betaincinv(successes + 1.0, n - successes, 1.0 - tail))
    return low, high


def wilson(successes: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Score bounds of a proportion (Wilson 1927): nominal coverage on average over the truth.

    For small rates the tails are unequal: the lower bound errs more often, the upper one less often than it says.
    """
    _check_counts(successes, n, confidence)
    if n <= 0:
        return 0.0, 1.0
    z = float(special.ndtri((1.0 + confidence) / 2.0))
    share = successes / n
    centre = (share + z * z / (2.0 * n)) / (1.0 + z * z / n)
    half = z / (1.0 + z * z / n) * math.sqrt(share * (1.0 - share) / n + z * z / (4.0 * n * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def _check_counts(successes: float, n: float, confidence: float) -> None:
    _check_confidence(confidence)
    if n > 0 and not 0 <= successes <= n:
        raise StatisticsError("successes must lie between 0 and n", key="successes", value=(successes, n))


PROPORTION_BOUNDS: Mapping[ProportionMethod, Callable[[float, float, float], tuple[float, float]]] = MappingProxyType(
    {"mid-p": mid_p, "wilson": wilson, "clopper-pearson": clopper_pearson}
)
"""Bounds of a proportion, from successes, trials and confidence, by the name in `evaluation.interval`."""


def proportion(successes: float, n: int, confidence: float = 0.95, method: ProportionMethod = "mid-p") -> Interval:
    """A share with its bounds; with n = 0 the estimate is NaN and the bounds are (0, 1)."""
    low, high = PROPORTION_BOUNDS[method](successes, n, confidence)
    return Interval(successes / n if n else math.nan, low, high, n, n, method)


def clustered_proportion(
    outcomes: ArrayLike, clusters: Sequence[str], confidence: float = 0.95, method: ProportionMethod = "mid-p"
) -> Interval:
    """A share of correlated yes/no outcomes (several attacks on one prompt), with Korn and Graubard's sample size.

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
    low, high = PROPORTION_BOUNDS[method](share * effective, effective, confidence)
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
        variance = n * tango_variance(b / n, c / n, delta)
        gap = b - c - n * delta
        if variance <= 0.0:
            return 0.0 if gap == 0 else math.copysign(math.inf, gap)
        return gap / math.sqrt(variance)

    low = _solve(lambda d: score(d) - z, -1.0, estimate)
    high = _solve(lambda d: score(d) + z, estimate, 1.0)
    return Interval(estimate, low, high, n, n, "tango")


def tango_variance(only_first: float, only_second: float, delta: float) -> float:
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
    of the cluster means (empirical likelihood).

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
    """Mean of independent differences in [-1, 1], by empirical likelihood with known ends of the support.

    R(d) is the largest likelihood of any distribution on [-1, 1] with mean d over that of the observed one; the bounds
    are where -2 log R(d) = t^2 with t the Student quantile with k - 1 degrees of freedom (Owen 2001, chapter 2; Owen
    1990, Annals of Statistics 18, for F(1, k - 1) in place of chi-square). Because the ends are known, that
    distribution may put mass on -1 or 1 though nothing was seen there (Honda and Takemura 2010, K_inf), so that the
    bounds are as skewed as the data, stay within [-1, 1], and do not collapse when few clusters differ. Where all
    values are equal there is no likelihood ratio to speak of; then a share of q = 1 - (1 - confidence)^(1/k), mid-P's
    bound for what k clusters did not show, may lie at either end.

    Args:
        values: [N], one a cluster. Values beyond [-1, 1], as linearised ratios can be, move the end to themselves.
        confidence: Two-sided level.
    """
    _check_confidence(confidence)
    found = _finite(values, "values")
    k = len(found)
    if k == 0:
        return Interval(math.nan, -1.0, 1.0, 0, 0, "empirical likelihood")
    estimate = float(found.mean())
    low_end, high_end = min(-1.0, float(found.min())), max(1.0, float(found.max()))
    if float(np.ptp(found)) < 1e-12:
        unseen = 1.0 - (1.0 - confidence) ** (1.0 / k)
        low, high = estimate + unseen * (low_end - estimate), estimate + unseen * (high_end - estimate)
    else:
        limit = float(special.stdtrit(k - 1, (1.0 + confidence) / 2.0)) ** 2
        support, counts = np.unique(found, return_counts=True)
        low = -_likelihood_bound(-support, counts, -low_end, limit)
        high = _likelihood_bound(support, counts, high_end, limit)
    return Interval(estimate, low, high, k, k, "empirical likelihood")


def _likelihood_bound(support: FloatArray, counts: NDArray[np.int_], end: float, limit: float) -> float:
    """The mean above the observed one at which -2 log R = `limit`.

    Among distributions on what was seen, the likeliest with a given mean has weights w_i proportional to
    1 / (a + end - x_i) with a > 0 (Lagrange), and -2 log R = -2 sum log(k w_i) rises as a falls. Means beyond that of
    a = 0 need mass at the end that was not seen there; then -2 log R = 2 sum log((end - x_i) / (end - d)).

    Args:
        support: [M] at least two different values.
        counts: [M] how often each was seen.
        end: The largest value there can be.
        limit: The quantile that -2 log R is compared with.
    """
    k = float(counts.sum())
    room = end - support
    if room.min() > 0.0:
        left = math.exp(float(counts @ np.log(room)) / k - limit / (2.0 * k))
        if left <= k / float(np.sum(counts / room)):
            return end - left

    def weights(log_a: float) -> FloatArray:
        raw = 1.0 / (math.exp(log_a) + room)
        return np.asarray(raw / float(counts @ raw), dtype=np.float64)

    def excess(log_a: float) -> float:
        return -2.0 * float(counts @ np.log(k * weights(log_a))) - limit

    scale = math.log(float(room.max()))
    # At the left end nearly all weight lies on one value, at the right end all weights are equal.
    least = max(scale - 30.0 - limit, -700.0)
    if excess(least) <= 0.0:  # two or three values at a very high level
        return end
    log_a = float(optimize.brentq(excess, least, scale + 20.0, xtol=1e-10))
    return float((counts * weights(log_a)) @ support)


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
    """Weighted mean sum(w x) / sum(w), with bootstrap-t bounds from resampling whole clusters.

    Each resample's mean r* is studentised by its own standard error e*, so that the quantiles of (r* - r) / e* take in
    both few clusters and skewed values: the bounds are r - q_high e and r - q_low e (Hall 1988; Davison and Hinkley
    1997, section 5.2). The standard error is that of the linearised ratio, e^2 = k / (k - 1) sum_j (s_j - r m_j)^2 /
    (sum_j m_j)^2 (Cochran 1977, eq. 6.13). Where so many resamples have no spread that the quantiles are infinite (very
    few clusters, or nearly all of them alike), Student's t with that standard error takes their place.

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
        The interval; a point when all values are equal, infinite bounds below two clusters.
    """
    _check_confidence(confidence)
    array = _finite(values, "values")
    n = len(array)
    weight = np.ones(n) if weights is None else _finite(weights, "weights")
    if (weight <= 0).any():
        raise StatisticsError("weights must be positive", key="weights")
    labels = [str(i) for i in range(n)] if clusters is None else list(clusters)
    if n == 0:
        return Interval(math.nan, -math.inf, math.inf, 0, 0, "bootstrap-t")
    _, index = np.unique(np.asarray(labels, dtype=object).astype(str), return_inverse=True)
    sums: FloatArray = np.bincount(index, weights=array * weight).astype(np.float64)
    masses: FloatArray = np.bincount(index, weights=weight).astype(np.float64)
    k = len(sums)
    estimate = float(sums.sum() / masses.sum())
    if k < 2:
        return Interval(estimate, -math.inf, math.inf, n, k, "bootstrap-t")
    if np.ptp(sums / masses) == 0:
        return Interval(estimate, estimate, estimate, n, k, "all equal")
    residuals = sums - estimate * masses
    error = math.sqrt(k / (k - 1.0) * float(residuals @ residuals)) / float(masses.sum())
    studentised = _studentised(residuals, masses, resamples, seed)
    tail = (1.0 - confidence) / 2.0
    with np.errstate(invalid="ignore"):
        low, high = np.quantile(studentised, [tail, 1.0 - tail], method="weibull").tolist()
    method = f"bootstrap-t, {resamples} resamples"
    if not (math.isfinite(low) and math.isfinite(high)):
        high = float(special.stdtrit(k - 1, 1.0 - tail))
        low, method = -high, "t"
    return Interval(estimate, estimate - high * error, estimate - low * error, n, k, method)


def _studentised(residuals: FloatArray, masses: FloatArray, resamples: int, seed: int) -> FloatArray:
    """(r* - r) / e* of resamples of the clusters, infinite where a resample has no spread.

    Args:
        residuals: [K] s_j - r m_j, which makes r* - r the ratio of their sum to that of the masses.
        masses: [K].
        resamples: How many.
        seed: Of the draws.
    """
    k = len(masses)
    moments_K5 = np.column_stack([residuals, masses, residuals**2, residuals * masses, masses**2])
    floor = 1e-12 * float(moments_K5[:, 2].sum())
    rng = np.random.default_rng(seed)
    found = np.empty(resamples)
    block = max(1, 4_000_000 // k)  # resamples at once: at most some 32 MB a matrix
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        drawn = rng.integers(k, size=(size, k)) + k * np.arange(size)[:, None]
        counts_BK = np.bincount(drawn.ravel(), minlength=size * k).reshape(size, k)
        s, m, ss, sm, mm = (counts_BK @ moments_K5).T
        shift = s / m
        spread = k / (k - 1.0) * (ss - 2.0 * shift * sm + shift**2 * mm)
        with np.errstate(divide="ignore", invalid="ignore"):
            found[start : start + size] = np.where(spread > floor, s / np.sqrt(spread), np.copysign(math.inf, s))
    return found


# ----------------------------------------------------------------------------------------------- length control


def length_controlled_win_rate(outcomes: ArrayLike, length_difference: ArrayLike, confidence: float = 0.95) -> Interval:
    """Win rate at equal length: logistic regression of the outcome on the length difference, read at zero.

    After AlpacaEval 2 (Dubois et al. 2024): logit P(win) = theta + phi tanh(d / sd(d)), reported as
    sigmoid(theta). Ties count one half. phi has a N(0, 2^2) prior and theta a N(0, 4^2) prior, so that separable data
    keep finite estimates. The interval is the delta method on theta with the sandwich covariance (robust to ties not
    being Bernoulli), Student's t with n - 2 degrees of freedom, transformed by the sigmoid. Where all outcomes are
    equal the sandwich is no evidence; then the bounds are mid-P's of the raw share.

    Args:
        outcomes: [N], 1 win, 0.5 tie, 0 loss of the first model.
        length_difference: [N], first minus second, any unit.
        confidence: Two-sided level.
    """
    _check_confidence(confidence)
    y, d = _finite(outcomes, "outcomes"), _finite(length_difference, "length_difference")
    n = len(y)
    if n < 3 or np.ptp(y) == 0:
        low, high = mid_p(float(y.sum()), n, confidence)
        return Interval(float(y.mean()) if n else math.nan, low, high, n, n, "mid-p (too few to fit)")
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
