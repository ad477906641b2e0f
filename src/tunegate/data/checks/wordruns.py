"""Finds given runs of words in many texts."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import polars as pl

from tunegate.data.checks.shingles import mixed

_PRIME = np.uint64(0x9E3779B97F4A7C15)
_SEED = 11
_TABLE_BITS = 22


class WordRuns:
    """Finds runs of words, each given as words parted by one space.

    Every run is known by the hash of its first words, as many as the shortest run has. These hashes are looked for in
    a rolling hash over the words of all texts at once; what is hit is then compared word by word, so that nothing is
    found that is not there.

    Args:
        runs: The runs; equal ones count once.
    """

    def __init__(self, runs: Iterable[str]) -> None:
        split = {run: run.split(" ") for run in runs}
        self._width = min(map(len, split.values()), default=0)
        self._by_start: dict[int, list[list[str]]] = {}
        self._table = np.zeros(1 << _TABLE_BITS, dtype=bool)
        if split:
            heads = pl.Series([" ".join(words[: self._width]) for words in split.values()])
            hashes = _rolling(_word_hashes(_words(heads).explode()), self._width)[:: self._width]
            for key, words in zip(hashes.tolist(), split.values(), strict=True):
                self._by_start.setdefault(key, []).append(words)
            self._table[_slots(hashes)] = True

    def search(self, texts: pl.Series) -> list[tuple[int, str]]:
        """Where the runs occur.

        Args:
            texts: Words parted by one space, possibly with spaces around them.

        Returns:
            (number of the text, run) for every occurrence, in the order of the texts and of the words within them.
        """
        if not self._by_start or texts.is_empty():
            return []
        words = _words(texts)
        ends = np.cumsum(words.list.len().to_numpy().astype(np.int64))
        flat = words.explode()
        hashes = _rolling(_word_hashes(flat), self._width)
        places = np.flatnonzero(self._table[_slots(hashes)])
        numbers = np.searchsorted(ends, places, side="right")
        found = []
        for place, number, key in zip(places.tolist(), numbers.tolist(), hashes[places].tolist(), strict=True):
            for run in self._by_start.get(key, ()):
                # A run must not go on into the next text.
                if place + len(run) <= ends[number] and flat[place : place + len(run)].to_list() == run:
                    found.append((number, " ".join(run)))
        return found


def _words(texts: pl.Series) -> pl.Series:
    return texts.str.strip_chars(" ").str.split(" ")


def _word_hashes(words: pl.Series) -> npt.NDArray[np.uint64]:
    return words.hash(_SEED).to_numpy()


def _rolling(hashes: npt.NDArray[np.uint64], width: int) -> npt.NDArray[np.uint64]:
    """The hash of each `width` words in a row: sum of h_i P^(width - 1 - i) (mod 2^64)."""
    count = max(0, len(hashes) - width + 1)
    value = np.zeros(count, np.uint64)
    for offset in range(width):
        value *= _PRIME
        value += hashes[offset : offset + count]
    return value


def _slots(hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    return (mixed(hashes) >> np.uint64(64 - _TABLE_BITS)).astype(np.int64)
