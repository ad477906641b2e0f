"""Usefulness against safety: the models of one run, and the versions of a registered model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import pairwise

from markupsafe import Markup

from tunegate.report.charts import interval
from tunegate.report.facts import Balance, Estimate, Version
from tunegate.report.formats import percent
from tunegate.report.svg import Point, Scale, coordinate, drawing, join, padded, polyline, tag, text, ticks

_WIDTH, _HEIGHT = 620.0, 430.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 600.0, 18.0, 372.0
_MARKER = 9.0
_Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class _Plot:
    """The scales of a balance: x usefulness, y safety."""

    x: Scale
    y: Scale

    def place(self, useful: Estimate, safe: Estimate) -> Point:
        return self.x(useful.value), self.y(safe.value)


def balance_chart(points: Sequence[Balance], limits: Mapping[str, float], x_title: str, y_title: str) -> Markup:
    """Usefulness against safety: a cross of intervals for each model, over-refusal as the marker's fill.

    Args:
        points: The models; those called anchor, sft and candidate are joined in the order of training.
        limits: Absolute limits drawn as lines: `useful` (x at least), `safe` (y at least).
        x_title: What the x axis counts.
        y_title: What the y axis counts.
    """
    plot = _plot([(p.useful, p.safe) for p in points], limits)
    parts = _frame(plot, limits, x_title, y_title)
    path = [p for role in ("anchor", "sft", "candidate") for p in points if p.role == role]
    if len(path) > 1:
        parts.append(polyline([plot.place(p.useful, p.safe) for p in path], "trail"))
    for p in points:
        parts += _cross(plot, p.useful, p.safe, p.role)
    for p in points:
        parts.append(_marker(plot, p.useful, p.safe, p.role, p.over_refusal, _tip(p, x_title, y_title)))
    parts += _labels([(p.name, p.role, p.useful, p.safe) for p in points], plot)
    spoken = "; ".join(f"{p.name} {percent(p.useful.value)} useful, {percent(p.safe.value)} safe" for p in points)
    return drawing(_WIDTH, _HEIGHT, *parts, label=f"Safety against usefulness: {spoken}", class_="balance")


def versions_chart(versions: Sequence[Version], x_title: str, y_title: str) -> Markup:
    """The versions of a registered model: crosses of intervals, arrows of descent, the Pareto front.

    Args:
        versions: The points, oldest first. Those that were measured under other conditions are drawn faint.
        x_title: What the x axis counts.
        y_title: What the y axis counts.
    """
    plot = _plot([(v.useful, v.safe) for v in versions], {})
    parts = _frame(plot, {}, x_title, y_title)
    places = {v.version: plot.place(v.useful, v.safe) for v in versions}
    front = sorted((places[v.version] for v in versions if v.on_front), key=lambda p: p[0])
    if front:
        parts.append(polyline(_staircase(front), "front"))
    for v in versions:
        if v.parent in places and v.parent != v.version:
            parts += _arrow(places[v.parent], places[v.version], made=v.made_from)
    for v in versions:
        parts.append(tag("g", join(_cross(plot, v.useful, v.safe, v.role)), class_=None if v.comparable else "faint"))
    for v in versions:
        tip = _version_tip(v, x_title, y_title)
        shown = _marker(plot, v.useful, v.safe, v.role, v.over_refusal, tip)
        parts.append(tag("g", shown, class_=None if v.comparable else "faint"))
    parts += _labels([(v.label, v.role, v.useful, v.safe) for v in versions], plot)
    spoken = "; ".join(f"{v.label} {percent(v.useful.value)} useful, {percent(v.safe.value)} safe" for v in versions)
    return drawing(_WIDTH, _HEIGHT, *parts, label=f"Balance over versions: {spoken}", class_="balance")


def versions_file(title: str, versions: Sequence[Version], x_title: str, y_title: str, notes: Sequence[str]) -> str:
    """The chart of the versions as an SVG file of its own: with title, key and notes, and its style inside."""
    chart = versions_chart(versions, x_title, y_title)
    lines = [
        "Crosses: confidence intervals. Green band: Pareto front, by the estimates.",
        "Arrows: from the version that it was made from; dashed: from the version that it was measured against.",
        *notes,
    ]
    height = _HEIGHT + 74 + 15 * len(lines)
    key_y = _HEIGHT + 62
    ramp = tag(
        "linearGradient",
        tag("stop", offset="0", style="stop-color:var(--scale-low)"),
        tag("stop", offset="1", style="stop-color:var(--scale-high)"),
        id="ramp",
    )
    return str(
        tag(
            "svg",
            tag("style", Markup(_style())),
            tag("defs", ramp),
            tag("rect", x=0, y=0, width=_WIDTH + 40, height=height, fill="var(--page)"),
            text(20, 28, title, "name start"),
            tag("svg", chart, x=10, y=36, width=_WIDTH, height=_HEIGHT),
            text(20, key_y, "Over-refusal", "tick start"),
            tag("rect", x=92, y=key_y - 9, width=110, height=10, rx=5, fill="url(#ramp)", stroke="var(--rule)"),
            text(208, key_y, "0% to 50% or more", "tick start"),
            *(text(20, key_y + 20 + 15 * i, line, "tick start") for i, line in enumerate(lines)),
            xmlns="http://www.w3.org/2000/svg",
            viewBox=f"0 0 {_WIDTH + 40:.0f} {height:.0f}",
            width=_WIDTH + 40,
            height=height,
            class_="chart",
            role="img",
            aria_label=title,
        )
    )


@cache
def _style() -> str:
    return (resources.files("tunegate.report") / "assets" / "report.css").read_text(encoding="utf-8")


def _plot(points: Iterable[tuple[Estimate, Estimate]], limits: Mapping[str, float]) -> _Plot:
    useful, safe = [limits[k] for k in ("useful",) if k in limits], [limits[k] for k in ("safe",) if k in limits]
    for x, y in points:
        useful += x.ends
        safe += y.ends
    (x_low, x_high), (y_low, y_high) = padded(useful, 0.14), padded(safe, 0.14)
    return _Plot(
        Scale(max(x_low, -0.02), min(x_high, 1.02), _LEFT, _RIGHT),
        Scale(max(y_low, -0.02), min(y_high, 1.02), _BOTTOM, _TOP),
    )


def _frame(plot: _Plot, limits: Mapping[str, float], x_title: str, y_title: str) -> list[Markup]:
    """Grid, axes and limits."""
    parts: list[Markup] = []
    if {"useful", "safe"} & limits.keys():
        x0, y0 = plot.x(limits.get("useful", plot.x.low)), plot.y(limits.get("safe", plot.y.low))
        parts.append(tag("rect", x=x0, y=_TOP, width=_RIGHT - x0, height=y0 - _TOP, class_="zone"))
    for value in ticks(plot.x.low, plot.x.high, 5):
        x = plot.x(value)
        parts += [
            tag("line", x1=x, x2=x, y1=_TOP, y2=_BOTTOM, class_="grid"),
            text(x, _BOTTOM + 17, percent(value), "tick mid"),
        ]
    for value in ticks(plot.y.low, plot.y.high, 5):
        y = plot.y(value)
        parts += [
            tag("line", x1=_LEFT, x2=_RIGHT, y1=y, y2=y, class_="grid"),
            text(_LEFT - 8, y + 4, percent(value), "tick end"),
        ]
    if "useful" in limits:
        x = plot.x(limits["useful"])
        parts.append(tag("line", x1=x, x2=x, y1=_TOP, y2=_BOTTOM, class_="reference"))
    if "safe" in limits:
        y = plot.y(limits["safe"])
        parts.append(tag("line", x1=_LEFT, x2=_RIGHT, y1=y, y2=y, class_="reference"))
        parts.append(text(_RIGHT - 4, y + 14, f"limit {percent(limits['safe'])}", "tick end halo"))
    middle = (_TOP + _BOTTOM) / 2
    parts += [
        text((_LEFT + _RIGHT) / 2, _HEIGHT - 14, f"{x_title} →", "axis mid"),
        tag("text", f"{y_title} →", x=16.0, y=middle, class_="axis mid", transform=f"rotate(-90 16 {middle:.0f})"),
    ]
    return parts


def _cross(plot: _Plot, useful: Estimate, safe: Estimate, role: str) -> list[Markup]:
    """The two intervals of a point."""
    x, y = plot.place(useful, safe)
    (left, right), (low, high) = (plot.x(e) for e in useful.ends), (plot.y(e) for e in safe.ends)
    return [
        tag("line", x1=left, x2=right, y1=y, y2=y, class_=f"bar thin role-{role}"),
        tag("line", x1=x, x2=x, y1=low, y2=high, class_=f"bar thin role-{role}"),
    ]


def _marker(plot: _Plot, useful: Estimate, safe: Estimate, role: str, over_refusal: float | None, tip: str) -> Markup:
    x, y = plot.place(useful, safe)
    return tag(
        "circle",
        tag("title", tip),
        cx=x,
        cy=y,
        r=_MARKER,
        class_=f"marker role-{role}",
        style=f"fill:{over_refusal_fill(over_refusal)}",
    )


def _tip(p: Balance, x_title: str, y_title: str) -> str:
    told = f"{p.name}: {x_title.lower()} {interval(p.useful, 'share')}, {y_title.lower()} {interval(p.safe, 'share')}"
    return told + (f", over-refusal {percent(p.over_refusal)}" if p.over_refusal is not None else "")


def _version_tip(v: Version, x_title: str, y_title: str) -> str:
    point = Balance(v.role, v.label, v.useful, v.safe, v.over_refusal)
    words = [_tip(point, x_title, y_title), v.verdict, *v.aliases]
    words += ["rejected"] * v.rejected + ["measured on other prompts or otherwise"] * (not v.comparable)
    return ", ".join(word for word in words if word)


def _staircase(front: Sequence[Point]) -> list[Point]:
    """The edge of what the front's points reach: further right costs safety."""
    steps = [front[0]]
    for (_, y), (next_x, next_y) in pairwise(front):
        steps += [(next_x, y), (next_x, next_y)]
    return steps


