from __future__ import annotations

import yaml
from registry_fixtures import NAME

from tunegate.registry.description import describe
from tunegate.registry.evidence import DecisionFacts
from tunegate.registry.model_card import model_card

FACTS = {
    "name": NAME,
    "run_id": "run-1",
    "base_model": "org/base",
    "base_license": "apache-2.0",
    "license": "apache-2.0",
    "language": "en",
    "verdict": "HOLD",
    "reasons": ["the interval of the violation rate straddles its limit"],
    "confidence": 0.95,
    "data": [{"name": "starter", "source": "s3://b/x", "records": 240, "license": "CC0-1.0", "digest": "ab12"}],
    "training": [
        {"stage": "SFT", "method": "lora", "settings": {"learning_rate": 1e-4}, "figures": {"heldout_nll": 2.123456}}
    ],
    "evaluation": [
        {
            "name": "violation rate",
            "estimate": 0.02,
            "low": 0.004,
            "high": 0.071,
            "n": 100,
            "limit": 0.05,
            "verdict": "HOLD",
            "reason": "a|b\nc",
        },
        {"name": "win rate", "estimate": 0.75, "low": 0.66, "high": None, "n": 150, "verdict": "PROMOTE"},
    ],
    "limits": ["English only."],
    "lineage": {"dataset": "d" * 64},
}


def _rows(card: str, heading: str) -> list[list[str]]:
    section = card.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").replace("\\|", "¦").split("|")] for line in lines]


def test_the_header_is_what_the_hub_reads():
    _, header, _ = model_card(FACTS).split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "transformers",
        "license": "apache-2.0",
        "language": "en",
        "base_model": "org/base",
        "pipeline_tag": "text-generation",
        "tags": ["tunegate", "sft", "ppo"],
    }


def test_every_measure_has_its_interval_and_verdict():
    assert _rows(model_card(FACTS), "Evaluation") == [
        ["violation rate", "0.02", "0.004 to 0.071", "100", "0.05", "HOLD", "a¦b c"],
        ["win rate", "0.75", "0.66 to ∞", "150", "–", "PROMOTE", "–"],
    ]
    assert "95% confidence" in model_card(FACTS)


def test_data_training_lineage_and_limits_are_told():
    card = model_card(FACTS)
    assert _rows(card, "Data") == [["starter", "s3://b/x", "240", "CC0-1.0", "ab12", "–"]]
    assert _rows(card, "Training") == [["`learning_rate`", "0.0001"], ["`heldout_nll`", "2.123"]]
    assert _rows(card, "Lineage") == [["dataset", f"`{'d' * 64}`"]]
    assert "- English only." in card
    assert "Verdict: **HOLD**\n\n- the interval of the violation rate straddles its limit" in card
    assert f"models:/{NAME}@champion" in card


def test_figures_are_written_in_their_unit_and_what_has_no_gate_is_there_too():
    gate = {"name": "violations", "estimate": 0.02, "low": 0.004, "high": 0.071, "limit": 0.05, "unit": "share", "n": 9}
    nll = {"name": "likelihood", "estimate": 2.31, "low": "-Infinity", "high": "Infinity", "unit": "nats", "n": 1}
    card = model_card({**FACTS, "evaluation": [gate], "measures": [gate, nll]})
    assert _rows(card, "Evaluation")[0][:5] == ["violations", "2.0%", "0.4% to 7.1%", "9", "5.0%"]
    rest = card.split("### Everything that was measured\n")[1]
    assert "| violations | 2.0% | 0.4% to 7.1% | 9 |" in rest
    assert "| likelihood | 2.31 | −∞ to ∞ | 1 |" in rest


def test_a_pages_description_has_one_line_a_gate_with_a_figure():
    gates = [
        {"name": "a", "title": "Violations\n direct", "verdict": "PROMOTE", "estimate": 0.02, "low": 0.01, "high": 0.04}
        | {"unit": "share", "limit": 0.1, "n": 400},
        {"name": "b", "title": "Likelihood", "verdict": "HOLD", "estimate": 0.1234, "low": "-Infinity", "unit": "nats"},
        {"name": "comparable", "verdict": "PROMOTE"},
    ]
    facts = DecisionFacts(schema_version=1, gates_version=2, verdict="HOLD", reasons=["r"] * 20, gates=gates)
    text = describe(facts, "# Card\n", experiment_id="7", model_id="m-1", report_run_id="abc")
    assert "\n- ✓ Violations direct: 2.0% [1.0%, 4.0%], limit 10.0%, n = 400\n" in text
    assert "\n- ‖ Likelihood: 0.123 [–, –], limit –\n" in text
    assert "comparable" not in text
    table = "# C\n\n## Data\n\n| Dataset | Records | Licence |\n|---|---|---|\n| own | 12 | – |\n| more | 3 | MIT |\n"
    listed = describe(facts, table, experiment_id="7", model_id="m-1", report_run_id=None)
    assert listed.endswith("\n\n### Data\n\n- own, records 12\n- more, records 3, licence MIT\n")
    assert text.count("- r\n") == 8
    assert "[balance over versions](#/experiments/7/runs/abc/artifacts/balance.svg)" in text
    assert "[files and evidence](#/experiments/7/models/m-1/artifacts)" in text


def test_what_is_not_known_is_said_where_it_matters():
    card = model_card({"name": NAME})
    assert "Unknown: no record of the training data" in card
    assert "None: this version was registered without an evaluation" in card
    assert "not stated" in card
    assert "## Training" not in card
    assert "\n\n\n" not in card
