"""The report as one HTML file: style, script and charts inside, nothing loaded from elsewhere.

Everything a model or a dataset wrote is untrusted: the template escapes all text, and a content security policy lets no
script run but the report's own, which is named by its hash.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache, partial
from importlib import resources
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from tunegate.report import balance, charts, curves, diagrams, formats, wording
from tunegate.report.facts import ROLES, Bar, Estimate, Facts, Metric, Reference, Sample, Unit, role_names
from tunegate.report.reading import read_facts
from tunegate.report.svg import tag
from tunegate.storage.runs import RunStore

_SHOWN_PER_TAG = 4
"""Prompts of one tag that are open in the page; the others are a click away."""
_SHOWN_REASONS = 4
"""Reasons beside the verdict; the gates below hold all of them."""

_ICON_PATHS = {
    "pass": "M5 12.5l4.5 4.5L19 7.5",
    "fail": "M7 7l10 10M17 7L7 17",
    "hold": "M9 6.5v11M15 6.5v11",
    "invalid": "M12 5.5v8.5M12 17.9v.3",
    "none": "M7 12h10",
}
_CHARTS: dict[str, Any] = {
    "gate_strip": charts.gate_strip,
    "interval_chart": charts.interval_chart,
    "bound_bar": charts.bound_bar,
    "balance_chart": balance.balance_chart,
    "versions_chart": balance.versions_chart,
    "reliability_chart": charts.reliability_chart,
    "histogram": charts.histogram,
    "count_bars": charts.count_bars,
    "plain_bars": charts.plain_bars,
    "curve_panel": curves.curve_panel,
    "timeline": diagrams.timeline,
    "lineage_graph": diagrams.lineage_graph,
}


def render_report(run: RunStore) -> str:
    """The report of a run, finished or failed at whatever stage.

    Args:
        run: Where the run's records lie; only small files are read.

    Returns:
        A self-contained HTML document.
    """
    return render_html(read_facts(run))


def render_html(facts: Facts) -> str:
    """The report as HTML, from facts that were read before."""
    return _template().render(_context(facts))


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_readable
    )
    return environment.from_string(_asset("report.html.j2"))


@cache
def _asset(name: str) -> str:
    return (resources.files("tunegate.report") / "assets" / name).read_text(encoding="utf-8")


def _readable(value: Any) -> Any:
    """Untrusted text loses its control characters on the way into the page; escaping follows."""
    return value if isinstance(value, Markup) else formats.readable(value)


def _context(facts: Facts) -> dict[str, Any]:
    """What the template works with."""
    script = "\n" + _asset("report.js")
    groups = _sample_groups(facts.samples)
    names = role_names(facts.run.pipeline if facts.run else "")
    return {
        "facts": facts,
        "charts": _CHARTS,
        "css": Markup("\n" + _asset("report.css")),
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "title": wording.run_title(facts),
        "when": formats.moment(facts.run.started if facts.run else None),
        "shown_reasons": _SHOWN_REASONS,
        "tone": wording.tone(facts.outcome.word),
        "icon": _icon,
        "sections": _sections(facts),
        "headline_facts": wording.headline_facts(facts),
        "role_names": names,
        "role_order": list(ROLES),
        "sample_groups": groups,
        "sample_roles": [r for r in ROLES if any(r in s.answers for s in facts.samples)],
        "metric_bars": partial(_metric_bars, names),
        "chance": Reference(0.5, "chance"),
        "measured_effects": _measured(facts),
        "drawn_gates": any(g.estimate and g.limit is not None for g in facts.gates),
        "effect_tone": {"yes": "pass", "no": "fail", "unclear": "hold", "missing": "none"},
        "effect_word": {"yes": "Yes", "no": "No", "unclear": "Not shown", "missing": "Not measured"},
        "better_word": {"higher": "higher is better", "lower": "lower is better", "none": "for orientation"},
        "absent_text": lambda what, stage: wording.absent(facts, what, stage),
        "label_tone": wording.label_tone,
        "curve_stages": _curve_stages(facts),
        "stage_title": formats.stage_title,
        "verdict_class": charts.verdict_class,
        "figure": charts.figure,
        "interval": charts.interval,
        "estimate_figures": _estimate_figures,
        "version_notes": wording.version_notes(facts.versions) if facts.versions else [],
        "versions_axes": wording.VERSION_AXES,
        "answers_lead": wording.answers_lead(facts),
        "reward": _reward,
        "whole": lambda value: formats.DASH if value is None else f"{value:,.0f}",
        "number": formats.number,
        "percent": formats.percent,
        "plural": formats.plural,
        "seconds": formats.seconds,
        "size": formats.size,
        "data_lead": wording.data_lead(facts),
        "cost_lead": wording.cost_lead(facts),
        "cost_rows": [] if facts.cost is None else [(k, v) for k, v in facts.cost.per_stage.items() if v > 0],
        "cost_show": lambda value: formats.money(value, facts.cost.currency if facts.cost else ""),
        "environment": wording.environment(facts),
        "spec_text": yaml.safe_dump(facts.spec, sort_keys=False, allow_unicode=True, width=110) if facts.spec else "",
        "code_version": facts.run.code_version if facts.run else "",
    }


def _icon(tone: str) -> Markup:
    path = tag(
        "path",
        d=_ICON_PATHS.get(tone, _ICON_PATHS["none"]),
        fill="none",
        stroke="var(--page)",
        stroke_width=2.6,
        stroke_linecap="round",
        stroke_linejoin="round",
    )
    return tag(
        "svg", tag("circle", cx=12, cy=12, r=11, fill="var(--tone)"), path, viewBox="0 0 24 24", aria_hidden="true"
    )


def _measured(facts: Facts) -> bool:
    """Whether any of the effects was measured."""
    return any(effect.state != "missing" for effect in facts.effects)


def _curve_stages(facts: Facts) -> list[str]:
    """Stages that have curves or remarks, the training stages first."""
    stages = dict.fromkeys((*facts.remarks, *facts.curves, *facts.more_curves))
    return [s for s in stages if facts.curves.get(s) or facts.more_curves.get(s) or facts.remarks.get(s)]


def _sections(facts: Facts) -> list[tuple[str, str]]:
    """The page's own links, for the sections that have something to show."""
    wanted: list[tuple[str, str, object]] = [
        ("gates", "Gates", facts.gates),
        ("effect", "Effect", _measured(facts)),
        ("balance", "Balance", facts.balance or facts.metrics),
        ("versions", "Versions", facts.versions),
        ("curves", "Curves", _curve_stages(facts)),
        ("answers", "Answers", facts.samples),
        ("reward", "Reward", facts.reward),
        ("data", "Data", facts.data),
        ("stages", "Stages", facts.stages),
        ("lineage", "Lineage", facts.lineage),
        ("cost", "Cost", facts.cost),
        ("spec", "Spec", True),
    ]
    return [(anchor, name) for anchor, name, content in wanted if content]


