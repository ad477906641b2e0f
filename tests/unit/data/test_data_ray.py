"""Checks give the same on a whole dataset as on its parts, merged; the engine ray relies on it."""

import json
import pickle
import random
import signal
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from data_helpers import GOOD, jsonl, run_ingest

from tunegate.data import DataSpec, ValidationReport, validate
from tunegate.data.checks.base import Check, findings
from tunegate.data.inspection import Inspection, read_slice, slices
from tunegate.data.records import KINDS, Kind
from tunegate.observer import NullObserver, RecordingObserver

TREES = "amber birch cedar delta ember fjord grove heath island juniper kelp lagoon meadow nectar orchid"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some hundred rows with findings for most checks, in row groups of 64."""
    folder = tmp_path_factory.mktemp("ray")
    generator = random.Random(0)
    words = TREES.split()

    def text(n: int) -> str:
        return " ".join(generator.choices(words, k=n))

    rows: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for number in range(150):
        prompt, answer, other = text(8), text(20), text(15)
        rows["sft"].append({"id": str(number), "prompt": prompt, "response": answer})
        rows["preferences"].append({"prompt": prompt, "chosen": answer, "rejected": other})
        for rater in ("anna", "ben"):
            rows["ratings"].append(
                {"prompt": prompt, "response": answer, "score": generator.randint(1, 5), "rater": rater}
            )
        rows["evaluation"].append({"prompt": text(9), "tag": "everyday"})
        rows["prompts"].append({"prompt": text(9)})
    rows["sft"] += [row | {"id": "again"} for row in rows["sft"][:10]]
    rows["sft"] += [row | {"response": row["response"] + " x"} for row in rows["sft"][:10]]
    rows["preferences"] += [
        {"prompt": r["prompt"], "chosen": r["rejected"], "rejected": r["chosen"]} for r in rows["preferences"][:5]
    ]
    rows["sft"] += [{"prompt": row["prompt"], "response": "Mail jane@mail.org\x07"} for row in rows["evaluation"][:10]]
    for kind in KINDS:
        generator.shuffle(rows[kind])
        (folder / f"{kind}.jsonl").write_bytes(jsonl([*rows[kind], GOOD[kind]]))
    patch = pytest.MonkeyPatch()
    patch.setattr("tunegate.data.tables.BATCH_ROWS", 64)
    raw, _ = run_ingest(folder, {kind: [f"{kind}.jsonl"] for kind in KINDS} | {"heldout_fraction": 0.05})
    patch.undo()
    return raw


def counted(dataset: Path) -> dict[Any, int]:
    import pyarrow.parquet as pq

    return {kind: pq.ParquetFile(dataset / f"{kind}.parquet").metadata.num_rows for kind in KINDS}


@pytest.mark.parametrize("parts", [1, 3, 100])
def test_slices_are_the_dataset_cut_at_row_groups(parts: int, dataset: Path) -> None:
    found = slices(dataset, parts=parts)
    for kind, rows in counted(dataset).items():
        of_kind = [part for part in found if part.kind == kind]
        numbers = [b.first + i for part in of_kind for b in read_slice(dataset, part) for i in range(b.table.num_rows)]
        assert numbers == list(range(rows)) and sum(part.rows for part in of_kind) == rows
    assert len(found) == {1: 5, 3: 5, 100: sum(-(-n // 64) for n in counted(dataset).values())}[parts] or parts == 3


def test_states_that_travelled_merge_to_the_whole(dataset: Path, tmp_path: Path) -> None:
    """What a task of Ray does, without Ray: every slice in its own inspection, pickled and merged."""
    rows = counted(dataset)

    def make(name: str) -> Inspection:
        (tmp_path / name).mkdir()
        return Inspection(dataset, DataSpec(), rows, counter=None, folder=tmp_path / name, seed=0)

    whole, merged = make("whole"), make("merged")
    for number, part in enumerate(slices(dataset, parts=8)):
        piece = make(str(number))
        for batch in read_slice(dataset, part):
            whole.observe(batch)
            piece.observe(batch)
        state = pickle.dumps(piece.all)
        assert len(state) < 3 * 2**20  # indexes and models stay where they are
        for file in (tmp_path / str(number)).iterdir():
            file.unlink()  # another machine does not see them
        merged.merge(pickle.loads(state))
    whole.finish()
    merged.finish()
    for expected, found in zip(whole.all, merged.all, strict=True):
        assert found.seen == expected.seen, expected.name
        for kind in KINDS:
            assert all_found(found, kind).equals(all_found(expected, kind)), (expected.name, kind)
        for name in ("estimates", "figures", "histograms", "failure", "skipped", "threshold"):
            assert getattr(found, name) == getattr(expected, name), (expected.name, name)
    assert {check.name for check in whole.all if any(all_found(check, kind).height for kind in KINDS)} >= {
        "ids", "exact_duplicates", "near_duplicates", "contamination", "characters", "privacy", "preferences",
    }  # fmt: skip


def all_found(check: Check, kind: Kind) -> pl.DataFrame:
    return pl.concat([findings(), *check.found(kind)])


def gate(dataset: Path, folder: Path, engine: str, observer: Any) -> ValidationReport:
    return validate(
        dataset,
        DataSpec.model_validate({"engine": engine, "max_quarantine_fraction": 1.0}),
        tokenizer=None,
        clean=folder / "clean",
        quarantine=folder / "quarantine",
        report=folder / "report.html",
        seed=3,
        observer=observer,
    )


@pytest.mark.slow
def test_both_engines_find_the_same_and_write_the_same_bytes(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
    pytest.importorskip("ray.data")
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    observer, on_sigterm = RecordingObserver(), signal.getsignal(signal.SIGTERM)
    by_ray = gate(dataset, tmp_path / "ray", "ray", observer)
    here = gate(dataset, tmp_path / "here", "local", NullObserver())
    assert by_ray.model_dump() == here.model_dump()
    assert any(check.flagged for check in here.checks) and here.rows["sft"].quarantined
    for path in sorted((tmp_path / "here").rglob("*.*")):
        assert (tmp_path / "ray" / path.relative_to(tmp_path / "here")).read_bytes() == path.read_bytes(), path.name
    total = sum(counted(dataset).values())
    assert observer.last_progress is not None and observer.last_progress[:2] == (total, total)
    assert not ray.is_initialized()
    assert signal.getsignal(signal.SIGTERM) == on_sigterm
    assert json.loads((tmp_path / "ray" / "clean" / "validation.json").read_text())["verdict"] == here.verdict
