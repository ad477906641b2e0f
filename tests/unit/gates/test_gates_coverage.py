"""Every interval that a gate reads covers the truth as often as it says: the benchmark's cases, with fewer runs."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[3] / "benchmarks" / "gates"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("coverage_benchmark", FOLDER / "coverage.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["coverage_benchmark"] = module  # dataclasses and NamedTuples look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["coverage_benchmark"]


def test_the_committed_results_are_of_these_cases_and_within_a_point(benchmark):
    results = json.loads((FOLDER / "coverage.json").read_text())
    assert list(results) == list(benchmark.CASES)
    for name, row in results.items():
        case = benchmark.CASES[name]
        assert (row["size"], row["exact"], row["runs"]) == (case.size, case.exact, case.runs), name
        assert row["covered"] >= 0.94, name
        if not case.exact:
            assert row["covered"] <= 0.96, name


def test_intervals_cover_by_simulation(benchmark):
    """1,000 data sets a case, 200 for the bootstrap: within a point of nominal, up to three standard errors of this."""
    for number, (name, case) in enumerate(benchmark.CASES.items()):
        result = benchmark.simulate(case, 200 if case.runs < 20_000 else 1000, seed=number)
        slack = 0.01 + 3 * result.error
        assert result.covered >= 0.95 - slack, name
        if not case.exact:
            assert result.covered <= 0.95 + slack, name
