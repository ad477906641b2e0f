"""Sharded training (FSDP2, `torch.distributed.fsdp.fully_shard`; Zhao et al. 2023, arXiv 2304.11277).

The layers' weights, gradients and moments are cut over the ranks; a layer is gathered whole just before it computes.
Embeddings, the last norm and the head stay whole on every rank and are treated as in plain data parallelism, because
the losses read the head outside of the model's own forward pass. A model of plain tensors with the same weights is kept
beside the sharded one: it takes the trained weights back for merging, measuring, generating and saving.

Gradients are summed over ranks, not averaged: the losses are divided by the tokens of all ranks already.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tunegate.training.config import Sharding
from tunegate.training.models import trunk_of
from tunegate.training.ranks import largest, world

Batch = TypeVar("Batch")


class ShardedModel:
    """A model in training and its plain twin.

    Attributes:
        model: What is trained.
        plain: Plain tensors, up to date after `whole`; `model` itself where nothing is sharded.
    """

    def __init__(self, model: Any, sharding: Sharding, *, keep_on_device: bool = False) -> None:
        """Shard a model where that is asked for and there is more than one rank.

        Args:
            model: With adapters and frozen parameters as they shall be.
            sharding: `none` or `full`.
            keep_on_device: Leave the plain twin where the model is, because it is used between updates.
        """
        self.plain = model
        self.model = model
        self._device = next(model.parameters()).device
        if sharding == "full" and world()[1] > 1:
            self.model = _sharing_no_storage(model)
            shard_layers(self.model)
            if not keep_on_device:
                self.plain.to("cpu")

    @property
    def sharded(self) -> bool:
        """True if layers are cut over the ranks: then all ranks must compute in step."""
        return self.model is not self.plain

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the plain twin up to date; every rank must call it."""
        if not self.sharded:
            return
        for (name, target), source in zip(self.plain.named_parameters(), self.model.parameters(), strict=True):
            if source.requires_grad:
                target.copy_(whole_tensor(source))
            else:
                assert target.shape == source.shape, name  # frozen: never changed

    def whole(self) -> Any:
        """The plain twin with the trained weights, on the device; every rank must call it."""
        self.refresh()
        return self.plain.to(self._device)


def _sharing_no_storage(model: Any) -> Any:
    """A copy of a model with tensors of its own."""
    twin = copy.deepcopy(model)
    for own, other in zip(twin.parameters(), model.parameters(), strict=True):
        own.requires_grad_(other.requires_grad)
    return twin


def shard_layers(model: Any) -> None:
    """Cut the layers of a model over all ranks, in place.

    What is trained becomes fp32, which is the optimizer's master; layers compute in the model's own precision.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    trunk = trunk_of(model)
    layers = list(trunk.layers)
    dtype = next(layers[0].parameters()).dtype
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    inside: set[int] = set()
    for layer in layers:
        for parameter in layer.parameters():
            inside.add(id(parameter))
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        wrapped = fully_shard(layer, mp_policy=policy)
        wrapped.set_gradient_divide_factor(1.0)
        wrapped.set_force_sum_reduction_for_comms(True)
    others = {parameter for parameter in trunk.parameters() if not hasattr(parameter, "placements")}
    fully_shard(trunk, ignored_params=others)


@dataclass(frozen=True, slots=True)
class Layout:
    """How a tensor is cut over the ranks: between its local part and the whole.

    Attributes:
        mesh: The ranks.
        placements: Where the cuts are.
        shape: Of the whole.
        stride: Of the whole.
    """

    mesh: Any
    placements: Any
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, parameter: Tensor) -> Layout | None:
        """The layout of a parameter; None if it is whole on every rank."""
        if not hasattr(parameter, "placements"):
            return None
        sharded: Any = parameter
        return cls(sharded.device_mesh, sharded.placements, parameter.shape, parameter.stride())

    def whole(self, local: Tensor) -> Tensor:
        """The whole from every rank's part; every rank must call it."""
        from torch.distributed.tensor import DTensor

        parts: Any = DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )
        found: Tensor = parts.full_tensor()
        return found

    def local(self, whole: Tensor) -> Tensor:
        """This rank's part of the whole."""
        from torch.distributed.tensor import distribute_tensor

        device = self.mesh.device_type
        parts: Any = distribute_tensor(whole.to(device), self.mesh, self.placements, src_data_rank=None)
        found: Tensor = parts.to_local()
        return found


def local_tensor(parameter: nn.Parameter) -> Tensor:
    """This rank's part of a parameter, sharing its memory; the parameter itself if it is whole."""
    if not hasattr(parameter, "placements"):
        return parameter
    sharded: Any = parameter
    found: Tensor = sharded.to_local().detach()  # a view: its memory is the parameter's
    return found


def whole_tensor(parameter: Tensor) -> Tensor:
    """All of a parameter; every rank must call it."""
    if not hasattr(parameter, "placements"):
        return parameter
    sharded: Any = parameter
    found: Tensor = sharded.full_tensor()
    return found


def in_step(batches: Sequence[Batch], spare: Batch, *, needed: bool) -> list[tuple[Batch, float]]:
    """This rank's microbatches, filled up to as many as the rank with the most has.

    A sharded layer is gathered by all ranks together, so every rank must run as many forward and backward passes.

    Args:
        batches: This rank's.
        spare: Computed again, with weight 0, where a rank has fewer.
        needed: False where nothing is sharded: then nothing is filled up.

    Returns:
        Microbatches with weight 1 or 0.
    """
    own = [(batch, 1.0) for batch in batches]
    if not needed:
        return own
    return own + [(spare, 0.0)] * (largest(len(batches)) - len(batches))
