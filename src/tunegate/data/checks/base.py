"""Batches, findings, and the few statistics that checks share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from tunegate.data.checks.spill import ByRow
from tunegate.data.config import CheckSpec
from tunegate.data.records import KINDS, Kind
from tunegate.data.results import Histogram, Interval
from tunegate.data.tables import parquet_path, read_batches

Action = Literal["quarantine", "redact", "report"]

FINDING_SCHEMA = pl.Schema({"row": pl.Int64, "code": pl.String, "detail": pl.String})
_Z95 = 1.959963984540054
# The responses of a pair or a rating are numbered after all turns of its prompt.
_RESPONSES_FROM = 1_000_000
# Some megabytes of text: enough for the vectorised parts, little enough for the caches.
_ROWS = 4096
_SPACES = ["\t", "\n", "\v", "\f", "\r", "  "]


@dataclass(frozen=True)
class Batch:
    """Some rows of one kind.

    Attributes:
        kind: Which records these are.
        table: The rows as they lie in the Parquet file.
        first: The number of the table's first row within the file.
        dropped: Numbers of rows that later checks must not look at, because their fields are broken.
    """

    kind: Kind
    table: pa.Table
    first: int
    dropped: frozenset[int] = frozenset()

    @property
    def end(self) -> int:
        """The number of the first row after the table's last one."""
        return self.first + int(self.table.num_rows)

    @cached_property
    def frame(self) -> pl.DataFrame:
        """The rows, with their number in the file as the column `row`."""
        frame = pl.DataFrame(self.table)
        frame = frame.with_columns(row=pl.int_range(self.first, self.first + frame.height, dtype=pl.Int64))
        return frame.filter(~pl.col("row").is_in(list(self.dropped))) if self.dropped else frame

    def without(self, rows: pl.Series) -> Batch:
        """The batch without some rows; the others keep their numbers."""
        return Batch(self.kind, self.table, self.first, self.dropped | frozenset(rows.to_list()))

    @cached_property
    def turns(self) -> pl.DataFrame:
        """Every text of the rows, ordered by row and place.

        Columns: `row`, `number`, `place` (`messages[0]`, `chosen`), `part` (`prompt` or `response`), `role`,
        `content`, and `folded`: the content without what does not make it a different text (compatibility forms,
        case, white space).
        """
        return _turns(self.kind, self.frame)


def _turns(kind: Kind, frame: pl.DataFrame) -> pl.DataFrame:
    chat = "prompt" if kind in ("preferences", "ratings") else "messages"
    length = pl.col(chat).list.len().cast(pl.Int32)
    turns = (
        frame.select("row", turn=pl.col(chat), number=pl.int_ranges(0, length, dtype=pl.Int32), last=length - 1)
        .explode("turn", "number")
        .filter(pl.col("turn").is_not_null())
        .unnest("turn")
    )
    is_answer = (pl.col("number") == pl.col("last")) & (pl.col("role") == "assistant") & (kind == "sft")
    parts = [
        turns.with_columns(
            place=pl.format(chat + "[{}]", "number"),
            part=pl.when(is_answer).then(pl.lit("response")).otherwise(pl.lit("prompt")),
        )
    ]
    for order, column in enumerate(c for c in ("chosen", "rejected", "response") if c in frame.columns):
        parts.append(
            frame.select(
                "row",
                role=pl.lit("assistant"),
                content=pl.col(column),
                number=pl.lit(_RESPONSES_FROM + order, dtype=pl.Int32),
                place=pl.lit(column),
                part=pl.lit("response"),
            )
        )
    columns = ["row", "number", "place", "part", "role", "content"]
    whole = pl.concat([part.select(columns) for part in parts])
    if len(parts) > 1:
        whole = whole.sort("row", "number", maintain_order=True)
    return whole.with_columns(folded(whole["content"]).alias("folded"))


def folded(texts: pl.Series) -> pl.Series:
    """Texts without what does not make them different ones: compatibility forms, case, white space."""
    # Most texts are ASCII and many have no white space but single spaces; each step is done where it does something.
    changed = _where(texts, texts.str.len_bytes() != texts.str.len_chars(), lambda some: some.str.normalize("NFKC"))
    lower = changed.str.to_lowercase()
    spaced = lower.str.contains_any(_SPACES) | (lower.str.len_bytes() != lower.str.len_chars())
    return _where(lower, spaced, lambda some: some.str.replace_all(r"\s+", " ")).str.strip_chars()


def _where(texts: pl.Series, mask: pl.Series, change: Callable[[pl.Series], pl.Series]) -> pl.Series:
    """The texts, with those under the mask changed."""
    places = mask.fill_null(False).arg_true()
    if places.is_empty():
        return texts
    return texts.scatter(places, change(texts.gather(places)))


def is_chat_turn() -> pl.Expr:
    """Whether a turn belongs to the chat itself, not to the responses beside it."""
    return pl.col("number") < _RESPONSES_FROM


