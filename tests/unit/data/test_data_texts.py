"""The quick ways through texts give what the plain ones give."""

import random
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from tunegate.data.checks.base import Batch, findings, folded
from tunegate.data.checks.characters import check_characters
from tunegate.data.checks.wordruns import WordRuns
from tunegate.data.tables import arrow_schema, read_batches

LETTERS = "aB \t\n\r\x0b\x0c\x85\xa0\u3000\u2003éＡﬁİß\u200b\ufeff\U0001d400¨Å"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet=LETTERS, max_size=9), min_size=1, max_size=20))
def test_folding_step_by_step_is_folding_at_once(texts: list[str]) -> None:
    plain = pl.Series([unicodedata.normalize("NFKC", text) for text in texts], dtype=pl.String)
    plain = plain.str.to_lowercase().str.replace_all(r"\s+", " ").str.strip_chars()
    assert folded(pl.Series(texts, dtype=pl.String)).to_list() == plain.to_list()


WORDS = st.lists(st.sampled_from("abcd"), min_size=2, max_size=5).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, max_size=6), st.lists(st.lists(st.sampled_from("abcde"), max_size=12), max_size=6))
def test_runs_of_words_are_found_where_they_are(runs: list[str], texts: list[list[str]]) -> None:
    wanted = {
        (number, place, run)
        for number, words in enumerate(texts)
        for run in set(runs)
        for place in range(len(words))
        if words[place : place + len(run.split())] == run.split()
    }
    found = WordRuns(runs).search(pl.Series([f" {' '.join(words)} " for words in texts], dtype=pl.String))
    assert sorted(found) == sorted((number, run) for number, _, run in wanted)
    assert [number for number, _ in found] == sorted(number for number, _ in found)


def test_a_run_does_not_go_on_into_the_next_text() -> None:
    assert WordRuns(["a b c"]).search(pl.Series(["x a b", "c d"])) == []


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.text(alphabet="ab\x00\x07\u202e\u2069\U000e0041\ufdd0\ufffd\t\n", max_size=6), min_size=1, max_size=5)
)
def test_bad_characters_are_those_of_the_classes(texts: list[str]) -> None:
    rows = [
        {"id": str(n), "messages": [{"role": "user", "content": text}], "split": "train", "repeats": 1}
        for n, text in enumerate(texts)
    ]
    table = pa.Table.from_pylist(rows, schema=arrow_schema("sft"))
    found = check_characters(Batch("sft", table, 0), max_replacement=0)
    classes = {
        "control_character": r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]",
        "bidirectional_control": "[\u202a-\u202e\u2066-\u2069]",
        "hidden_tag": "[\U000e0000-\U000e007f]",
        "noncharacter": "[\ufdd0-\ufdef\ufffe\uffff]",
        "replacement_character": "\ufffd",
    }
    wanted = {(n, code) for n, text in enumerate(texts) for code, bad in classes.items() if re.search(bad, text)}
    assert set(found.select("row", "code").iter_rows()) == wanted
    assert found.schema == findings().schema


HELD = """
import sys
import pyarrow as pa, pyarrow.parquet as pq
from tunegate.data.tables import read_batches
rows, peak = 0, 0
with pq.ParquetFile(sys.argv[1]) as file:
    for batch in read_batches(file, rows=500):
        rows += batch.num_rows
        peak = max(peak, pa.total_allocated_bytes())
print(rows, peak)
"""


def test_batches_hold_one_row_group_at_a_time(tmp_path: Path) -> None:
    """A reader over several row groups keeps all that it has read; memory would grow with the file."""
    path = tmp_path / "rows.parquet"
    generator = random.Random(0)
    table = pa.table({"text": [generator.randbytes(500).hex() for _ in range(2000)]})
    with pq.ParquetWriter(path, table.schema) as writer:
        for _ in range(20):
            writer.write_table(table)
    # In a process of its own: Arrow counts the memory of everything that a process does.
    done = subprocess.run([sys.executable, "-c", HELD, path], capture_output=True, text=True, check=True)
    rows, peak = map(int, done.stdout.split())
    # The batch in hand, which keeps its row group, and the next row group, as pages and as values.
    assert rows == 40_000 and table.nbytes < peak < 4 * table.nbytes
    with pq.ParquetFile(path) as file:
        assert [b.num_rows for b in read_batches(file, rows=3000, groups=[3, 1])] == [2000, 2000]
