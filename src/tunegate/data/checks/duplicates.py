"""The same record twice, and almost the same record twice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import polars as pl

from tunegate.data.checks.base import Batch, Check, findings
from tunegate.data.checks.keys import text_keys
from tunegate.data.checks.shingles import jaccard, mixed, shingle_hashes, shingle_set
from tunegate.data.checks.spill import Column, Keyed, Marks, Texts
from tunegate.data.config import CheckSpec, NearDuplicatesCheck
from tunegate.data.records import KINDS, Kind

_SIGNATURE_SEED = 7
_MAX_PERMUTATIONS = 128
_NEIGHBOURS = 4
_REMEMBERED = 1 << 18
_FIELD_MARK = 0xD1B54A32D192ED03  # any odd constant


class Repeated(Check):
    """Rows whose key an earlier row of the same kind has.

    Args:
        name: The check's name.
        spec: Its section.
        by: `text` (the record's own content) or `id`.
        folder: For temporary files.
    """

    def __init__(self, name: str, spec: CheckSpec, *, by: str, folder: Path) -> None:
        super().__init__(name, spec)
        self._by = by
        self._keys = {kind: Keyed(folder / f"{name}.{kind}", [("row", np.int64)]) for kind in KINDS}

    def observe(self, batch: Batch) -> None:
        """Keep the keys of a batch."""
        self.seen += batch.frame.height
        keys = batch.frame.select("row", key=pl.col("id").hash(1)) if self._by == "id" else _content_keys(batch)
        self._keys[batch.kind].append(key=keys["key"].to_numpy(), row=keys["row"].to_numpy())

    def merge(self, other: Self) -> None:
        """Add the keys of another part."""
        super().merge(other)
        for kind, keys in other._keys.items():
            for piece in keys.pieces():
                self._keys[kind].append(key=piece["key"], row=piece["row"])

    def finish(self) -> None:
        """Find every row but the first of each group of equal keys."""
        code, what = ("duplicate_id", "id") if self._by == "id" else ("exact_duplicate", "text")
        detail = pl.format(f"the same {what} as row {{}}", "first")
        for kind, keys in self._keys.items():
            for values, begin in keys.groups():
                later = begin != np.arange(len(values))
                first = values["row"][begin]
                frame = pl.DataFrame({"row": values["row"][later], "first": first[later]})
                self.add(kind, findings(frame.select("row", code=pl.lit(code), detail=detail)))
            keys.close()


def _content_keys(batch: Batch) -> pl.DataFrame:
    keys = text_keys(batch)
    if batch.kind != "ratings":
        return keys
    # Several people's scores of one response are no duplicates of each other.
    rest = batch.frame.select("row", rest=pl.struct("rater", "score", "scale").hash(1))
    return keys.join(rest, on="row", maintain_order="left").select("row", key=pl.struct("key", "rest").hash(1))


def banding(threshold: float, recall: float) -> tuple[int, int]:
    """The number of bands and of rows a band for locality-sensitive hashing.

    A pair of Jaccard similarity s falls together in at least one of b bands of r rows with probability
    1 - (1 - s^r)^b (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, 3.4.2). The most selective banding that
    reaches the recall at the threshold within the budget of permutations is taken.

    Args:
        threshold: Similarity of the pairs that must be found.
        recall: Share of them that must be found.

    Returns:
        (bands, rows a band).
    """
    best = (_MAX_PERMUTATIONS, 1)
    for rows in range(1, _MAX_PERMUTATIONS + 1):
        together = threshold**rows
        bands = 1 if together >= recall else math.ceil(math.log1p(-recall) / math.log1p(-together))
        if bands * rows > _MAX_PERMUTATIONS:
            break
        best = (bands, rows)
    return best


class NearDuplicates(Check):
    """Rows whose prompt and whose responses are each almost those of one earlier row.

    The prompt and each response are compared with their own counterpart only: two pairs with one prompt and two
    different answers are no duplicates, and neither are a chosen and a rejected answer that look alike.

    Candidates come from MinHash signatures (rensa) of the union of the fields' shingles, each marked with its field:
    when every field has Jaccard similarity of at least t, so has the union (the mediant of the fractions). Every
    candidate pair is then compared exactly.

    Args:
        spec: Threshold and recall.
        exact: The check for exact duplicates, whose rows are not reported a second time; None when it is off.
        folder: For temporary files.
    """

    own = ("_exact",)

    def __init__(self, spec: NearDuplicatesCheck, *, exact: Repeated | None, folder: Path) -> None:
        super().__init__("near_duplicates", spec, kinds=("sft", "preferences", "prompts"))
        self.threshold = spec.max_fraction
        self._limit = spec.threshold
        self._exact = exact
        self._bands, self._rows_a_band = banding(spec.threshold, spec.recall)
        self._state = {kind: _Sketches(folder, kind, self._bands) for kind in self.kinds}

    def observe(self, batch: Batch) -> None:
        """Keep the sketches and texts of a batch."""
        self.seen += batch.frame.height
        rows, items = _fields(batch)
        if not items:
            return
        width = len(items[0])
        hashes, offsets = shingle_hashes([text for item in items for text in item])
        # Each field's shingles are marked, so that a prompt is never like a response.
        marks = np.arange(width, dtype=np.uint64) * np.uint64(_FIELD_MARK)
        hashes += np.repeat(np.tile(marks, len(items)), np.diff(offsets))
        signatures = _signatures(hashes, offsets[::width], self._bands * self._rows_a_band)
        self._state[batch.kind].append(rows, items, _band_hashes(signatures, self._bands))

    def merge(self, other: Self) -> None:
        """Add the sketches of another part."""
        super().merge(other)
        for kind, state in other._state.items():
            self._state[kind].extend(state)

    def finish(self) -> None:
        """Compare the candidates."""
        detail = pl.format("almost row {} (similarity at least {} in every part)", "near", "similarity")
        for kind, state in self._state.items():
            for near in state.search(self._limit, partial(self._is_exact, kind)):
                self.add(kind, findings(near.select("row", code=pl.lit("near_duplicate"), detail=detail)))
            state.close()

    def _is_exact(self, kind: Kind, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which of some rows are exact duplicates."""
        if self._exact is None or not len(rows):
            return np.zeros(len(rows), dtype=bool)
        exact = self._exact.found_between(kind, int(rows.min()), int(rows.max()) + 1)
        return np.isin(rows, exact["row"].to_numpy())


def _fields(batch: Batch) -> tuple[npt.NDArray[np.int64], list[list[str]]]:
    """The rows, and for each the texts that are compared: its prompt, then its responses."""
    clean = pl.col("folded").str.replace_all("[\\x1e\\x00]", " ")
    is_prompt = pl.col("part") == "prompt"
    grouped = batch.turns.group_by("row", maintain_order=True).agg(
        prompt=clean.filter(is_prompt).str.join("\n"), responses=clean.filter(~is_prompt)
    )
    wanted = {"sft": 1, "preferences": 2, "prompts": 0}[batch.kind]
    # An SFT row without an answer is the structure check's business.
    grouped = grouped.filter(pl.col("responses").list.len() == wanted)
    items = [[prompt, *responses] for prompt, responses in grouped.select("prompt", "responses").iter_rows()]
    return grouped["row"].to_numpy(), items


def _signatures(hashes: npt.NDArray[np.uint64], offsets: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.uint32]:
    """MinHash signatures [N, length] of N sets of hashes."""
    from rensa import RMinHash  # type: ignore[import-untyped]

    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets.astype(np.uint64), length, _SIGNATURE_SEED)
    return np.asarray(matrix.to_rows(), dtype=np.uint32)


