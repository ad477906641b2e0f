"""Statistics against SciPy's own routines, brute-force likelihoods, closed forms, and coverage by simulation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special, stats

from tunegate.evaluation import significance as g
from tunegate.evaluation import statistics as s
from tunegate.evaluation.statistics import StatisticsError


@pytest.mark.parametrize(("k", "n"), [(0, 10), (1, 10), (5, 40), (40, 40), (3, 200), (199, 200)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_proportion_bounds_agree_with_scipy(k, n, confidence):
    exact = stats.binomtest(k, n).proportion_ci(confidence, method="exact")
    score = stats.binomtest(k, n).proportion_ci(confidence, method="wilson")
    assert s.clopper_pearson(k, n, confidence) == pytest.approx((exact.low, exact.high), abs=1e-9)
    assert s.wilson(k, n, confidence) == pytest.approx((score.low, score.high), abs=1e-9)


@pytest.mark.parametrize(("k", "n"), [(0, 10), (1, 10), (5, 40), (40, 40), (3, 200), (199, 200), (24, 400)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_mid_p_bounds_halve_the_weight_of_what_was_seen(k, n, confidence):
    """The defining equation, by the binomial distribution itself instead of incomplete beta functions."""
    low, high = s.mid_p(k, n, confidence)
    tail = (1 - confidence) / 2

    def seen_or_more(p):
        return stats.binom.sf(k, n, p) + stats.binom.pmf(k, n, p) / 2

    if k:
        assert low == pytest.approx(optimize.brentq(lambda p: seen_or_more(p) - tail, 1e-12, 1 - 1e-12), abs=1e-9)
    else:
        assert low == 0.0
        assert high == pytest.approx(1 - (1 - confidence) ** (1 / n))
    if k < n:
        assert high == pytest.approx(optimize.brentq(lambda p: 1 - seen_or_more(p) - tail, 1e-12, 1 - 1e-12), abs=1e-9)
    else:
        assert high == 1.0
    wide = s.clopper_pearson(k, n, confidence)
    assert wide[0] <= low <= k / n <= high <= wide[1]
    assert s.proportion(k, n, confidence) == s.Interval(k / n, low, high, n, n, "mid-p")


def test_mid_p_takes_fractions_between_its_neighbours():
    bounds = [s.mid_p(x, 37.5) for x in (2.0, 2.01, 2.5, 2.99, 3.0)]
    assert bounds == sorted(bounds)
    assert bounds[1] == pytest.approx(bounds[0], abs=1e-3)
    assert bounds[3] == pytest.approx(bounds[4], abs=1e-3)
    assert s.mid_p(1e-9, 40)[1] == pytest.approx(s.mid_p(0, 40)[1], abs=1e-6)


def coverage_around(method, n, p):
    """Coverage and misses below and above, on average over true rates from half to one and a half times p."""
    k, truths = np.arange(n + 1), np.linspace(0.5 * p, 1.5 * p, 201)
    bounds = np.array([s.PROPORTION_BOUNDS[method](int(x), n, 0.95) for x in k])
    mass = stats.binom.pmf(k[None], n, truths[:, None])
    below = (mass * (bounds[:, 1] < truths[:, None])).sum(1).mean()
    above = (mass * (bounds[:, 0] > truths[:, None])).sum(1).mean()
    return 1 - below - above, below, above


@pytest.mark.parametrize(("n", "p"), [(400, 0.01), (400, 0.03), (400, 0.06), (400, 0.12), (100, 0.06), (100, 0.12)])
def test_mid_p_covers_what_it_says_in_both_tails(n, p):
    """Exact, no simulation. Clopper-Pearson covers more than that at all of these."""
    covered, below, above = coverage_around("mid-p", n, p)
    assert covered == pytest.approx(0.95, abs=0.01)
    assert below == pytest.approx(0.025, abs=0.007)
    assert above == pytest.approx(0.025, abs=0.007)
    assert coverage_around("clopper-pearson", n, p)[0] > max(covered, 0.955)


def test_proportion_of_nothing_says_nothing():
    interval = s.proportion(0, 0)
    assert math.isnan(interval.estimate)
    assert (interval.low, interval.high, interval.n) == (0.0, 1.0, 0)


def test_zero_of_n_upper_bound_closed_form():
    assert s.clopper_pearson(0, 60)[1] == pytest.approx(1 - 0.025 ** (1 / 60))


@pytest.mark.parametrize("p", [0.01, 0.05, 0.2, 0.5])
@pytest.mark.parametrize("n", [20, 60, 200])
def test_clopper_pearson_covers_at_least_nominal_exactly(p, n):
    k = np.arange(n + 1)
    mass = stats.binom.pmf(k, n, p)
    bounds = np.array([s.clopper_pearson(int(x), n) for x in k])
    assert mass[(bounds[:, 0] <= p) & (p <= bounds[:, 1])].sum() >= 0.95 - 1e-12


@pytest.mark.parametrize("n", [40, 100, 300])
def test_wilson_covers_nominally_on_average_over_the_truth(n):
    k = np.arange(n + 1)
    bounds = np.array([s.wilson(int(x), n) for x in k])
    truths = np.linspace(0.005, 0.995, 397)
    covered = [stats.binom.pmf(k, n, p)[(bounds[:, 0] <= p) & (p <= bounds[:, 1])].sum() for p in truths]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.01)


def profile_deviance_score(b, c, n, delta):
    """Tango's statistic with the constrained MLE found numerically instead of by his closed form."""

    def negative(q21):
        q12, rest = q21 + delta, 1 - 2 * q21 - delta
        return -(special.xlogy(b, q12) + special.xlogy(c, q21) + special.xlogy(n - b - c, rest))

    low, high = max(0.0, -delta), (1 - delta) / 2
    q21 = optimize.minimize_scalar(negative, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    return (b - c - n * delta) / math.sqrt(n * (2 * q21 + delta * (1 - delta)))


@pytest.mark.parametrize(("b", "c", "n"), [(5, 12, 60), (1, 0, 40), (20, 3, 80), (0, 0, 50), (7, 7, 30), (0, 9, 200)])
def test_tango_bounds_solve_the_numerical_score_equation(b, c, n):
    interval = s.paired_proportions(b, c, n)
    z = stats.norm.ppf(0.975)
    assert profile_deviance_score(b, c, n, interval.low) == pytest.approx(z, abs=2e-3)
    assert profile_deviance_score(b, c, n, interval.high) == pytest.approx(-z, abs=2e-3)


def test_tango_without_discordant_pairs_has_the_closed_form_width():
    z2 = stats.norm.ppf(0.975) ** 2
    interval = s.paired_proportions(0, 0, 50)
    assert interval.high == pytest.approx(z2 / (50 + z2), abs=1e-8)
    assert interval.low == pytest.approx(-interval.high)


@given(n=st.integers(1, 200), data=st.data())
@settings(max_examples=150, deadline=None)
def test_tango_is_antisymmetric_contains_its_estimate_and_agrees_with_mcnemar(n, data):
    b = data.draw(st.integers(0, n))
    c = data.draw(st.integers(0, n - b))
    first, second = s.paired_proportions(b, c, n), s.paired_proportions(c, b, n)
    assert first.low == pytest.approx(-second.high, abs=1e-7)
    assert -1 <= first.low <= first.estimate + 1e-9
    assert first.estimate - 1e-9 <= first.high <= 1
    mcnemar = (b - c) / math.sqrt(b + c) if b + c else 0.0
    if abs(abs(mcnemar) - stats.norm.ppf(0.975)) > 1e-6:
        assert (first.low > 0 or first.high < 0) == (abs(mcnemar) > stats.norm.ppf(0.975))


@pytest.mark.parametrize(("b", "c", "n"), [(0.1, 0.05, 100), (0.2, 0.2, 100), (0.3, 0.1, 200), (0.08, 0.02, 300)])
def test_tango_coverage_is_nominal(b, c, n):
    """Exact coverage: the sum over every pair of counts, no simulation."""
    covered = 0.0
    for x in range(n + 1):
        px = stats.binom.pmf(x, n, b)
        if px < 1e-7:
            continue
        ys = np.arange(n - x + 1)
        for y, py in zip(ys, stats.binom.pmf(ys, n - x, c / (1 - b)), strict=True):
            if px * py > 1e-6:
                interval = s.paired_proportions(x, int(y), n)
                covered += px * py * (interval.low <= b - c <= interval.high)
    assert covered == pytest.approx(0.95, abs=0.01)


def test_clustered_difference_with_single_pairs_is_tango():
    differences = [1, 1, -1, 0, 0, 0, 0, 1]
    got = s.clustered_difference(differences, [str(i) for i in range(8)])
    assert got == s.paired_proportions(3, 1, 8)


def test_clustered_difference_covers_under_correlation():
    rng = np.random.default_rng(3)
    k, m, runs, covered = 60, 3, 1200, 0
    labels = np.repeat(np.arange(k), m).astype(str).tolist()
    for _ in range(runs):
        first, second = rng.beta(0.4, 1, size=(k, 1)), rng.beta(0.4, 1, size=(k, 1))
        difference = (rng.random((k, m)) < first).astype(float) - (rng.random((k, m)) < second)
        interval = s.clustered_difference(difference.ravel(), labels)
        covered += interval.low <= 0 <= interval.high
    assert 0.94 <= covered / runs <= 0.975


def restricted_log_likelihood(values, mean):
    """-2 log R(mean) by a general optimiser over weights on what was seen and on the ends -1 and 1."""
    support = np.unique(np.concatenate([values, [-1.0, 1.0]]))
    counts = np.array([(values == x).sum() for x in support], dtype=float)
    k = counts.sum()
    start = np.where(counts > 0, counts, 0.5)
    found = optimize.minimize(
        lambda w: -np.sum(special.xlogy(counts, w)),
        start / start.sum(),
        jac=lambda w: -counts / w,
        bounds=[(1e-9, 1)] * len(support),
        constraints=[
            {"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
            {"type": "eq", "fun": lambda w: w @ support - mean, "jac": lambda w: support},
        ],
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-12},
    )
    return 2 * (found.fun + np.sum(special.xlogy(counts, counts / k)))


@pytest.mark.parametrize(
    "values",
    [
        [0.0] * 12 + [1.0, -1 / 3, -1 / 3, 1.0],
        [0.0] * 22 + [-1 / 3, -2 / 3],
        [0.5, -0.2, 0.1, 0.4, 0.3, -0.1, 0.0, 0.2],
        [1.0] * 9 + [0.0] * 3,
    ],
)
def test_bounded_difference_solves_the_restricted_likelihood(values):
    interval = s.bounded_difference(values)
    limit = stats.t.ppf(0.975, len(values) - 1) ** 2
    for bound in (interval.low, interval.high):
        assert restricted_log_likelihood(np.array(values), bound) == pytest.approx(limit, rel=2e-3)
    assert interval.low < np.mean(values) < interval.high
    mirrored = s.bounded_difference([-v for v in values])
    assert (mirrored.low, mirrored.high) == pytest.approx((-interval.high, -interval.low), abs=1e-8)


@given(values=st.lists(st.sampled_from([-1.0, -2 / 3, -1 / 3, 0.0, 1 / 3, 2 / 3, 1.0]), min_size=1, max_size=40))
@settings(max_examples=150, deadline=None)
def test_bounded_difference_stays_in_range_and_never_collapses(values):
    interval = s.bounded_difference(values)
    assert -1 <= interval.low <= interval.estimate + 1e-12
    assert interval.estimate - 1e-12 <= interval.high <= 1
    assert interval.high - interval.low > 0.02
    wider = s.bounded_difference(values, 0.99)
    assert wider.low <= interval.low + 1e-9
    assert wider.high >= interval.high - 1e-9


def test_bounded_difference_where_all_agree_allows_for_what_was_not_seen():
    unseen = 1 - 0.05 ** (1 / 24)
    assert s.bounded_difference([0.0] * 24).high == pytest.approx(unseen)
    assert s.bounded_difference([0.5] * 24).low == pytest.approx(0.5 - 1.5 * unseen)
    assert s.bounded_difference([1.0] * 24).high == 1.0


def test_bounded_difference_is_near_t_for_many_values():
    values = np.random.default_rng(4).normal(0.1, 0.2, size=2000)
    theory = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    interval = s.bounded_difference(values)
    assert (interval.low, interval.high) == pytest.approx((theory.low, theory.high), abs=2e-4)


@pytest.mark.parametrize(("p", "more"), [(0.2, 0.0), (0.2, 0.25), (0.5, 0.1)])
def test_bounded_difference_covers_refusals_of_24_templates(p, more):
    """Student's t with two pseudo-pairs covers up to 97.5% here, and misses in one tail in as little as 0.9%."""
    rng = np.random.default_rng(12)
    runs, below, above = 3000, 0, 0
    for _ in range(runs):
        own = rng.beta(2 * p, 2 * (1 - p), size=(24, 1))
        refused = rng.random((24, 4)) < own
        refused[:, 0] |= rng.random(24) < more / (1 - p)
        interval = s.bounded_difference(refused[:, 0] - refused[:, 1:].mean(axis=1))
        below += interval.high < more
        above += interval.low > more
    assert 1 - (below + above) / runs == pytest.approx(0.95, abs=0.01 + 0.006)
    assert min(below, above) / runs > 0.016


def test_clustered_difference_does_not_collapse():
    interval = s.clustered_difference([0.0] * 24, [f"t{i // 2}" for i in range(24)])
    assert interval.estimate == 0
    assert interval.low < -0.05 < 0.05 < interval.high


def test_clustered_proportion_widens_with_correlation_and_covers():
    rng = np.random.default_rng(5)
    k, m, runs, covered = 80, 2, 1200, 0
    labels = np.repeat(np.arange(k), m).astype(str).tolist()
    for _ in range(runs):
        rate = rng.beta(0.3, 0.7, size=(k, 1))
        outcomes = (rng.random((k, m)) < rate).astype(float).ravel()
        interval = s.clustered_proportion(outcomes, labels)
        covered += interval.low <= 0.3 <= interval.high
    assert 0.94 <= covered / runs <= 0.975
    identical = s.clustered_proportion([1.0, 1.0, 0.0, 0.0] * 20, labels[:80])
    independent = s.proportion(40, 80)
    assert identical.high - identical.low > 1.3 * (independent.high - independent.low)


def test_all_safe_under_attack_counts_prompts_not_attempts():
    interval = s.clustered_proportion([0.0] * 40, [str(i // 4) for i in range(40)])
    assert interval.high == pytest.approx(s.mid_p(0, 10)[1])
    assert (interval.n, interval.clusters) == (40, 10)


def test_bootstrap_mean_agrees_with_t_for_normal_data_and_is_seeded():
    values = np.random.default_rng(0).normal(0.3, 1, size=120)
    first = s.bootstrap_mean(values, seed=4)
    assert first == s.bootstrap_mean(values, seed=4)
    theory = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (first.low, first.high) == pytest.approx((theory.low, theory.high), abs=0.03)


def test_bootstrap_mean_weights_and_clusters():
    rng = np.random.default_rng(1)
    tokens = rng.integers(5, 60, size=50).astype(float)
    nll = rng.normal(2, 0.5, size=50)
    interval = s.bootstrap_mean(nll, weights=tokens)
    assert interval.estimate == pytest.approx(float((nll * tokens).sum() / tokens.sum()))
    doubled = s.bootstrap_mean(np.repeat(nll, 2), [str(i // 2) for i in range(100)])
    single = s.bootstrap_mean(nll, [f"{i:02d}" for i in range(50)])
    assert doubled.clusters == 50
    assert doubled.high - doubled.low == pytest.approx(single.high - single.low, rel=0.1)


def test_bootstrap_mean_edges():
    assert s.bootstrap_mean([2.0, 2.0, 2.0]).low == 2.0
    assert s.bootstrap_mean([2.0]).high == math.inf
    assert s.bootstrap_mean([]).n == 0
    with pytest.raises(StatisticsError, match="not finite"):
        s.bootstrap_mean([1.0, math.nan])


def test_bootstrap_t_is_the_textbook_loop():
    """The same draws, resample by resample, with SciPy's standard error of a mean."""
    values = np.random.default_rng(3).exponential(size=30)
    interval = s.bootstrap_mean(values, [f"{i:02d}" for i in range(30)], resamples=999, seed=5)
    draws = np.random.default_rng(5).integers(30, size=(999, 30))
    t = sorted((values[d].mean() - values.mean()) / stats.sem(values[d]) for d in draws)
    # The 2.5% and 97.5% points of 999 values are the 25th and the 975th (Davison and Hinkley 1997, section 5.2).
    expected = [values.mean() - t[i - 1] * stats.sem(values) for i in (975, 25)]
    assert (interval.low, interval.high) == pytest.approx(expected)
    assert interval.high - interval.estimate > 1.2 * (interval.estimate - interval.low)


def test_bootstrap_t_gives_way_to_t_where_resamples_have_no_spread():
    nearly_alike = s.bootstrap_mean([64.0] * 398 + [3.0, 5.0])
    assert nearly_alike.method == "t"
    theory = stats.ttest_1samp([64.0] * 398 + [3.0, 5.0], 0).confidence_interval(0.95)
    assert (nearly_alike.low, nearly_alike.high) == pytest.approx((theory.low, theory.high))
    assert math.isfinite(s.bootstrap_mean([1.0, 2.0]).low)


def test_bootstrap_mean_does_not_depend_on_the_size_of_the_blocks():
    rng = np.random.default_rng(2)
    values = rng.normal(size=4000)  # 1,000 resamples at once
    whole = s.bootstrap_mean(values, resamples=2500, seed=1)
    theory = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (whole.low, whole.high) == pytest.approx((theory.low, theory.high), abs=0.004)


@pytest.mark.slow
@pytest.mark.parametrize(("skewed", "n"), [(False, 100), (True, 100), (True, 50)])
def test_bootstrap_coverage_within_a_point(skewed, n):
    rng = np.random.default_rng(8)
    runs, covered = 2000, 0
    for run in range(runs):
        values = rng.exponential(1.0, size=n) if skewed else rng.normal(1.0, 1.0, size=n)
        interval = s.bootstrap_mean(values, seed=run, resamples=500)
        covered += interval.low <= 1 <= interval.high
    assert covered / runs == pytest.approx(0.95, abs=0.01 + 0.005)


def test_sign_test_is_the_exact_binomial():
    assert g.sign_test(9, 1) == pytest.approx(22 / 1024)
    assert g.sign_test(0, 0) == 1.0
    assert g.binomial_exceeds(3, 3, 0.5) == pytest.approx(0.125)


def test_holm_matches_the_definition_and_statsmodels():
    p = [0.01, 0.04, 0.03, 0.005]
    assert g.holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    rng = np.random.default_rng(0)
    for _ in range(20):
        values = rng.random(7) ** 3
        assert g.holm(values.tolist()) == pytest.approx(multitest.multipletests(values, method="holm")[1])
    assert g.holm([]) == []


def test_length_control_removes_a_pure_length_effect():
    rng = np.random.default_rng(9)
    difference = rng.normal(40, 30, size=40_000)
    standard = np.tanh(difference / difference.std())
    wins = (rng.random(40_000) < special.expit(1.5 * standard)).astype(float)
    interval = s.length_controlled_win_rate(wins, difference)
    assert wins.mean() > 0.65
    assert interval.estimate == pytest.approx(0.5, abs=0.02)


def test_length_control_without_length_differences_is_the_raw_rate():
    outcomes = np.array([1.0] * 60 + [0.0] * 40)
    interval = s.length_controlled_win_rate(outcomes, np.zeros(100))
    assert interval.estimate == pytest.approx(0.6, abs=0.002)
    wald = 1.984 * math.sqrt(0.24 / 99)
    assert interval.high - interval.low == pytest.approx(2 * wald, rel=0.05)


@pytest.mark.parametrize(("theta", "phi", "ties"), [(0.0, 0.0, 0.0), (0.5, 0.5, 0.2), (0.0, 2.0, 0.0)])
def test_length_control_covers(theta, phi, ties):
    rng = np.random.default_rng(11)
    runs, covered = 1500, 0
    truth = (1 - ties) * special.expit(theta) + ties * 0.5
    for _ in range(runs):
        difference = rng.normal(10, 30, size=120)
        x = np.tanh(difference / difference.std())
        outcomes = (rng.random(120) < special.expit(theta + phi * x)).astype(float)
        outcomes[rng.random(120) < ties] = 0.5
        interval = s.length_controlled_win_rate(outcomes, difference)
        covered += interval.low <= truth <= interval.high
    assert covered / runs == pytest.approx(0.95, abs=0.01 + 0.006)


def test_length_control_survives_separable_and_unanimous_data():
    separable = s.length_controlled_win_rate([0.0] * 20 + [1.0] * 20, [-50.0] * 20 + [50.0] * 20)
    assert 0 <= separable.low <= separable.estimate <= separable.high <= 1
    unanimous = s.length_controlled_win_rate([1.0] * 30, list(range(30)))
    assert unanimous.low == pytest.approx(s.mid_p(30, 30)[0])


@pytest.mark.parametrize(("rate", "limit"), [(0.02, 0.1), (0.05, 0.1), (0.2, 0.1), (0.0, 0.02)])
@pytest.mark.parametrize("method", ["mid-p", "wilson", "clopper-pearson"])
def test_required_n_for_a_limit_has_the_power_by_exact_enumeration(rate, limit, method):
    n = g.required_n_limit(rate, limit, power=0.8, method=method)
    k = np.arange(n + 1)
    bounds = np.array([s.PROPORTION_BOUNDS[method](int(x), n, 0.95) for x in k])
    right = bounds[:, 1] <= limit if rate < limit else bounds[:, 0] > limit
    assert stats.binom.pmf(k, n, rate)[right].sum() >= 0.8
    assert g.required_n_limit(0.1, 0.1) is None


def test_required_n_paired_has_about_the_power_by_simulation():
    n = g.required_n_paired(0.05, 0.0, 0.08, power=0.8)
    rng = np.random.default_rng(10)
    counts = rng.multinomial(n, [0.04, 0.04, 0.92], size=1500)
    shown = sum(s.paired_proportions(int(b), int(c), n).high < 0.05 for b, c, _ in counts)
    assert shown / 1500 == pytest.approx(0.8, abs=0.05)
    assert g.required_n_paired(0.05, 0.06, 0.1) is None


def test_required_n_win_rate_closed_form():
    # Superiority of a 60% win rate without ties: (1.96 * 1 + 0.8416 * sqrt(0.96))^2 / 0.2^2
    assert g.required_n_win_rate(0.6) == math.ceil((1.95996 + 0.84162 * math.sqrt(0.96)) ** 2 / 0.04)


@pytest.mark.parametrize(("k", "n", "limit"), [(2, 40, 0.1), (8, 40, 0.1), (0, 20, 0.1)])
def test_n_to_decide_is_the_first_that_decides(k, n, limit):
    size = g.n_to_decide_limit(k, n, limit)

    def decided(total):
        low, high = s.mid_p(k / n * total, total)
        return high <= limit or low > limit

    assert decided(size)
    assert size == n or not decided(size - 1)


def test_n_to_decide_mean_scales_with_the_square():
    assert g.n_to_decide_mean(s.Interval(0.0, -0.2, 0.2, 50, 50, "t"), 0.1) == 200
    assert g.n_to_decide_mean(s.Interval(0.1, -0.2, 0.2, 50, 50, "t"), 0.1) is None
    assert g.n_to_decide_limit(4, 40, 0.1) is None


def test_errors_name_what_is_wrong():
    with pytest.raises(StatisticsError, match="confidence"):
        s.proportion(1, 2, 1.5)
    with pytest.raises(StatisticsError, match="successes"):
        s.clopper_pearson(3, 2)
    with pytest.raises(StatisticsError, match="pairs"):
        s.paired_proportions(3, 3, 5)
    with pytest.raises(StatisticsError, match="cluster"):
        s.cluster_means([1.0, 2.0], ["a"])
