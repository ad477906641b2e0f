"""What direct preference optimisation reports: versioned, JSON, written next to the policy it describes."""

from __future__ import annotations

from typing import Literal

from tunegate.training.ppo_results import Example, HeldoutFigures, PairedDifference, SourceFigures
from tunegate.training.results import Result, Share


class PreferencePoint(Result):
    """The held-out preferences after some step."""

    step: int
    loss: float
    """Mean preference loss."""
    accuracy: Share
    """Pairs whose chosen response has the higher implicit reward."""
    margin: float
    """Mean difference of the implicit rewards, beta log(policy / reference)."""


class DPOResult(Result):
    """DPO: what was trained and what came out."""

    schema_version: Literal[1] = 1
    algorithm: Literal["dpo"] = "dpo"
    method: Literal["lora", "full", "disabled"]
    precision: Literal["bf16", "fp32"]
    seed: int
    learning_rate: float
    trained_parameters: int
    pairs: int
    dropped: int
    """Training pairs that do not fit."""
    steps: int
    skipped_steps: int
    resumed_from: int | None
    kept: Literal["best", "last"]
    kept_update: int
    """The saved policy is the one after so many steps."""
    final_loss: float | None
    """Mean training loss over the last tenth of the steps."""
    preferences: list[PreferencePoint]
    """Of the held-out pairs, before, during and after training."""
    before: HeldoutFigures | None
    """The reference on the held-out prompts, scored by the reward model; None without one."""
    after: HeldoutFigures | None
    """The saved policy likewise."""
    reward_gain: PairedDifference | None
    judge_gain: PairedDifference | None
    by_source: dict[str, SourceFigures]
    examples: list[Example]
    seconds: float
    pairs_per_second: float
    peak_memory_bytes: int
