"""Errors that name the key or row, the value, the reason and the fix.

Every error that Tunegate raises on purpose derives from `TunegateError`; the command line turns it into one
readable message and the documented exit code. Anything else is a crash (exit code 1).
"""

from __future__ import annotations

from typing import Any, ClassVar


class TunegateError(Exception):
    """A failure that was foreseen.

    Args:
        reason: What is wrong, in one sentence.
        key: The spec key, file, row or object it is about, e.g. `"sft.learning_rate"`.
        value: The offending value, shown as it was given (never a secret).
        fix: What would be right, in one sentence.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, reason: str, *, key: str | None = None, value: Any = None, fix: str | None = None) -> None:
        self.reason = reason
        self.key = key
        self.value = value
        self.fix = fix
        super().__init__(str(self))

    def __str__(self) -> str:
        head = f"{self.key}: " if self.key else ""
        shown = f" (got {self.value!r})" if self.value is not None else ""
        tail = f" Fix: {self.fix}" if self.fix else ""
        return f"{head}{self.reason}{shown}.{tail}".replace("..", ".")


class SpecError(TunegateError):
    """The run spec, a flag or a pipeline parameter is wrong; nothing was started."""

    exit_code = 2


class DataError(TunegateError):
    """A data source is missing, unreadable or has nothing usable in it."""

    exit_code = 2


class ModelError(TunegateError):
    """A model folder is missing, incomplete or not of the kind that is needed."""

    exit_code = 2


class StorageError(TunegateError):
    """A folder or bucket cannot be read or written, or a digest does not match."""

    exit_code = 1


class StorageUnavailableError(StorageError):
    """The storage cannot be used now (unreachable, throttling, credentials); the same may succeed later."""


class TrainingError(TunegateError):
    """Training cannot go on: divergence, out of memory, a watchdog."""

    exit_code = 1


class TrainingStoppedError(TrainingError):
    """Training stopped on request, with a checkpoint written: started again, it goes on from there.

    A process that ends so exits with 75 (EX_TEMPFAIL of sysexits.h: try again).
    """

    exit_code = 75


class GateError(TunegateError):
    """A promotion was asked for without the evidence that it needs."""

    exit_code = 4


class RegistryError(TunegateError):
    """The model registry refused or does not have what was asked for."""

    exit_code = 2