def _band_hashes(signatures: npt.NDArray[np.uint32], bands: int) -> npt.NDArray[np.uint64]:
    """A hash of each band of each signature, [N, bands]."""
    parts = signatures.reshape(len(signatures), bands, -1).astype(np.uint64)
    value = np.zeros(parts.shape[:2], np.uint64)
    for position in range(parts.shape[2]):
        value = mixed(value + parts[:, :, position] + np.uint64(1))
    return value


class _Sketches:
    """Band hashes, row numbers and texts of one kind, in files."""

    def __init__(self, folder: Path, kind: Kind, bands: int) -> None:
        self._bands = [Keyed(folder / f"near.{kind}.{band}", [("item", np.int64)]) for band in range(bands)]
        self._rows = Column(folder / f"near.{kind}.rows", np.int64)
        self._texts = Texts(folder / f"near.{kind}.texts")

    def append(self, rows: npt.NDArray[np.int64], items: list[list[str]], hashes: npt.NDArray[np.uint64]) -> None:
        number = self._rows.length + np.arange(len(rows))
        self._rows.append(rows)
        self._texts.append(items)
        for band, keyed in enumerate(self._bands):
            keyed.append(key=hashes[:, band], item=number)

    def extend(self, other: _Sketches) -> None:
        offset = self._rows.length
        for rows in other._rows.pieces():
            self._rows.append(rows)
        self._texts.extend(other._texts)
        for mine, theirs in zip(self._bands, other._bands, strict=True):
            for piece in theirs.pieces():
                mine.append(key=piece["key"], item=piece["item"] + offset)

    def search(
        self, limit: float, is_out: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.bool_]]
    ) -> Iterator[pl.DataFrame]:
        """The rows that are near-duplicates of an earlier one.

        Args:
            limit: The least similarity.
            is_out: Which of some rows are not to be found.

        Yields:
            `row`, `near` (the earlier row) and `similarity`, in no order, each row once.
        """
        out = Marks(self._rows.length)
        start = 0
        for rows in self._rows.pieces():
            out.add(start + np.flatnonzero(is_out(rows)))
            start += len(rows)
        # Pairs that are known not to be alike: they save another comparison, and are forgotten when they are many.
        different: npt.NDArray[np.uint64] = np.empty(0, np.uint64)
        shingles = lru_cache(maxsize=256)(lambda item: [shingle_set(text) for text in self._texts[item]])
        for values, begin in (group for band in self._bands for group in band.groups()):
            pairs = _candidates(values["item"], begin, out)
            codes = (pairs[:, 1] * self._rows.length + pairs[:, 0]).astype(np.uint64)
            fresh = ~np.isin(codes, different)
            near: dict[int, tuple[int, float]] = {}
            rejected = []
            for (first, second), code in zip(pairs[fresh].tolist(), codes[fresh].tolist(), strict=True):
                # All pairs of an item with a band in common are in one group.
                if second in near:
                    continue
                similarity = _similarity(shingles(first), shingles(second), limit)
                if similarity >= limit:
                    near[second] = (first, similarity)
                else:
                    rejected.append(code)
            if rejected:
                kept = different if len(different) < _REMEMBERED else different[:0]
                different = np.union1d(kept, np.asarray(rejected, np.uint64))
            if near:
                out.add(np.fromiter(near, np.int64, len(near)))
                yield pl.DataFrame(
                    {
                        "row": self._rows.at(list(near)),
                        "near": self._rows.at([first for first, _ in near.values()]),
                        "similarity": [round(similarity, 2) for _, similarity in near.values()],
                    }
                )

    def close(self) -> None:
        for keyed in self._bands:
            keyed.close()
        self._rows.close()
        self._texts.close()


