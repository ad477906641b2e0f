"""What the sources of a spec hold, counted before anything runs, and the gates that can never pass with that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from tunegate.config import TuneSpec
from tunegate.data.config import SourceSpec
from tunegate.data.faults import RowError
from tunegate.data.formats import convert
from tunegate.data.hashing import split_of
from tunegate.data.readers import Limits
from tunegate.data.sources import open_source
from tunegate.errors import TunegateError
from tunegate.gates.power import Supply, contradictions

_COUNTED_BYTES = 32 * 2**20
"""Larger files, and those on S3, are not read for this."""


def gate_contradictions(spec: TuneSpec) -> list[str]:
    """Gates that no candidate can pass with these settings and sources, each with what would be right.

    Args:
        spec: The run; relative paths are resolved.

    Returns:
        Sentences; empty when every gate can be passed. What only counts from the second release on says so.
    """
    supply = read_supply(spec)
    first = contradictions(spec.gates, spec.evaluation, champion=False, supply=supply)
    later = contradictions(spec.gates, spec.evaluation, champion=True, supply=supply)
    return [*first, *(f"once there is a champion: {line}" for line in later if line not in first)]


def read_supply(spec: TuneSpec) -> Supply:
    """Count evaluation prompts by tag and held-out pairs and conversations, where reading the sources is quick.

    Args:
        spec: The run; relative paths are resolved.

    Returns:
        Upper bounds: duplicates and rows that validation will quarantine are counted too.
    """
    prompts = _count(spec, "evaluation", spec.data.evaluation)
    pairs = _count(spec, "preferences", spec.data.preferences)
    conversations = _count(spec, "sft", spec.data.sft)
    return Supply(
        prompts=prompts,
        heldout_pairs=None if pairs is None else pairs["heldout"],
        heldout_conversations=None if conversations is None else conversations["heldout"],
    )


_Counted = Literal["evaluation", "preferences", "sft"]


def _count(spec: TuneSpec, kind: _Counted, sources: Sequence[SourceSpec]) -> Counter[str] | None:
    """Rows by tag (evaluation prompts) or split (the others); None when there is a source that was not read."""
    total: Counter[str] = Counter()
    for source in sources:
        found: Counter[str] = Counter()
        try:
            for row in _rows(spec, kind, source):
                messages = row["messages"] if "messages" in row else row["prompt"]
                found[row["tag"] if kind == "evaluation" else split_of(messages, spec.data.heldout_fraction)] += 1
        except (TunegateError, OSError):
            return None  # too large, not here, or broken, which the stage that reads it for good will say
        most = source.cap
        total.update(found if most is None else {name: min(n, most) for name, n in found.items()})
    return total if sources else None


def _rows(spec: TuneSpec, kind: _Counted, source: SourceSpec) -> Iterator[dict[str, Any]]:
    """The rows of a source that can be understood."""
    if source.uri.startswith(("s3://", "hf://")):
        raise TunegateError("sources elsewhere are not read for a count", key=source.uri)
    limits = Limits(spec.data.max_line_bytes, spec.data.max_decompression_ratio)
    with open_source(source, base_dir=Path.cwd(), key=f"data.{kind}") as opened:
        files = list(opened)
        if sum(file.size for file in files) > _COUNTED_BYTES:
            raise TunegateError("the source is too large to be read for a count", key=source.uri)
        for file in files:
            for raw in file.rows(limits, f"data.{kind}"):
                if raw.fault is not None:
                    continue
                try:
                    yield from convert(kind, raw.value, source)
                except RowError:
                    continue
