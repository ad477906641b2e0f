"""How the training stages call a trainer: with checkpoints that outlive the pod, and SIGTERM as a request to stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from tunegate.observer import Observer
from tunegate.stages.context import StageContext
from tunegate.training.launch import launch
from tunegate.training.stopping import stop_on_sigterm

Result = TypeVar("Result")


def train(
    context: StageContext,
    trainer: Callable[..., Result],
    *inputs: Any,
    name: str | None = None,
    observer: Observer | None = None,
    **options: Any,
) -> Result:
    """Call a trainer of `tunegate.training`.

    Args:
        context: The stage's.
        trainer: `train_sft`, `train_reward`, ...
        inputs: Its positional arguments.
        name: Of a second training inside the stage, which has checkpoints of its own.
        observer: Unset means the stage's.
        options: Its other keyword arguments.

    Raises:
        TrainingStoppedError: After SIGTERM, with a checkpoint written.
    """
    checkpoints, mirror = context.checkpoints, context.mirror
    if name is not None:
        checkpoints, mirror = checkpoints / name, mirror.below(name) if mirror is not None else None
    with stop_on_sigterm() as stop_requested:
        return launch(
            trainer,
            *inputs,
            **options,
            distributed=context.spec.distributed,
            observer=observer or context.observer,
            checkpoints=checkpoints,
            mirror=mirror,
            stop_requested=stop_requested,
        )
