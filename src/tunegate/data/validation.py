"""The validation gate: run the checks, part good rows from bad, judge the dataset, write the reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from tunegate.data.checks.base import Batch, Check, batches, json_row, wilson
from tunegate.data.checks.lengths import TokenCounter
from tunegate.data.checks.spill import ByRow, Keyed
from tunegate.data.config import DataSpec
from tunegate.data.inspection import Inspection, inspect_here, inspect_on_ray
from tunegate.data.records import KINDS, Kind
from tunegate.data.results import CheckResult, Example, IngestSummary, KindRows, SplitCounts, ValidationReport
from tunegate.data.tables import (
    QUARANTINE_NAME,
    SUMMARY_NAME,
    TableWriter,
    arrow_schema,
    parquet_path,
    quarantine_row,
    quarantine_schema,
)
from tunegate.errors import DataError
from tunegate.observer import Observer

VALIDATION_NAME = "validation.json"
_EXAMPLES = 5
_FAMILY_SEED = 5
_TEXT_COLUMNS = ("messages", "prompt", "chosen", "rejected", "response")

Reasons = dict[int, list[tuple[str, str, str]]]


def validate(
    dataset: Path,
    spec: DataSpec,
    *,
    tokenizer: Path | None,
    clean: Path,
    quarantine: Path,
    report: Path,
    seed: int,
    observer: Observer,
) -> ValidationReport:
    """Check a dataset; part its rows into clean and quarantined ones; judge it.

    A row is quarantined with every reason that was found; only findings about the dataset as a whole make it INVALID.
    In every case rows in = clean rows + quarantined rows, kind by kind.

    Args:
        dataset: A folder written by `ingest`.
        spec: The checks (`spec.checks`) and the share of quarantined rows that is still acceptable.
        tokenizer: Folder of the model's tokenizer; without it token lengths are not checked.
        clean: Folder for the clean dataset, with `summary.json` and `validation.json`.
        quarantine: Folder for `quarantine.parquet`: the row as JSON, its source and line, and its reasons.
        report: The HTML file to write.
        seed: Of the resampling behind intervals.
        observer: Is told the progress, in rows.

    Returns:
        The report: verdict `PROMOTE` or `INVALID`, reasons, every check's findings.

    Raises:
        DataError: `dataset` is not a dataset, or the reference for drift cannot be read.
        ModelError: `tokenizer` has no readable `tokenizer.json`.
    """
    rows = _count_rows(dataset)
    clean.mkdir(parents=True, exist_ok=True)
    quarantine.mkdir(parents=True, exist_ok=True)
    # Temporary files stay beside the output: /tmp is memory on many clusters.
    with TemporaryDirectory(prefix=".validate-", dir=quarantine) as folder:
        gate = _Gate(dataset, spec, rows, tokenizer, Path(folder), seed)
        gate.inspect(observer)
        parts = gate.part(clean, quarantine)
        result = gate.judge(parts)
    _write_summary(dataset, clean, parts)
    (clean / VALIDATION_NAME).write_text(result.model_dump_json(indent=2) + "\n")
    from tunegate.data.report import render

    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(render(result), encoding="utf-8")
    return result


def _count_rows(dataset: Path) -> dict[Kind, int]:
    rows: dict[Kind, int] = {}
    for kind in KINDS:
        path = parquet_path(dataset, kind)
        if not path.is_file():
            raise DataError(
                f"the dataset folder has no {kind}.parquet", key=str(dataset), fix="run ingest to make the dataset"
            )
        try:
            with pq.ParquetFile(path) as file:
                rows[kind] = file.metadata.num_rows
                missing, wrong = _differences(arrow_schema(kind), file.schema_arrow)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"the file is not Parquet: {error}", key=str(path), fix="run ingest again") from error
        if missing:
            raise DataError(
                "columns are missing: " + ", ".join(sorted(missing)),
                key=str(path),
                fix="run ingest to make the dataset",
            )
        if wrong:
            raise DataError(
                "columns have the wrong type: " + ", ".join(wrong), key=str(path), fix="run ingest to make the dataset"
            )
    return rows


def _differences(wanted: pa.Schema, found: pa.Schema) -> tuple[set[str], list[str]]:
    """Columns that are missing, and those whose type is another one, said in words."""
    missing = set(wanted.names) - set(found.names)
    wrong = []
    for field in wanted:
        if field.name not in missing and not _alike(kind := found.field(field.name).type, field.type):
            wrong.append(f"{field.name} is {kind}, not {field.type}")
    return missing, wrong


def _alike(one: pa.DataType, other: pa.DataType) -> bool:
    return bool(one.equals(other)) or _plain(one) == _plain(other)


def _plain(kind: pa.DataType) -> str:
    """A type without what other writers may choose freely: the width of offsets and the name of a list's elements."""
    text = str(kind).replace("large_", "").replace("string_view", "string").replace("element: ", "item: ")
    return text.replace(" not null", "")


