"""From lists of token ids to tensors: padding, masks, microbatches under a token budget, packing, shuffles.

Masks always come from lengths. A padding token may also occur as a real token (a model may emit it), so comparing ids
with the padding id would silently drop it.

Shape suffixes: B rows, T tokens, N items.
"""

# ruff: noqa: N815 - fields carry shape suffixes
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tunegate.errors import TrainingError


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of different lengths in one tensor.

    Attributes:
        ids_BT: Token ids, int64.
        mask_BT: True at real tokens.
        positions_BT: Position of each token in its sequence; 0 at padding.
        lengths_B: Real tokens in each row.
        segments_BT: In packed rows the number of the segment a token belongs to, -1 at padding; None if not packed.
        shared_prefix: True if segment 0 is a prompt that all other segments of its row continue.
    """

    ids_BT: Tensor
    mask_BT: Tensor
    positions_BT: Tensor
    lengths_B: Tensor
    segments_BT: Tensor | None = None
    shared_prefix: bool = False

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        segments = None if self.segments_BT is None else self.segments_BT.to(device)
        return replace(
            self,
            ids_BT=self.ids_BT.to(device),
            mask_BT=self.mask_BT.to(device),
            positions_BT=self.positions_BT.to(device),
            lengths_B=self.lengths_B.to(device),
            segments_BT=segments,
        )


def length_mask(lengths_B: Tensor, width: int) -> Tensor:
    """True for the first `lengths_B[b]` columns of each row: the mask of right-padded rows, [B, width]."""
    return torch.arange(width, device=lengths_B.device)[None, :] < lengths_B[:, None]


def positions_from_mask(mask_BT: Tensor) -> Tensor:
    """Positions `clamp(cumsum(mask) - 1, 0)`, right for either padding side."""
    return (mask_BT.long().cumsum(dim=1) - 1).clamp_min(0)


def pad_right(rows: Sequence[Sequence[int]], pad_id: int, *, multiple_of: int = 1) -> Batch:
    """Pad at the end: for training and scoring.

    A causal model never looks ahead, so the real tokens of a right-padded row need no attention mask at all, and the
    fast causal attention kernels apply (see `models.hidden_states`).

    Args:
        rows: Token ids of each row; at least one row, each with at least one token.
        pad_id: Fills the rest.
        multiple_of: The width is rounded up to a multiple of this.

    Raises:
        TrainingError: If there are no rows, or one is empty.
    """
    lengths_B, width = _measure(rows, multiple_of)
    ids_BT = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    for row, ids in enumerate(rows):
        ids_BT[row, : len(ids)] = torch.as_tensor(ids, dtype=torch.int64)
    mask_BT = length_mask(lengths_B, width)
    positions_BT = torch.arange(width).expand(len(rows), width) * mask_BT
    return Batch(ids_BT, mask_BT, positions_BT, lengths_B)


def pad_left(rows: Sequence[Sequence[int]], pad_id: int, *, multiple_of: int = 1) -> Batch:
    """Pad at the start: for generation, where every row must end at the same column.

    Args:
        rows: Token ids of each prompt; at least one row, each with at least one token.
        pad_id: Fills the start.
        multiple_of: The width is rounded up to a multiple of this.

    Raises:
        TrainingError: If there are no rows, or one is empty.
    """
    lengths_B, width = _measure(rows, multiple_of)
    ids_BT = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    for row, ids in enumerate(rows):
        ids_BT[row, width - len(ids) :] = torch.as_tensor(ids, dtype=torch.int64)
    mask_BT = length_mask(lengths_B, width).flip(1)
    return Batch(ids_BT, mask_BT, positions_from_mask(mask_BT), lengths_B)


def _measure(rows: Sequence[Sequence[int]], multiple_of: int) -> tuple[Tensor, int]:
    if not rows or min(len(ids) for ids in rows) == 0:
        raise TrainingError(
            "a batch needs at least one row and every row at least one token",
            key="batch",
            value=[len(ids) for ids in rows],
            fix="drop empty rows before batching",
        )
    lengths = [len(ids) for ids in rows]
    width = -(-max(lengths) // multiple_of) * multiple_of
    return torch.tensor(lengths), width


def token_budget_batches(lengths: Sequence[int], budget: int, *, max_rows: int | None = None) -> list[list[int]]:
    """Group items of similar length so that each padded group holds at most `budget` tokens.

    Longest first, so that a run that would run out of memory does so at once. A single item longer than the budget
    gets a group of its own.

    Args:
        lengths: Tokens of each item.
        budget: Largest rows x width of a group (tokens, padding included).
        max_rows: Largest number of rows of a group.

    Returns:
        Groups of indices into `lengths`; every index once.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    groups: list[list[int]] = []
    width = 0
    for index in order:
        group = groups[-1] if groups else None
        if group is None or (len(group) + 1) * width > budget or (max_rows is not None and len(group) >= max_rows):
            width = lengths[index]
            groups.append([index])
        else:
            group.append(index)
    return groups


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Fill rows of `capacity` tokens with whole sequences (first-fit decreasing, which wastes at most 22%).

    Args:
        lengths: Tokens of each sequence.
        capacity: Tokens a row; a longer sequence gets a row of its own.

    Returns:
        For each row the indices of its sequences; every index once.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        for row, free in enumerate(room):
            if lengths[index] <= free:
                rows[row].append(index)
                room[row] -= lengths[index]
                break
        else:
            rows.append([index])
            room.append(capacity - lengths[index])
    return rows


