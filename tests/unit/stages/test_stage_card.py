"""The model card of a run tells its data, training, evaluation with intervals, limits and licence."""

import json
from types import SimpleNamespace

import pytest

from tunegate.config import build_spec, profile_mapping
from tunegate.registry.model_card import model_card
from tunegate.stages.card import card_facts

SHARE = {"estimate": 0.08, "low": 0.05, "high": 0.12, "n": 400, "unit": "share"}
DECISION = {
    "created": "2026-11-22T09:00:00Z",
    "verdict": "HOLD",
    "reasons": ["HOLD: it straddles"],
    "gates": [
        {"name": "v", "title": "Violations", "verdict": "PROMOTE", "reason": "Violations: few.", "limit": 0.2, **SHARE},
        {
            "name": "w",
            "title": "Win rate",
            "verdict": "HOLD",
            "reason": "Win rate: it straddles.",
            "limit": 0.5,
            **SHARE,
        },
    ],
}
EVALUATION = {
    "judge": "training",
    "notes": ["the judge was lenient"],
    "hazards": [{"hazard": "self_harm", "unsafe": 1, "n": 12}],
    "models": {"candidate": {"metrics": {"nll": {"title": "Likelihood", "estimate": 2.1, "unit": "nats", "n": 50}}}},
}
INGEST = {
    "sources": [
        {"kind": "sft", "name": "own", "uri": "s3://bucket/own.jsonl", "records": {"train": 90, "heldout": 10}},
        {"kind": "sft", "name": "sft", "uri": "starter:sft.jsonl", "records": {"train": 200, "heldout": 40}},
    ]
}


@pytest.fixture
def card():
    def made(evaluation=EVALUATION, **spec):
        files = {"ingest.json": INGEST, "evaluation.json": evaluation}
        stages = [SimpleNamespace(stage="sft", figures={"heldout/nll_after": 1.8}), SimpleNamespace(stage="decide")]
        run = SimpleNamespace(
            run_id="run-1",
            read_file=lambda name: json.dumps(files[name]).encode() if name in files else None,
            stages=lambda: stages,
        )
        resolved = build_spec(profile_mapping("demo"), spec)
        context = SimpleNamespace(spec=resolved, run=run, lineage=lambda: {"sft.model": "d" * 64})
        return model_card(card_facts(context, DECISION))

    return made


def test_every_part_is_there(card):
    text = card()
    assert "| sft: own | s3://bucket/own.jsonl | 100 | – | – | 10 held out |" in text
    assert "| sft: sft | starter:sft.jsonl | 240 | apache-2.0 | – | 40 held out |" in text
    assert "### sft: full" in text
    assert f"| `learning_rate` | {profile_mapping('demo')['sft']['learning_rate']} |" in text
    assert "| `heldout/nll_after` | 1.8 |" in text
    assert "| Violations | 8.0% | 5.0% to 12.0% | 400 | 20.0% | PROMOTE |" in text
    assert "| Likelihood | 2.1 | – | 50 |" in text
    assert "- Not decided: Win rate (it straddles.)" in text
    assert "- Answers were compared by the reward model that PPO trained on" in text
    assert "- The judge was lenient." in text
    assert "self harm (12)" in text
    assert "This model: apache-2.0." in text
    assert "| sft.model | `" in text


def test_a_licence_of_ones_own_goes_before_the_base_models(card):
    text = card(registry={"license": "proprietary"})
    assert "This model: proprietary." in text
    assert "Base model `smollm2-135m-instruct`: apache-2.0." in text
    assert "\nlicense: proprietary\n" in text
    assert "not stated" in card(model={"source": "./own"})


def test_another_last_stage_is_told(card):
    text = card(last_stage="dpo")
    assert "by supervised fine-tuning and DPO." in text
    assert "\n- dpo\n" in text
    assert "a reward model and PPO" in card()


def test_a_run_without_an_evaluation_still_has_a_card(card):
    assert "## Limits" in card(evaluation={})