class _Gate:
    """The checks of one run and what they found."""

    def __init__(
        self, dataset: Path, spec: DataSpec, rows: dict[Kind, int], tokenizer: Path | None, folder: Path, seed: int
    ) -> None:
        self.dataset = dataset
        self.folder = folder
        self.spec = spec
        self.rows = rows
        self.seed = seed
        self.tokenizer = tokenizer
        counter = TokenCounter.load(tokenizer) if tokenizer is not None else None
        self.tokenizer_digest = counter.digest if counter else None
        self.inspection = Inspection(dataset, spec, rows, counter=counter, folder=folder, seed=seed)
        self.checks = self.inspection.all

    def inspect(self, observer: Observer) -> None:
        """Show every batch to every check."""
        if self.spec.engine == "ray":
            inspect_on_ray(
                self.inspection,
                self.dataset,
                self.spec,
                self.rows,
                tokenizer=self.tokenizer,
                seed=self.seed,
                observer=observer,
            )
        else:
            inspect_here(self.inspection, self.dataset, self.rows, observer)

    def part(self, clean: Path, quarantine: Path) -> dict[Kind, _Part]:
        """Write the clean and the quarantined rows."""
        parts: dict[Kind, _Part] = {}
        family = _Family(self.folder)
        with TableWriter(quarantine / QUARANTINE_NAME, quarantine_schema()) as bad:
            for kind in KINDS:
                if kind == "ratings":
                    family.find(self.dataset)
                with TableWriter(parquet_path(clean, kind), arrow_schema(kind)) as good:
                    parts[kind] = self._part_kind(kind, good, bad, family)
        return parts

    def _part_kind(self, kind: Kind, good: TableWriter, bad: TableWriter, family: _Family) -> _Part:
        part = _Part()
        for batch in batches(self.dataset, kind):
            reasons = self._reasons(batch)
            if kind == "ratings":
                family.follow(batch, reasons)
            private = self._rows_with(batch, lambda check: check.name in ("privacy", "secrets"))
            redacted = self._rows_with(batch, lambda check: check.action == "redact")
            numbers = range(batch.first, batch.end)
            keep = [n for n in numbers if n not in reasons]
            kept = batch.table.take(pa.array([n - batch.first for n in keep], type=pa.int64()))
            change = [position for position, n in enumerate(keep) if n in redacted]
            if change:
                kept = self._redacted(kept, change)
                part.redacted += len(change)
            good.write_batch(kept)
            for split, n in Counter(kept["split"].to_pylist()).items():
                setattr(part.splits, split, getattr(part.splits, split) + n)
            gone = sorted(reasons)
            for number in gone:
                row = batch.table.slice(number - batch.first, 1).to_pylist()[0]
                if number in private:
                    row = self._redact_row(row, everything=True)
                bad.write(_bad_row(kind, row, reasons[number]))
            if kind == "preferences":
                family.leave(batch.table["id"].take(pa.array([n - batch.first for n in gone], type=pa.int64())))
            part.quarantined += len(gone)
        return part

    def _reasons(self, batch: Batch) -> Reasons:
        """(check, code, detail) of every row of a batch that must go, by row number."""
        reasons: Reasons = {}
        for check in self.checks:
            if check.action == "quarantine":
                for row, code, detail in check.found_between(batch.kind, batch.first, batch.end).iter_rows():
                    reasons.setdefault(row, []).append((check.name, code, detail))
        return reasons

    def _rows_with(self, batch: Batch, which: Callable[[Check], bool]) -> set[int]:
        found = [c.found_between(batch.kind, batch.first, batch.end)["row"] for c in self.checks if which(c)]
        return {row for rows in found for row in rows}

    def _redacted(self, table: pa.Table, positions: list[int]) -> pa.Table:
        rows = table.take(pa.array(positions)).to_pylist()
        changed = pa.Table.from_pylist([self._redact_row(row, everything=False) for row in rows], schema=table.schema)
        order = np.arange(table.num_rows)
        order[positions] = table.num_rows + np.arange(len(positions))
        return pa.concat_tables([table, changed]).take(pa.array(order))

    def _redact_row(self, row: dict[str, Any], *, everything: bool) -> dict[str, Any]:
        from tunegate.data.checks.privacy import redact

        privacy = self.spec.checks.privacy
        kinds = [
            kind
            for kind in privacy.kinds
            if everything or (privacy.secrets if kind == "secret" else privacy.action) == "redact"
        ]

        def cleaned(text: str) -> str:
            return redact(text, kinds=kinds, regions=privacy.regions)

        row = dict(row)
        for name in _TEXT_COLUMNS:
            value = row.get(name)
            if isinstance(value, str):
                row[name] = cleaned(value)
            elif value:
                row[name] = [{**turn, "content": cleaned(turn["content"])} for turn in value]
        return row

    def judge(self, parts: Mapping[Kind, _Part]) -> ValidationReport:
        """The verdict and every check's result."""
        results = [self._result(check) for check in self.checks]
        reasons = [f"{result.check}: {result.reason}" for result in results if result.verdict == "fail"]
        limit = self.spec.max_quarantine_fraction
        least = self.spec.checks.enough
        for kind, part in parts.items():
            total, clean = self.rows[kind], part.splits.total
            if total and part.quarantined / total > limit:
                reasons.append(
                    f"quarantine: {part.quarantined} of {total} {kind} rows ({part.quarantined / total:.1%}) were "
                    f"quarantined, allowed are {limit:.1%}"
                )
            wanted = least.min_rows.get(kind, 1 if total else 0) if least.enabled else 0
            if clean < wanted:
                reasons.append(f"enough: {clean} {kind} rows are left, at least {wanted} are wanted")
        return ValidationReport(
            verdict="INVALID" if reasons else "PROMOTE",
            reasons=reasons,
            rows={
                kind: KindRows(
                    rows_in=self.rows[kind],
                    clean=part.splits.total,
                    quarantined=part.quarantined,
                    redacted=part.redacted,
                )
                for kind, part in parts.items()
            },
            checks=results,
            seed=self.seed,
            tokenizer=self.tokenizer_digest,
        )

    def _result(self, check: Check) -> CheckResult:
        flagged = 0
        codes: Counter[str] = Counter()
        examples: list[Example] = []
        for kind in KINDS:
            for frame in check.found(kind):
                flagged += frame["row"].n_unique()
                codes.update(frame["code"].to_list())
                examples += _examples(self.dataset, kind, frame.head(_EXAMPLES - len(examples)))
        result = CheckResult(
            check=check.name,
            verdict="flagged" if flagged else "skipped" if check.skipped else "pass",
            reason=check.skipped,
            action=check.action,
            seen=check.seen,
            flagged=flagged,
            fraction=wilson(flagged, check.seen) if check.seen else None,
            threshold=check.threshold,
            codes=dict(sorted(codes.items())),
            estimates=check.estimates,
            figures=check.figures,
            histograms=check.histograms,
            examples=examples,
        )
        limit = check.spec.max_fraction
        if check.failure:
            result.verdict, result.reason = "fail", check.failure
        elif limit is not None and check.seen and flagged / check.seen > limit:
            share = f"{flagged} of {check.seen} rows ({flagged / check.seen:.1%})"
            result.verdict, result.reason = "fail", f"{share} are flagged, allowed are {limit:.1%}"
        return result


