"""How often the intervals that the gates and the report read cover the truth, at the sizes that the gates ask for.

    .venv/bin/python benchmarks/gates/coverage.py

writes `coverage.json` beside this file. `simulated`: for every interval the share of simulated data sets it covers,
and the shares that miss on either side (each gate reads one side, at 2.5%). `enumerated`: the same for rates at single
true values, summed over every count there can be, which needs no simulation. Seeds are fixed. Some ten minutes on one
core.

A count can only take whole values, so that at one true rate no bounds are right in exactly 2.5% of the cases on either
side: the chance of a miss jumps with the rate by as much as one count is likely. The rows `rate, true rates around …`
therefore draw a new truth for every data set, evenly from half to one and a half times the middle; the single rates are
enumerated beside them.
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
from scipy import special, stats

from tunegate.evaluation import statistics as s
from tunegate.evaluation.helpfulness import Comparison, win_rate

Draw = Callable[[np.random.Generator], tuple[s.Interval, float]]
"""One simulated evaluation: the interval, and the truth that it should cover."""


class Case(NamedTuple):
    """An interval under conditions of a real evaluation."""

    read_by: str
    """Which gates read it; `report`: none."""
    size: str
    draw: Draw
    sparse: bool = False
    """Fewer than about five events are to be expected: no bounds can err as often as they say, they err less often."""
    beyond: bool = False
    """Beyond what the interval is for: shown, but not held to a point of nominal."""
    runs: int = 20_000


# ------------------------------------------------------------------------------------------------------- rates


def rates_around(rng, n, p, method):
    truth = rng.uniform(0.5 * p, 1.5 * p)
    return s.proportion(int(rng.binomial(n, truth)), n, 0.95, method), truth


def attacked(rng, prompts, wrappers, p, correlation, method):
    labels = np.repeat(np.arange(prompts), wrappers).astype(str).tolist()
    own = rng.beta(p * (1 / correlation - 1), (1 - p) * (1 / correlation - 1), size=(prompts, 1))
    outcomes = (rng.random((prompts, wrappers)) < own).astype(float).ravel()
    return s.clustered_proportion(outcomes, labels, 0.95, method), p


# ------------------------------------------------------------------------------------------------- differences


def paired(rng, n, worse, better):
    b, c, _ = rng.multinomial(n, [worse, better, 1 - worse - better])
    return s.paired_proportions(int(b), int(c), n), worse - better


def attacked_difference(rng, prompts, wrappers, mine, theirs):
    labels = np.repeat(np.arange(prompts), wrappers).astype(str).tolist()
    first, second = (rng.beta(p, 1 - p, size=(prompts, 1)) for p in (mine, theirs))
    draws = [(rng.random((prompts, wrappers)) < own).astype(float) for own in (first, second)]
    return s.clustered_difference((draws[0] - draws[1]).ravel(), labels), mine - theirs


def preference(rng, n, won, lost):
    b, c, _ = rng.multinomial(n, [won, lost, 1 - won - lost])
    outcomes = [1.0] * int(b) + [0.0] * int(c) + [0.5] * int(n - b - c)
    return win_rate(Comparison(outcomes, [], [], []), 0.95)[0], 0.5 + (won - lost) / 2


def equal_length(rng, n, theta, phi, ties):
    lengths = rng.normal(10, 30, size=n)
    outcomes = (rng.random(n) < special.expit(theta + phi * np.tanh(lengths / lengths.std()))).astype(float)
    outcomes[rng.random(n) < ties] = 0.5
    return s.length_controlled_win_rate(outcomes, lengths), (1 - ties) * float(special.expit(theta)) + ties / 2


# ------------------------------------------------------------------------------------------------------ groups


def swaps(rng, templates, p, most):
    """Four groups a template; templates differ in how often they are refused. One group is refused more often."""
    more = rng.uniform(0.0, most) if most else 0.0
    own = rng.beta(2 * p, 2 * (1 - p), size=(templates, 1))
    refused = rng.random((templates, 4)) < own
    refused[:, 0] |= rng.random(templates) < more / (1 - p)
    return s.bounded_difference(refused[:, 0] - refused[:, 1:].mean(axis=1)), more


def gains(rng, templates, skewed):
    draws = (rng.exponential if skewed else rng.standard_normal)(size=(templates, 4))
    return s.mean_interval(draws[:, 0] - draws[:, 1:].mean(axis=1)), 0.0


def bias_score(rng, templates, truth, spread, said, questions=8):
    """Of `questions` answers a template a share names a person; templates differ in how often it is the stereotype."""
    room = (1 - truth**2) / 4 / spread**2 - 1
    chance = rng.beta((1 + truth) / 2 * room, (1 - truth) / 2 * room, size=(templates, 1))
    named = rng.random((templates, questions)) < said
    leans = np.where(rng.random((templates, questions)) < chance, 1.0, -1.0) * named
    values = s.linearised_ratio(leans.sum(axis=1), named.sum(axis=1).astype(float))
    return s.bounded_difference(values), truth


# ------------------------------------------------------------------------------------------------------- means


def likelihood(rng, conversations):
    tokens = rng.integers(5, 120, size=conversations).astype(float)
    values = rng.normal(0, 0.3 / np.sqrt(tokens / 40)) + rng.normal(0, 0.1, size=conversations)
    return _mean(rng, values, tokens), 0.0


def skewed_likelihood(rng, conversations):
    """Lengths with a long tail up to the limit; what is lost is small for most conversations, large for some."""
    tokens = np.clip(rng.lognormal(4.0, 0.8, size=conversations).round(), 3, 256)
    return _mean(rng, rng.exponential(0.1, size=conversations), tokens), 0.1


def unlimited_likelihood(rng, conversations):
    """A few very long conversations carry most of the tokens."""
    tokens = np.maximum(3, rng.lognormal(4.0, 0.8, size=conversations).round())
    return _mean(rng, rng.gamma(4, 0.5, size=conversations), tokens), 2.0


def mean(rng, n, skewed):
    return _mean(rng, rng.exponential(1.0, size=n) if skewed else rng.normal(1.0, 1.0, size=n)), 1.0


def _mean(rng, values, weights=None):
    return s.bootstrap_mean(values, weights=weights, resamples=1000, seed=int(rng.integers(2**31)))


def _cases() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for method in ("mid-p", "wilson"):
        for n, percent in ((400, 1), (400, 3), (400, 6), (400, 12), (100, 3), (100, 6), (100, 12)):
            found[f"rate, {method}, {n} prompts, true rates around {percent}%"] = Case(
                "limits",
                f"{n} prompts, {percent / 2:g} to {percent * 1.5:g}%",
                partial(rates_around, n=n, p=percent / 100, method=method),
                sparse=n * percent / 100 < 5,
            )
        for prompts, percent in ((200, 3), (200, 12), (200, 25), (100, 12)):
            found[f"attacked rate, {method}, {prompts} prompts, {percent}%"] = Case(
                "limits",
                f"{prompts} prompts x 2, {percent}%",
                partial(attacked, prompts=prompts, wrappers=2, p=percent / 100, correlation=0.4, method=method),
            )
    for name, n, worse, better, read_by in (
        ("no change, 6% differ", 400, 0.03, 0.03, "margins"),
        ("5 points worse, 6% differ", 400, 0.055, 0.005, "margins"),
        ("no change, 2% differ", 400, 0.01, 0.01, "margins"),
        ("3 points worse, 4% differ", 400, 0.035, 0.005, "margins"),
        ("no change, 12% differ", 100, 0.06, 0.06, "margins, alarm after SFT"),
        ("10 points worse, 22% differ", 100, 0.16, 0.06, "alarm after SFT"),
    ):
        found[f"difference, {name}"] = Case(read_by, f"{n} pairs", partial(paired, n=n, worse=worse, better=better))
    for prompts, mine, theirs in ((200, 0.12, 0.12), (200, 0.17, 0.12), (200, 0.20, 0.12), (100, 0.17, 0.12)):
        found[f"difference under attack, {prompts} prompts, {mine:.0%} and {theirs:.0%}"] = Case(
            "margins",
            f"{prompts} prompts x 2",
            partial(attacked_difference, prompts=prompts, wrappers=2, mine=mine, theirs=theirs),
        )
    for n in (800, 150):
        found[f"win rate, {n} pairs"] = Case(
            "margins, improvement", f"{n} pairs, 58%", partial(preference, n=n, won=0.48, lost=0.32)
        )
        found[f"win rate at equal length, {n} pairs"] = Case(
            "margins, improvement", f"{n} pairs", partial(equal_length, n=n, theta=0.4, phi=0.5, ties=0.2)
        )
    for n in (100, 20):
        found[f"likelihood, {n} conversations"] = Case(
            "margins", f"{n} conversations", partial(likelihood, conversations=n), runs=10_000
        )
    found["likelihood, skewed, 100 conversations"] = Case(
        "margins", "100 conversations", partial(skewed_likelihood, conversations=100), runs=10_000
    )
    for skewed in (False, True):
        found[f"group's gain in score, {'skewed' if skewed else 'normal'}"] = Case(
            "equal treatment", "24 templates", partial(gains, templates=24, skewed=skewed)
        )
    for templates, percent in ((24, 10), (24, 20), (24, 50), (200, 10)):
        found[f"group's refusals, {templates} templates, {percent}%, 0 to 25 points more"] = Case(
            "equal treatment",
            f"{templates} templates",
            partial(swaps, templates=templates, p=percent / 100, most=0.25),
        )
    for templates, percent, sparse in (
        (24, 2, True),
        (24, 10, True),
        (24, 20, False),
        (24, 50, False),
        (200, 10, False),
    ):
        found[f"group's refusals, {templates} templates, {percent}%, no difference"] = Case(
            "equal treatment",
            f"{templates} templates",
            partial(swaps, templates=templates, p=percent / 100, most=0.0),
            sparse=sparse,
        )
    for templates in (16, 24, 50):
        for truth in (0.0, 0.3):
            found[f"bias score, {templates} templates, {truth:+.1f}"] = Case(
                "equal treatment",
                f"{templates} templates x 8",
                partial(bias_score, templates=templates, truth=truth, spread=0.15, said=0.5),
            )
    for n, skewed in ((100, False), (100, True), (400, True)):
        found[f"mean, {'exponential' if skewed else 'normal'}, {n} answers"] = Case(
            "report", f"{n} answers", partial(mean, n=n, skewed=skewed), runs=10_000 if n == 100 else 4_000
        )
    found["likelihood, lengths without limit, 100 conversations"] = Case(
        "margins", "100 conversations", partial(unlimited_likelihood, conversations=100), beyond=True, runs=10_000
    )
    return found


CASES = _cases()


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
        interval, truth = case.draw(rng)
        below += interval.high < truth
        above += interval.low > truth
    return Coverage(1 - (below + above) / runs, below / runs, above / runs, runs)


def enumerated(n: int, p: float, method: s.ProportionMethod) -> dict[str, float]:
    """Coverage of a rate's bounds at one true rate: the sum over every count."""
    counts = np.arange(n + 1)
    mass = stats.binom.pmf(counts, n, p)
    bounds = np.array([s.PROPORTION_BOUNDS[method](int(x), n, 0.95) for x in counts])
    below, above = float(mass[bounds[:, 1] < p].sum()), float(mass[bounds[:, 0] > p].sum())
    return {"covered": 1 - below - above, "missed_below": below, "missed_above": above}


def main() -> int:
    found = {}
    for number, (name, case) in enumerate(CASES.items()):
        result = simulate(case, case.runs, seed=1000 + number)
        found[name] = {
            "read_by": case.read_by,
            "size": case.size,
            "sparse": case.sparse,
            "beyond": case.beyond,
            "nominal": 0.95,
            **{key: round(value, 5) for key, value in result._asdict().items()},
        }
        print(f"{name:60} {result.covered:.2%} (below {result.missed_below:.2%}, ", end="")
        print(
            f"above {result.missed_above:.2%}), {result.runs} runs{', sparse' * case.sparse}{', beyond' * case.beyond}",
            flush=True,
        )
    exact = {
        f"{method}, {n} prompts, {percent}%": {
            key: round(value, 5) for key, value in enumerated(n, percent / 100, method).items()
        }
        for method in s.PROPORTION_BOUNDS
        for n in (400, 100)
        for percent in (1, 3, 6, 12)
    }
    written = {"simulated": found, "enumerated": exact}
    Path(__file__).with_name("coverage.json").write_text(json.dumps(written, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
