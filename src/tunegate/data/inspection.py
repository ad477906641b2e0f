"""All checks of a gate over a dataset or a part of it, in this process or spread over a Ray cluster.

Both ways run the same code: a check looks at batches, the states of checks that saw different parts are merged in the
order of the parts, and only then does it judge.
"""

from __future__ import annotations

import math
import os
import pickle
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tunegate.data.checks.base import Batch, Check, RowCheck, batches
from tunegate.data.checks.fields import check_fields
from tunegate.data.checks.lengths import TokenCounter
from tunegate.data.checks.made import make_checks
from tunegate.data.config import DataSpec
from tunegate.data.records import KINDS, Kind
from tunegate.data.tables import parquet_path, read_batches
from tunegate.errors import DataError
from tunegate.observer import Observer

_SLICES_PER_CORE = 4
_BATCH_ROWS = 4096


class Inspection:
    """The checks of a spec and what they have found so far.

    Args:
        dataset: A folder written by `ingest`; evaluation prompts are read from it.
        spec: The checks.
        rows: Rows of each kind in the whole dataset.
        counter: The model's tokenizer, if there is one.
        folder: An existing folder for temporary files.
        seed: Of the resampling behind intervals.
    """

    def __init__(
        self,
        dataset: Path,
        spec: DataSpec,
        rows: dict[Kind, int],
        *,
        counter: TokenCounter | None,
        folder: Path,
        seed: int,
    ) -> None:
        self.fields = RowCheck("fields", spec.checks.types, check_fields)
        self.checks = make_checks(spec.checks, dataset=dataset, rows=rows, counter=counter, folder=folder, seed=seed)
        for check in self.all:
            check.spill_to(folder)

    @property
    def all(self) -> list[Check]:
        """Every check, in the order of the report."""
        return [self.fields, *self.checks]

    def observe(self, batch: Batch) -> None:
        """Show a batch to every check; rows with broken fields reach only the first."""
        broken = self.fields.rows_found(batch)
        sound = batch.without(broken) if broken.len() else batch
        for check in self.checks:
            if batch.kind in check.kinds and sound.frame.height:
                check.observe(sound)

    def merge(self, states: Iterable[Check]) -> None:
        """Add what the same checks have seen of the next part of the dataset."""
        for check, state in zip(self.all, states, strict=True):
            check.merge(state)

    def finish(self) -> None:
        """Judge, after the last batch."""
        for check in self.checks:
            check.finish()


def inspect_here(inspection: Inspection, dataset: Path, rows: dict[Kind, int], observer: Observer) -> None:
    """Show the whole dataset to the checks, batch by batch, in this process."""
    done, total = 0, sum(rows.values())
    for kind in KINDS:
        for batch in batches(dataset, kind):
            inspection.observe(batch)
            done += batch.table.num_rows
            observer.progress(done, total, "row", "validate")
    inspection.finish()


@dataclass(frozen=True, slots=True)
class Slice:
    """Some row groups of a kind's file."""

    kind: Kind
    groups: tuple[int, ...]
    first: int
    """The number of the first row within the file."""
    rows: int


def slices(dataset: Path, *, parts: int) -> list[Slice]:
    """Cut a dataset at its row groups into about so many pieces of equal size, in the order of kinds and rows."""
    layout: list[tuple[Kind, list[int]]] = []
    for kind in KINDS:
        with pq.ParquetFile(parquet_path(dataset, kind)) as file:
            metadata = file.metadata
            layout.append((kind, [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]))
    size = max(1, math.ceil(sum(sum(groups) for _, groups in layout) / max(1, parts)))
    found = []
    for kind, groups in layout:
        first, here, count = 0, [], 0
        for number, rows in enumerate(groups):
            here.append(number)
            count += rows
            if count >= size or number == len(groups) - 1:
                found.append(Slice(kind, tuple(here), first, count))
                first, here, count = first + count, [], 0
    return found


def read_slice(dataset: Path, part: Slice) -> Iterator[Batch]:
    """The batches of a slice; rows keep the numbers that they have in the file."""
    first = part.first
    with pq.ParquetFile(parquet_path(dataset, part.kind)) as file:
        for piece in read_batches(file, rows=_BATCH_ROWS, groups=part.groups):
            yield Batch(part.kind, pa.Table.from_batches([piece]), first)
            first += piece.num_rows


def inspect_on_ray(
    inspection: Inspection,
    dataset: Path,
    spec: DataSpec,
    rows: dict[Kind, int],
    *,
    tokenizer: Path | None,
    seed: int,
    observer: Observer,
) -> None:
    """Show the dataset to the checks by Ray Data, slice by slice on all cores of the cluster, and merge.

    A running cluster is joined when `RAY_ADDRESS` names one; otherwise Ray is started on this machine and stopped
    afterwards. All its nodes must see the dataset (and the tokenizer) under the same path.

    Raises:
        DataError: Ray is not installed, or a task failed.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise DataError(
            "the engine ray needs the package `ray`", key="data.engine", value="ray", fix="pip install 'tunegate[ray]'"
        ) from None
    started, on_sigterm = not ray.is_initialized(), signal.getsignal(signal.SIGTERM)
    if started:
        ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, logging_level="ERROR")
    try:
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        cores = int(ray.cluster_resources().get("CPU", 1))
        parts = slices(dataset.absolute(), parts=cores * _SLICES_PER_CORE)
        work = _SliceWork(dataset.absolute(), spec, rows, tokenizer.absolute() if tokenizer else None, seed)
        done, total = 0, sum(rows.values())
        if parts:
            numbered = ray.data.from_items([{"number": n} for n in range(len(parts))], override_num_blocks=len(parts))
            states = numbered.map(lambda row: {"number": row["number"], "state": work(parts[row["number"]])})
            for row in states.iter_rows():
                inspection.merge(pickle.loads(row["state"]))
                done += parts[row["number"]].rows
                observer.progress(done, total, "row", "validate")
    except ray.exceptions.RayError as error:
        raise DataError(
            f"a task of the engine ray failed: {str(error).strip().splitlines()[-1][:300]}",
            key="data.engine",
            value="ray",
            fix="check that all nodes see the dataset under the same path; the engine local needs no cluster",
        ) from error
    finally:
        if started:
            ray.shutdown()
            # Ray's own answer to SIGTERM would stay, and a later stage of this process end without a checkpoint.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_sigterm)
    inspection.finish()


@dataclass(frozen=True, slots=True)
class _SliceWork:
    """What a task needs to inspect a slice, wherever it runs."""

    dataset: Path
    spec: DataSpec
    rows: dict[Kind, int]
    tokenizer: Path | None
    seed: int

    def __call__(self, part: Slice) -> bytes:
        """The pickled states of all checks after the slice."""
        counter = TokenCounter.load(self.tokenizer) if self.tokenizer is not None else None
        with TemporaryDirectory(prefix="tunegate-slice-") as folder:
            inspection = Inspection(
                self.dataset, self.spec, self.rows, counter=counter, folder=Path(folder), seed=self.seed
            )
            for batch in read_slice(self.dataset, part):
                inspection.observe(batch)
            states: Any = inspection.all
            return pickle.dumps(states)
