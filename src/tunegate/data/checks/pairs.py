"""Preference pairs: contradictions, and how far the preferred answer is simply the longer one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Self

import numpy as np
import polars as pl

from tunegate.data.checks.base import Batch, Check, findings, wilson
from tunegate.data.checks.keys import text_keys
from tunegate.data.checks.spill import Keyed
from tunegate.data.config import LengthBiasCheck, PreferencesCheck


def check_pairs(batch: Batch) -> pl.DataFrame:
    """Pairs whose answers are the same text, or whose scores or margin contradict the choice."""
    frame = batch.frame
    answers = batch.turns.filter(pl.col("part") == "response").select("row", "place", "folded")
    same_row, same_text = (pl.col(c) == pl.col(c).shift(1) for c in ("row", "folded"))
    same = answers.filter(same_row & same_text).select(
        "row", code=pl.lit("same_answers"), detail=pl.lit("chosen and rejected are the same text")
    )
    against = frame.filter(pl.col("chosen_score") < pl.col("rejected_score")).select(
        "row",
        code=pl.lit("scores_contradict"),
        detail=pl.format("chosen is scored {}, rejected {}", "chosen_score", "rejected_score"),
    )
    negative = frame.filter(pl.col("margin") < 0).select(
        "row", code=pl.lit("negative_margin"), detail=pl.format("the margin is {}", "margin")
    )
    return findings(pl.concat([same, against, negative]))


class Consistency(Check):
    """Pairs that contradict themselves or each other.

    Of a pair of answers that was preferred both ways, the rows against the majority are found; without a majority,
    all of them.

    Args:
        spec: The section.
        folder: For temporary files.
    """

    def __init__(self, spec: PreferencesCheck, *, folder: Path) -> None:
        super().__init__("preferences", spec, kinds=("preferences",))
        self._votes = Keyed(folder / "votes", [("forward", np.bool_), ("row", np.int64)])

    def observe(self, batch: Batch) -> None:
        """Judge each row, and keep which answer it prefers."""
        self.seen += batch.frame.height
        self.add(batch.kind, check_pairs(batch))
        prompt = text_keys(batch, pl.col("part") == "prompt").rename({"key": "prompt"})
        answers = batch.turns.filter(pl.col("part") == "response").select("row", "place", key=pl.col("folded").hash(3))
        keyed = prompt.join(
            answers.filter(pl.col("place") == "chosen").select("row", chosen="key"), on="row", maintain_order="left"
        ).join(
            answers.filter(pl.col("place") == "rejected").select("row", rejected="key"), on="row", maintain_order="left"
        )
        both = ("chosen", "rejected")
        keyed = keyed.filter(pl.col("chosen") != pl.col("rejected")).select(
            "row",
            forward=pl.col("chosen") < pl.col("rejected"),
            key=pl.struct("prompt", low=pl.min_horizontal(*both), high=pl.max_horizontal(*both)).hash(4),
        )
        self._votes.append(**{name: keyed[name].to_numpy() for name in ("key", "forward", "row")})

    def merge(self, other: Self) -> None:
        """Add the votes of another part."""
        super().merge(other)
        for piece in other._votes.pieces():
            self._votes.append(key=piece["key"], forward=piece["forward"], row=piece["row"])

    def finish(self) -> None:
        """Find the pairs that were preferred both ways."""
        both_ways = 0
        detail = pl.lit("the same two answers were also preferred the other way")
        for values, begin in self._votes.groups():
            size = np.bincount(begin, minlength=len(begin))[begin]
            forward = np.bincount(begin, weights=values["forward"], minlength=len(begin))[begin]
            split = (forward > 0) & (forward < size)
            lost = split & np.where(values["forward"], forward <= size / 2, forward >= size / 2)
            both_ways += len(np.unique(begin[split]))
            against = pl.DataFrame({"row": values["row"][lost]}).select("row", code=pl.lit("both_ways"), detail=detail)
            self.add("preferences", findings(against))
        self._votes.close()
        self.figures["pairs_both_ways"] = float(both_ways)


class LengthBias(Check):
    """How often the longer answer was preferred, by source; answers of one length do not count."""

    def __init__(self, spec: LengthBiasCheck) -> None:
        super().__init__("length_bias", spec, kinds=("preferences",), action="report")
        self.threshold = spec.max_share
        self._spec = spec
        self._longer: Counter[str] = Counter()
        self._shorter: Counter[str] = Counter()

    def observe(self, batch: Batch) -> None:
        """Count."""
        self.seen += batch.frame.height
        lengths = batch.frame.select(
            "source", sign=(pl.col("chosen").str.len_chars().cast(pl.Int64) - pl.col("rejected").str.len_chars()).sign()
        )
        for source, sign, n in lengths.group_by("source", "sign").len().iter_rows():
            if sign:
                (self._longer if sign > 0 else self._shorter)[source] += n

    def merge(self, other: Self) -> None:
        """Add the counts of another part."""
        super().merge(other)
        self._longer.update(other._longer)
        self._shorter.update(other._shorter)

    def finish(self) -> None:
        """Judge each source that has enough pairs."""
        for source in sorted(self._longer.keys() | self._shorter.keys()):
            longer, n = self._longer[source], self._longer[source] + self._shorter[source]
            share = wilson(longer, n)
            self.estimates[source] = share
            limit = self._spec.max_share
            if n >= self._spec.min_pairs and not self.failure:
                which = "longer" if share.low > limit else "shorter" if share.high < 1 - limit else ""
                if which:
                    p = share if which == "longer" else wilson(n - longer, n)
                    self.failure = (
                        f"in {source} the {which} answer was chosen in {p.estimate:.1%} [{p.low:.1%}, {p.high:.1%}] "
                        f"of {n} pairs, allowed are {limit:.1%}"
                    )
