"""The report's charts of figures: gates, intervals, the balance, reliability, histograms, bars."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup

from tunegate.report.facts import Bar, Bin, Count, Estimate, Gate, Reference, Unit
from tunegate.report.formats import DASH, decimals, fixed, number, percent, readable
from tunegate.report.svg import Scale, drawing, padded, polyline, share, strip, tag, text, ticks

LIMIT_AT = 0.42
"""Where the limit's line stands in a gate's strip; the style sheet shades the row right of it."""

_VERDICT_CLASS = {"PROMOTE": "pass", "HOLD": "hold", "REJECT": "fail", "INVALID": "invalid"}


def verdict_class(verdict: str) -> str:
    """The style class of a verdict."""
    return _VERDICT_CLASS.get(verdict.upper(), "none")


def figure(value: float | None, unit: Unit) -> str:
    """A number in its unit."""
    return percent(value) if unit == "share" else number(value)


def figures(values: Sequence[float], unit: Unit, step: float | None = None) -> list[str]:
    """Numbers that are read together, with the same number of decimals.

    Args:
        values: The numbers.
        unit: Shares are written as percentages.
        step: The difference that must stay visible; by default a twentieth of their range.
    """
    finite = [v for v in values if math.isfinite(v)]
    span = step if step is not None else (max(finite) - min(finite)) / 20 if finite else 1.0
    if unit == "share":
        hundreds = [100 * v for v in finite]
        coarse = all(math.isclose(v, round(v), abs_tol=1e-6) for v in hundreds)
        return [percent(v, 0 if coarse else max(1, decimals(200 * span) if 0 < span < 0.001 else 1)) for v in values]
    if span <= 0:
        return [number(v) for v in values]
    places = decimals(span)
    while places and all(math.isclose(v, round(v, places - 1), rel_tol=1e-9, abs_tol=1e-12) for v in finite):
        places -= 1
    return [fixed(v, places) for v in values]


def interval(estimate: Estimate | None, unit: Unit) -> str:
    """A figure with its interval: `12.0% [8.1%, 17.3%]`."""
    if estimate is None:
        return DASH
    if estimate.low is None or estimate.high is None:
        return figure(estimate.value, unit)
    middle, low, high = figures([estimate.value, estimate.low, estimate.high], unit)
    return f"{middle} [{low}, {high}]"


def tick_figures(values: Sequence[float], unit: Unit) -> list[str]:
    """The labels of an axis: as few decimals as show every tick exactly."""
    shown = [100 * v for v in values] if unit == "share" else list(values)
    places = next((p for p in range(7) if all(math.isclose(v, round(v, p), abs_tol=1e-9) for v in shown)), 6)
    return [fixed(v, places) + ("%" if unit == "share" else "") for v in shown]


def _margins(gate: Gate, limit: float, estimate: Estimate) -> tuple[float, float, float]:
    """How far the interval's worse end, the estimate and the better end lie on the passing side of the limit."""
    low, high = estimate.ends
    if gate.direction == "below":
        return limit - high, limit - estimate.value, limit - low
    if gate.direction == "within":
        near = 0.0 if low <= 0 <= high else min(abs(low), abs(high))
        return limit - max(abs(low), abs(high)), limit - abs(estimate.value), limit - near
    return low - limit, estimate.value - limit, high - limit


def gate_strip(gate: Gate) -> Markup:
    """A gate's interval against its limit: right of the line is the passing side, whatever the gate's direction.

    Each strip has its own scale; what can be compared between strips is where the interval lies to the line.
    """
    height = 46.0
    if gate.estimate is None or gate.limit is None:
        return strip(height, label=f"{gate.title}: no figure")
    worse, middle, better = _margins(gate, gate.limit, gate.estimate)
    scale = max(max(-worse, 0) / (LIMIT_AT - 0.05), max(better, 0) / (0.94 - LIMIT_AT), 1e-12)

    def at(margin: float) -> str:
        return share(LIMIT_AT + margin / scale)

    mark = f"mark {verdict_class(gate.verdict)}"
    sign = {"below": "≤ ", "within": "± ", "above": "≥ "}[gate.direction]
    y = 17.0
    return strip(
        height,
        tag("line", x1=at(worse), x2=at(better), y1=y, y2=y, class_=f"bar {mark}"),
        tag("line", x1=at(worse), x2=at(worse), y1=y - 5, y2=y + 5, class_=f"cap {mark}"),
        tag("line", x1=at(better), x2=at(better), y1=y - 5, y2=y + 5, class_=f"cap {mark}"),
        tag("circle", tag("title", interval(gate.estimate, gate.unit)), cx=at(middle), cy=y, r=6, class_=f"dot {mark}"),
        text(share(LIMIT_AT), height - 6, f"{sign}{figure(gate.limit, gate.unit)}", "tick end", dx=-7),
        label=f"{gate.title}: {interval(gate.estimate, gate.unit)}, limit {sign}{figure(gate.limit, gate.unit)}",
    )


