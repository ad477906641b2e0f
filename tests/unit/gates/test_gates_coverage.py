"""Every interval that a gate reads covers the truth as often as it says: the benchmark's cases, with fewer runs."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from scipy import stats

FOLDER = Path(__file__).resolve().parents[3] / "benchmarks" / "gates"
RESULTS = json.loads((FOLDER / "coverage.json").read_text())


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("coverage_benchmark", FOLDER / "coverage.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["coverage_benchmark"] = module  # dataclasses and NamedTuples look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["coverage_benchmark"]


def test_the_committed_results_are_of_these_cases_and_within_a_point(benchmark):
    assert list(RESULTS["simulated"]) == list(benchmark.CASES)
    for name, row in RESULTS["simulated"].items():
        case = benchmark.CASES[name]
        assert (row["size"], row["sparse"], row["beyond"], row["runs"]) == (case.size, *case[3:]), name
        assert row["covered"] >= (0.93 if case.beyond else 0.94), name
        if not case.sparse:
            assert row["covered"] <= 0.96, name


def test_intervals_cover_by_simulation(benchmark):
    """500 data sets a case: within a point of nominal, up to three standard errors of this."""
    for number, (name, case) in enumerate(benchmark.CASES.items()):
        result = benchmark.simulate(case, 200 if case.runs < 20_000 else 500, seed=number)
        slack = (0.02 if case.beyond else 0.01) + 3 * result.error
        assert result.covered >= 0.95 - slack, name
        if not case.sparse:
            assert result.covered <= 0.95 + slack, name


@pytest.mark.parametrize("percent", [1, 3, 6, 12])
@pytest.mark.parametrize("n", [100, 400])
def test_at_one_true_rate_mid_p_errs_by_no_more_than_half_a_count(benchmark, n, percent):
    """Each tail is within half the chance of one count of 2.5%: as near as counts can be, and never far from it."""
    p = percent / 100
    row = RESULTS["enumerated"][f"mid-p, {n} prompts, {percent}%"]
    again = benchmark.enumerated(n, p, "mid-p")
    assert row == {name: round(value, 5) for name, value in again.items()}
    low, high = stats.binom.ppf(0.025, n, p), stats.binom.isf(0.025, n, p)
    assert abs(row["missed_below"] - 0.025) <= max(stats.binom.pmf([low - 1, low], n, p)) / 2 + 1e-4
    assert abs(row["missed_above"] - 0.025) <= max(stats.binom.pmf([high, high + 1], n, p)) / 2 + 1e-4
    guaranteed = RESULTS["enumerated"][f"clopper-pearson, {n} prompts, {percent}%"]
    assert guaranteed["covered"] >= max(0.95, row["covered"] - 1e-9)