class Check(ABC):
    """One check of the gate: looks at every batch, then says what it found.

    The state that `observe` gathers from disjoint parts of a dataset can be joined by `merge`, in the order of the
    parts; `finish` then gives what it would have given on the whole.

    Args:
        name: Its name in reports.
        spec: Its section of the spec.
        kinds: The kinds of record that it looks at.
        action: What becomes of the rows that it finds something in.
    """

    def __init__(
        self, name: str, spec: CheckSpec, *, kinds: Sequence[Kind] = KINDS, action: Action = "quarantine"
    ) -> None:
        self.name = name
        self.spec = spec
        self.kinds = tuple(kinds)
        self.action = action
        self.seen = 0
        self.threshold: float | None = spec.max_fraction
        self.failure = ""
        """Why the dataset as a whole is INVALID; empty when it is not because of this check."""
        self.skipped = ""
        """Why the check could not judge."""
        self.estimates: dict[str, Interval] = {}
        self.figures: dict[str, float] = {}
        self.histograms: dict[str, Histogram] = {}
        self._found = {kind: ByRow(FINDING_SCHEMA) for kind in KINDS}

    own: ClassVar[tuple[str, ...]] = ()
    """Attributes that a check makes for itself and that do not travel to another process with its state."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in self.own}

    @abstractmethod
    def observe(self, batch: Batch) -> None:
        """Look at a batch."""

    def merge(self, other: Self) -> None:
        """Add what the same check has gathered from another part of the dataset."""
        self.seen += other.seen
        for kind, found in other._found.items():
            self._found[kind].extend(found)

    def finish(self) -> None:  # noqa: B027 - a check of rows has nothing left to judge
        """Judge, after the last batch."""

    def spill_to(self, folder: Path) -> None:
        """Keep findings in files of this folder."""
        for kind, found in self._found.items():
            found.spill_to(folder / f"{self.name}.{kind}.found")

    def add(self, kind: Kind, found: pl.DataFrame) -> None:
        """Note findings."""
        self._found[kind].append(found)

    def found(self, kind: Kind) -> Iterator[pl.DataFrame]:
        """All findings in the rows of a kind, by row, in frames of limited size that share no row."""
        return self._found[kind].parts()

    def found_between(self, kind: Kind, first: int, end: int) -> pl.DataFrame:
        """The findings in the rows of a kind from `first` to before `end`, by row."""
        return self._found[kind].between(first, end)


class RowCheck(Check):
    """A check that judges each row by itself, by a pure function from a batch to findings."""

    own = ("_find",)

    def __init__(
        self,
        name: str,
        spec: CheckSpec,
        find: Callable[[Batch], pl.DataFrame],
        *,
        kinds: Sequence[Kind] = KINDS,
        action: Action = "quarantine",
    ) -> None:
        super().__init__(name, spec, kinds=kinds, action=action)
        self._find = find

    def observe(self, batch: Batch) -> None:
        """Look at a batch."""
        self.rows_found(batch)

    def rows_found(self, batch: Batch) -> pl.Series:
        """Look at a batch; the rows that something was found in."""
        self.seen += batch.frame.height
        found = self._find(batch)
        self.add(batch.kind, found)
        return found["row"].unique()


def batches(dataset: Path, kind: Kind, *, rows: int = _ROWS, columns: Sequence[str] | None = None) -> Iterator[Batch]:
    """The rows of a kind, batch by batch, in the order of the file; all columns or some."""
    first = 0
    with pq.ParquetFile(parquet_path(dataset, kind)) as file:
        for record_batch in read_batches(file, rows=rows, columns=columns):
            yield Batch(kind, pa.Table.from_batches([record_batch]), first)
            first += record_batch.num_rows


def findings(frame: pl.DataFrame | None = None) -> pl.DataFrame:
    """Findings with their columns in order: `row`, `code`, `detail`; none when called without a frame."""
    if frame is None:
        return pl.DataFrame(schema=FINDING_SCHEMA)
    return frame.select(pl.col(name).cast(dtype) for name, dtype in FINDING_SCHEMA.items())


def first_per_row(found: pl.DataFrame) -> pl.DataFrame:
    """At most one finding of each code a row."""
    return found.unique(subset=["row", "code"], keep="first", maintain_order=True)


def wilson(successes: int, n: int) -> Interval:
    """The 95% score interval of a proportion (Wilson 1927, JASA 22:209); (0, 1) when nothing was seen."""
    if n == 0:
        return Interval(estimate=0.0, low=0.0, high=1.0, n=0)
    p, z2 = successes / n, _Z95 * _Z95
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # Rounding must not push the estimate out of its own interval at 0 and 1.
    return Interval(estimate=p, low=min(p, max(0.0, centre - half)), high=max(p, min(1.0, centre + half)), n=n)


def json_row(row: dict[str, Any]) -> dict[str, Any]:
    """A table row as it should be read in the quarantine: without the fields that are null."""
    return {name: value for name, value in row.items() if value is not None}
