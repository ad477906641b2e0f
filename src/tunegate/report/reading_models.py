"""What was measured on the models: `evaluation.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypedDict

from tunegate.report.facts import (
    ROLES,
    Answer,
    Balance,
    Bar,
    Breakdown,
    Estimate,
    Metric,
    Reference,
    Sample,
    Unit,
    role_names,
)
from tunegate.report.tolerant import estimate, mapping, mappings, real, string, strings, whole

_UNITS: dict[str, Unit] = {"share": "share", "nats": "nats", "reward": "reward", "tokens": "tokens"}
_BETTER: dict[str, Literal["higher", "lower", "none"]] = {"higher": "higher", "lower": "lower"}
_KEY_METRICS = (
    "unsafe_rate",
    "attacked_unsafe_rate",
    "lookalike_failure_rate",
    "win_rate_anchor",
    "reward_mean",
    "nll",
    "everyday_failure_rate",
    "incoherent_rate",
    "task_accuracy",
)
#: The first of these that was measured says how useful a model is: metric, whether it is turned round, axis title.
_USEFUL = (
    ("win_rate_anchor", False, "Win rate against the base model"),
    ("everyday_failure_rate", True, "Everyday requests answered"),
    ("lookalike_failure_rate", True, "Harmless look-alikes answered"),
)
#: Incoherent answers to harmful requests are not credited as safe where the evaluation tells them apart.
_SAFE = (
    ("unsafe_rate", "Harmful requests safely declined"),
    ("violation_rate", "Harmful requests not complied with"),
)
_CONDITIONS = {"ambiguous": "text does not tell", "disambiguated": "text tells"}


class EvaluationFacts(TypedDict):
    """The part of the facts that comes from the evaluation."""

    balance: list[Balance]
    balance_limits: dict[str, float]
    useful_axis: str
    safe_axis: str
    metrics: list[Metric]
    differences: list[Metric]
    breakdowns: list[Breakdown]
    samples: list[Sample]
    evaluation_notes: list[str]
    judge: str
    confidence: float | None


def read_evaluation_facts(
    evaluation: Mapping[str, Any], spec: Mapping[str, Any], pipeline: str = ""
) -> EvaluationFacts:
    """Everything about the evaluated models of a run of a pipeline; all empty when there is no evaluation."""
    gates = mapping(spec.get("gates"))
    useful_name, turned, axis = _useful_metric(evaluation)
    return {
        "balance": _balance(evaluation, useful_name, turned, role_names(pipeline)),
        "balance_limits": _limits(gates, useful_name),
        "useful_axis": axis,
        "safe_axis": _safe_metric(evaluation)[1],
        "metrics": _metrics(evaluation),
        "differences": _differences(evaluation),
        "breakdowns": _breakdowns(evaluation, gates),
        "samples": [s for s in (_sample(m) for m in mappings(evaluation.get("samples"))) if s.answers],
        "evaluation_notes": [note[:1].upper() + note[1:] for note in strings(evaluation.get("notes"))],
        "judge": string(evaluation.get("judge")),
        "confidence": real(evaluation.get("confidence")),
    }


def metric(evaluation: Mapping[str, Any], name: str) -> dict[str, Estimate]:
    """One metric of every model, by role."""
    models = mapping(evaluation.get("models"))
    found = {role: estimate(mapping(mapping(models.get(role)).get("metrics")).get(name)) for role in ROLES}
    return {role: value for role, value in found.items() if value is not None}


def difference(evaluation: Mapping[str, Any], role: str, name: str) -> Estimate | None:
    """Candidate minus another model."""
    return estimate(mapping(mapping(evaluation.get("differences")).get(role)).get(name))


def _described(name: str, by_role: Mapping[str, Any], key: bool) -> Metric | None:
    values = {role: e for role, content in by_role.items() if (e := estimate(content)) is not None}
    if not values:
        return None
    one = mapping(next(iter(by_role.values())))
    return Metric(
        name=name,
        title=string(one.get("title")) or name.replace("_", " ").capitalize(),
        better=_BETTER.get(string(one.get("better")), "none"),
        unit=_UNITS.get(string(one.get("unit")), "plain"),
        by_role=values,
        key=key,
        signed="minus" in string(one.get("title")),
    )


def _metrics(evaluation: Mapping[str, Any]) -> list[Metric]:
    models = mapping(evaluation.get("models"))
    measured = {role: mapping(mapping(models.get(role)).get("metrics")) for role in ROLES if role in models}
    names = list(dict.fromkeys(name for metrics in measured.values() for name in metrics))
    order = [n for n in _KEY_METRICS if n in names] + [n for n in names if n not in _KEY_METRICS]
    found = [
        _described(n, {r: metrics[n] for r, metrics in measured.items() if n in metrics}, n in _KEY_METRICS)
        for n in order
    ]
    return [m for m in found if m is not None]


def _differences(evaluation: Mapping[str, Any]) -> list[Metric]:
    content = {role: mapping(value) for role, value in mapping(evaluation.get("differences")).items()}
    names = dict.fromkeys(name for figures in content.values() for name in figures)
    found = [_described(n, {r: figures[n] for r, figures in content.items() if n in figures}, True) for n in names]
    return [m for m in found if m is not None]


def _useful_metric(evaluation: Mapping[str, Any]) -> tuple[str, bool, str]:
    for name, turned, axis in _USEFUL:
        if "candidate" in metric(evaluation, name):
            return name, turned, axis
    return _USEFUL[0]


def _safe_metric(evaluation: Mapping[str, Any]) -> tuple[str, str]:
    return next((choice for choice in _SAFE if "candidate" in metric(evaluation, choice[0])), _SAFE[0])


def _turned(value: Estimate) -> Estimate:
    """1 minus a share, with its interval."""
    low, high = value.low, value.high
    return Estimate(1 - value.value, None if high is None else 1 - high, None if low is None else 1 - low, value.n)


def _balance(evaluation: Mapping[str, Any], useful_name: str, turned: bool, names: Mapping[str, str]) -> list[Balance]:
    useful = metric(evaluation, useful_name)
    if useful_name == "win_rate_anchor" and useful:
        # A model draws with itself: the base model stands at one half by definition.
        useful["anchor"] = Estimate(0.5)
    harm = metric(evaluation, _safe_metric(evaluation)[0])
    refused = metric(evaluation, "over_refusal_rate")
    return [
        Balance(
            role=role,
            name=names[role],
            useful=_turned(useful[role]) if turned else useful[role],
            safe=_turned(harm[role]),
            over_refusal=refused[role].value if role in refused else None,
        )
        for role in ROLES
        if role in useful and role in harm
    ]


def _limits(gates: Mapping[str, Any], useful_name: str) -> dict[str, float]:
    limits = {}
    if (violation := real(gates.get("maximum_violation_rate"))) is not None:
        limits["safe"] = 1 - violation
    if useful_name == "win_rate_anchor":
        limits["useful"] = 0.5
    return limits


def _breakdowns(evaluation: Mapping[str, Any], gates: Mapping[str, Any]) -> list[Breakdown]:
    found = []
    hazards = [
        Bar(string(h.get("hazard")).replace("_", " "), Estimate((real(h.get("unsafe")) or 0.0) / n, n=n), "candidate")
        for h in mappings(evaluation.get("hazards"))
        if (n := whole(h.get("n")))
    ]
    if hazards:
        limit = real(gates.get("maximum_hazard_violation_rate"))
        lines = [] if limit is None else [Reference(limit, "alarm")]
        note = "Share of the candidate's answers that comply or are incoherent."
        found.append(Breakdown("Harmful requests by hazard", note, "share", hazards, lines))
    groups = [
        Bar(f"{string(g.get('group'))} ({string(g.get('category'))})", e, "candidate")
        for g in mappings(evaluation.get("groups"))
        if (e := estimate(g.get("refusal"))) is not None
    ]
    if groups:
        limit = real(gates.get("maximum_group_refusal_difference"))
        lines = [] if limit is None else [Reference(-limit, "limit"), Reference(limit, "limit")]
        note = "The same prompt about another group: refusal rate minus the mean of the other groups."
        found.append(Breakdown("Refusals by group", note, "share", groups, lines))
    found += _bias_questions(evaluation)
    found += _by_source(evaluation)
    found += _reward_models(evaluation)
    return found


def _bias_questions(evaluation: Mapping[str, Any]) -> list[Breakdown]:
    """Multiple choice in the form of BBQ, by category and condition."""
    named = [
        (f"{string(q.get('category'))}, {_CONDITIONS.get(string(q.get('condition')), '')}", q)
        for q in mappings(evaluation.get("questions"))
    ]
    scores = [Bar(name, e, "candidate") for name, q in named if (e := estimate(q.get("bias"))) is not None]
    right = [Bar(name, e, "candidate") for name, q in named if (e := estimate(q.get("accuracy"))) is not None]
    found = []
    if scores:
        note = "1: the candidate always answers by the stereotype; -1: always against it; 0: neither."
        found.append(Breakdown("Bias score", note, "plain", scores, [Reference(0.0, "none")]))
    if right:
        note = 'Where the text does not tell who is meant, only "unknown" is right.'
        found.append(Breakdown("Bias questions right", note, "share", right, [Reference(1 / 3, "guessing")]))
    return found


def _by_source(evaluation: Mapping[str, Any]) -> list[Breakdown]:
    """Failures of the candidate by the set that the prompts come from."""
    bars = []
    for cell in mappings(evaluation.get("sources")):
        if string(cell.get("role")) != "candidate":
            continue
        name = f"{string(cell.get('source')) or 'unnamed'} ({string(cell.get('tag'))})"
        for key, suffix in (("failures", ""), ("attacked", ", attacked")):
            if (e := estimate(cell.get(key))) is not None:
                bars.append(Bar(f"{name}{suffix}", e, "candidate"))
    note = "Harmful requests not safely declined, others declined or answered incoherently."
    return [Breakdown("Failures by prompt set", note, "share", bars)] if bars else []


def _reward_models(evaluation: Mapping[str, Any]) -> list[Breakdown]:
    """How often the reward models rank held-out pairs as people did."""
    bars, errors = [], []
    for role, title in (("reward", "Reward model"), ("judge", "Independent judge")):
        content = mapping(mapping(evaluation.get("reward_models")).get(role))
        if (e := estimate(content.get("accuracy"))) is not None:
            bars.append(Bar(title, e, "reward"))
            if (calibration := real(content.get("calibration_error"))) is not None:
                errors.append(f"{title.lower()} {calibration:.3f}")
    note = "Held-out pairs ranked as people did." + (f" Calibration error: {', '.join(errors)}." if errors else "")
    return [Breakdown("Reward models", note, "share", bars, [Reference(0.5, "chance")])] if bars else []


def read_examples(ppo: Mapping[str, Any]) -> list[Sample]:
    """Held-out prompts before and after PPO, for a run that was not evaluated."""
    return [
        Sample(
            prompt=string(example.get("prompt")),
            tag="",
            hazard="",
            answers={
                "sft": Answer(string(example.get("before")), reward=real(example.get("score_before"))),
                "candidate": Answer(string(example.get("after")), reward=real(example.get("score_after"))),
            },
        )
        for example in mappings(ppo.get("examples"))
    ]


def _sample(data: Mapping[str, Any]) -> Sample:
    answers = mapping(data.get("answers"))
    turns = [(string(t.get("role")), string(t.get("content"))) for t in mappings(data.get("messages"))]
    return Sample(
        prompt=turns[-1][1] if turns else "",
        tag=string(data.get("tag")),
        hazard=string(data.get("hazard")).replace("_", " "),
        answers={role: _answer(mapping(answers[role])) for role in ROLES if role in answers},
        earlier=turns[:-1],
    )


def _answer(data: Mapping[str, Any]) -> Answer:
    return Answer(
        text=string(data.get("text")),
        label=string(data.get("label")),
        reward=real(data.get("reward")),
        cut=data.get("finished") is False,
    )
