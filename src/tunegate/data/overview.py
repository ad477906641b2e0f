"""What a dataset folder holds, at a glance: counts, splits and lengths by source, and a few rows to look at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from tunegate.data.records import KINDS, Kind
from tunegate.data.tables import parquet_path
from tunegate.errors import DataError

if TYPE_CHECKING:
    import polars as pl


class SourceStats(BaseModel):
    """The rows of one kind from one source."""

    model_config = ConfigDict(extra="forbid")

    kind: str
    source: str
    rows: int
    train: int
    heldout: int
    seen: int
    """Training rows with their repeats: what one epoch of the mixture sees."""
    prompt_characters: float
    """Median."""
    response_characters: float | None
    """Median over all responses; None for kinds without."""
    tags: dict[str, int]
    """Of prompts and evaluation prompts."""


def dataset_stats(dataset: Path) -> list[SourceStats]:
    """Count a dataset's rows.

    Args:
        dataset: A folder that `ingest` or `validate` wrote.

    Returns:
        One entry a kind and source, in the order of the kinds, sources by name.

    Raises:
        DataError: The folder is no dataset.
    """
    import polars as pl

    stats = []
    for kind in KINDS:
        rows = pl.scan_parquet(_existing(dataset, kind))
        chat = "prompt" if kind in ("preferences", "ratings") else "messages"
        turns = pl.col(chat).list.slice(0, pl.col(chat).list.len() - 1) if kind == "sft" else pl.col(chat)
        characters = turns.list.eval(pl.element().struct.field("content").str.len_chars()).list.sum()
        answers = {
            "sft": pl.col("messages").list.last().struct.field("content").str.len_chars(),
            "preferences": (pl.col("chosen").str.len_chars() + pl.col("rejected").str.len_chars()) / 2,
            "ratings": pl.col("response").str.len_chars(),
        }
        in_train = pl.col("split") == "train"
        table = (
            rows.group_by("source")
            .agg(
                rows=pl.len(),
                train=in_train.sum(),
                seen=pl.col("repeats").filter(in_train).sum(),
                prompt=characters.median(),
                response=answers.get(kind, pl.lit(None)).cast(pl.Float64).median(),
                tags=pl.col("tag").value_counts() if kind in ("prompts", "evaluation") else pl.lit(None).first(),
            )
            .sort("source")
            .collect()
        )
        for row in table.iter_rows(named=True):
            stats.append(
                SourceStats(
                    kind=kind,
                    source=row["source"],
                    rows=row["rows"],
                    train=row["train"],
                    heldout=row["rows"] - row["train"],
                    seen=row["seen"],
                    prompt_characters=row["prompt"] or 0.0,
                    response_characters=row["response"],
                    tags={t["tag"]: t["count"] for t in sorted(row["tags"] or [], key=lambda t: str(t["tag"]))},
                )
            )
    return stats


def sample_rows(dataset: Path, kind: Kind, n: int, seed: int = 0, *, source: str | None = None) -> list[dict[str, Any]]:
    """A few rows of a kind, drawn evenly.

    Args:
        dataset: The folder.
        kind: Which records.
        n: At most so many.
        seed: Of the draw.
        source: Only rows of this source; None: of all.

    Returns:
        The rows as they lie in the file, in its order.

    Raises:
        DataError: The folder is no dataset, or has no row of this source.
    """
    import polars as pl

    rows = pl.scan_parquet(_existing(dataset, kind))
    if source is not None:
        rows = rows.filter(pl.col("source") == source)
        if rows.select(pl.len()).collect().item() == 0:
            raise DataError(f"there is no {kind} row of this source", key="--source", value=source)
    return _sample(rows, n, seed)


def sample_quarantine(
    file: Path, n: int, *, source: str | None = None, reason: str | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """A few rows of a `quarantine.parquet`, drawn evenly.

    Args:
        file: The file.
        n: At most so many.
        source: Only rows of this source; None: of all.
        reason: Only rows that this check, or this code, put there; None: all.
        seed: Of the draw.

    Returns:
        The rows with their reasons, in the order of the file.

    Raises:
        DataError: There is no such file, or it is none that `mix` or `validate` wrote.
    """
    import polars as pl

    try:
        rows = pl.scan_parquet(file)
        names = set(rows.collect_schema().names())
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(f"the file cannot be read: {str(error)[:200]}", key=str(file), fix="check the path") from error
    if source is not None and "source" in names:
        rows = rows.filter(pl.col("source") == source)
    if reason is not None:
        if "reasons" not in names:
            raise DataError("the file is no quarantine: it has no reasons", key=str(file), fix="leave --reason out")
        of_reason = pl.element().struct.field("check").eq(reason) | pl.element().struct.field("code").eq(reason)
        rows = rows.filter(pl.col("reasons").list.eval(of_reason).list.any())
    return _sample(rows, n, seed)


def _sample(rows: pl.LazyFrame, n: int, seed: int) -> list[dict[str, Any]]:
    import polars as pl

    frame = rows.with_row_index("place")
    total = int(frame.select(pl.len()).collect().item())
    chosen = pl.int_range(total, eager=True).sample(min(n, total), seed=seed).sort()
    return frame.filter(pl.col("place").is_in(chosen.implode())).drop("place").collect().to_dicts()


def _existing(dataset: Path, kind: Kind) -> Path:
    path = parquet_path(dataset, kind)
    if not path.is_file():
        raise DataError(f"the dataset folder has no {path.name}", key=str(dataset), fix="run ingest to make one")
    return path
