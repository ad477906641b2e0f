import random
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from data_helpers import codes, jsonl, quarantined, run_gate, run_ingest

from tunegate.data.checks.base import batches
from tunegate.data.checks.duplicates import NearDuplicates, Repeated, banding
from tunegate.data.checks.shingles import jaccard, shingle_hashes, shingle_set
from tunegate.data.config import CheckSpec, NearDuplicatesCheck

WORDS = [
    f"{a}{b}{c}" for a in ("ka", "lo", "mi", "ru", "te") for b in ("n", "s", "", "r") for c in ("a", "en", "o", "ik")
]


def text(generator: random.Random, n: int) -> str:
    return " ".join(generator.choices(WORDS, k=n))


def edited(generator: random.Random, original: str, share: float) -> str:
    words = original.split()
    for position in generator.sample(range(len(words)), round(share * len(words))):
        words[position] = generator.choice(WORDS)
    return " ".join(words)


@cache
def naive_shingles(value: str) -> set[str]:
    value = value.ljust(5)
    return {value[i : i + 5] for i in range(len(value) - 4)}


def naive_jaccard(a: str, b: str) -> float:
    one, two = naive_shingles(a), naive_shingles(b)
    return len(one & two) / len(one | two)


def corpus(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Preference rows of which some are edited copies of earlier ones, in the prompt, the answers, or both."""
    generator = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for number in range(n):
        row = {"prompt": text(generator, 12), "chosen": text(generator, 30), "rejected": text(generator, 25)}
        if rows and generator.random() < 0.5:
            copied = generator.choice(rows)
            everything = ("prompt", "chosen", "rejected")
            for field in generator.choice([("prompt",), ("chosen", "rejected"), everything, everything]):
                row[field] = edited(generator, copied[field], generator.choice([0.0, 0.0, 0.03, 0.06, 0.2]))
        rows.append(row | {"id": str(number)})
    return rows


def brute_force(rows: list[dict[str, Any]], threshold: float) -> set[int]:
    fields = ("prompt", "chosen", "rejected")
    return {
        later
        for earlier, later in combinations(range(len(rows)), 2)
        if all(naive_jaccard(rows[earlier][f], rows[later][f]) >= threshold for f in fields)
    }


def test_recall_and_precision_against_brute_force(tmp_path: Path) -> None:
    rows = corpus(500)
    (tmp_path / "p.jsonl").write_bytes(jsonl(rows))
    spec = {
        "preferences": ["p.jsonl"],
        "checks": {"exact_duplicates": {"enabled": False}},
        "max_quarantine_fraction": 1.0,
    }
    run_gate(tmp_path, spec)
    found = {
        int(r["id"])
        for r in quarantined(tmp_path / "quarantine")
        if r["kind"] == "preferences" and "near_duplicate" in codes([r])
    }
    expected = brute_force(rows, 0.8)
    assert len(expected) >= 40
    assert found <= expected, "every finding is verified exactly"
    assert len(found & expected) >= 0.95 * len(expected)


def test_chosen_and_rejected_may_look_alike_and_one_prompt_may_have_many_answers(tmp_path: Path) -> None:
    answer = "The first thing to do is to switch off the water at the main valve, then open the lowest tap."
    rows = [
        {"prompt": "My pipe has burst, what now?", "chosen": answer, "rejected": answer.replace("main", "back")},
        {"prompt": "My pipe has burst, what now?", "chosen": "Call a plumber at once.", "rejected": "Wait and see."},
        {"prompt": "Where does the water come from?", "chosen": answer, "rejected": answer.replace("main", "back")},
    ]
    assert naive_jaccard(rows[0]["chosen"], rows[0]["rejected"]) > 0.7
    (tmp_path / "p.jsonl").write_bytes(jsonl(rows))
    _, report = run_gate(tmp_path, {"preferences": ["p.jsonl"]})
    assert report.check("near_duplicates").flagged == 0
    assert report.rows["preferences"].clean == 3


def test_exact_duplicates_are_reported_once_and_the_first_is_kept(tmp_path: Path) -> None:
    row = {"prompt": "What is a fjord?", "response": "A long narrow inlet of the sea."}
    variants = [row, row | {"prompt": "WHAT IS  A FJORD?"}, row, row | {"response": "Something else entirely."}]
    (tmp_path / "s.jsonl").write_bytes(jsonl(variants))
    _, report = run_gate(tmp_path, {"sft": ["s.jsonl"], "max_quarantine_fraction": 1.0})
    bad = [r for r in quarantined(tmp_path / "quarantine") if r["kind"] == "sft"]
    assert [r["line"] for r in bad] == [2, 3]
    assert [[reason["code"] for reason in r["reasons"]] for r in bad] == [
        ["exact_duplicate"],
        ["duplicate_id", "exact_duplicate"],
    ]
    assert report.check("near_duplicates").flagged == 0


def test_the_same_response_rated_by_two_people_is_no_duplicate(tmp_path: Path) -> None:
    row = {"prompt": "p", "response": "A response.", "score": 3}
    (tmp_path / "r.jsonl").write_bytes(jsonl([row | {"rater": "a"}, row | {"rater": "b"}, row | {"rater": "a"}]))
    _, report = run_gate(tmp_path, {"ratings": ["r.jsonl"], "max_quarantine_fraction": 1.0})
    assert report.check("exact_duplicates").flagged == 1


def test_a_state_merged_from_parts_finds_what_the_whole_finds(tmp_path: Path) -> None:
    rows = corpus(300, seed=1) + corpus(300, seed=1)[:40]
    (tmp_path / "p.jsonl").write_bytes(jsonl(row | {"id": str(i)} for i, row in enumerate(rows)))
    raw, _ = run_ingest(tmp_path, {"preferences": ["p.jsonl"]})

    def make(name: str) -> tuple[Repeated, NearDuplicates]:
        folder = tmp_path / name
        folder.mkdir()
        exact = Repeated("exact_duplicates", CheckSpec(), by="text", folder=folder)
        return exact, NearDuplicates(NearDuplicatesCheck(), exact=exact, folder=folder)

    whole, first, second = make("whole"), make("first"), make("second")
    for number, batch in enumerate(batches(raw, "preferences", rows=64)):
        for check in (*whole, *(first if number < 3 else second)):
            check.observe(batch)
    for mine, other in zip(first, second, strict=True):
        mine.merge(other)
    for one, other in zip(whole, first, strict=True):
        one.finish()
        other.finish()
        assert pl.concat(one.found("preferences")).equals(pl.concat(other.found("preferences")))
        assert pl.concat(one.found("preferences")).height > 0
        assert one.seen == other.seen == len(rows)
    assert not [p for p in (tmp_path / "whole").iterdir() if "preferences" in p.name], "temporary files are removed"


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 0.95])
@pytest.mark.parametrize("recall", [0.9, 0.99])
def test_the_banding_reaches_the_recall_that_was_asked_for(threshold: float, recall: float) -> None:
    bands, rows = banding(threshold, recall)
    assert bands * rows <= 128
    assert 1 - (1 - threshold**rows) ** bands >= recall


def test_shingle_hashes_are_equal_exactly_where_shingles_are() -> None:
    texts = ["hello world", "", "hi", "hello", "ünïcödé 😀😀 text", "hello world hello world"]
    hashes, offsets = shingle_hashes(texts)
    assert len(hashes) == offsets[-1]
    owner: dict[int, str] = {}
    for number, value in enumerate(texts):
        mine = hashes[offsets[number] : offsets[number + 1]]
        padded = value.ljust(5)
        expected = [padded[i : i + 5] for i in range(len(padded) - 4)]
        assert len(mine) == len(expected)
        for key, shingle in zip(mine.tolist(), expected, strict=True):
            assert owner.setdefault(key, shingle) == shingle
    assert len(set(owner.values())) == len(owner)
    assert shingle_hashes([])[0].dtype == np.uint64


def test_jaccard_against_its_definition() -> None:
    for a, b in combinations(["hello world", "hello there world", "", "hell", "completely different"], 2):
        assert jaccard(shingle_set(a), shingle_set(b)) == pytest.approx(naive_jaccard(a, b))
