"""The Parquet form of a dataset: one Arrow schema a kind, written in batches, read back as records."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload

from tunegate.data.records import KINDS, Conversation, Kind, Preference, Prompt, Rating, Split
from tunegate.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

BATCH_ROWS = 8192
_PYTHON_ROWS = 512  # rows that wait as Python objects
QUARANTINE_NAME = "quarantine.parquet"
SUMMARY_NAME = "summary.json"

Record = Conversation | Preference | Rating | Prompt


def parquet_path(dataset: Path, kind: Kind) -> Path:
    """Where the rows of a kind lie in a dataset folder."""
    return dataset / f"{kind}.parquet"


def arrow_schema(kind: Kind) -> pa.Schema:
    """The columns of a kind.

    Beside the record's own fields: `scale` of the scores, `parent` (the record that a rating was derived from),
    `repeats` (how often the mixture wants a training row to be seen an epoch), `file` and `line` that it came from.
    """
    import pyarrow as pa

    text, number = pa.string(), pa.float64()
    messages = pa.list_(pa.struct([("role", text), ("content", text)]))
    own: dict[Kind, list[tuple[str, pa.DataType]]] = {
        "sft": [("messages", messages), ("topic", text)],
        "preferences": [
            ("prompt", messages),
            ("chosen", text),
            ("rejected", text),
            ("margin", number),
            ("chosen_score", number),
            ("rejected_score", number),
            ("rater", text),
            ("scale", pa.list_(number)),
            ("topic", text),
        ],
        "ratings": [
            ("prompt", messages),
            ("response", text),
            ("score", number),
            ("rater", text),
            ("scale", pa.list_(number)),
            ("topic", text),
            ("parent", text),
        ],
        "prompts": [("messages", messages), ("tag", text), ("hazard", text), ("extra", pa.map_(text, text))],
        "evaluation": [("messages", messages), ("tag", text), ("hazard", text), ("extra", pa.map_(text, text))],
    }
    tail = [("source", text), ("split", text), ("repeats", pa.int32()), ("file", text), ("line", pa.int64())]
    return pa.schema([("id", text), *own[kind], *tail])


def quarantine_schema() -> pa.Schema:
    """The columns of `quarantine.parquet`."""
    import pyarrow as pa

    text = pa.string()
    reason = pa.struct([("check", text), ("code", text), ("detail", text)])
    return pa.schema(
        [
            ("kind", text),
            ("id", text),
            ("source", text),
            ("file", text),
            ("line", pa.int64()),
            ("row", text),
            ("reasons", pa.list_(reason)),
        ]
    )


class TableWriter:
    """Writes rows to a Parquet file in batches; equal rows give equal bytes."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        import pyarrow.parquet as pq

        self.path = path
        self._schema = schema
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")
        self._rows: list[Mapping[str, Any]] = []
        self._batches: list[pa.RecordBatch] = []
        self._pending = 0
        self.count = 0

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._rows, self._batches = [], []
        self.close()

    def close(self) -> None:
        """Write what is left and close the file; a second call does nothing."""
        if self._writer.is_open:
            self._flush()
            self._writer.close()

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row; missing columns are null."""
        self._rows.append(row)
        self.count += 1
        # As Python objects rows take several times the memory.
        if len(self._rows) >= _PYTHON_ROWS:
            self._to_arrow()
        self._pending += 1
        if self._pending >= BATCH_ROWS:
            self._flush()

    def write_batch(self, batch: pa.RecordBatch | pa.Table) -> None:
        """Add a batch that already has the schema."""
        import pyarrow as pa

        self._flush()
        table = batch if isinstance(batch, pa.Table) else pa.Table.from_batches([batch])
        if table.num_rows:
            self._writer.write_table(table.cast(self._schema))
            self.count += table.num_rows

    def _to_arrow(self) -> None:
        import pyarrow as pa

        if self._rows:
            self._batches.append(pa.RecordBatch.from_pylist(self._rows, schema=self._schema))
            self._rows = []

    def _flush(self) -> None:
        import pyarrow as pa

        self._to_arrow()
        if self._batches:
            self._writer.write_table(pa.Table.from_batches(self._batches).combine_chunks())
            self._batches, self._pending = [], 0
            pa.default_memory_pool().release_unused()


def read_batches(
    file: pq.ParquetFile, *, rows: int, columns: Sequence[str] | None = None, groups: Sequence[int] | None = None
) -> Iterator[pa.RecordBatch]:
    """The rows of a Parquet file in batches, in memory that does not grow with the file.

    One row group after the other: a reader of several keeps what it has read until it ends.

    Args:
        file: The open file.
        rows: At most so many rows a batch.
        columns: Only these; None: all.
        groups: Only these row groups, in this order; None: all.
    """
    import pyarrow as pa

    for group in range(file.metadata.num_row_groups) if groups is None else groups:
        yield from file.iter_batches(batch_size=rows, columns=columns, row_groups=[group])
        # The allocator would keep more freed pages the longer it runs.
        pa.default_memory_pool().release_unused()


def quarantine_row(
    *, kind: str, row: Any, reasons: Iterable[tuple[str, str, str]], id: str, source: str, file: str, line: int
) -> dict[str, Any]:
    """A row of `quarantine.parquet`; `reasons` are (check, code, detail)."""
    shown = row if isinstance(row, str) else json.dumps(row, default=str)
    return {
        "kind": kind,
        "id": id,
        "source": source,
        "file": file,
        "line": line,
        "row": shown.encode("utf-8", "replace").decode(),
        "reasons": [{"check": c, "code": k, "detail": d.encode("utf-8", "replace").decode()} for c, k, d in reasons],
    }


def record_of(kind: Kind, row: Mapping[str, Any]) -> Record:
    """The record that a table row stands for."""
    common: dict[str, Any] = {"id": row["id"], "source": row["source"], "split": row["split"]}
    if kind == "sft":
        return Conversation(messages=row["messages"], topic=row["topic"], **common)
    if kind == "preferences":
        return Preference(
            prompt=row["prompt"],
            chosen=row["chosen"],
            rejected=row["rejected"],
            margin=row["margin"],
            chosen_score=row["chosen_score"],
            rejected_score=row["rejected_score"],
            rater=row["rater"],
            topic=row["topic"],
            **common,
        )
    if kind == "ratings":
        low, high = row["scale"]
        return Rating(
            prompt=row["prompt"],
            response=row["response"],
            score=row["score"],
            rater=row["rater"],
            scale=(low, high),
            topic=row["topic"],
            **common,
        )
    return Prompt(
        messages=row["messages"],
        tag=row["tag"],
        hazard=row["hazard"],
        extra=dict(row["extra"] or []),
        **common,
    )


@overload
def read_records(dataset: Path, kind: Literal["sft"], split: Split | None = None) -> list[Conversation]: ...
@overload
def read_records(dataset: Path, kind: Literal["preferences"], split: Split | None = None) -> list[Preference]: ...
@overload
def read_records(dataset: Path, kind: Literal["ratings"], split: Split | None = None) -> list[Rating]: ...
@overload
def read_records(dataset: Path, kind: Literal["prompts", "evaluation"], split: Split | None = None) -> list[Prompt]: ...
def read_records(dataset: Path, kind: Kind, split: Split | None = None) -> Any:
    """Read the records of one kind.

    A row that the mixture wants to be seen several times an epoch comes as often, all its repeats in a row.

    Args:
        dataset: A folder that `ingest` or `validate` wrote.
        kind: Which records.
        split: Only those of this split; None for all.

    Returns:
        The records, in the order of the file.

    Raises:
        DataError: The folder is no dataset, or `kind` is unknown.
    """
    import pyarrow.parquet as pq

    if kind not in KINDS:
        raise DataError("no such kind of record", key="kind", value=kind, fix="one of " + ", ".join(KINDS))
    path = parquet_path(dataset, kind)
    if not path.is_file():
        raise DataError(
            f"the dataset folder has no {path.name}", key=str(dataset), fix="run ingest (and validate) to make one"
        )
    records: list[Record] = []
    with pq.ParquetFile(path) as file:
        for batch in read_batches(file, rows=BATCH_ROWS):
            for row in batch.to_pylist():
                if split is None or row["split"] == split:
                    records.extend([record_of(kind, row)] * row["repeats"])
    return records
