"""Raw scores of many responses at once, all responses to a prompt in one row.

The prompt of a pair goes through the model once; each response sees the prompt and itself, and scores are those of
separate rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunegate.observer import Observer
from tunegate.training.batching import shared_prefix_batch, token_budget_batches
from tunegate.training.models import hidden_states
from tunegate.training.reward_data import Item

_SCORING_TOKENS = 8192  # no gradients are kept, so memory is no concern


def last_hidden(model: Any, items: Sequence[Item], pad_id: int) -> Tensor:
    """Hidden state at the last token of every response, [sum of responses, D], item by item."""
    device = next(model.parameters()).device
    batch, last = shared_prefix_batch([item.prompt for item in items], [item.responses for item in items], pad_id)
    hidden_BTD = hidden_states(model, batch.to(device))
    rows = torch.tensor([row for row, columns in enumerate(last) for _ in columns], device=device)
    columns = torch.tensor([column for columns in last for column in columns], device=device)
    return hidden_BTD[rows, columns]


def score_items(model: Any, items: Sequence[Item], pad_id: int) -> Tensor:
    """Raw scores, with gradients, [sum of responses] fp32, item by item."""
    weight_HD: Tensor = model.score.weight.float()
    hidden_ND = last_hidden(model, items, pad_id).float()
    if len(weight_HD) == 1:
        return hidden_ND @ weight_HD[0]
    heads_N = torch.tensor([item.head for item in items for _ in item.responses], device=hidden_ND.device)
    return (hidden_ND @ weight_HD.T).gather(1, heads_N[:, None])[:, 0]


def raw_item_scores(model: Any, items: Sequence[Item], pad_id: int, observer: Observer) -> list[np.ndarray]:
    """Raw scores [responses] of each item, without gradients, in order, float64."""
    found = _by_item(lambda part: score_items(model, part, pad_id)[:, None], items, observer, "scoring")
    return [values[:, 0] for values in found]


def item_features(model: Any, items: Sequence[Item], pad_id: int, observer: Observer) -> list[np.ndarray]:
    """Hidden states [responses, D] at the last tokens of each item, without gradients, in order, float64."""
    return _by_item(lambda part: last_hidden(model, part, pad_id), items, observer, "features")


def _by_item(
    compute: Callable[[Sequence[Item]], Tensor], items: Sequence[Item], observer: Observer, label: str
) -> list[np.ndarray]:
    found: dict[int, np.ndarray] = {}
    for group in token_budget_batches([item.tokens for item in items], _SCORING_TOKENS):
        part = [items[index] for index in group]
        with torch.no_grad():  # inference tensors could not take part in a later backward pass of sharded layers
            values = compute(part).double().cpu().numpy()
        start = 0
        for index, item in zip(group, part, strict=True):
            found[index] = values[start : start + len(item.responses)]
            start += len(item.responses)
        observer.progress(len(found), len(items), "item", label)
    return [found[index] for index in range(len(items))]
