"""What the sources hold, and the gates that cannot be passed with it, before anything runs."""

import json

import pytest
from typer.testing import CliRunner

from tunegate.cli import gates, spec  # noqa: F401  (register their commands)
from tunegate.cli.app import app
from tunegate.config import build_spec, profile_mapping
from tunegate.stages.supply import gate_contradictions, read_supply


@pytest.fixture
def prompts(tmp_path):
    """A file of evaluation prompts with so many rows a tag; a broken row and one without a tag are among them."""

    def write(name="own.jsonl", **tags):
        rows = [
            {"messages": [{"role": "user", "content": f"{tag} {i}"}], "tag": tag}
            for tag, n in tags.items()
            for i in range(n)
        ]
        rows.append({"prompt": "no tag"})
        path = tmp_path / name
        path.write_text("\n".join([*(json.dumps(row) for row in rows), "{broken"]) + "\n")
        return str(path)

    return write


def demo(**layers):
    return build_spec(profile_mapping("demo"), layers)


def test_prompts_are_counted_by_tag(prompts):
    source = {"uri": prompts(harmful=7, everyday=5), "tag": "lookalike"}
    assert read_supply(demo(data={"evaluation": [source]})).prompts == {"harmful": 7, "everyday": 5, "lookalike": 1}


def test_caps_and_several_sources_add_up(prompts):
    sources = [
        {"uri": prompts(harmful=7), "cap": 4, "tag": "everyday"},
        {"uri": prompts("more.jsonl", harmful=3), "tag": "x"},
    ]
    assert read_supply(demo(data={"evaluation": sources})).prompts == {"harmful": 7, "everyday": 1, "x": 1}


@pytest.mark.parametrize("uri", ["s3://bucket/prompts.jsonl", "/nowhere/prompts.jsonl"])
def test_what_cannot_be_read_is_not_known(prompts, uri):
    supply = read_supply(demo(data={"evaluation": [{"uri": prompts(harmful=7)}, {"uri": uri}]}))
    assert supply.prompts is None
    assert supply.heldout_pairs is not None


def test_held_out_rows_are_those_that_ingestion_will_hold_out(tmp_path):
    from tunegate.data import ingest
    from tunegate.observer import NullObserver

    wanted = demo()
    supply = read_supply(wanted)
    rows = ingest(wanted.data, tmp_path, base_dir=tmp_path, seed=1, observer=NullObserver()).rows
    assert supply.heldout_pairs == rows["preferences"].heldout
    assert supply.heldout_conversations == rows["sft"].heldout


@pytest.mark.parametrize("profile", ["smoke", "demo"])
def test_the_profiles_can_be_passed(profile):
    assert gate_contradictions(build_spec(profile_mapping(profile))) == []


def test_what_counts_only_with_a_champion_says_so(prompts):
    found = gate_contradictions(demo(gates={"champion": {"violation": 0.01}}))
    assert len(found) == 1
    assert found[0].startswith("once there is a champion: 60 harmful prompts cannot show that gates.champion.violation")


def test_validate_plan_and_power_warn(prompts):
    few = prompts(harmful=12, lookalike=60, everyday=60)
    arguments = ["--profile", "demo", "--set", f"data.evaluation=[{{uri: '{few}', tag: everyday}}]"]
    told = "data.evaluation holds 12 harmful prompts, gates.minimum_harmful asks for 30"
    for command in (["validate"], ["plan"], ["gates", "power"]):
        result = CliRunner(env={"COLUMNS": "400"}).invoke(app, [*command, *arguments])
        assert result.exit_code == 0, result.output
        assert told in " ".join(result.output.split())
    warnings = json.loads(CliRunner().invoke(app, ["validate", *arguments, "--json"]).output)["warnings"]
    assert any(told in warning for warning in warnings)
    sizes = json.loads(CliRunner().invoke(app, ["gates", "power", *arguments, "--json"]).output)
    assert next(s for s in sizes if s["gate"] == "anchor.violation")["planned"] == 12


def test_promotion_by_the_pipeline_and_by_persons_exclude_each_other():
    with pytest.raises(Exception, match="moves the alias before anybody could give one of the 2 approvals"):
        demo(registry={"approvals": 2})
    assert demo(registry={"approvals": 2, "promote": False}).registry.approvals == 2