def interval_chart(
    bars: Sequence[Bar],
    references: Sequence[Reference] = (),
    *,
    unit: Unit,
    label: str,
    axis: bool = True,
) -> Markup:
    """Rows of estimates with their intervals on one axis, each labelled above its bar with its figure.

    Args:
        bars: The rows, from the top.
        references: Vertical lines, labelled at the top.
        unit: How numbers are written.
        label: What a screen reader says.
        axis: Whether tick values are drawn below.
    """
    values = [end for bar in bars for end in (*bar.estimate.ends, bar.estimate.value)]
    low, high = padded([*values, *(r.value for r in references)], 0.08)
    if unit == "share" and min([*values, *(r.value for r in references)]) >= 0:
        low, high = max(low, -0.02), min(high, 1.02)
    scale = Scale(low, high, 0.02, 0.98)
    top = 18.0 if references else 2.0
    row = 42.0
    bottom = top + row * len(bars)
    parts: list[Markup] = []
    if axis:
        marks = ticks(low, high, 4)
        for value, shown in zip(marks, tick_figures(marks, unit), strict=True):
            x = share(scale(value))
            parts.append(tag("line", x1=x, x2=x, y1=top, y2=bottom + 2, class_="grid"))
            anchor = "start" if scale(value) < 0.06 else "end" if scale(value) > 0.94 else "mid"
            parts.append(text(x, bottom + 16, shown, f"tick {anchor}"))
    for reference in references:
        x = share(scale(reference.value))
        side = "start" if scale(reference.value) < 0.25 else "end" if scale(reference.value) > 0.75 else "mid"
        parts.append(text(x, 11, reference.label, f"tick strong {side}"))
        for index in range(len(bars)):
            # Beside the bars only: a line through the rows' words would make them hard to read.
            y = top + row * index + 29
            parts.append(tag("line", x1=x, x2=x, y1=y - 8, y2=y + 9, class_="reference"))
    for index, bar in enumerate(bars):
        y = top + row * index + 29
        ends = bar.estimate.ends
        tip = f"{bar.label}: {interval(bar.estimate, unit)}" + (f", n = {bar.estimate.n}" if bar.estimate.n else "")
        parts += [
            text("0%", y - 13, bar.label, "label start halo"),
            text("100%", y - 13, interval(bar.estimate, unit), "value end halo"),
            tag("line", x1=share(scale(ends[0])), x2=share(scale(ends[1])), y1=y, y2=y, class_=f"bar role-{bar.role}"),
            tag(
                "circle",
                tag("title", tip),
                cx=share(scale(bar.estimate.value)),
                cy=y,
                r=5.5,
                class_=f"dot role-{bar.role}",
            ),
        ]
    spoken = "; ".join(f"{bar.label} {interval(bar.estimate, unit)}" for bar in bars)
    return strip(bottom + (22 if axis else 4), *parts, label=f"{label}: {spoken}")


def bound_bar(label: str, value: float, bound: float, unit: Unit = "nats") -> Markup:
    """A figure as a bar that must stay short of its bound."""
    end = max(value, bound) * 1.12 or 1.0
    kept = value <= bound
    return strip(
        40,
        text("0%", 11, label, "label start"),
        text("100%", 11, f"{figure(value, unit)} of at most {figure(bound, unit)}", "value end"),
        tag("rect", x=0, y=20, width=share(bound / end), height=12, rx=2, class_="track"),
        tag(
            "rect",
            x=0,
            y=20,
            width=share(value / end),
            height=12,
            rx=2,
            class_="fill role-candidate" if kept else "fill fail",
        ),
        tag("line", x1=share(bound / end), x2=share(bound / end), y1=16, y2=36, class_="reference"),
        label=f"{label} {figure(value, unit)}, bound {figure(bound, unit)}",
    )


