"""The gate on real public sets, against figures computed here by other means.

The sets are not part of the repository: their folder is `TUNEGATE_SHARED_DATA` or `../shared/data`.
"""

import csv
import gzip
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from data_helpers import assert_nothing_is_lost, codes, quarantined, run_gate

from tunegate.data import DataSpec, ingest, read_records
from tunegate.data.checks.base import wilson
from tunegate.data.checks.toxicity import packaged_head
from tunegate.observer import NullObserver

REAL = Path(os.environ.get("TUNEGATE_SHARED_DATA", Path(__file__).parents[3].parent / "shared" / "data"))
pytestmark = pytest.mark.skipif(
    not REAL.is_dir(), reason=f"the real sets are not here ({REAL}); set TUNEGATE_SHARED_DATA to their folder"
)


def uri(name: str) -> str:
    return str(REAL / name)


def hh(name: str) -> list[dict[str, str]]:
    with gzip.open(uri(f"hh-rlhf/{name}-base.test.jsonl.gz"), "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def parts(transcript: str) -> tuple[str, str]:
    context, answer = transcript.rsplit("\n\nAssistant:", 1)
    return context, answer.strip()


def longer(rows: list[dict[str, str]]) -> tuple[int, int]:
    lengths = [(len(parts(row["chosen"])[1]), len(parts(row["rejected"])[1])) for row in rows]
    return sum(a > b for a, b in lengths), sum(a != b for a, b in lengths)


@pytest.fixture(scope="module")
def hh_gate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("hh")
    spec = {
        "preferences": [
            {"uri": uri(f"hh-rlhf/{name}-base.test.jsonl.gz"), "name": name} for name in ("helpful", "harmless")
        ],
        "evaluation": [
            {"uri": uri("xstest/xstest_prompts.csv"), "tag": "lookalike"},
            {"uri": uri("jailbreakbench/jailbreakbench.csv"), "fields": {"prompt": "Goal"}, "tag": "harmful"},
        ],
    }
    _, report = run_gate(folder, spec)
    return folder, report


def test_the_longer_answer_of_hh_is_preferred_as_often_as_is_known() -> None:
    """Known: helpful-base 60.0% [58.0, 62.0], harmless-base 44.5% [42.4, 46.5]."""
    for name, known in (("helpful", (0.600, 0.580, 0.620)), ("harmless", (0.445, 0.424, 0.465))):
        share = wilson(*longer(hh(name)))
        assert (share.estimate, share.low, share.high) == pytest.approx(known, abs=6e-4)


def test_the_gates_length_bias_is_that_of_the_pairs_with_one_context(hh_gate: tuple[Path, Any]) -> None:
    _, report = hh_gate
    for name in ("helpful", "harmless"):
        rows = [row for row in hh(name) if parts(row["chosen"])[0] == parts(row["rejected"])[0]]
        wins, n = longer(rows)
        share = report.check("length_bias").estimates[name]
        assert (round(share.estimate * share.n), share.n) == (wins, n)


def test_differing_contexts_and_identical_answers_of_hh_are_all_found(hh_gate: tuple[Path, Any]) -> None:
    folder, report = hh_gate
    refused = quarantined(folder / "raw")
    bad = [r for r in quarantined(folder / "quarantine") if r["kind"] == "preferences"]
    for name in ("helpful", "harmless"):
        rows = hh(name)
        differ = {i + 1 for i, row in enumerate(rows) if parts(row["chosen"])[0] != parts(row["rejected"])[0]}
        same = {
            i + 1
            for i, row in enumerate(rows)
            if parts(row["chosen"])[1].casefold() == parts(row["rejected"])[1].casefold()
        }
        assert {r["line"] for r in refused if r["source"] == name and codes([r]) == {"contexts_differ"}} == differ
        assert {r["line"] for r in bad if r["source"] == name and "same_answers" in codes([r])} == same
    assert report.verdict == "PROMOTE"
    assert_nothing_is_lost(folder, report)


def test_answers_that_look_alike_are_no_duplicates(hh_gate: tuple[Path, Any]) -> None:
    """A quarter of the transcripts share more than 0.7 of their words with their counterpart."""
    _, report = hh_gate
    alike = 0
    rows = hh("helpful") + hh("harmless")
    for row in rows:
        a, b = (set(row[side].split()) for side in ("chosen", "rejected"))
        alike += len(a & b) > 0.7 * len(a | b)
    assert alike / len(rows) > 0.2
    near = [e for e in report.check("near_duplicates").examples if e.kind == "preferences"]
    assert report.check("near_duplicates").flagged < 0.01 * report.check("near_duplicates").seen, near


def test_prompts_of_xstest_in_hh_are_found(hh_gate: tuple[Path, Any]) -> None:
    _, report = hh_gate
    with Path(uri("xstest/xstest_prompts.csv")).open(encoding="utf-8", newline="") as stream:
        prompts = {" ".join(row["prompt"].casefold().split()) for row in csv.DictReader(stream)}
    held = {
        row["chosen"]
        for name in ("helpful", "harmless")
        for row in hh(name)
        for turn in row["chosen"].split("\n\nHuman:")[1:]
        if " ".join(turn.split("\n\nAssistant:")[0].casefold().split()) in prompts
    }
    flagged = report.check("contamination").flagged
    assert flagged >= len(held) >= 1
    assert report.check("contamination").figures["evaluation_prompts"] == 550


def test_the_instruction_set_of_rasbt(tmp_path: Path) -> None:
    spec = {
        "sft": [uri("rasbt-instruct/instruction-data.json")],
        "preferences": [uri("rasbt-instruct/instruction-data-with-preference.json")],
    }
    _, report = run_gate(tmp_path, spec)
    rows = json.loads(Path(uri("rasbt-instruct/instruction-data-with-preference.json")).read_text())
    same = sum(" ".join(r["chosen"].casefold().split()) == " ".join(r["rejected"].casefold().split()) for r in rows)
    assert report.check("preferences").codes == {"same_answers": same}
    assert report.rows["sft"].clean == 1100 and report.verdict == "PROMOTE"
    assert_nothing_is_lost(tmp_path, report)


def test_the_human_scores_of_topical_chat(tmp_path: Path) -> None:
    fields = {"prompt": "source", "response": "system_output", "score": "scores.overall"}
    _, report = run_gate(
        tmp_path, {"ratings": [{"uri": uri("unieval-human-scores/topical_chat.json"), "fields": fields}]}
    )
    ratings = read_records(tmp_path / "raw", "ratings")
    rows = json.loads(Path(uri("unieval-human-scores/topical_chat.json")).read_text())
    assert [r.score for r in ratings] == [row["scores"]["overall"] for row in rows] and len(rows) == 360
    assert report.verdict == "PROMOTE"


def test_the_other_sets_can_be_read(tmp_path: Path) -> None:
    spec = DataSpec.model_validate(
        {
            "sft": [
                {
                    "uri": uri("self-instruct/seed_tasks.jsonl"),
                    "fields": {"input": "instances.0.input", "output": "instances.0.output"},
                }
            ],
            "prompts": [uri("openai-moderation/samples-1680.jsonl.gz")],
            "evaluation": [
                {"uri": uri("bbq/*.jsonl"), "name": "bbq", "fields": {"instruction": "context", "input": "question"}},
                {"uri": uri("advbench/advbench.csv"), "fields": {"prompt": "goal"}, "tag": "harmful"},
            ],
        }
    )
    summary = ingest(spec, tmp_path, base_dir=tmp_path, seed=0, observer=NullObserver())
    assert {s.name: s.rows_read for s in summary.sources} == {
        "seed_tasks": 175, "samples-1680": 1680, "bbq": 4880, "advbench": 520,
    }  # fmt: skip
    assert summary.quarantined == 0
    assert Counter(p.tag for p in read_records(tmp_path, "evaluation")) == {"everyday": 4880, "harmful": 520}


def test_the_toxicity_head_tells_hh_answers_apart_a_little() -> None:
    head = packaged_head()
    rows = hh("harmless")[:800]
    chosen, rejected = ([head.probability(parts(row[side])[1]) for row in rows] for side in ("chosen", "rejected"))
    assert sum(p >= 0.8 for p in chosen) <= sum(p >= 0.8 for p in rejected) <= 0.03 * len(rows)
