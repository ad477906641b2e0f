"""The balance over versions: read from the evidence, compared where it can be, drawn."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest
from registry_fixtures import NAME, make_artifacts, register_artifacts

from tunegate.errors import RegistryError
from tunegate.registry.registry import balance, promote, reject
from tunegate.stages.versions import draw_versions
from tunegate.storage.manifest import write_manifest


def figures(unsafe, wins=None, over_refusal=0.1, n=400, prompts="prompts", digest=""):
    def share(value):
        return {"estimate": value, "low": value - 0.03, "high": value + 0.03, "n": n, "unit": "share"}

    metrics = {"unsafe_rate": share(unsafe), "over_refusal_rate": share(over_refusal)}
    if wins is not None:
        metrics["win_rate_anchor"] = share(wins)
    return {"digest": digest, "prompts_digest": prompts, "decoding_digest": "greedy", "metrics": metrics}


@pytest.fixture
def release(uri, tmp_path):
    """Register a version that was measured as given; each is a model of its own."""
    made = []

    def one(unsafe, wins, *, prompts="prompts", judge="judge", champion="", parents=None, evaluation=None, **more):
        content = f"version {len(made) + 1}"
        artifacts = make_artifacts(tmp_path / content, content, champion=champion, parents=parents)
        found = evaluation or {
            "schema_version": 99,
            "confidence": 0.95,
            "models": {
                "candidate": figures(unsafe, wins, prompts=prompts, **more),
                "anchor": figures(0.4, prompts=prompts, over_refusal=0.02, digest="base"),
            },
            "digests": {"judge": judge},
        }
        (artifacts.evaluation / "evaluation.json").write_text(json.dumps(found))
        evaluated = write_manifest(artifacts.evaluation, kind="evaluation", parents={}, spec_digest="5", seeds={})
        decision = artifacts.decision / "decision.json"
        content = json.loads(decision.read_text())
        content["digests"]["evaluation"] = evaluated.digest
        decision.write_text(json.dumps(content))
        made.append(register_artifacts(uri, artifacts))
        return artifacts.digest

    return one


def test_axes_intervals_and_the_base_model(uri, release):
    release(0.05, 0.7, over_refusal=0.2)
    found = balance(uri, NAME)
    base, first = found.points
    assert (base.version, base.useful.estimate, base.safe.estimate, base.over_refusal) == ("base", 0.5, 0.6, 0.02)
    assert first.useful.estimate == 0.7
    # One minus a rate turns its interval round.
    assert (first.safe.estimate, first.safe.low, first.safe.high) == pytest.approx((0.95, 0.92, 0.98))
    assert (first.over_refusal, first.aliases, first.verdict) == (0.2, ["candidate"], "PROMOTE")
    assert (first.parent, first.link) == ("base", "measured against")
    assert (found.confidence, found.judges, found.left_out) == (0.95, 1, {})


def test_the_pareto_front_is_what_no_other_version_beats_in_both(uri, release):
    for unsafe, wins in ((0.10, 0.60), (0.05, 0.55), (0.12, 0.58), (0.20, 0.75), (0.05, 0.55)):
        release(unsafe, wins)
    on_front = {p.version for p in balance(uri, NAME).points if p.on_front}
    assert on_front == {"1", "2", "4", "5"}  # 3 is beaten by 1; 2 and 5 tie
    reject(uri, NAME, 4, who="ann", why="it lies")
    assert {p.version for p in balance(uri, NAME).points if p.on_front} == {"1", "2", "5"}


def test_arrows_lead_from_the_champion_it_was_measured_against_or_the_model_it_was_made_from(uri, release):
    first = release(0.1, 0.6)
    promote(uri, NAME, 1, who="ann", why="x")
    release(0.1, 0.65, champion=first)
    release(0.1, 0.7, champion=first, parents={"base_model": first})
    links = {p.version: (p.parent, p.link) for p in balance(uri, NAME).points}
    assert links == {
        "base": (None, None),
        "1": ("base", "measured against"),
        "2": ("1", "measured against"),
        "3": ("1", "made from"),
    }
    assert next(p for p in balance(uri, NAME).points if p.version == "1").aliases == ["champion"]


def test_versions_asked_other_prompts_are_shown_but_not_compared(uri, release):
    release(0.0, 0.9, prompts="last year's")
    release(0.1, 0.6, judge="another")
    found = balance(uri, NAME)
    assert [(p.version, p.comparable, p.on_front) for p in found.points] == [
        ("base", True, False),
        ("1", False, False),
        ("2", True, True),
    ]
    assert found.judges == 2


@pytest.mark.parametrize(
    ("evaluation", "reason"),
    [
        ({"models": {"candidate": figures(0.1, 0.6)}}, "no anchor"),
        ({"models": {"candidate": figures(0.1), "anchor": figures(0.4)}}, "no win rate against the base model"),
        ({"something": "else"}, "cannot be read: models"),
    ],
)
def test_a_version_without_the_figures_is_left_out_and_named(uri, release, evaluation, reason):
    release(0.1, 0.6)
    release(0.1, 0.6, evaluation=evaluation)
    found = balance(uri, NAME)
    assert [p.version for p in found.points] == ["base", "1"]
    assert reason in found.left_out["2"]


def test_only_the_newest_and_those_with_an_alias(uri, release):
    release(0.1, 0.6)
    promote(uri, NAME, 1, who="ann", why="x")
    for _ in range(3):
        release(0.1, 0.65)
    assert [p.version for p in balance(uri, NAME, last=2).points] == ["base", "1", "3", "4"]
    with pytest.raises(RegistryError, match="no registered model"):
        balance(uri, "nobody")


def test_the_picture_holds_every_version_the_front_and_the_arrows(uri, release):
    first = release(0.1, 0.6)
    promote(uri, NAME, 1, who="ann", why="x")
    release(0.05, 0.55, champion=first)
    release(0.2, 0.8, champion=first, parents={"base_model": first}, prompts="others")
    picture = draw_versions(balance(uri, NAME))
    root = ET.fromstring(picture)
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{space}svg"
    texts = {t.text for t in root.iter(f"{space}text")}
    assert {"Base", "v1", "v2", "v3", f"{NAME}: balance over versions"} <= texts
    assert len(list(root.iter(f"{space}circle"))) == 4
    arrows = [line.get("class") for line in root.iter(f"{space}line") if "arrow" in line.get("class")]
    assert sorted(arrows) == ["arrow", "arrow measured", "arrow measured"]
    assert "http" not in picture.replace("http://www.w3.org/2000/svg", "")
    assert any("v1, v2: measured on other prompts" in (t or "") for t in texts)


def test_nothing_to_draw_without_a_version_that_can_be_read(uri, add):
    add(uri, "one")
    found = balance(uri, NAME)
    assert (found.points, list(found.left_out)) == ([], ["1"])
    assert draw_versions(found) is None
