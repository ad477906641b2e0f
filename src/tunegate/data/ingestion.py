"""Read sources, recognise and convert their rows, split by prompt, mix, and write one dataset folder."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunegate.data.config import DataSpec, SourceSpec
from tunegate.data.faults import RowError
from tunegate.data.formats import convert
from tunegate.data.hashing import hash64, prompt_key, split_of
from tunegate.data.readers import Limits, RawRow
from tunegate.data.records import KINDS, Kind, Messages, Split
from tunegate.data.results import IngestSummary, SourceSummary, SplitCounts
from tunegate.data.sources import open_source
from tunegate.data.tables import (
    BATCH_ROWS,
    QUARANTINE_NAME,
    SUMMARY_NAME,
    TableWriter,
    arrow_schema,
    parquet_path,
    quarantine_row,
    quarantine_schema,
    read_batches,
)
from tunegate.errors import DataError
from tunegate.observer import Observer

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

_PROGRESS_ROWS = 5000
# Ratings and prompts may be derived from SFT and preferences, which therefore come first.
_ORDER: tuple[Kind, ...] = ("sft", "preferences", "ratings", "prompts", "evaluation")
_MIXED: tuple[Kind, ...] = ("sft", "preferences")
_DERIVED: tuple[Kind, ...] = ("ratings", "prompts")


def ingest(spec: DataSpec, out: Path, *, base_dir: Path, seed: int, observer: Observer) -> IngestSummary:
    """Make a dataset of all sources of a spec.

    Writes `sft.parquet`, `preferences.parquet`, `ratings.parquet`, `prompts.parquet`, `evaluation.parquet`,
    `summary.json`, and `quarantine.parquet` with every row that could not be understood.

    Args:
        spec: The sources, the mixture and the share that is held out.
        out: The folder to write; made when it does not exist.
        base_dir: What relative paths in the spec are relative to.
        seed: Decides which rows a cap or a mixture takes; the split does not depend on it.
        observer: Is told the progress, in rows.

    Returns:
        What was read, kept and quarantined, by source.

    Raises:
        DataError: A source is missing, unreadable or has no usable row, or the spec names no source at all.
    """
    if not any(getattr(spec, kind) for kind in KINDS):
        raise DataError(
            "the spec names no source of data",
            key="data",
            fix="give data.sft and data.preferences, e.g. sft: [starter:sft.jsonl]",
        )
    out.mkdir(parents=True, exist_ok=True)
    return _Ingestion(spec, out, base_dir, seed, observer).run()


@dataclass
class _Queue:
    """The records of one source that await selection, in the order they were read."""

    places: array[int] = field(default_factory=lambda: array("Q"))
    in_train: bytearray = field(default_factory=bytearray)


class _Firsts:
    """Derived rows of a kind, of which only the first with each key is kept; on disk until all are known.

    Args:
        folder: For temporary files.
        kind: Whose rows these are.
    """

    def __init__(self, folder: Path, kind: Kind) -> None:
        import numpy as np

        from tunegate.data.checks.spill import Keyed

        self._rows = TableWriter(folder / f".{kind}.derived.parquet", arrow_schema(kind))
        self._keys = Keyed(folder / f".{kind}.keys", [("row", np.int64)])
        self._waiting = array("Q")

    def write(self, row: Mapping[str, Any], key: int) -> None:
        """Add a row."""
        self._rows.write(row)
        self._waiting.append(key)
        if len(self._waiting) >= BATCH_ROWS:
            self._spill()

    def _spill(self) -> None:
        import numpy as np

        keys = np.frombuffer(self._waiting, np.uint64)
        self._keys.append(key=keys, row=self._rows.count - len(keys) + np.arange(len(keys)))
        self._waiting = array("Q")

    def kept(self) -> Iterator[pa.Table]:
        """The rows that are kept, in their order."""
        import numpy as np
        import pyarrow as pa
        import pyarrow.parquet as pq

        from tunegate.data.checks.spill import Marks

        self._spill()
        self._rows.close()
        first = Marks(self._rows.count)
        for values, begin in self._keys.groups():
            first.add(values["row"][begin == np.arange(len(values))])
        start = 0
        with pq.ParquetFile(self._rows.path) as file:
            for batch in read_batches(file, rows=BATCH_ROWS):
                kept = first[np.arange(start, start + batch.num_rows)]
                yield pa.Table.from_batches([batch]).filter(pa.array(kept))
                start += batch.num_rows

    def close(self) -> None:
        """Remove the files."""
        self._rows.close()
        self._rows.path.unlink(missing_ok=True)
        self._keys.close()


class _Ingestion:
    def __init__(self, spec: DataSpec, out: Path, base_dir: Path, seed: int, observer: Observer) -> None:
        self.spec = spec
        self.out = out
        self.base_dir = base_dir
        self.seed = seed
        self.observer = observer
        self.limits = Limits(spec.max_line_bytes, spec.max_decompression_ratio)
        self.counts: Counter[tuple[Kind, Split]] = Counter()
        self.summaries: list[SourceSummary] = []
        self.done = 0
        raters = spec.raters
        # Ratings that are brought together wait here until all are known.
        self.waiting: list[dict[str, Any]] | None = [] if raters.normalise or raters.merge or raters.pairs else None

    def run(self) -> IngestSummary:
        with ExitStack() as stack:
            self.writers: dict[Kind, TableWriter] = {
                kind: stack.enter_context(TableWriter(parquet_path(self.out, kind), arrow_schema(kind)))
                for kind in KINDS
            }
            self.quarantine = stack.enter_context(TableWriter(self.out / QUARANTINE_NAME, quarantine_schema()))
            self.derived = {kind: stack.enter_context(closing(_Firsts(self.out, kind))) for kind in _DERIVED}
            for kind in _ORDER:
                self._kind(kind)
                if kind == "ratings" and self.waiting:
                    self._bring_together(self.waiting)
            for kind, firsts in self.derived.items():
                for table in firsts.kept():
                    self.writers[kind].write_batch(table)
                    for split, n in Counter(table["split"].to_pylist()).items():
                        self.counts[kind, split] += n
        self.observer.progress(self.done, self.done, "row", "ingest")
        rows: dict[str, SplitCounts] = {
            kind: SplitCounts(train=self.counts[kind, "train"], heldout=self.counts[kind, "heldout"]) for kind in KINDS
        }
        derived = {}
        if not self.spec.preferences and rows["preferences"].total:
            derived["preferences"] = "ratings"
        if not self.spec.ratings and rows["ratings"].total:
            derived["ratings"] = "preferences with scores"
        if not self.spec.prompts and rows["prompts"].total:
            derived["prompts"] = "prompts of SFT and preference records"
        summary = IngestSummary(
            rows=rows,
            sources=self.summaries,
            derived=derived,
            quarantined=self.quarantine.count,
            heldout_fraction=self.spec.heldout_fraction,
            mixture=self.spec.mixture.strategy,
            seed=self.seed,
        )
        (self.out / SUMMARY_NAME).write_text(summary.model_dump_json(indent=2) + "\n")
        return summary

    def _kind(self, kind: Kind) -> None:
        sources: list[SourceSpec] = getattr(self.spec, kind)
        mixed = kind in _MIXED and self.spec.mixture.strategy != "all"
        staging: TableWriter | None = None
        if mixed or any(source.cap is not None for source in sources):
            # Which records are taken is known only when all have been seen.
            staging = TableWriter(self.out / f".{kind}.staging.parquet", arrow_schema(kind))
        summaries = []
        queues = []
        try:
            for number, source in enumerate(sources):
                queue = _Queue()
                summaries.append(self._source(kind, source, f"data.{kind}[{number}]", staging, queue))
                queues.append(queue)
            if staging is not None:
                staging.close()
                self._select(kind, sources, summaries, queues, staging.path, mixed)
        finally:
            if staging is not None:
                staging.close()
                staging.path.unlink(missing_ok=True)
        total = sum(summary.epochs * summary.records.train for summary in summaries)
        for summary in summaries:
            if kind in _MIXED and total:
                summary.share = summary.epochs * summary.records.train / total
        self.summaries.extend(summaries)

    def _source(
        self, kind: Kind, source: SourceSpec, key: str, staging: TableWriter | None, queue: _Queue
    ) -> SourceSummary:
        summary = SourceSummary(kind=kind, name=source.name, uri=source.uri, files=[])
        reasons: Counter[str] = Counter()
        converted = 0
        with open_source(source, base_dir=self.base_dir, key=f"{key}.uri", scratch=self.out) as files:
            for file in files:
                summary.files.append(file.label)
                for raw in file.rows(self.limits, f"{key}.uri"):
                    summary.rows_read += 1
                    self._count()
                    try:
                        for row in _records(kind, raw, source):
                            converted += 1
                            self._place(kind, row, file.label, raw.line)
                            if staging is None:
                                self._keep(kind, row, summary)
                            else:
                                self._queue(row, staging, queue)
                    except RowError as fault:
                        reasons[fault.code] += 1
                        self._reject(kind, raw, source, file.label, fault)
        summary.quarantined = reasons.total()
        summary.reasons = dict(sorted(reasons.items()))
        if not summary.rows_read:
            raise DataError(
                "the source has no rows", key=f"{key}.uri", value=source.uri, fix="check how it was exported"
            )
        if not converted:
            most = reasons.most_common(1)[0][0]
            raise DataError(
                f"none of the source's {summary.rows_read} rows can be used as {kind}; most frequent reason: {most}",
                key=f"{key}.uri",
                value=source.uri,
                fix=f"check that it holds {kind}, or give a field map; see {QUARANTINE_NAME} for every row",
            )
        return summary

    def _place(self, kind: Kind, row: dict[str, Any], file: str, line: int) -> None:
        split = "heldout" if kind == "evaluation" else split_of(_prompt(row), self.spec.heldout_fraction)
        row |= {"split": split, "repeats": 1, "file": file, "line": line}

    def _queue(self, row: dict[str, Any], staging: TableWriter, queue: _Queue) -> None:
        from tunegate.data.mixture import queue_place

        staging.write(row)
        queue.places.append(queue_place(self.seed, row["id"]))
        queue.in_train.append(row["split"] == "train")

    def _reject(self, kind: Kind, raw: RawRow, source: SourceSpec, file: str, fault: RowError) -> None:
        self.quarantine.write(
            quarantine_row(
                kind=kind,
                row=raw.text if raw.fault is not None else raw.value,
                reasons=[("ingest", fault.code, fault.detail)],
                id="",
                source=source.name,
                file=file,
                line=raw.line,
            )
        )

    def _select(
        self,
        kind: Kind,
        sources: list[SourceSpec],
        summaries: list[SourceSummary],
        queues: list[_Queue],
        staged: Path,
        mixed: bool,
    ) -> None:
        """Take from the staged records those that caps and mixture want, each as often as they want."""
        import numpy as np
        import pyarrow.parquet as pq

        counts = self._repeats(sources, queues, mixed)
        for summary, taken, queue in zip(summaries, counts, queues, strict=True):
            train = np.frombuffer(queue.in_train, bool)
            kept = int(np.count_nonzero(taken[train]))
            summary.left_out = int(np.count_nonzero(taken == 0))
            summary.epochs = float(taken[train].sum()) / kept if kept else 0.0
        of_row = np.concatenate(counts) if counts else np.zeros(0, np.int32)
        which = np.repeat(np.arange(len(counts)), [len(c) for c in counts])
        first = 0
        with pq.ParquetFile(staged) as file:
            for batch in read_batches(file, rows=BATCH_ROWS):
                for offset, row in enumerate(batch.to_pylist()):
                    number = first + offset
                    if of_row[number]:
                        self._keep(kind, row | {"repeats": int(of_row[number])}, summaries[which[number]])
                first += batch.num_rows

    def _repeats(self, sources: list[SourceSpec], queues: list[_Queue], mixed: bool) -> list[npt.NDArray[np.int32]]:
        """How often each record of each source is to be seen; 0: it is left out."""
        import numpy as np

        from tunegate.data.mixture import Supply, plan, repeats

        taken = []
        for source, queue in zip(sources, queues, strict=True):
            places = np.frombuffer(queue.places, np.uint64)
            taken.append(repeats(places, min(len(places), source.cap or len(places))))
        if not mixed:
            return taken
        trains = [
            np.frombuffer(queue.in_train, bool) & (counts > 0) for queue, counts in zip(queues, taken, strict=True)
        ]
        supplies = [
            Supply(source.name, int(train.sum()), source.weight) for source, train in zip(sources, trains, strict=True)
        ]
        for queue, counts, train, rows in zip(queues, taken, trains, plan(supplies, self.spec.mixture), strict=True):
            counts[train] = repeats(np.frombuffer(queue.places, np.uint64)[train], rows)
        return taken

    def _bring_together(self, rows: list[dict[str, Any]]) -> None:
        """Write the ratings as `spec.raters` wants them, and the preferences that they imply."""
        from tunegate.data.ratings import mean_ratings, normalise_raters, preferences_of
        from tunegate.data.records import Rating

        raters = self.spec.raters
        ratings = [
            Rating(
                id=str(number),
                prompt=row["prompt"],
                response=row["response"],
                score=row["score"],
                rater=row["rater"],
                scale=(row["scale"][0], row["scale"][1]),
            )
            for number, row in enumerate(rows)
        ]
        if raters.normalise:
            ratings = normalise_raters(ratings)
        pairs = preferences_of(ratings, min_gap=raters.min_gap) if raters.pairs and not self.spec.preferences else []
        for rating in mean_ratings(ratings) if raters.merge else ratings:
            self._write("ratings", rows[int(rating.id)] | {"score": rating.score, "rater": rating.rater})
        for pair in pairs:
            better, worse = (rows[int(number)] for number in pair.id.split(">"))
            row = {key: better[key] for key in ("prompt", "scale", "topic", "source", "split", "file", "line")}
            row |= {
                "id": f"{better['id']}>{worse['id']}",
                "chosen": pair.chosen,
                "rejected": pair.rejected,
                "repeats": 1,
            }
            row |= {"chosen_score": pair.chosen_score, "rejected_score": pair.rejected_score, "margin": pair.margin}
            self._write("preferences", row)
            self._derive("preferences", row)

    def _keep(self, kind: Kind, row: dict[str, Any], summary: SourceSummary) -> None:
        setattr(summary.records, row["split"], getattr(summary.records, row["split"]) + 1)
        if kind == "ratings" and self.waiting is not None:
            self.waiting.append(row)
            return
        self._write(kind, row)
        self._derive(kind, row)

    def _derive(self, kind: Kind, row: dict[str, Any]) -> None:
        messages = _prompt(row)
        if kind == "preferences" and not self.spec.ratings:
            for rating in _ratings_of(row):
                key = hash64(str(prompt_key(messages)), rating["response"], rating["rater"] or "", str(rating["score"]))
                self.derived["ratings"].write(rating, key)
        if kind in ("sft", "preferences") and not self.spec.prompts:
            prompt = messages[:-1] if kind == "sft" else messages
            if prompt and prompt[-1]["role"] == "user":
                key = prompt_key(prompt)
                self.derived["prompts"].write(_prompt_of(row, prompt, key), key)

    def _write(self, kind: Kind, row: Mapping[str, Any]) -> None:
        self.writers[kind].write(row)
        self.counts[kind, row["split"]] += 1

    def _count(self) -> None:
        self.done += 1
        if self.done % _PROGRESS_ROWS == 0:
            self.observer.progress(self.done, 0, "row", "ingest")


def _prompt(row: Mapping[str, Any]) -> Messages:
    messages: Messages = row["messages"] if "messages" in row else row["prompt"]
    return messages


def _records(kind: Kind, raw: RawRow, source: SourceSpec) -> Iterator[dict[str, Any]]:
    if raw.fault is not None:
        raise raw.fault
    yield from convert(kind, raw.value, source)


def _ratings_of(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The ratings that a scored preference implies: one a response."""
    if row["chosen_score"] is None or row["rejected_score"] is None:
        return
    for side in ("chosen", "rejected"):
        yield {
            **{k: row[k] for k in ("prompt", "rater", "topic", "source", "split", "file", "line")},
            "id": f"{row['id']}/{side}",
            "response": row[side],
            "score": row[f"{side}_score"],
            "scale": row["scale"],
            "parent": row["id"],
            "repeats": row["repeats"],
        }


def _prompt_of(row: Mapping[str, Any], prompt: Messages, key: int) -> dict[str, Any]:
    return {
        **{k: row[k] for k in ("source", "split", "file", "line")},
        "id": f"prompt-{key:016x}",
        "messages": prompt,
        "tag": "train",
        "hazard": None,
        "extra": [],
        "repeats": 1,
    }
