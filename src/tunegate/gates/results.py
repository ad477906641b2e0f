"""What a gate says, and the decision that all of them lead to: the versioned schema of `decision.json`."""

from __future__ import annotations

import hashlib
import math
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from tunegate.errors import GateError

FILE_NAME = "decision.json"
GATES_VERSION = 3
"""Raised when a gate's meaning changes: a decision made by an older version is no evidence for a new promotion."""

Verdict = Literal["PROMOTE", "HOLD", "REJECT", "INVALID"]
SEVERITY: tuple[Verdict, ...] = ("PROMOTE", "HOLD", "REJECT", "INVALID")
Direction = Literal["above", "below", "within"]
Unit = Literal["share", "nats", "reward", "tokens", "plain"]


class Result(BaseModel):
    """Base: unknown keys are errors; NaN and infinity survive JSON as strings."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class GateResult(Result):
    """One gate's finding."""

    name: str
    """Stable key, e.g. `violation_rate` or `champion.over_refusal`."""
    title: str
    verdict: Verdict
    reason: str
    """One or two sentences that a person understands without knowing statistics."""
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    limit: float | None = None
    direction: Direction = "below"
    """On which side of the limit the interval must lie; `within`: between minus and plus the limit."""
    unit: Unit = "plain"
    n: int | None = None
    """Independent units behind the estimate: prompts, pairs, conversations, templates."""
    minimum_n: int | None = None
    """Fewer are not evidence: INVALID."""
    needed: int | None = None
    """After HOLD: about how many more units would decide it if the estimate stayed; None when more cannot help."""

    @property
    def passed(self) -> bool:
        """True only for PROMOTE."""
        return self.verdict == "PROMOTE"


class RewardFigures(Result):
    """What the reward gate needs of the reward model's held-out pairs."""

    pairs: int = Field(ge=0)
    """Held-out preference pairs."""
    correct: float = Field(ge=0)
    """Pairs in which the chosen answer scored higher; ties count one half."""
    length_correct: float = Field(ge=0)
    """The same for the rule "the longer answer is better"."""
    only_model: int | None = Field(default=None, ge=0)
    """Pairs that only the model gets right (fully); with `only_length` the comparison is paired."""
    only_length: int | None = Field(default=None, ge=0)
    """Pairs that only the length rule gets right."""


class Decision(Result):
    """The verdict on a candidate."""

    schema_version: Literal[1] = 1
    gates_version: int = GATES_VERSION
    verdict: Verdict
    reasons: list[str]
    """Why, the most serious first."""
    gates: list[GateResult]
    compared_with: Literal["champion", "anchor"]
    """Whom an improvement was looked for against."""
    digests: dict[str, str]
    """`candidate`, `anchor`, `champion` (models), `prompts`, `decoding`, `evaluation` (the artifact's files),
    `evaluation_content`, `judge`, `classifier`, `spec` (the gates' section)."""
    created: datetime | None = None
    who: str = ""

    def gate(self, name: str) -> GateResult:
        """The gate of that name.

        Raises:
            GateError: There is none.
        """
        for gate in self.gates:
            if gate.name == name:
                return gate
        raise GateError(
            "the decision has no such gate", key=name, fix=f"it has {', '.join(gate.name for gate in self.gates)}"
        )


def worst(verdicts: list[Verdict]) -> Verdict:
    """The most serious verdict; PROMOTE when there are none."""
    return max(verdicts, key=SEVERITY.index, default="PROMOTE")


def show(value: float, unit: Unit, *, signed: bool = False) -> str:
    """A number as a sentence writes it: shares as percentages, the others with two or three digits."""
    if math.isinf(value):
        return "unknown"
    sign = "+" if signed else ""
    if unit == "share":
        return f"{100 * value:{sign}.1f}%"
    return f"{value:{sign}.3f}" if unit == "nats" else f"{value:{sign}.2f}"


def write_decision(decision: Decision, folder: Path) -> Path:
    """Write `decision.json`; the folder is created if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE_NAME
    path.write_text(decision.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return path


def read_decision(path: Path) -> Decision:
    """Read `decision.json`, or the one in a folder.

    Raises:
        GateError: It is missing or not a decision of a schema that this code knows.
    """
    file = path / FILE_NAME if path.is_dir() else path
    try:
        return Decision.model_validate_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise GateError(f"there is no decision: {error.strerror}", key=str(file), fix="run the decide stage") from None
    except ValueError as error:
        raise GateError(
            f"the file is not a decision of schema version 1: {str(error).splitlines()[0]}",
            key=str(file),
            fix="run the decide stage again",
        ) from error


def content_digest(text: str) -> str:
    """The sha256 of text."""
    return hashlib.sha256(text.encode()).hexdigest()
