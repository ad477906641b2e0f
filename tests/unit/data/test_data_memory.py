"""What a run keeps does not grow with the rows: neither findings nor reasons nor keys."""

import pickle
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from tunegate.data.checks.base import FINDING_SCHEMA
from tunegate.data.checks.spill import _PART_ROWS, ByRow, Marks

PEAK = """
import resource, sys
from pathlib import Path
from tunegate.data import DataSpec, validate
from tunegate.data.records import KINDS
from tunegate.data.tables import TableWriter, arrow_schema, parquet_path
from tunegate.observer import NullObserver
out, rows = Path(sys.argv[1]), int(sys.argv[2])
for kind in KINDS:
    with TableWriter(parquet_path(out, kind), arrow_schema(kind)) as table:
        for n in range(rows if kind == "sft" else 0):
            turns = [("user", f"ask {n}"), ("assistant", f"say {n} <|im_end|> \\x07")]
            messages = [{"role": role, "content": text} for role, text in turns]
            table.write({"id": str(n), "messages": messages, "source": "s", "split": "train", "repeats": 1})
off = {name: {"enabled": False} for name in ("near_duplicates", "language", "toxicity", "privacy", "contamination")}
spec = DataSpec.model_validate({"checks": off, "max_quarantine_fraction": 1.0})
report = validate(out, spec, tokenizer=None, clean=out / "clean", quarantine=out / "bad", report=out / "r.html",
                  seed=0, observer=NullObserver())
print(report.rows["sft"].quarantined, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""


def peak_mib(folder: Path, rows: int) -> int:
    folder.mkdir()
    done = subprocess.run([sys.executable, "-c", PEAK, folder, str(rows)], capture_output=True, text=True, check=True)
    quarantined, peak = map(int, done.stdout.split())
    assert quarantined == rows
    return peak


def test_the_gate_takes_no_more_memory_for_more_rows_that_are_all_quarantined(tmp_path: Path) -> None:
    """Two findings a row: kept as Python objects, those of 80,000 rows take 70 MiB."""
    small, large = peak_mib(tmp_path / "small", 20_000), peak_mib(tmp_path / "large", 100_000)
    assert large - small < 30


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_findings_come_back_in_the_order_of_their_rows(data: st.DataObject) -> None:
    numbers = data.draw(st.lists(st.lists(st.integers(0, 3 * _PART_ROWS), max_size=20), max_size=8))
    frames = [
        pl.DataFrame([(n, f"c{i}", '\x07"\u2028') for n in rows], schema=FINDING_SCHEMA, orient="row")
        for i, rows in enumerate(numbers)
    ]
    wanted = pl.concat([FINDING_SCHEMA.to_frame(), *frames]).sort("row", maintain_order=True)
    first, end = sorted(data.draw(st.tuples(st.integers(0, 3 * _PART_ROWS), st.integers(0, 3 * _PART_ROWS))))
    with tempfile.TemporaryDirectory() as folder:
        spilled, held, travelled = ByRow(FINDING_SCHEMA), ByRow(FINDING_SCHEMA), ByRow(FINDING_SCHEMA)
        spilled.spill_to(Path(folder) / "found")
        for frame in frames:
            spilled.append(frame)
            held.append(frame)
        travelled.extend(pickle.loads(pickle.dumps(spilled)))
        for one in (spilled, held, travelled):
            assert pl.concat([FINDING_SCHEMA.to_frame(), *one.parts()]).equals(wanted)
            assert one.between(first, end).equals(wanted.filter(pl.col("row").is_between(first, end, closed="left")))


def test_marks_are_those_that_were_added() -> None:
    generator = random.Random(0)
    some = generator.sample(range(1003), 200)
    marks = Marks(1003)
    for part in (some[:90], some[90:]):
        marks.add(np.asarray(part, np.int64))
    assert np.flatnonzero(marks[np.arange(1003)]).tolist() == sorted(some)
