"""Which curves of a stage are shown, in which panels, under which names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunegate.report.facts import Panel, Reference, Series, Unit
from tunegate.report.tolerant import real

_AXES = {"step", "time"}
_NO_CURVES = ("/update", "/n")
"""Endings of logged numbers that only count."""
_SET_LABELS = {"rate", "beta"}
_SET_ENDINGS = ("learning_rate", "kl_coefficient")
"""Curves that are set rather than measured: smoothing would only distort them."""
_FEW = 40
"""A held-out curve with at most this many points is drawn with a dot at each."""


@dataclass(frozen=True, slots=True)
class _Curve:
    metric: str
    label: str
    role: str = "other"


@dataclass(frozen=True, slots=True)
class _Plan:
    title: str
    curves: tuple[_Curve, ...]
    note: str = ""
    unit: Unit = "plain"
    baselines: tuple[tuple[str, str], ...] = ()
    """Metrics whose last value is drawn as a line, with the line's label."""
    limits: tuple[tuple[str, str], ...] = ()
    """Dotted keys of the spec whose values are drawn as lines, with their labels."""
    varied: bool = False
    """Shown only when its values differ."""


_PLANS: dict[str, tuple[_Plan, ...]] = {
    "sft": (
        _Plan(
            "Loss",
            (_Curve("sft/loss", "train"), _Curve("sft/heldout_nll", "held out", "sft")),
            "nats a token",
        ),
        _Plan("Gradient norm", (_Curve("sft/gradient_norm", "norm", "sft"),)),
        _Plan("Learning rate", (_Curve("sft/learning_rate", "rate", "sft"),)),
    ),
    "reward": (
        _Plan("Loss", (_Curve("reward/loss", "train"), _Curve("reward/heldout_log_loss", "held out", "reward"))),
        _Plan(
            "Accuracy on pairs",
            (_Curve("reward/accuracy", "train"), _Curve("reward/heldout_accuracy", "held out", "reward")),
            unit="share",
            baselines=(
                ("reward/length_baseline_accuracy", "length only"),
                ("reward/tfidf_baseline_accuracy", "TF-IDF"),
            ),
        ),
        _Plan("Gradient norm", (_Curve("reward/gradient_norm", "norm", "reward"),)),
    ),
    "ppo": (
        _Plan(
            "Reward",
            (_Curve("ppo/reward", "rollouts"), _Curve("ppo/heldout/reward", "held out", "candidate")),
            "without the KL term",
        ),
        _Plan(
            "KL from the reference",
            (_Curve("ppo/kl", "rollouts"), _Curve("ppo/heldout/kl", "held out", "candidate")),
            "nats a response",
            limits=(("ppo.kl.limit", "limit"),),
        ),
        _Plan("Judge's score", (_Curve("ppo/heldout/judge", "held out", "reward"),), "never trained on"),
        _Plan(
            "Entropy",
            (_Curve("ppo/entropy", "rollouts"), _Curve("ppo/heldout/entropy", "held out", "candidate")),
            "nats a token",
        ),
        _Plan(
            "Response length",
            (_Curve("ppo/length", "rollouts"), _Curve("ppo/heldout/length", "held out", "candidate")),
            "tokens",
        ),
        _Plan("Clipped ratios", (_Curve("ppo/clip_fraction", "clipped", "candidate"),), unit="share"),
        _Plan("Explained variance", (_Curve("ppo/explained_variance", "explained", "candidate"),), "of the critic"),
        _Plan(
            "Ended by themselves",
            (_Curve("ppo/finished", "rollouts"), _Curve("ppo/heldout/finished", "held out", "candidate")),
            unit="share",
        ),
        _Plan("KL coefficient", (_Curve("ppo/kl_coefficient", "beta", "candidate"),), varied=True),
        # The same stage when `last_stage` is dpo.
        _Plan("Preference loss", (_Curve("dpo/loss", "train"), _Curve("dpo/heldout_loss", "held out", "candidate"))),
        _Plan(
            "Pairs ranked right",
            (_Curve("dpo/accuracy", "train"), _Curve("dpo/heldout_accuracy", "held out", "candidate")),
            "by the implicit reward",
            unit="share",
        ),
        _Plan("Margin", (_Curve("dpo/heldout_margin", "held out", "candidate"),), "beta x difference of log-ratios"),
        _Plan("Gradient norm", (_Curve("dpo/gradient_norm", "norm", "candidate"),)),
    ),
}


def read_panels(
    stage: str, rows: Sequence[Mapping[str, Any]], spec: Mapping[str, Any]
) -> tuple[list[Panel], list[Panel]]:
    """The panels of a stage's curves: the telling ones in their order, and all the others.

    Args:
        stage: Name of the stage.
        rows: What it logged: `{"step": …, "<metric>": …}`.
        spec: The run's spec, for targets that are drawn as lines.

    Returns:
        Two lists; panels without a single value are left out.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    for index, row in enumerate(rows):
        step = real(row.get("step"))
        for name, value in row.items():
            number = real(value)
            if name not in _AXES and not name.endswith(_NO_CURVES) and number is not None:
                series.setdefault(name, []).append((float(index) if step is None else step, number))
    main: list[Panel] = []
    used: set[str] = set()
    for plan in _PLANS.get(stage, ()):
        curves = [c for c in plan.curves if c.metric in series]
        values = {value for c in curves for _, value in series[c.metric]}
        if not curves or (plan.varied and len(values) == 1):
            continue
        used.update((*(c.metric for c in curves), *(name for name, _ in plan.baselines)))
        drawn = [_series(c.label, series[c.metric], c.role) for c in curves]
        main.append(Panel(plan.title, drawn, plan.note, plan.unit, _references(plan, series, spec)))
    role = {"sft": "sft", "reward": "reward", "ppo": "candidate"}.get(stage, "other")
    # A number that was logged once is no curve; tables and cards show it.
    rest = [
        Panel(name, [_series(name, points, role)])
        for name, points in sorted(series.items())
        if name not in used and len(points) > 1
    ]
    return main, rest


def _series(label: str, points: list[tuple[float, float]], role: str) -> Series:
    exact = label in _SET_LABELS or label.endswith(_SET_ENDINGS)
    return Series(label, points, role, marks=len(points) <= _FEW and label == "held out", exact=exact)


def _references(
    plan: _Plan, series: Mapping[str, list[tuple[float, float]]], spec: Mapping[str, Any]
) -> list[Reference]:
    found = [Reference(series[name][-1][1], label) for name, label in plan.baselines if name in series]
    for path, label in plan.limits:
        value: Any = spec
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if (number := real(value)) is not None:
            found.append(Reference(number, label))
    return found
