"""The charts: valid XML, the right places, direct labels."""

import math
import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest

from tunegate.report import balance, charts, curves, diagrams, svg
from tunegate.report.facts import (
    Balance,
    Bar,
    Bin,
    Count,
    Estimate,
    Gate,
    Lineage,
    LineageNode,
    Panel,
    Reference,
    Series,
)
from tunegate.storage.runs import StageRecord

EVIL = '</text><script>alert("1")</script>&\x00\ud83d'


def parse(markup):
    return ET.fromstring(str(markup))


def all_of(root, name, **attributes):
    found = [e for e in root.iter() if e.tag.endswith("}" + name) or e.tag == name]
    return [e for e in found if all(a in (e.get(k) or "").split() for k, a in attributes.items())]


def words(root):
    return " ".join("".join(e.itertext()) for e in all_of(root, "text"))


def test_tag_escapes_children_and_attributes():
    element = svg.tag("text", EVIL, class_=EVIL, stroke_width=1.005)
    root = parse(element)
    assert root.text == '</text><script>alert("1")</script>&��'
    assert root.get("class") == root.text
    assert root.get("stroke-width") in {"1", "1.0", "1.01"}


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.25, 0.5, 0.75, 1]), (1.6, 2.6, [1.75, 2, 2.25, 2.5]), (-3, 9, [-0.0, 5]), (0, 97, [0, 25, 50, 75])],
)
def test_ticks_are_round_and_inside(low, high, expected):
    assert svg.ticks(low, high, 4) == pytest.approx(expected)


def test_ticks_of_an_empty_range():
    assert svg.ticks(2, 2) == [2]
    assert svg.ticks(0, math.inf) == [0]


def test_smoothing_keeps_a_line_and_calms_noise():
    line = [(float(i), 2.0 * i + 1) for i in range(60)]
    middle = svg.smooth(line, 3)[10:50]
    assert [y for _, y in middle] == pytest.approx([2 * x + 1 for x, _ in middle])
    zigzag = [(float(i), (-1.0) ** i) for i in range(60)]
    assert max(abs(y) for _, y in svg.smooth(zigzag, 3)[10:50]) < 0.01


def test_averaging_keeps_the_mean():
    points = [(float(i), float(i % 7)) for i in range(4000)]
    short = svg.averaged(points, 400)
    assert len(short) == 400
    assert sum(y for _, y in short) / 400 == pytest.approx(sum(y for _, y in points) / 4000)
    assert svg.averaged(points[:9], 400) == points[:9]


def test_thinning_keeps_peaks_and_the_last_point():
    points = [(float(i), math.sin(i / 50)) for i in range(5000)]
    points[1234] = (1234.0, 9.0)
    thinned = svg.thin(points, 400)
    assert len(thinned) <= 402
    assert (1234.0, 9.0) in thinned
    assert thinned[-1] == points[-1]
    assert thinned == sorted(thinned)


def test_spread_separates_labels_inside_the_room_and_keeps_their_order():
    placed = svg.spread([50, 52, 51, 99], 10, 0, 100)
    ordered = sorted(placed)
    assert all(b - a >= 10 - 1e-9 for a, b in pairwise(ordered))
    assert placed[0] < placed[2] < placed[1] < placed[3]
    assert min(placed) >= 0 and max(placed) <= 100
    assert svg.spread([10, 80], 10, 0, 100) == [10, 80]


def at(element, name):
    return float(element.get(name).rstrip("%"))


@pytest.mark.parametrize(
    ("direction", "limit", "estimate", "passes"),
    [
        ("below", 0.2, Estimate(0.1, 0.05, 0.15), True),
        ("below", 0.2, Estimate(0.3, 0.25, 0.35), False),
        ("above", 0.5, Estimate(0.6, 0.55, 0.7), True),
        ("above", 0.5, Estimate(0.4, 0.3, 0.45), False),
        ("within", 0.1, Estimate(-0.02, -0.08, 0.04), True),
        ("within", 0.1, Estimate(-0.3, -0.4, -0.2), False),
    ],
)
def test_a_gate_passes_on_the_right_of_the_line_whatever_its_direction(direction, limit, estimate, passes):
    gate = Gate("g", "Gate", "PROMOTE" if passes else "REJECT", estimate, limit, direction, "share")
    root = parse(charts.gate_strip(gate))
    bar = all_of(root, "line", **{"class": "bar"})[0]
    ends = sorted([at(bar, "x1"), at(bar, "x2")])
    dot = at(all_of(root, "circle")[0], "cx")
    line = 100 * charts.LIMIT_AT
    assert (ends[0] > line) if passes else (ends[1] < line)
    assert ends[0] <= dot <= ends[1]
    assert ends[0] >= 0 and ends[1] <= 100


def test_an_undecided_gate_crosses_the_line():
    gate = Gate("g", "Gate", "HOLD", Estimate(0.19, 0.1, 0.3), 0.2, "below", "share")
    bar = all_of(parse(charts.gate_strip(gate)), "line", **{"class": "bar"})[0]
    ends = sorted([at(bar, "x1"), at(bar, "x2")])
    assert ends[0] < 100 * charts.LIMIT_AT < ends[1]


