"""The gate as a whole: verdicts, the page, languages, toxicity, foreign datasets."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import codes, jsonl, quarantined, rows_of, run_gate, run_ingest

from tunegate.data import DataSpec, IngestSummary, validate
from tunegate.data.checks.toxicity import BUCKETS, packaged_head, word_buckets
from tunegate.data.records import KINDS
from tunegate.data.tables import arrow_schema
from tunegate.errors import DataError
from tunegate.observer import NullObserver, RecordingObserver


def answers(n: int) -> list[dict[str, Any]]:
    topics = ("tides", "bread", "glaciers", "violins", "bees", "bridges", "ink", "salt", "kites", "maps")
    return [
        {
            "prompt": f"Tell me fact {i} about {topics[i % 10]}.",
            "response": f"{topics[i % 10].title()}: fact no. {i * i}.",
        }
        for i in range(n)
    ]


LOOSE = {"near_duplicates": {"enabled": False}}


def test_too_many_quarantined_rows_make_the_dataset_invalid(tmp_path: Path) -> None:
    rows = answers(20)
    for row in rows[:7]:
        row["response"] = ""
    (tmp_path / "s.jsonl").write_bytes(jsonl(rows))
    _, report = run_gate(tmp_path, {"sft": ["s.jsonl"], "checks": LOOSE})
    assert report.verdict == "INVALID"
    assert report.reasons == ["quarantine: 7 of 20 sft rows (35.0%) were quarantined, allowed are 30.0%"]
    _, report = run_gate(tmp_path, {"sft": ["s.jsonl"], "checks": LOOSE, "max_quarantine_fraction": 0.35})
    assert report.verdict == "PROMOTE" and report.check("structure").verdict == "flagged"


def test_a_minimum_of_rows_can_be_asked_for(tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_bytes(jsonl(answers(20)))
    spec = {"sft": ["s.jsonl"], "checks": LOOSE | {"enough": {"min_rows": {"sft": 21, "preferences": 1}}}}
    _, report = run_gate(tmp_path, spec)
    assert report.reasons == [
        "enough: 20 sft rows are left, at least 21 are wanted",
        "enough: 0 preferences rows are left, at least 1 are wanted",
    ]


def test_a_disabled_check_does_not_run(tmp_path: Path) -> None:
    rows = answers(5)
    rows[0]["response"] = ""
    (tmp_path / "s.jsonl").write_bytes(jsonl(rows))
    _, report = run_gate(tmp_path, {"sft": ["s.jsonl"], "checks": LOOSE | {"structure": {"enabled": False}}})
    assert "structure" not in {check.check for check in report.checks}
    assert report.rows["sft"].clean == 5


def test_the_summary_of_the_clean_dataset_counts_the_clean_rows(tmp_path: Path) -> None:
    rows = answers(20)
    rows[3]["response"] = " "
    (tmp_path / "s.jsonl").write_bytes(jsonl(rows))
    clean, _ = run_gate(tmp_path, {"sft": ["s.jsonl"], "checks": LOOSE})
    summary = IngestSummary.model_validate_json((clean / "summary.json").read_text())
    assert summary.rows["sft"].total == 19 and summary.sources[0].records.total == 20


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else_and_shows_no_markup_of_the_data(tmp_path: Path) -> None:
    rows = [*answers(30), {"id": "<script>alert(1)</script>", "prompt": "<b>bold</b>", "response": ""}]
    (tmp_path / "s.jsonl").write_bytes(jsonl(rows))
    (tmp_path / "p.jsonl").write_bytes(
        jsonl({"prompt": f"q{i}?", "chosen": f"long answer {i}", "rejected": f"no {i}"} for i in range(60))
    )
    (tmp_path / "r.jsonl").write_bytes(
        jsonl({"prompt": f"q{i}?", "response": f"answer {i}", "score": 1 + i / 20} for i in range(60))
    )
    run_gate(tmp_path, {"sft": ["s.jsonl"], "preferences": ["p.jsonl"], "ratings": ["r.jsonl"], "checks": LOOSE})
    text = (tmp_path / "report.html").read_text()
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert all(link.startswith("#") for link in page.links)
    assert "script" not in page.tags and "<b>" not in text and "&lt;script&gt;" in text
    assert "svg" in page.tags and "INVALID" in text
    assert len(text) < 200_000


def test_languages_are_reported_and_can_be_restricted(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": "What is the weather usually like in the autumn?",
            "response": "It is often windy and the days grow shorter.",
        },
        {
            "prompt": "Wie ist das Wetter im Herbst normalerweise so?",
            "response": "Oft ist es windig, und die Tage werden kürzer.",
        },
        {"prompt": "Hm?", "response": "Ja."},
    ]
    (tmp_path / "s.jsonl").write_bytes(jsonl(rows))
    _, report = run_gate(tmp_path, {"sft": ["s.jsonl"]})
    histogram = report.check("language").histograms["language"]
    assert set(histogram.labels) == {"en", "de"} and report.check("language").flagged == 0
    spec = {"sft": ["s.jsonl"], "checks": {"language": {"allowed": ["en"]}}, "max_quarantine_fraction": 1.0}
    _, report = run_gate(tmp_path, spec)
    bad = [r for r in quarantined(tmp_path / "quarantine") if r["kind"] == "sft"]
    assert [r["line"] for r in bad] == [2] and codes(bad) == {"language"}


def test_the_toxicity_head_is_as_good_as_it_says_and_the_check_reports(tmp_path: Path) -> None:
    head = packaged_head()
    assert head.figures["AUC, cross-validated"] > 0.85
    assert head.figures["alarms on them at 0.8, with them"] == 0
    assert head.weights.shape == head.idf.shape == (BUCKETS,)
    assert head.probability("") == 0.0 == head.probability("12345 !!!")
    nasty, nice = (
        "you are all worthless scum and i will kill you, you fucking bitch",
        "the bread should rest for an hour",
    )
    assert head.probability(nasty) > 0.8 > 0.5 > head.probability(nice)
    rows = [{"prompt": "Say something.", "response": nasty}, {"prompt": "How long does bread rest?", "response": nice}]
    (tmp_path / "s.jsonl").write_bytes(jsonl(rows))
    _, report = run_gate(tmp_path, {"sft": ["s.jsonl"]})
    check = report.check("toxicity")
    assert (check.action, check.flagged, check.seen) == ("report", 1, 2) and report.rows["sft"].clean == 2
    spec = {"sft": ["s.jsonl"], "checks": {"toxicity": {"action": "quarantine"}}, "max_quarantine_fraction": 1.0}
    _, report = run_gate(tmp_path, spec)
    assert report.rows["sft"].clean == 1


def test_the_toxicity_score_against_scikit_learn() -> None:
    import math

    import numpy as np

    head = packaged_head()
    text = "the cat and the dog and the bird"
    counts = np.zeros(BUCKETS)
    for bucket, n in word_buckets(text).items():
        counts[bucket] = n
    values = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0) * head.idf
    expected = 1 / (1 + math.exp(-float(values / np.linalg.norm(values) @ head.weights + head.bias)))
    assert head.probability(text) == pytest.approx(expected)


def _foreign(folder: Path, **columns: Any) -> Path:
    """A dataset that `ingest` did not write, with one SFT row that has these columns."""
    folder.mkdir()
    common = {"source": "s", "split": "train", "repeats": 1}
    rows = [
        {"id": str(n), "messages": [{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": answer}]}
        | common
        for n, answer in enumerate(("Yes.", "No, thank you."))
    ]
    rows[0] |= columns
    for kind in KINDS:
        schema = arrow_schema(kind)
        table = pa.Table.from_pylist(rows if kind == "sft" else [], schema=schema)
        pq.write_table(table, folder / f"{kind}.parquet")
    return folder


@pytest.mark.parametrize(
    ("columns", "code"),
    [
        ({"id": None}, "missing_field"),
        ({"messages": None}, "missing_field"),
        ({"messages": []}, "missing_field"),
        ({"messages": [None]}, "missing_field"),
        ({"messages": [{"role": "user", "content": None}]}, "missing_field"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "unknown_role"),
        ({"split": "test"}, "unknown_split"),
        ({"split": None}, "unknown_split"),
        ({"repeats": 0}, "bad_repeats"),
    ],
)
def test_fields_of_a_foreign_dataset_are_checked(columns: dict[str, Any], code: str, tmp_path: Path) -> None:
    dataset = _foreign(tmp_path / "raw", **columns)
    report = _validate(dataset, tmp_path)
    assert report.check("fields").codes.keys() == {code}
    assert report.rows["sft"].quarantined == 1 and len(rows_of(tmp_path / "clean", "sft")) == 1
    assert "fields: 1 of 2 rows (50.0%) are flagged, allowed are 5.0%" in report.reasons


def _validate(dataset: Path, folder: Path, observer: Any = None) -> Any:
    return validate(dataset, DataSpec(max_quarantine_fraction=1.0), tokenizer=None, clean=folder / "clean",
                    quarantine=folder / "quarantine", report=folder / "report.html", seed=1,
                    observer=observer or NullObserver())  # fmt: skip


def test_what_is_no_dataset_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no sft\.parquet"):
        _validate(tmp_path, tmp_path)
    dataset = _foreign(tmp_path / "raw")
    pq.write_table(pa.table({"id": ["x"]}), dataset / "sft.parquet")
    with pytest.raises(DataError, match="columns are missing: file, line, messages"):
        _validate(dataset, tmp_path)
    schema = arrow_schema("sft")
    for column, kind in (("repeats", pa.string()), ("topic", pa.bool_()), ("messages", pa.list_(pa.string()))):
        changed = schema.set(schema.get_field_index(column), pa.field(column, kind))
        pq.write_table(changed.empty_table(), dataset / "sft.parquet")
        with pytest.raises(DataError, match=f"wrong type: {column} is "):
            _validate(dataset, tmp_path)
    wide = pa.list_(pa.field("element", pa.struct([("role", pa.large_string()), ("content", pa.large_string())])))
    pq.write_table(schema.set(1, pa.field("messages", wide)).empty_table(), dataset / "sft.parquet")
    assert _validate(dataset, tmp_path / "wide").rows["sft"].rows_in == 0
    (dataset / "sft.parquet").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="not Parquet"):
        _validate(dataset, tmp_path)


def test_an_empty_dataset_is_valid_and_empty(tmp_path: Path) -> None:
    dataset = _foreign(tmp_path / "raw")
    pq.write_table(pa.Table.from_pylist([], schema=arrow_schema("sft")), dataset / "sft.parquet")
    report = _validate(dataset, tmp_path)
    assert report.verdict == "PROMOTE" and all(rows.rows_in == 0 for rows in report.rows.values())


def test_progress_is_told_and_nothing_is_left_behind(tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_bytes(jsonl(answers(30)))
    raw, _ = run_ingest(tmp_path, {"sft": ["s.jsonl"]})
    observer = RecordingObserver()
    _validate(raw, tmp_path, observer)
    assert observer.last_progress == (60, 60, "row", "validate")
    assert [p.name for p in (tmp_path / "quarantine").iterdir()] == ["quarantine.parquet"]
    assert sorted(p.name for p in (tmp_path / "clean").iterdir()) == [
        "evaluation.parquet", "preferences.parquet", "prompts.parquet", "ratings.parquet", "sft.parquet",
        "summary.json", "validation.json",
    ]  # fmt: skip


def test_the_quarantined_row_can_be_read_again(tmp_path: Path) -> None:
    rows = answers(5)
    rows[2] |= {"response": "", "topic": "sea"}
    (tmp_path / "s.jsonl").write_bytes(jsonl(rows))
    run_gate(tmp_path, {"sft": ["s.jsonl"], "checks": LOOSE})
    (bad,) = quarantined(tmp_path / "quarantine")
    row = json.loads(bad["row"])
    assert row["messages"][0]["content"] == rows[2]["prompt"] and row["topic"] == "sea"
    assert (bad["file"], bad["line"], bad["source"]) == ("s.jsonl", 3, "s")
    assert bad["reasons"] == [
        {"check": "structure", "code": "empty_content", "detail": "messages[1] (assistant) is empty"}
    ]