class _Part:
    """Where the rows of one kind went."""

    def __init__(self) -> None:
        self.splits = SplitCounts()
        self.quarantined = 0
        self.redacted = 0


class _Family:
    """Ratings that were derived from a quarantined preference, and go with it.

    Args:
        folder: For temporary files.
    """

    _IS_PARENT = -1

    def __init__(self, folder: Path) -> None:
        self._keys = Keyed(folder / "family", [("row", np.int64)])
        self._orphans = ByRow(pl.Schema({"row": pl.Int64}))
        self._orphans.spill_to(folder / "orphans")

    def leave(self, ids: pa.ChunkedArray) -> None:
        """Note quarantined preferences."""
        keys = pl.Series(ids, dtype=pl.String).drop_nulls().hash(_FAMILY_SEED).to_numpy()
        self._keys.append(key=keys, row=np.full(len(keys), self._IS_PARENT))

    def find(self, dataset: Path) -> None:
        """Look for the ratings, once all quarantined preferences are noted."""
        for batch in batches(dataset, "ratings", columns=["parent"]):
            derived = batch.frame.filter(pl.col("parent").is_not_null())
            self._keys.append(key=derived["parent"].hash(_FAMILY_SEED).to_numpy(), row=derived["row"].to_numpy())
        for values, begin in self._keys.groups():
            rows = values["row"]
            # Parents were added first, so they begin their group.
            found = rows[(rows != self._IS_PARENT) & (rows[begin] == self._IS_PARENT)]
            self._orphans.append(pl.DataFrame({"row": found}))
        self._keys.close()

    def follow(self, batch: Batch, reasons: Reasons) -> None:
        """Add the reason to each such rating of a batch."""
        for row in self._orphans.between(batch.first, batch.end)["row"]:
            detail = f"derived from the quarantined preference {batch.table['parent'][row - batch.first]}"
            reasons.setdefault(row, []).append(("derived", "parent_quarantined", detail))