def _sample_groups(samples: list[Sample]) -> list[tuple[str, str, list[Sample], list[Sample]]]:
    """Samples by tag: heading, explanation, those shown at once, the rest."""
    tags = list(dict.fromkeys(s.tag for s in samples))
    order = sorted(tags, key=lambda t: (wording.TAG_ORDER.index(t) if t in wording.TAG_ORDER else 99, t))
    groups = []
    for name in order:
        members = [s for s in samples if s.tag == name]
        heading, explanation = wording.tag_title(name)
        groups.append((heading, explanation, members[:_SHOWN_PER_TAG], members[_SHOWN_PER_TAG:]))
    return groups


def _metric_bars(names: Mapping[str, str], metric: Metric) -> list[Bar]:
    return [Bar(names[r], metric.by_role[r], r) for r in ROLES if r in metric.by_role]


def _estimate_figures(found: Estimate | None, unit: Unit, signed: bool = False) -> list[str]:
    """The estimate, and the interval's ends when there are any, with the same decimals."""
    if found is None:
        return []
    if found.low is None or found.high is None:
        values = [found.value]
        texts = [charts.figure(found.value, unit)]
    else:
        values = [found.value, found.low, found.high]
        texts = charts.figures(values, unit)
    return [f"+{text}" if signed and value > 0 else text for value, text in zip(values, texts, strict=True)]


def _reward(value: float | None) -> str:
    return ("+" if value is not None and value > 0 else "") + formats.fixed(value, 2)
