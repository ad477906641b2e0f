"""The processes of a data-parallel run, seen from one of them.

Statistics and gradients of PPO are sums over all ranks. With one process every function
here is the identity; under `torchrun` it is a collective of `torch.distributed`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, distributed

Item = TypeVar("Item")


def world() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without `torch.distributed`."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def share(items: Sequence[Item]) -> list[Item]:
    """This rank's part of a list that every rank knows: every world-size-th item."""
    rank, size = world()
    return list(items[rank::size])


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of every rank's tensor; the tensor itself with one rank."""
    if world()[1] == 1:
        return tensor
    total = tensor.clone()
    distributed.all_reduce(total)
    return total


def agreed(flag: bool) -> bool:
    """True on every rank if it is true on any: all ranks stop at the same step, or none does."""
    if world()[1] == 1:
        return flag
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    return bool(sum_over_ranks(torch.tensor(float(flag), device=device)) > 0)


def largest(count: int) -> int:
    """The largest of every rank's number."""
    if world()[1] == 1:
        return count
    counts = [0] * world()[1]
    distributed.all_gather_object(counts, count)
    return max(counts)


def from_first(value: Item) -> Item:
    """Rank 0's value, on every rank."""
    if world()[1] == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Add up the gradients of all ranks in one message. A parameter without a gradient counts as zero."""
    if world()[1] == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:  # every rank steps its own parts of all of them
        return
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    parts = torch.split(flat, [gradient.numel() for gradient in gradients])
    for gradient, summed in zip(gradients, parts, strict=True):
        gradient.copy_(summed.view_as(gradient))


def seed_step(seed: int, step: int) -> None:
    """Seed torch for the noise of one step of this rank: noise on embeddings, dropout in adapters.

    A function of seed, step and rank, so that ranks draw different noise and a resumed run the same again.
    """
    number = int(np.random.SeedSequence([seed, step, world()[0]]).generate_state(1, np.uint64)[0])
    torch.manual_seed(number >> 1)


def gather(items: Sequence[Item], total: int) -> list[Item]:
    """Undo `share`: every rank's part, back in the order of the whole list.

    Args:
        items: This rank's part.
        total: Length of the whole list.
    """
    size = world()[1]
    if size == 1:
        return list(items)
    parts: list[list[Item]] = [[] for _ in range(size)]
    distributed.all_gather_object(parts, list(items))
    return [parts[index % size][index // size] for index in range(total)]