def reliability_chart(bins: Sequence[Bin]) -> Markup:
    """Predicted against observed share of preferred answers, with intervals; the diagonal is perfect calibration."""
    width, height = 360.0, 330.0
    left, right, top, bottom = 46.0, 348.0, 10.0, 284.0
    shown = [b for b in bins if b.predicted is not None and b.observed is not None and b.n > 0]
    ends = [e for b in shown if b.observed for e in b.observed.ends]
    low = min(max(math.floor(10 * min([*ends, 0.5])) / 10, 0.0), 0.4)
    x_scale, y_scale = Scale(low, 1, left, right), Scale(low, 1, bottom, top)
    parts: list[Markup] = []
    for value in ticks(low, 1, 5):
        parts += [
            tag("line", x1=left, x2=right, y1=y_scale(value), y2=y_scale(value), class_="grid"),
            text(left - 7, y_scale(value) + 4, percent(value), "tick end"),
            text(x_scale(value), bottom + 16, percent(value), "tick mid"),
        ]
    parts.append(tag("line", x1=left, x2=right, y1=bottom, y2=top, class_="diagonal"))
    parts.append(
        polyline(
            [(x_scale(b.predicted or 0), y_scale(b.observed.value)) for b in shown if b.observed], "line role-reward"
        )
    )
    most = max((b.n for b in shown), default=1)
    for b in shown:
        if b.predicted is None or b.observed is None:
            continue
        x, (bar_low, bar_high) = x_scale(b.predicted), b.observed.ends
        tip = f"predicted {percent(b.predicted)}, observed {interval(b.observed, 'share')}, {number(b.n)} pairs"
        parts.append(
            tag(
                "line",
                x1=x,
                x2=x,
                y1=y_scale(max(bar_low, low)),
                y2=y_scale(min(bar_high, 1)),
                class_="bar thin role-reward",
            )
        )
        parts.append(
            tag(
                "circle",
                tag("title", tip),
                cx=x,
                cy=y_scale(b.observed.value),
                r=3 + 5 * math.sqrt(b.n / most),
                class_="dot role-reward",
            )
        )
    parts.append(text((left + right) / 2, height - 10, "Predicted probability →", "axis mid"))
    parts.append(
        tag(
            "text",
            "Observed →",
            x=12.0,
            y=(top + bottom) / 2,
            class_="axis mid",
            transform=f"rotate(-90 12 {(top + bottom) / 2:.0f})",
        )
    )
    return drawing(
        width,
        height,
        *parts,
        label="Reliability: observed against predicted share of preferred answers",
        class_="reliability",
    )


def histogram(bins: Sequence[Bin], unit_name: str) -> Markup:
    """Counts by range, labelled at the ends and at the fullest bar."""
    width, height, bottom, top = 520.0, 190.0, 162.0, 20.0
    if not bins:
        return drawing(width, height, label="no rows")
    low, high, most = bins[0].low, max(b.high for b in bins), max(b.n for b in bins) or 1
    x_scale, y_scale = Scale(low, high, 6, width - 6), Scale(0, most, bottom, top)
    parts = []
    for b in bins:
        x0, x1 = x_scale(b.low), x_scale(b.high)
        tip = f"{number(b.low)} to {number(b.high)} {unit_name}: {number(b.n)} rows"
        parts.append(
            tag(
                "rect",
                tag("title", tip),
                x=x0 + 0.75,
                width=max(x1 - x0 - 1.5, 0.5),
                y=y_scale(b.n),
                height=bottom - y_scale(b.n),
                rx=1.5,
                class_="column",
            )
        )
    peak = max(bins, key=lambda b: b.n)
    parts.append(
        text((x_scale(peak.low) + x_scale(peak.high)) / 2, y_scale(peak.n) - 6, number(peak.n), "tick mid strong")
    )
    parts.append(tag("line", x1=6, x2=width - 6, y1=bottom, y2=bottom, class_="baseline"))
    for value in ticks(low, high, 5):
        parts.append(text(x_scale(value), bottom + 16, number(value), "tick mid"))
    return drawing(width, height, *parts, label=f"Histogram over {unit_name}", class_="histogram")


def count_bars(counts: Sequence[Count]) -> Markup:
    """Rows kept and quarantined, one bar each."""
    row, most = 36.0, max((c.seen for c in counts), default=1) or 1
    parts: list[Markup] = []
    for index, c in enumerate(counts):
        y = row * index
        tip = f"{c.label}: {number(c.seen)} seen, {number(c.clean)} clean, {number(c.quarantined)} quarantined"
        value = f"{c.clean:,.0f}" + (f" + {c.quarantined:,.0f} quarantined" if c.quarantined else "")
        parts += [
            text("0%", y + 12, c.label, "label start"),
            text("100%", y + 12, value, "value end"),
            tag(
                "rect", tag("title", tip), x=0, y=y + 18, width=share(c.clean / most), height=9, rx=1.5, class_="column"
            ),
            tag(
                "rect",
                x=share(c.clean / most),
                y=y + 18,
                width=share(c.quarantined / most),
                height=9,
                rx=1.5,
                class_="column quarantined",
            ),
        ]
    return strip(
        row * len(counts), *parts, label="Rows: " + "; ".join(f"{c.label} {number(c.clean)} clean" for c in counts)
    )


def plain_bars(rows: Sequence[tuple[str, float]], show: Callable[[float], str], class_: str = "column") -> Markup:
    """Labelled bars from zero."""
    row, most = 34.0, max((value for _, value in rows), default=1) or 1
    parts: list[Markup] = []
    for index, (label, value) in enumerate(rows):
        y = row * index
        parts += [
            text("0%", y + 12, label, "label start"),
            text("100%", y + 12, show(value), "value end"),
            tag("rect", x=0, y=y + 17, width=share(max(value, 0) / most), height=8, rx=1.5, class_=class_),
        ]
    return strip(row * len(rows), *parts, label="; ".join(f"{readable(label)} {show(value)}" for label, value in rows))
