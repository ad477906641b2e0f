"""Evaluation prompts that occur in what is trained on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from tunegate.data.checks.base import FINDING_SCHEMA, Batch, Check, batches, findings, first_per_row
from tunegate.data.checks.shingles import jaccard, mixed, shingle_hashes, shingle_set
from tunegate.data.checks.wordruns import WordRuns
from tunegate.data.config import ContaminationCheck
from tunegate.data.records import Kind

_TRAINED: tuple[Kind, ...] = ("sft", "preferences", "ratings", "prompts")
_TABLE_BITS = 22
_RUN, _WHOLE = "shared_ngram", "whole_prompt"


def words(folded: pl.Expr) -> pl.Expr:
    """A folded text as its letters and digits only, words parted by one space, with a space at both ends."""
    return pl.format(" {} ", folded.str.replace_all(r"[^\p{L}\p{N}]+", " ").str.strip_chars())


class Contamination(Check):
    """Training rows that hold an evaluation prompt.

    An evaluation prompt is its last user turn. It is found by three rules, since none serves all lengths: any run of
    `ngram` words that a long prompt shares with any turn; the whole of a shorter prompt inside a user turn (of a very
    short one: as the user turn); and a user turn whose 5-character shingles are almost those of the prompt.

    Args:
        spec: Lengths and threshold.
        dataset: Where the evaluation prompts are read from.
    """

    own = ("_equal", "_near", "_parts", "_runs", "prompts")

    def __init__(self, spec: ContaminationCheck, *, dataset: Path) -> None:
        super().__init__("contamination", spec, kinds=_TRAINED)
        self._spec = spec
        self.prompts = _evaluation_prompts(dataset)
        """(id, folded text, words) of every evaluation prompt."""
        self._parts: dict[str, tuple[str, int]] = {}
        self._equal: dict[str, int] = {}
        for number, (_, _, text) in enumerate(self.prompts):
            parts = text.split()
            self._equal.setdefault(text, number)
            if len(parts) >= spec.ngram:
                for start in range(len(parts) - spec.ngram + 1):
                    self._parts.setdefault(" ".join(parts[start : start + spec.ngram]), (_RUN, number))
            elif len(parts) >= spec.min_words:
                self._parts.setdefault(" ".join(parts), (_WHOLE, number))
        self._runs = WordRuns(self._parts)
        self._near = _NearPrompts([text for _, text, _ in self.prompts], spec.threshold)
        if not self.prompts:
            self.skipped = "there are no evaluation prompts"
        self.figures["evaluation_prompts"] = len(self.prompts)

    def observe(self, batch: Batch) -> None:
        """Look for the evaluation prompts in the training split of a batch."""
        train = batch.frame.filter(pl.col("split") == "train")["row"]
        self.seen += train.len()
        if not self.prompts or not train.len():
            return
        turns = batch.turns.filter(pl.col("row").is_in(train.implode()))
        turns = turns.select("row", "place", "role", "folded", words=words(pl.col("folded")))
        asked = turns.filter(pl.col("role") == "user")
        parts = [self._matches(turns), self._equals(asked), self._near_matches(asked)]
        self.add(batch.kind, first_per_row(findings(pl.concat(parts))))

    def _matches(self, turns: pl.DataFrame) -> pl.DataFrame:
        rows, places, roles = turns["row"], turns["place"], turns["role"]
        hits = []
        for turn, text in self._runs.search(turns["words"]):
            code, number = self._parts[text]
            name = self.prompts[number][0]
            if code == _RUN:
                detail = f"{places[turn]} shares {self._spec.ngram} words with evaluation prompt {name}"
            elif roles[turn] == "user":
                detail = f"{places[turn]} holds evaluation prompt {name}"
            else:
                continue  # short prompts are looked for in what the user says only
            hits.append((rows[turn], code, detail))
        return findings(pl.DataFrame(hits, schema=FINDING_SCHEMA, orient="row"))

    def _equals(self, asked: pl.DataFrame) -> pl.DataFrame:
        hits = asked.filter(pl.col("words").is_in(list(self._equal)) & (pl.col("words").str.len_bytes() > 2))
        ids = pl.Series([self.prompts[self._equal[text]][0] for text in hits["words"]], dtype=pl.String)
        detail = pl.format("{} is evaluation prompt {}", "place", ids)
        return findings(hits.select("row", code=pl.lit(_WHOLE), detail=detail))

    def _near_matches(self, asked: pl.DataFrame) -> pl.DataFrame:
        rows, places = asked["row"], asked["place"]
        hits = [
            (rows[turn], "near_prompt", f"{places[turn]} is almost evaluation prompt {self.prompts[prompt][0]}")
            for turn, prompt, similarity in self._near.search(asked["folded"].to_list())
            if similarity < 1.0
        ]
        return findings(pl.DataFrame(hits, schema=FINDING_SCHEMA, orient="row"))


def _evaluation_prompts(dataset: Path) -> list[tuple[str, str, str]]:
    found: list[tuple[str, str, str]] = []
    for batch in batches(dataset, "evaluation"):
        last = (
            batch.turns.filter(pl.col("role") == "user")
            .group_by("row", maintain_order=True)
            .last()
            .with_columns(words=words(pl.col("folded")))
            .join(batch.frame.select("row", "id"), on="row", maintain_order="left")
        )
        found.extend(last.select("id", "folded", "words").filter(pl.col("words").str.len_bytes() > 2).iter_rows())
    return found


class _NearPrompts:
    """Finds texts whose shingle set is almost that of one of a few given texts, and misses none.

    A text A with Jaccard similarity of at least t to a prompt P holds at least ceil(t |P|) of its shingles, so it lacks
    at most m = |P| - ceil(t |P|) of them. Of any m + l shingles of P it therefore holds at least l. The m + l rarest
    ones (those that the fewest prompts have) are looked for in all texts at once; only the pairs with at least l hits
    are compared (the idea of prefix filtering: Chaudhuri, Ganti, Kaushik 2006; with l > 1: Wang, Li, Feng 2012).
    """

    def __init__(self, prompts: Sequence[str], limit: float) -> None:
        self._limit = limit
        self._sets = [shingle_set(text) for text in prompts]
        holders = Counter(shingle for shingles in self._sets for shingle in shingles)
        sizes, rare, owners = [], [], []
        for number, shingles in enumerate(self._sets):
            lacking = len(shingles) - math.ceil(limit * len(shingles) - 1e-9)
            hits = max(1, lacking // 2)
            chosen = sorted(shingles, key=lambda shingle: (holders[shingle], shingle))[: lacking + hits]
            sizes.append((hits, len(shingles)))
            rare.extend(chosen)
            owners.extend([number] * len(chosen))
        self._hits, self._least = np.array(sizes, np.float64).reshape(-1, 2).T
        self._least *= limit
        hashes = shingle_hashes(rare)[0]
        self._table = np.zeros(1 << _TABLE_BITS, dtype=bool)
        self._table[_slots(hashes)] = True
        order = np.argsort(hashes, kind="stable")
        self._owners = np.asarray(owners, np.int64)[order]
        self._hashes, first, count = np.unique(hashes[order], return_index=True, return_counts=True)
        self._first, self._count = first.astype(np.int64), count.astype(np.int64)

    def search(self, texts: Sequence[str]) -> list[tuple[int, int, float]]:
        """(text, prompt, similarity) for each text that is near a prompt, with its nearest one."""
        if not texts or not self._sets:
            return []
        best: dict[int, tuple[int, float]] = {}
        shingles: dict[int, frozenset[str]] = {}
        for text, prompt in self._candidates(texts):
            mine = shingles.get(text) or shingles.setdefault(text, shingle_set(texts[text]))
            similarity = jaccard(mine, self._sets[prompt])
            if similarity >= self._limit and similarity > best.get(text, (0, 0.0))[1]:
                best[text] = (prompt, similarity)
        return [(text, *best[text]) for text in sorted(best)]

    def _candidates(self, texts: Sequence[str]) -> list[tuple[int, int]]:
        """Pairs (text, prompt) that share enough of the prompt's rare shingles, in order."""
        hashes, offsets = shingle_hashes(texts)
        places = np.flatnonzero(self._table[_slots(hashes)])
        entry = np.minimum(np.searchsorted(self._hashes, hashes[places]), len(self._hashes) - 1)
        known = self._hashes[entry] == hashes[places]
        places, entry = places[known], entry[known]
        # Every occurrence stands for all prompts that have this shingle.
        counts = self._count[entry]
        inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        owners = self._owners[np.repeat(self._first[entry], counts) + inside]
        numbers = np.repeat(np.searchsorted(offsets, places, side="right") - 1, counts)
        # A text has at most as many shingles as places for them.
        fits = np.diff(offsets)[numbers] >= self._least[owners] - 1e-9
        pairs, hits = np.unique(numbers[fits] * len(self._sets) + owners[fits], return_counts=True)
        enough = pairs[hits >= self._hits[pairs % len(self._sets)]]
        return [divmod(pair, len(self._sets)) for pair in enough.tolist()]


def _slots(hashes: np.ndarray) -> np.ndarray:
    return (mixed(hashes) >> np.uint64(64 - _TABLE_BITS)).astype(np.int64)
