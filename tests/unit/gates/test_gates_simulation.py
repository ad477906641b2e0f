"""What the gates do over many releases: bad candidates hardly ever pass, good ones mostly do.

Labels are drawn prompt by prompt, counted and put through the same statistics as a real evaluation, at the documented
size: 400 prompts a tag, 200 of the harmful ones attacked with two wrappers, 800 pairs.
"""

import numpy as np
import pytest
from gates_builders import ATTACKED, HAZARDS, N, evaluation, group
from scipy.special import expit

from tunegate.evaluation.helpfulness import Comparison, win_rate
from tunegate.evaluation.results import DIFFERENCES, METRICS, Figure
from tunegate.evaluation.statistics import (
    clustered_difference,
    clustered_proportion,
    length_controlled_win_rate,
    mean_interval,
)
from tunegate.gates import GatesSpec, decide

SPEC = GatesSpec()
CLUSTERS = [str(i) for i in range(ATTACKED)] * 2


def paired_labels(rng, n, rate, shift, discordance):
    """Failures of candidate and other: the other's rate, the candidate's minus it, and how often they differ."""
    worse, better = (discordance + shift) / 2, (discordance - shift) / 2
    both = rate - better
    draw = rng.choice(4, size=n, p=[both, better, worse, 1 - both - better - worse])
    return np.isin(draw, (0, 2)).astype(float), np.isin(draw, (0, 1)).astype(float)


def release(rng, harm=0.0, attacked=0.0, over_refusal=0.0, quality=0.4, drift=0.0):
    """Draw one evaluation.

    `harm`, `attacked`, `over_refusal`: candidate minus champion. `quality`: log odds of winning a decided comparison.
    `drift`: nats a token lost on held-out text.
    """
    mine, champion = paired_labels(rng, N, 0.04, harm, max(0.06, abs(harm)))
    halves = [paired_labels(rng, ATTACKED, 0.12, attacked, max(0.10, abs(attacked))) for _ in range(2)]
    attacked_mine, attacked_champion = (np.concatenate([half[i] for half in halves]) for i in range(2))
    refusing, champion_refusing = paired_labels(rng, N, 0.08, over_refusal, max(0.06, abs(over_refusal)))
    everyday, champion_everyday = paired_labels(rng, N, 0.01, 0.0, 0.015)
    found = evaluation(
        candidate={
            "unsafe": (int(mine.sum()), N),
            "lookalike": (int(refusing.sum()), N),
            "everyday": (int(everyday.sum()), N),
            "incoherent": (int(rng.binomial(3 * N, 0.005)), 3 * N),
            "tasks": (34, 40),
        },
        hazards={name: (int(rng.binomial(n, 0.04 + max(0.0, harm))), n) for name, (_, n) in HAZARDS.items()},
        groups=[group(name, (rng.random(24) < 0.003).astype(float)) for name in ("A", "B", "C", "D")],
    )
    attack_rate = clustered_proportion(attacked_mine, CLUSTERS)
    found.models["candidate"].metrics["attacked_unsafe_rate"] = Figure.of(METRICS["attacked_unsafe_rate"], attack_rate)
    for role, lead in (("champion", 0.0), ("anchor", 0.3)):
        singles = [str(i) for i in range(N)]
        figures = {
            "violation": clustered_difference(mine - (champion if lead == 0 else rng.random(N) < 0.3), singles),
            "attacked_violation": clustered_difference(
                attacked_mine - (attacked_champion if lead == 0 else rng.random(2 * ATTACKED) < 0.4), CLUSTERS
            ),
            "over_refusal": clustered_difference(refusing - (champion_refusing if lead == 0 else 0.0), singles),
            "everyday_refusal": clustered_difference(everyday - (champion_everyday if lead == 0 else 0.0), singles),
            "nll": mean_interval(rng.normal(drift, 0.15, size=100)),
        }
        outcomes = (rng.random(2 * N) < expit(quality + lead)).astype(float)
        outcomes[rng.random(2 * N) < 0.2] = 0.5
        figures["win_rate_length_controlled"] = length_controlled_win_rate(outcomes, rng.normal(5, 30, size=2 * N))
        raw, exact = win_rate(Comparison(outcomes.tolist(), [], [], []), 0.95)
        for name, interval in figures.items():
            found.differences[role][name] = Figure.of(DIFFERENCES[name], interval)
        found.differences[role]["win_rate"] = Figure.of(DIFFERENCES["win_rate"], raw, p_value=exact)
    return found


def verdicts(runs, seed, **kinds):
    rng = np.random.default_rng(seed)
    return [decide(SPEC, evaluation=release(rng, **kinds)).verdict for _ in range(runs)]


def share(found, verdict):
    return found.count(verdict) / len(found)


def test_a_good_candidate_mostly_passes_and_a_harmful_one_does_not():
    assert share(verdicts(150, 1), "PROMOTE") > 0.7
    assert share(verdicts(150, 2, harm=0.05), "PROMOTE") < 0.07


@pytest.mark.slow
def test_five_points_more_harm_is_promoted_at_most_five_percent_of_the_time():
    assert share(verdicts(2000, 3, harm=0.05), "PROMOTE") <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    "kinds",
    [
        {"harm": 0.05, "quality": 1.5},
        {"attacked": 0.10},
        {"over_refusal": 0.06},
        {"quality": -0.45},
        {"drift": 0.12},
        {"quality": 0.0},
    ],
    ids=["harm, but far more helpful", "attacked", "over-refusal", "worse help", "forgets", "no better"],
)
def test_other_bad_candidates_are_promoted_at_most_five_percent_of_the_time(kinds):
    assert share(verdicts(400, 3, **kinds), "PROMOTE") <= 0.05


@pytest.mark.slow
def test_good_candidates_are_promoted_at_least_eighty_percent_of_the_time():
    found = verdicts(2000, 4)
    assert share(found, "PROMOTE") >= 0.80
    assert share(found, "REJECT") == 0


@pytest.mark.slow
def test_a_disaster_is_rejected_not_held():
    assert share(verdicts(300, 5, harm=0.25), "REJECT") > 0.99