def packed_batch(rows: Sequence[Sequence[Sequence[int]]], pad_id: int) -> Batch:
    """Rows of several sequences each, with positions that start at 0 in every sequence.

    Args:
        rows: For each row its sequences of token ids.
        pad_id: Fills the end of shorter rows.

    Returns:
        A batch with `segments_BT`; give the model `visible_keys(segments_BT)` so that sequences in one row do
        not see each other.

    Raises:
        TrainingError: If there are no rows, or one is empty.
    """
    joined = [[token for sequence in row for token in sequence] for row in rows]
    batch = pad_right(joined, pad_id)
    segments_BT = torch.full_like(batch.ids_BT, -1)
    positions_BT = torch.zeros_like(batch.ids_BT)
    for index, row in enumerate(rows):
        start = 0
        for number, sequence in enumerate(row):
            end = start + len(sequence)
            segments_BT[index, start:end] = number
            positions_BT[index, start:end] = torch.arange(len(sequence))
            start = end
    return replace(batch, positions_BT=positions_BT, segments_BT=segments_BT)


def shared_prefix_batch(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[Sequence[int]]], pad_id: int
) -> tuple[Batch, list[list[int]]]:
    """Rows that hold a prompt once and several responses to it one after another.

    Each response's positions start where the prompt ends and `visible_keys` keeps responses from seeing each other,
    so hidden states are those of separate rows, at the cost of one prompt.

    Args:
        prompts: Ids of each row's prompt.
        responses: For each row the ids of its responses, none empty.
        pad_id: Fills the end of shorter rows.

    Returns:
        The batch, and for each row the column of the last token of each response.

    Raises:
        TrainingError: If there are no rows, or one is empty.
    """
    rows = [[*prompt, *(t for ids in own for t in ids)] for prompt, own in zip(prompts, responses, strict=True)]
    batch = pad_right(rows, pad_id)
    segments_BT = torch.full_like(batch.ids_BT, -1)
    positions_BT = torch.zeros_like(batch.ids_BT)
    last: list[list[int]] = []
    for index, (prompt, own) in enumerate(zip(prompts, responses, strict=True)):
        start = len(prompt)
        segments_BT[index, :start] = 0
        positions_BT[index, :start] = torch.arange(start)
        last.append([])
        for number, ids in enumerate(own, start=1):
            end = start + len(ids)
            segments_BT[index, start:end] = number
            positions_BT[index, start:end] = torch.arange(len(prompt), len(prompt) + len(ids))
            last[index].append(end - 1)
            start = end
    batch = replace(batch, positions_BT=positions_BT, segments_BT=segments_BT, shared_prefix=True)
    return batch, last


def visible_keys(segments_BT: Tensor, *, shared_prefix: bool = False) -> Tensor:
    """Which key each query of a packed row may see, bool [B, 1, T, T].

    A token sees the earlier tokens of its own segment and, with a shared prefix, those of segment 0. Padding (segment
    -1) sees padding, so that no row of the attention is empty (an empty softmax is NaN).
    """
    width = segments_BT.shape[1]
    causal_TT = torch.ones(width, width, dtype=torch.bool, device=segments_BT.device).tril()
    visible_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    if shared_prefix:
        visible_BTT |= (segments_BT[:, None, :] == 0) & (segments_BT[:, :, None] > 0)
    return (visible_BTT & causal_TT)[:, None]


def shuffled(count: int, *, seed: int, epoch: int) -> list[int]:
    """A fresh permutation of `range(count)`, the same whenever seed and epoch are the same."""
    return [int(index) for index in np.random.default_rng([seed, epoch]).permutation(count)]


def steps_of_rows(order: Sequence[int], batch_size: int) -> list[list[int]]:
    """Cut an epoch's order into optimizer steps of `batch_size` items; the last step may be smaller."""
    return [list(order[start : start + batch_size]) for start in range(0, len(order), batch_size)]


def steps_of_tokens(order: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Cut an epoch's order into optimizer steps of at most `batch_tokens` tokens (one item at least)."""
    steps: list[list[int]] = []
    tokens = 0
    for index in order:
        if not steps or tokens + lengths[index] > batch_tokens:
            steps.append([])
            tokens = 0
        steps[-1].append(index)
        tokens += lengths[index]
    return steps


def chunks(count: int, size: int) -> Iterator[slice]:
    """Slices that cover `range(count)` in pieces of at most `size`."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