def test_the_lines_place_in_the_charts_and_in_the_style_sheet_agree():
    from importlib import resources

    css = (resources.files("tunegate.report") / "assets" / "report.css").read_text()
    assert f"calc({100 * charts.LIMIT_AT:.0f}% - 0.75px)" in css


def test_interval_chart_writes_every_figure():
    bars = [Bar("Base", Estimate(2.451, 2.31, 2.6, 48), "anchor"), Bar(EVIL, Estimate(1.84, 1.72, 1.96, 48), "sft")]
    root = parse(charts.interval_chart(bars, [Reference(2.0, "target")], unit="nats", label="Loss"))
    shown = words(root)
    assert "2.45 [2.31, 2.60]" in shown and "1.84 [1.72, 1.96]" in shown and "target" in shown
    assert len(all_of(root, "circle")) == 2
    assert not all_of(root, "script")
    assert root.get("aria-label").startswith("Loss: Base 2.45")


def test_interval_texts_share_their_decimals():
    assert charts.interval(Estimate(0.08, 0.0351, 0.1523), "share") == "8.0% [3.5%, 15.2%]"
    assert charts.interval(Estimate(-0.05, -0.2, 0.1), "reward") == "−0.05 [−0.20, 0.10]"
    assert charts.interval(Estimate(61, 55, 67), "plain") == "61 [55, 67]"
    assert charts.interval(Estimate(0.3), "plain") == "0.3"
    assert charts.interval(None, "plain") == "–"


def test_ticks_are_labelled_exactly():
    assert charts.tick_figures([1.75, 2.0, 2.25], "nats") == ["1.75", "2.00", "2.25"]
    assert charts.tick_figures([0, 5e-06, 1e-05], "plain") == ["0.000000", "0.000005", "0.000010"]
    assert charts.tick_figures([0.5, 0.525], "share") == ["50.0%", "52.5%"]
    assert charts.tick_figures([-0.5, 0.0], "reward") == ["−0.5", "0.0"]


def test_a_rate_that_is_just_below_its_limit_is_not_rounded_onto_it():
    assert charts.interval(Estimate(0.15, 0.11, 0.1996), "share") == "15.0% [11.0%, 20.0%]"
    assert charts.interval(Estimate(0.0004, 0.0, 0.0008), "share") == "0.040% [0.000%, 0.080%]"


def test_balance_puts_better_models_right_and_up():
    points = [
        Balance("anchor", "Base", Estimate(0.5), Estimate(0.8, 0.7, 0.88), 0.02),
        Balance("candidate", "PPO", Estimate(0.7, 0.6, 0.8), Estimate(0.95, 0.9, 0.99), 0.6),
    ]
    root = parse(balance.balance_chart(points, {"safe": 0.9}, "Win rate", "Declined"))
    base, ppo = all_of(root, "circle", **{"class": "marker"})
    assert float(base.get("cx")) < float(ppo.get("cx"))
    assert float(base.get("cy")) > float(ppo.get("cy"))
    assert "100%" in ppo.get("style") and "4%" in base.get("style")
    assert "Base" in words(root) and "PPO" in words(root) and "limit 90%" in words(root)


def test_labels_of_models_in_one_place_do_not_cover_each_other():
    points = [
        Balance(role, name, Estimate(0.5, 0.4, 0.6), Estimate(0.9, 0.8, 0.95), None)
        for role, name in (("anchor", "Base"), ("sft", "SFT"), ("candidate", "PPO"), ("champion", "Champion"))
    ]
    root = parse(balance.balance_chart(points, {}, "Win rate", "Declined"))
    places = {(e.get("x"), e.get("y")) for e in all_of(root, "text", **{"class": "name"})}
    assert len(places) == 4


def test_reliability_chart_marks_each_filled_bin():
    bins = [
        Bin(0.5, 0.6, 40, 0.55, Estimate(0.57, 0.43, 0.71, 40)),
        Bin(0.6, 0.7, 0, None, None),
        Bin(0.9, 1.0, 10, 0.95, Estimate(1.0, 0.69, 1.0, 10)),
    ]
    root = parse(charts.reliability_chart(bins))
    dots = all_of(root, "circle")
    assert len(dots) == 2
    assert float(dots[0].get("r")) > float(dots[1].get("r"))
    assert parse(charts.reliability_chart([])) is not None


def test_histogram_and_bars():
    root = parse(charts.histogram([Bin(0, 10, 3), Bin(10, 20, 7)], "tokens"))
    heights = [float(e.get("height")) for e in all_of(root, "rect")]
    assert heights[0] / heights[1] == pytest.approx(3 / 7, rel=0.01)
    assert parse(charts.histogram([], "tokens")) is not None
    root = parse(charts.count_bars([Count("a", 100, 90, 10), Count(EVIL, 50, 50, 0)]))
    assert "90 + 10 quarantined" in words(root)
    widths = [at(e, "width") for e in all_of(root, "rect")]
    assert widths == pytest.approx([90, 10, 50, 0])
    root = parse(charts.plain_bars([("x", 2.0), ("y", 1.0)], str))
    assert [at(e, "width") for e in all_of(root, "rect")] == [100, 50]
    assert parse(charts.plain_bars([("x", 0.0)], str)) is not None