def _arrow(start: Point, end: Point, *, made: bool) -> list[Markup]:
    """An arrow between two markers, none where they touch."""
    length = math.dist(start, end)
    if length < 2 * _MARKER + 8:
        return []
    x, y = (end[0] - start[0]) / length, (end[1] - start[1]) / length

    def at(along: float, aside: float = 0.0) -> Point:
        return start[0] + along * x - aside * y, start[1] + along * y + aside * x

    tip = length - _MARKER - 3
    (x1, y1), (x2, y2) = at(_MARKER + 2), at(tip - 6)
    head = "L".join(f"{coordinate(a)},{coordinate(b)}" for a, b in (at(tip), at(tip - 8, 4), at(tip - 8, -4)))
    return [
        tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_="arrow" if made else "arrow measured"),
        tag("path", d=f"M{head}z", class_="arrow-head"),
    ]


def _labels(points: Sequence[tuple[str, str, Estimate, Estimate]], plot: _Plot) -> list[Markup]:
    """The points' names beside their markers, each at the corner where it hides least.

    Args:
        points: Name, role, usefulness, safety.
        plot: The scales.
    """
    markers = [plot.place(useful, safe) for _, _, useful, safe in points]
    arms: list[_Box] = []
    for (_, _, useful, safe), (x, y) in zip(points, markers, strict=True):
        arms += [
            (plot.x(useful.ends[0]), y - 1, plot.x(useful.ends[1]), y + 1),
            (x - 1, plot.y(safe.ends[1]), x + 1, plot.y(safe.ends[0])),
            (x - 11, y - 11, x + 11, y + 11),
        ]
    taken: list[_Box] = []
    labels = []
    for (name, role, _, _), (x, y) in zip(points, markers, strict=True):
        width = 7.4 * len(name) + 4
        choices = []
        for rank, (side, lift) in enumerate(((1, -13.0), (-1, -13.0), (1, 23.0), (-1, 23.0), (1, -31.0), (-1, 41.0))):
            left = x + 12 if side > 0 else x - 12 - width
            box = (left, y + lift - 11, left + width, y + lift + 2)
            outside = max(box[2] - _RIGHT - 30, 0) + max(60 - box[0], 0)
            cost = (
                rank * 6
                + 50 * outside
                + sum(_overlap(box, other) for other in arms)
                + 9 * sum(_overlap(box, other) for other in taken)
            )
            choices.append((cost, side, lift, box))
        _, side, lift, box = min(choices, key=lambda c: c[0])
        taken.append(box)
        labels.append(text(x + 12 * side, y + lift, name, f"name {'start' if side > 0 else 'end'} halo ink-{role}"))
    return labels


def _overlap(a: _Box, b: _Box) -> float:
    """The common area of two boxes (left, top, right, bottom)."""
    return max(min(a[2], b[2]) - max(a[0], b[0]), 0.0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0.0)


def over_refusal_fill(value: float | None) -> str:
    """The marker's fill for an over-refusal rate: from the page's colour (none) to full amber at one half or more."""
    if value is None or not math.isfinite(value):
        return "var(--page)"
    return f"color-mix(in srgb, var(--scale-high) {min(max(value, 0.0) / 0.5, 1.0) * 100:.0f}%, var(--scale-low))"
