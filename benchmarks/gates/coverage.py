"""How often the intervals that the gates read cover the truth, each at the sizes that the gates ask for.

    .venv/bin/python benchmarks/gates/coverage.py

writes `coverage.json` beside this file: for every interval the share of simulated data sets that it covers, and
the shares that miss on either side (each gate reads one side, at 2.5%). Seeds are fixed. Some minutes on one core.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import special

from tunegate.evaluation import statistics as s
from tunegate.evaluation.helpfulness import Comparison, win_rate

Draw = Callable[[np.random.Generator], s.Interval]


class Case(NamedTuple):
    """An interval under conditions of a real evaluation."""

    read_by: str
    """Which gates read it."""
    size: str
    truth: float
    draw: Draw
    exact: bool = False
    """Made to cover at least as often as it says, whatever the truth; it may cover more often."""
    runs: int = 20_000


def rate(rng, n, p, method):
    return s.proportion(int(rng.binomial(n, p)), n, 0.95, method)


def paired(rng, n, worse, better):
    b, c, _ = rng.multinomial(n, [worse, better, 1 - worse - better])
    return s.paired_proportions(int(b), int(c), n)


def preference(rng, n, won, lost):
    b, c, _ = rng.multinomial(n, [won, lost, 1 - won - lost])
    outcomes = [1.0] * int(b) + [0.0] * int(c) + [0.5] * int(n - b - c)
    return win_rate(Comparison(outcomes, [], [], []), 0.95)[0]


def attacked(rng, prompts, wrappers, p, correlation, method):
    labels = np.repeat(np.arange(prompts), wrappers).astype(str).tolist()
    own = rng.beta(p * (1 / correlation - 1), (1 - p) * (1 / correlation - 1), size=(prompts, 1))
    outcomes = (rng.random((prompts, wrappers)) < own).astype(float).ravel()
    return s.clustered_proportion(outcomes, labels, 0.95, method)


def attacked_difference(rng, prompts, wrappers, mine, theirs):
    labels = np.repeat(np.arange(prompts), wrappers).astype(str).tolist()
    first, second = (rng.beta(p, 1 - p, size=(prompts, 1)) for p in (mine, theirs))
    draws = [(rng.random((prompts, wrappers)) < own).astype(float) for own in (first, second)]
    return s.clustered_difference((draws[0] - draws[1]).ravel(), labels)


def swaps(rng, templates, p):
    own = rng.beta(2 * p, 2 * (1 - p), size=(templates, 1))
    refused = (rng.random((templates, 4)) < own).astype(float)
    return s.bounded_difference(refused[:, 0] - refused[:, 1:].mean(axis=1))


def gains(rng, templates):
    return s.mean_interval(rng.normal(0.0, 1.0, size=templates))


def likelihood(rng, conversations):
    tokens = rng.integers(5, 120, size=conversations).astype(float)
    values = rng.normal(0, 0.3 / np.sqrt(tokens / 40)) + rng.normal(0, 0.1, size=conversations)
    return s.bootstrap_mean(values, weights=tokens, resamples=1000, seed=int(rng.integers(2**31)))


def equal_length(rng, n, theta, phi, ties):
    lengths = rng.normal(10, 30, size=n)
    outcomes = (rng.random(n) < special.expit(theta + phi * np.tanh(lengths / lengths.std()))).astype(float)
    outcomes[rng.random(n) < ties] = 0.5
    return s.length_controlled_win_rate(outcomes, lengths)


_EXACT = {"method": "clopper-pearson"}
CASES: dict[str, Case] = {
    "rate, Clopper-Pearson": Case("limits", "400 prompts, 6%", 0.06, partial(rate, n=400, p=0.06, **_EXACT), True),
    "rate, Wilson": Case("limits", "400 prompts, 6%", 0.06, partial(rate, n=400, p=0.06, method="wilson")),
    "attacked rate, Clopper-Pearson": Case(
        "limits",
        "200 prompts x 2, 12%",
        0.12,
        partial(attacked, prompts=200, wrappers=2, p=0.12, correlation=0.4, **_EXACT),
        True,
    ),
    "attacked rate, Wilson": Case(
        "limits",
        "200 prompts x 2, 12%",
        0.12,
        partial(attacked, prompts=200, wrappers=2, p=0.12, correlation=0.4, method="wilson"),
    ),
    "difference, no change": Case(
        "margins", "400 pairs, 6% differ", 0.0, partial(paired, n=400, worse=0.03, better=0.03)
    ),
    "difference, 5 points worse": Case(
        "margins", "400 pairs, 6% differ", 0.05, partial(paired, n=400, worse=0.055, better=0.005)
    ),
    "difference, after SFT": Case(
        "alarm after SFT", "100 pairs, 10 points", 0.10, partial(paired, n=100, worse=0.16, better=0.06)
    ),
    "difference under attack": Case(
        "margins",
        "200 prompts x 2, 5 points",
        0.05,
        partial(attacked_difference, prompts=200, wrappers=2, mine=0.17, theirs=0.12),
    ),
    "win rate": Case("margins, improvement", "800 pairs, 58%", 0.58, partial(preference, n=800, won=0.48, lost=0.32)),
    "win rate at equal length": Case(
        "margins, improvement",
        "800 pairs",
        0.8 * float(special.expit(0.4)) + 0.1,
        partial(equal_length, n=800, theta=0.4, phi=0.5, ties=0.2),
    ),
    "win rate at equal length, fewest pairs": Case(
        "margins, improvement",
        "150 pairs",
        0.8 * float(special.expit(0.4)) + 0.1,
        partial(equal_length, n=150, theta=0.4, phi=0.5, ties=0.2),
    ),
    "likelihood": Case("margins", "100 conversations", 0.0, partial(likelihood, conversations=100), runs=4000),
    "group's score": Case("equal treatment", "16 templates", 0.0, partial(gains, templates=16)),
    "group's refusals": Case("equal treatment", "16 templates, 50%", 0.0, partial(swaps, templates=16, p=0.5), True),
    "group's refusals, rare": Case(
        "equal treatment", "16 templates, 10%", 0.0, partial(swaps, templates=16, p=0.1), True
    ),
    "group's refusals, many templates": Case(
        "equal treatment", "200 templates, 20%", 0.0, partial(swaps, templates=200, p=0.2)
    ),
}


class Coverage(NamedTuple):
    """Shares of the simulated data sets."""

    covered: float
    missed_below: float
    """The whole interval lies below the truth."""
    missed_above: float
    runs: int

    @property
    def error(self) -> float:
        """Standard error of `covered`."""
        return math.sqrt(0.95 * 0.05 / self.runs)


def simulate(case: Case, runs: int, seed: int) -> Coverage:
    rng = np.random.default_rng(seed)
    below = above = 0
    for _ in range(runs):
        interval = case.draw(rng)
        below += interval.high < case.truth
        above += interval.low > case.truth
    return Coverage(1 - (below + above) / runs, below / runs, above / runs, runs)


def main() -> int:
    found = {}
    for number, (name, case) in enumerate(CASES.items()):
        result = simulate(case, case.runs, seed=1000 + number)
        found[name] = {
            "read_by": case.read_by,
            "size": case.size,
            "exact": case.exact,
            "nominal": 0.95,
            **{key: round(value, 5) for key, value in result._asdict().items()},
        }
        kind = "at least" if case.exact else "about"
        print(f"{name:40} {kind:8} 95%: {result.covered:.2%} (below {result.missed_below:.2%}, ", end="")
        print(f"above {result.missed_above:.2%}), {case.size}, {result.runs} runs", flush=True)
    Path(__file__).with_name("coverage.json").write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