def _similarity(a: list[frozenset[str]], b: list[frozenset[str]], limit: float) -> float:
    """The smallest similarity over the fields (0 as soon as one is below the limit)."""
    smallest = 1.0
    for one, other in zip(a, b, strict=True):
        # Sets whose sizes differ too much cannot be similar.
        if min(len(one), len(other)) < limit * max(len(one), len(other)):
            return 0.0
        smallest = min(smallest, jaccard(one, other))
        if smallest < limit:
            return 0.0
    return smallest


def _candidates(items: npt.NDArray[np.int64], begin: npt.NDArray[np.int64], out: Marks) -> npt.NDArray[np.int64]:
    """Pairs (earlier, later) [P, 2] of items that share a band.

    Within a group of equal hashes each item is paired with the first one and with the few before it: a row needs to
    be found near one earlier row only, and large groups must not cost the square of their size.

    Args:
        items: [N] items, those of a group one after the other and ascending.
        begin: [N] where each item's group begins.
        out: Those that need no partner any more.
    """
    here = np.arange(len(items))
    open_ = ~out[items]
    partners = [begin, *(here - lag for lag in range(1, _NEIGHBOURS + 1))]
    pairs = []
    for partner in partners:
        valid = (partner >= begin) & (partner < here) & open_
        pairs.append(np.column_stack([items[partner[valid]], items[valid]]))
    return np.unique(np.concatenate(pairs), axis=0)
