"""What a check of the surroundings found, and the line that mends it: shared by preflight and `cluster doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "failure", "skipped"]


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    check: str
    level: Level
    message: str
    fix: str = ""
    """The line that mends it: a command, a setting, a manifest's field."""

    def __str__(self) -> str:
        tail = f". Fix: {self.fix}" if self.fix else ""
        return f"{self.check}: {self.message}{tail}"
