"""Evaluations made of counts, so that a table of outcomes reads like one."""

import math
from datetime import UTC, datetime

from tunegate.evaluation.results import (
    DIFFERENCES,
    METRICS,
    Evaluation,
    Figure,
    GroupFigures,
    HazardCount,
    ModelFigures,
)
from tunegate.evaluation.significance import sign_test
from tunegate.evaluation.statistics import (
    Interval,
    bounded_difference,
    paired_proportions,
    proportion,
)

N = 400
ATTACKED = 200
HAZARDS = {"violence": (1, 60), "fraud": (1, 60), "hacking": (2, 60), "drugs": (1, 60), "hate": (1, 60)}


def rate(name, failures, n=N, confidence=0.95):
    return Figure.of(METRICS[name], proportion(failures, n, confidence))


def against(name, worse, better, n=N):
    """A paired difference: `worse` pairs in which only the candidate failed, `better` in which only the other did."""
    return Figure.of(DIFFERENCES[name], paired_proportions(worse, better, n))


def wins(won, lost, n=2 * N, name="win_rate"):
    net = paired_proportions(won, lost, n)
    interval = Interval(0.5 + net.estimate / 2, 0.5 + net.low / 2, 0.5 + net.high / 2, n, n, "tango")
    return Figure.of(DIFFERENCES[name], interval, p_value=sign_test(won, lost))


def span(name, low, high, n, source=DIFFERENCES):
    return Figure.of(source[name], Interval((low + high) / 2, low, high, n, n, "bootstrap-t"))


def group(name, values, category="origin"):
    return GroupFigures(
        category=category, group=name, refusal=Figure.of(METRICS["counterfactual_gap"], bounded_difference(values))
    )


def metrics(
    unsafe=(12, N),
    attacked=(20, ATTACKED),
    lookalike=(32, N),
    everyday=(4, N),
    incoherent=(6, 3 * N),
    tasks=(32, 40),
):
    counts = {
        "unsafe_rate": unsafe,
        "attacked_unsafe_rate": attacked,
        "lookalike_failure_rate": lookalike,
        "everyday_failure_rate": everyday,
        "incoherent_rate": incoherent,
        "task_accuracy": tasks,
    }
    return {name: rate(name, *count) for name, count in counts.items() if count is not None}


def differences(
    violation=(8, 10, N),
    attacked=(8, 9, ATTACKED),
    over_refusal=(8, 10, N),
    everyday=(2, 2, N),
    won=(390, 250, 2 * N),
    won_at_equal_length=(380, 255, 2 * N),
    nll=(-0.02, 0.02, 100),
    tasks=(1, 1, 40),
):
    """Of the candidate against one other model."""
    found = {}
    if violation:
        found["violation"] = against("violation", *violation)
    if attacked:
        found["attacked_violation"] = against("attacked_violation", *attacked)
    if over_refusal:
        found["over_refusal"] = against("over_refusal", *over_refusal)
    if everyday:
        found["everyday_refusal"] = against("everyday_refusal", *everyday)
    if won:
        found["win_rate"] = wins(*won)
    if won_at_equal_length:
        found["win_rate_length_controlled"] = wins(*won_at_equal_length, name="win_rate_length_controlled")
    if nll:
        found["nll"] = span("nll", *nll)
    if tasks:
        lost, gained, n = tasks
        found["task_accuracy"] = Figure.of(DIFFERENCES["task_accuracy"], paired_proportions(gained, lost, n))
    return found


def evaluation(
    candidate=None,
    anchor=None,
    champion=None,
    has_champion=True,
    hazards=HAZARDS,
    groups=None,
    prompts=None,
    decoding=None,
    confidence=0.95,
    roles=("candidate", "anchor"),
):
    """A candidate that passes everything, but for what is given.

    `candidate`, `anchor`, `champion` are keyword arguments for `metrics` and `differences`; `prompts` and `decoding`
    override the digest of a role.
    """
    names = [*roles, *(["champion"] if has_champion else [])]
    quiet = [0.0] * 24
    return Evaluation(
        created=datetime(2026, 11, 22, tzinfo=UTC),
        code_version="0.1.0",
        confidence=confidence,
        models={
            name: ModelFigures(
                digest=f"{name}-digest",
                prompts_digest=(prompts or {}).get(name, "prompts"),
                decoding_digest=(decoding or {}).get(name, "greedy"),
                cached=False,
                metrics=metrics(**(candidate or {})) if name == "candidate" else {},
            )
            for name in names
        },
        differences={
            "anchor": differences(**(anchor or {})),
            **({"champion": differences(**(champion or {}))} if has_champion else {}),
        },
        hazards=[HazardCount(hazard=name, unsafe=k, n=n) for name, (k, n) in hazards.items()],
        groups=[group(name, quiet) for name in ("Nigerian", "Polish", "Indian", "Mexican")]
        if groups is None
        else groups,
        samples=[],
        judge="independent",
        judge_deviation=1.0,
        digests={"judge": "judge-digest", "classifier": "classifier-digest"},
        notes=[],
    )


UNKNOWN = (-math.inf, math.inf)
