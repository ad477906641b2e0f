"""What can go wrong with a TrainJob."""

from __future__ import annotations

from tunegate.errors import TrainingError, TunegateError


class TrainJobError(TunegateError):
    """The Kubernetes API cannot be reached, or broke off; the same may work later."""

    exit_code = 1


class TrainJobRefusedError(TrainJobError):
    """The Kubernetes API answered and said no: permission, no Trainer, no runtime, a wrong value."""

    exit_code = 2


class TrainJobMissingError(TrainJobRefusedError):
    """There is no such object, or no longer."""


class TrainJobConflictError(TrainJobRefusedError):
    """There is an object of that name already."""


class TrainJobFailedError(TrainingError):
    """The TrainJob ended in failure; the message says why."""