def test_bound_bar_changes_when_the_bound_is_broken():
    kept, broken = charts.bound_bar("KL", 5.4, 8.0), charts.bound_bar("KL", 9.0, 8.0)
    assert all_of(parse(kept), "rect", **{"class": "role-candidate"})
    assert all_of(parse(broken), "rect", **{"class": "fail"})
    assert "5.4 of at most 8" in words(parse(kept))


def test_curve_panel_shows_raw_and_smoothed_and_the_last_value():
    train = [(float(i), 2.0 - i / 100 + 0.1 * (-1) ** i) for i in range(100)]
    panel = Panel(
        "Loss",
        [Series("train", train), Series("held out", [(0, 2.1), (50, 1.6), (99, 1.25)], "sft", True)],
        references=[Reference(1.5, "target"), Reference(900.0, "far away")],
    )
    root = parse(curves.curve_panel(panel))
    assert len(all_of(root, "path", **{"class": "raw"})) == 1
    assert len(all_of(root, "path", **{"class": "line"})) == 3
    assert len(all_of(root, "circle")) == 3
    assert "held out 1.25" in words(root) and "target" in words(root) and "far away" not in words(root)
    assert '"label":"train"' in root.get("data-series")


@pytest.mark.parametrize(
    "points",
    [
        [],
        [(1.0, 5.0)],
        [(1.0, math.nan)],
        [(0, 1e308), (1, 1e308)],
        [(3.0, 0.0), (3.0, 0.0)],
        [(i, 0.0) for i in range(40)],
    ],
)
def test_curve_panel_survives_odd_series(points):
    root = parse(curves.curve_panel(Panel(EVIL, [Series(EVIL, points)])))
    assert all_of(root, "script") == []
    finite = any(math.isfinite(y) for _, y in points)
    assert ("alert" in root.get("data-series")) if finite else root.get("data-series") is None
    drawn = [float(number) for line in all_of(root, "path") for number in re.findall(r"-?[\d.]+", line.get("d"))]
    assert all(math.isfinite(number) and abs(number) < 1e5 for number in drawn)


def test_a_single_spike_does_not_flatten_the_curve():
    points = [(float(i), 1.0 + i / 1000) for i in range(200)]
    points[100] = (100.0, 5000.0)
    root = parse(curves.curve_panel(Panel("Norm", [Series("norm", points)])))
    import json

    assert json.loads(root.get("data-series"))["y"][1] < 3000


def stage(name, start, seconds, **more):
    minute, second = divmod(start, 60)
    return StageRecord(
        stage=name,
        status=more.pop("status", "done"),
        started=f"2026-11-22T09:{minute:02d}:{second:02d}+00:00",
        seconds=seconds,
        **more,
    )


def test_timeline_places_stages_by_their_start():
    records = [
        stage("ingest", 0, 10.0),
        stage("sft", 10, 90.0, peak_memory_bytes=2_900_000_000),
        stage("reward", 5, 1.0, reused_from="other"),
        stage("ppo", 100, 20.0, status="failed"),
    ]
    root = parse(diagrams.timeline(records))
    spans = all_of(root, "rect", **{"class": "span"})
    starts, widths = [at(s, "x") for s in spans], [at(s, "width") for s in spans]
    assert starts[0] < starts[1] < starts[3]
    assert widths[1] / widths[0] == pytest.approx(9, rel=0.02)
    assert "1 min 30 s · 2.9 GB" in words(root) and "reused" in words(root)
    assert "fail" in spans[3].get("class")


def test_timeline_without_stages_or_times():
    assert all_of(parse(diagrams.timeline([])), "rect", **{"class": "span"}) == []
    root = parse(diagrams.timeline([StageRecord(stage="x", status="running", started="not a time")]))
    (span,) = all_of(root, "rect", **{"class": "span"})
    assert math.isfinite(at(span, "x")) and at(span, "width") >= 0 and "x" in words(root)


def test_lineage_runs_from_left_to_right():
    nodes = [
        LineageNode(n, k, n * 64) for n, k in (("e", "evaluation"), ("m", "model"), ("d", "dataset"), ("p", "model"))
    ]
    graph = Lineage(nodes, [("d", "m"), ("m", "p"), ("d", "p"), ("p", "e"), ("ghost", "e")])
    root = parse(diagrams.lineage_graph(graph))
    boxes = dict(zip([n.name for n in nodes], [float(r.get("x")) for r in all_of(root, "rect")], strict=True))
    assert boxes["d"] < boxes["m"] < boxes["p"] < boxes["e"]
    assert len(all_of(root, "path")) == 4
    assert "dddddddd" in words(root)


def test_lineage_with_a_cycle_or_nothing_ends():
    nodes = [LineageNode("a", "model", ""), LineageNode("b", "model", "")]
    assert len(all_of(parse(diagrams.lineage_graph(Lineage(nodes, [("a", "b"), ("b", "a")]))), "rect")) == 2
    assert all_of(parse(diagrams.lineage_graph(Lineage([], []))), "rect") == []
