from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tunegate.errors import TrainingError
from tunegate.training.batching import (
    length_mask,
    pack,
    packed_batch,
    pad_left,
    pad_right,
    positions_from_mask,
    shared_prefix_batch,
    shuffled,
    steps_of_rows,
    steps_of_tokens,
    token_budget_batches,
    visible_keys,
)
from tunegate.training.models import hidden_states, load_causal_lm

ROWS = [[5, 6, 7, 0, 0], [9, 10], [0, 11, 12, 13, 14, 15, 16]]  # 0 is the padding id, and a real token here
LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=60)


def test_masks_come_from_lengths_not_from_ids():
    """Rows that end in, or begin with, the padding id keep those tokens."""
    right, left = pad_right(ROWS, 0), pad_left(ROWS, 0)
    for batch in (right, left):
        assert batch.mask_BT.sum(1).tolist() == batch.lengths_B.tolist() == [5, 2, 7]
        assert [ids[mask].tolist() for ids, mask in zip(batch.ids_BT, batch.mask_BT, strict=True)] == ROWS
    assert length_mask(torch.tensor([2, 0, 3]), 3).tolist() == [[True, True, False], [False] * 3, [True] * 3]


def test_padding_sides_and_positions():
    """Prompts padded left, positions = clamp(cumsum(mask) - 1, 0)."""
    left = pad_left(ROWS, 99)
    assert left.ids_BT[1].tolist() == [99, 99, 99, 99, 99, 9, 10]
    assert left.positions_BT.tolist() == [[0, 0, 0, 1, 2, 3, 4], [0, 0, 0, 0, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6]]
    right = pad_right(ROWS, 99, multiple_of=4)
    assert right.ids_BT.shape == (3, 8) and right.ids_BT[1].tolist() == [9, 10, *[99] * 6]
    assert right.positions_BT[0].tolist() == [0, 1, 2, 3, 4, 0, 0, 0]
    assert positions_from_mask(torch.tensor([[False, False, True, True]])).tolist() == [[0, 0, 0, 1]]


def test_empty_rows_are_refused():
    for rows in ([], [[1], []]):
        with pytest.raises(TrainingError, match="at least one"):
            pad_right(rows, 0)
        with pytest.raises(TrainingError, match="at least one"):
            pad_left(rows, 0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_do_not_depend_on_padding_or_packing(tiny_model, attention):
    """Logits are invariant to padding on either side and to packing."""
    model = load_causal_lm(tiny_model, attention=attention)
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(6, 300, (n,), generator=draw).tolist() for n in (3, 17, 9, 30, 1)]
    with torch.no_grad():
        alone = [model.model(torch.tensor([row])).last_hidden_state[0] for row in rows]
        right = hidden_states(model, pad_right(rows, 0, multiple_of=8))
        left = pad_left(rows, 0)
        padded = model.model(left.ids_BT, attention_mask=left.mask_BT, position_ids=left.positions_BT).last_hidden_state
        together = packed_batch([rows[:3], rows[3:]], 0)
        packed = hidden_states(model, together)
    for index, expected in enumerate(alone):
        torch.testing.assert_close(right[index, : len(expected)], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(padded[index][left.mask_BT[index]], expected, rtol=1e-4, atol=1e-5)
        row, segment = (0, index) if index < 3 else (1, index - 3)
        found = packed[row][together.segments_BT[row] == segment]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_packed_rows_restart_positions():
    batch = packed_batch([[[1, 2, 3], [4, 5]], [[6]]], 0)
    assert batch.ids_BT.tolist() == [[1, 2, 3, 4, 5], [6, 0, 0, 0, 0]]
    assert batch.positions_BT[0].tolist() == [0, 1, 2, 0, 1]
    assert batch.segments_BT.tolist() == [[0, 0, 0, 1, 1], [0, -1, -1, -1, -1]]


def test_visible_keys_by_definition():
    batch, last = shared_prefix_batch([[1, 2], [3]], [[[4, 5], [6]], [[7]]], 0)
    assert last == [[3, 4], [1]]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 3, 2], [0, 1, 0, 0, 0]]
    for shared in (False, True):
        seen = visible_keys(batch.segments_BT, shared_prefix=shared)
        for b, row in enumerate(batch.segments_BT.tolist()):
            for q, own in enumerate(row):
                for k, other in enumerate(row):
                    may = k <= q and (own == other or (shared and other == 0 and own > 0))
                    assert bool(seen[b, 0, q, k]) == may


@given(lengths=LENGTHS, budget=st.integers(1, 300), max_rows=st.none() | st.integers(1, 5))
def test_token_budget_holds_and_loses_nothing(lengths, budget, max_rows):
    groups = token_budget_batches(lengths, budget, max_rows=max_rows)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        width = max(lengths[index] for index in group)
        assert len(group) == 1 or len(group) * width <= budget
        assert max_rows is None or len(group) <= max_rows
    widths = [lengths[group[0]] for group in groups]
    assert widths == sorted(widths, reverse=True)


@given(lengths=LENGTHS, capacity=st.integers(20, 200))
def test_packing_loses_nothing_and_fits(lengths, capacity):
    rows = pack(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    for row in rows:
        assert len(row) == 1 or sum(lengths[index] for index in row) <= capacity


@given(lengths=LENGTHS, tokens=st.integers(90, 400))
def test_steps_cover_the_order(lengths, tokens):
    order = shuffled(len(lengths), seed=1, epoch=0)
    steps = steps_of_tokens(order, lengths, tokens)
    assert [index for step in steps for index in step] == order
    assert all(sum(lengths[index] for index in step) <= tokens for step in steps)
    assert [index for step in steps_of_rows(order, 7) for index in step] == order


def test_shuffles_are_fresh_each_epoch_and_repeatable():
    """A fresh permutation an epoch; the same whenever seed and epoch are the same."""
    orders = {(seed, epoch): shuffled(50, seed=seed, epoch=epoch) for seed in (1, 2) for epoch in (0, 1)}
    assert len({tuple(order) for order in orders.values()}) == 4
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert shuffled(50, seed=2, epoch=1) == orders[2, 1]
