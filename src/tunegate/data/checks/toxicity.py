"""A light screen for toxic responses: TF-IDF of single words under a logistic regression.

It is a screen, not a judge: it sees words, not meaning. `toxicity_train.py` trains it and measures what it is worth;
the figures lie beside the weights and in every report.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt
import polars as pl

from tunegate.data.checks.base import FINDING_SCHEMA, Batch, Check, findings
from tunegate.data.config import ToxicityCheck
from tunegate.data.records import Kind
from tunegate.data.results import Histogram

BUCKETS = 1 << 14
HEAD_NAME = "toxicity.npz"
_WORD = re.compile(r"[a-z']+")
_BINS = 20


def word_buckets(text: str) -> Counter[int]:
    """How often each of the 16,384 buckets is hit by the text's words."""
    return Counter(zlib.crc32(word.encode()) & (BUCKETS - 1) for word in _WORD.findall(text.lower()))


@dataclass(frozen=True)
class Head:
    """The trained screen.

    Attributes:
        idf: [buckets] inverse document frequencies.
        weights: [buckets] weights of the logistic regression.
        bias: Its intercept.
        figures: What it is worth, as measured when it was trained.
    """

    idf: npt.NDArray[np.float32]
    weights: npt.NDArray[np.float32]
    bias: float
    figures: dict[str, float]

    def probability(self, text: str) -> float:
        """The probability that a text is toxic; 0 for a text without a single word.

        x_b = (1 + ln tf_b) idf_b, divided by its Euclidean norm; p = 1 / (1 + exp(-(w x + bias))).
        """
        counts = word_buckets(text)
        if not counts:
            return 0.0
        buckets = np.fromiter(counts.keys(), np.int64, len(counts))
        values = (1.0 + np.log(np.fromiter(counts.values(), np.float64, len(counts)))) * self.idf[buckets]
        score = float(values @ self.weights[buckets]) / math.sqrt(float(values @ values)) + self.bias
        return 1.0 / (1.0 + math.exp(-score))

    def save(self, stream: BinaryIO) -> None:
        """Write the head; half precision is ample for weights of a screen."""
        np.savez_compressed(
            stream,
            idf=self.idf.astype(np.float16),
            weights=self.weights.astype(np.float16),
            bias=np.float64(self.bias),
            figures=np.frombuffer(json.dumps(self.figures).encode(), np.uint8),
        )

    @classmethod
    def load(cls, stream: BinaryIO) -> Head:
        """Read a head."""
        data: Any = np.load(stream)
        return cls(
            idf=data["idf"].astype(np.float32),
            weights=data["weights"].astype(np.float32),
            bias=float(data["bias"]),
            figures=json.loads(data["figures"].tobytes()),
        )


@cache
def packaged_head() -> Head:
    """The head that comes with the package."""
    with resources.files("tunegate.data.checks").joinpath(HEAD_NAME).open("rb") as stream:
        return Head.load(stream)  # type: ignore[arg-type]


class Toxicity(Check):
    """Responses that would be trained on and are probably toxic.

    Args:
        spec: Action and threshold.
        rows: Rows of each kind, to space the sample of a check that only reports.
    """

    own = ("_head",)

    def __init__(self, spec: ToxicityCheck, *, rows: Mapping[Kind, int]) -> None:
        super().__init__("toxicity", spec, kinds=("sft", "preferences"), action=spec.action)
        self._spec = spec
        sample = spec.sample if spec.action == "report" else None
        self._step = {kind: 1 if sample is None else max(1, -(-n // sample)) for kind, n in rows.items()}
        self._bins = [0] * _BINS
        self._head = packaged_head()

    def observe(self, batch: Batch) -> None:
        """Score every row's preferred response, or a sample."""
        wanted = pl.col("place") == "chosen" if batch.kind == "preferences" else pl.col("part") == "response"
        responses = batch.turns.filter(wanted & (pl.col("row") % self._step[batch.kind] == 0))
        found = []
        for row, place, text in responses.select("row", "place", "folded").iter_rows():
            probability = self._head.probability(text)
            self._bins[min(_BINS - 1, int(probability * _BINS))] += 1
            if probability >= self._spec.threshold:
                found.append((row, "toxic", f"{place}: probability {probability:.2f}"))
        self.seen += responses.height
        self.add(batch.kind, findings(pl.DataFrame(found, schema=FINDING_SCHEMA, orient="row")))

    def merge(self, other: Self) -> None:
        """Add the counts of another part."""
        super().merge(other)
        self._bins = [a + b for a, b in zip(self._bins, other._bins, strict=True)]

    def finish(self) -> None:
        """Report the distribution and what the screen is worth."""
        self.figures.update({f"head: {name}": value for name, value in self._head.figures.items()})
        edges = [i / _BINS for i in range(_BINS + 1)]
        self.histograms["probability"] = Histogram(edges=edges, counts=self._bins)
