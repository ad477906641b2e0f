"""Synthetic preference pairs with known faults, as a dataset folder or as JSON lines; seeded, streamed, fast."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tunegate.data.tables import BATCH_ROWS, TableWriter, arrow_schema, parquet_path

_SYLLABLES = "ba be bi bo bu da de di do du fa fe fi ga go ha he ka ke ki ko la le li lo lu ma me mi mo na ne ni no "
_SYLLABLES += "pa pe pi po ra re ri ro sa se si so ta te ti to va ve vi wa we ya yo za zo"
_VOCABULARY = 50_000
_ZIPF = 0.9
EVALUATION_PROMPTS = 2_000

# Share of the rows that get each fault.
FAULTS = {
    "exact_duplicate": 0.010,
    "near_duplicate": 0.010,
    "same_answers": 0.005,
    "both_ways": 0.002,
    "template_token": 0.002,
    "control_character": 0.002,
    "empty_content": 0.002,
    "email": 0.010,
    "secret": 0.001,
    "contaminated": 0.001,
    "missing_field": 0.002,
    "not_finite": 0.001,
}


@dataclass
class Truth:
    """How many rows got which fault."""

    rows: int = 0
    counts: dict[str, int] = field(default_factory=dict)


class Generator:
    """Makes the rows.

    Args:
        seed: Everything follows from it.
    """

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        syllables = _SYLLABLES.split()
        words: dict[str, None] = {}
        while len(words) < _VOCABULARY:
            count = int(self._random.integers(1, 5))
            words["".join(self._random.choice(syllables, count))] = None
        self._words = np.array(list(words), dtype=object)
        weights = 1.0 / np.arange(1, _VOCABULARY + 1) ** _ZIPF
        self._cumulative = np.cumsum(weights / weights.sum())
        self.truth = Truth(counts=dict.fromkeys(FAULTS, 0))
        self.evaluation = self._texts(EVALUATION_PROMPTS, 6, 30)

    def _texts(self, n: int, low: int, high: int) -> list[str]:
        """`n` texts whose numbers of words are spread evenly (in logarithm) between `low` and `high`."""
        sizes = np.exp(self._random.uniform(np.log(low), np.log(high), n)).astype(int)
        ends = np.cumsum(sizes)
        picks = np.minimum(np.searchsorted(self._cumulative, self._random.random(ends[-1])), _VOCABULARY - 1)
        words = self._words[picks].tolist()
        return [" ".join(words[end - size : end]) for end, size in zip(ends.tolist(), sizes.tolist(), strict=True)]

    def rows(self, n: int) -> Iterator[list[dict]]:
        """Rows in batches."""
        kinds = list(FAULTS)
        shares = np.array([FAULTS[kind] for kind in kinds])
        made = 0
        while made < n:
            size = min(BATCH_ROWS, n - made)
            prompts, chosen, rejected = self._texts(size, 6, 60), self._texts(size, 12, 120), self._texts(size, 12, 120)
            draw = np.searchsorted(np.cumsum(shares), self._random.random(size))
            batch = [
                {
                    "id": f"r{made + i:08d}",
                    "prompt": [{"role": "user", "content": prompts[i]}],
                    "chosen": chosen[i],
                    "rejected": rejected[i],
                    "margin": float(i % 5) / 2,
                    "scale": [1.0, 5.0],
                    "source": f"source-{i % 4}",
                    "split": "train" if i % 5 else "heldout",
                    "repeats": 1,
                    "file": "synthetic",
                    "line": made + i + 1,
                }
                for i in range(size)
            ]
            for i in np.flatnonzero(draw < len(kinds)).tolist():
                kind = kinds[draw[i]]
                if self._break(kind, batch, i):
                    self.truth.counts[kind] += 1
            made += size
            self.truth.rows = made
            yield batch

    def _break(self, kind: str, batch: list[dict], i: int) -> bool:
        row = batch[i]
        if kind in ("exact_duplicate", "near_duplicate", "both_ways"):
            if i == 0:
                return False
            earlier = batch[int(self._random.integers(0, i))]
            for name in ("prompt", "chosen", "rejected"):
                row[name] = earlier[name]
            if kind == "both_ways":
                row["chosen"], row["rejected"] = earlier["rejected"], earlier["chosen"]
            elif kind == "near_duplicate":
                row["prompt"] = [{"role": "user", "content": self._nudged(earlier["prompt"][0]["content"])}]
                row["chosen"], row["rejected"] = (
                    self._nudged(earlier["chosen"] or ""),
                    self._nudged(earlier["rejected"]),
                )
        elif kind == "same_answers":
            row["rejected"] = row["chosen"]
        elif kind == "template_token":
            row["chosen"] += " <|im_end|>"
        elif kind == "control_character":
            row["chosen"] += " \x07"
        elif kind == "empty_content":
            row["chosen"] = " "
        elif kind == "email":
            row["chosen"] += f" write to jane{i}@mail{i % 97}.org"
        elif kind == "secret":
            token = "".join(self._random.choice(list("abcdefghijkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789"), 36))
            row["chosen"] += f" ghp_{token}"
        elif kind == "contaminated":
            row["prompt"] = [{"role": "user", "content": self.evaluation[i % EVALUATION_PROMPTS]}]
            row["split"] = "train"
        elif kind == "missing_field":
            row["chosen"] = None
        elif kind == "not_finite":
            row["margin"] = float("inf")
        return True

    def _nudged(self, text: str) -> str:
        """The text with one word in about twenty replaced: around the similarity that the check looks for."""
        words = text.split(" ")
        for position in self._random.choice(len(words), max(1, len(words) // 25), replace=False):
            words[position] = str(self._words[int(self._random.integers(0, _VOCABULARY))])
        return " ".join(words)


def write_dataset(folder: Path, rows: int, seed: int) -> Truth:
    """A dataset folder as `ingest` leaves it, without derived prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = Generator(seed)
    for kind in ("sft", "ratings", "prompts"):
        TableWriter(parquet_path(folder, kind), arrow_schema(kind)).close()
    with TableWriter(parquet_path(folder, "evaluation"), arrow_schema("evaluation")) as table:
        for number, text in enumerate(generator.evaluation):
            table.write(
                {
                    "id": f"e{number}",
                    "messages": [{"role": "user", "content": text}],
                    "tag": "everyday",
                    "extra": [],
                    "source": "evaluation",
                    "split": "heldout",
                    "repeats": 1,
                    "file": "synthetic",
                    "line": number + 1,
                }
            )
    with TableWriter(parquet_path(folder, "preferences"), arrow_schema("preferences")) as table:
        for batch in generator.rows(rows):
            for row in batch:
                table.write(row)
    return generator.truth


def write_jsonl(path: Path, rows: int, seed: int) -> Truth:
    """The same pairs as a source file for `ingest`."""
    generator = Generator(seed)
    with path.open("w", encoding="utf-8") as stream:
        for batch in generator.rows(rows):
            for row in batch:
                shown = {key: row[key] for key in ("id", "prompt", "chosen", "rejected", "margin", "source")}
                stream.write(json.dumps(shown, allow_nan=True) + "\n")
    return generator.truth