def _bad_row(kind: Kind, row: dict[str, Any], reasons: list[tuple[str, str, str]]) -> dict[str, Any]:
    return quarantine_row(
        kind=kind,
        row=json_row(row),
        reasons=reasons,
        id=row["id"] or "",
        source=row["source"] or "",
        file=row["file"] or "",
        line=row["line"] or 0,
    )


def _examples(dataset: Path, kind: Kind, some: pl.DataFrame) -> list[Example]:
    origin = _origins(dataset, kind, set(some["row"]))
    examples: list[Example] = []
    for row, code, detail in some.iter_rows():
        name, source, line = origin[row]
        examples.append(Example(kind=kind, id=name, source=source, line=line, code=code, detail=detail))
    return examples


def _origins(dataset: Path, kind: Kind, numbers: set[int]) -> dict[int, tuple[str, str, int]]:
    """id, source and line of some rows."""
    origins: dict[int, tuple[str, str, int]] = {}
    if not numbers:
        return origins
    for batch in batches(dataset, kind, columns=["id", "source", "line"]):
        end = batch.first + batch.table.num_rows
        for number in sorted(n for n in numbers if batch.first <= n < end):
            row = batch.table.slice(number - batch.first, 1).to_pylist()[0]
            origins[number] = (row["id"] or "", row["source"] or "", row["line"] or 0)
        if len(origins) == len(numbers):
            break
    return origins


def _write_summary(dataset: Path, clean: Path, parts: Mapping[Kind, _Part]) -> None:
    rows: dict[str, SplitCounts] = {kind: part.splits for kind, part in parts.items()}
    path = dataset / SUMMARY_NAME
    if path.is_file():
        summary = IngestSummary.model_validate_json(path.read_text()).model_copy(update={"rows": rows})
    else:
        summary = IngestSummary(rows=rows, sources=[])
    (clean / SUMMARY_NAME).write_text(summary.model_dump_json(indent=2) + "\n")
