"""Several heads on one trunk: trained side by side, joined into one, and kept to be read one by one.

Each head is a linear function of the last hidden state, so the weighted sum of their standardised scores is one too: a
reward model with several heads is saved as a plain one with the joint head, and critics, PPO and evaluation use it like
any other. The heads themselves lie beside it.

Shape suffixes: H heads, N responses, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tunegate.errors import ModelError
from tunegate.training.config import HeadSpec

HEADS_FILE = "heads.safetensors"


@dataclass(frozen=True, slots=True)
class HeadScale:
    """How one head reads: score = gain x raw + bias.

    Attributes:
        name: Of the head.
        kind: `reward` or `cost`; a cost is read as it is, since 0 is its border between harmful and harmless.
        gain: So that scores of reference responses have variance 1.
        bias: So that they have mean 0.
    """

    name: str
    kind: str
    gain: float
    bias: float


def widen(model: Any, heads: int) -> None:
    """Give a sequence scorer a score layer with so many heads, in place; `init_score_head` draws it."""
    if heads > 1:
        old = model.score.weight
        model.score = nn.Linear(old.shape[1], heads, bias=False, device=old.device, dtype=old.dtype)


def join(model: Any, heads: Sequence[HeadSpec], raw_HN: np.ndarray) -> tuple[list[HeadScale], Tensor, np.ndarray]:
    """Put the joint head in place of several.

    Args:
        model: Scorer with one row a head; has a single one afterwards.
        heads: Names, kinds, weights.
        raw_HN: Every head's raw scores of the same responses, which they are standardised on.

    Returns:
        Scales of the heads, their weights [H, D] in fp32, and the joint raw scores [N].

    Raises:
        ModelError: If a head gives every response the same score.
    """
    weight_HD = model.score.weight.detach().float().cpu().clone()
    spread_H = raw_HN.std(axis=1)
    for head, spread in zip(heads, spread_H, strict=True):
        if not np.isfinite(spread) or spread < 1e-12:
            raise ModelError(
                "this head gives every response the same score, or scores that are not finite",
                key=f"reward.heads[{head.name}]",
                value=f"standard deviation {spread:g}",
                fix="train longer, or lower reward.learning_rate",
            )
    signs_H = np.array([-1.0 if head.kind == "cost" else 1.0 for head in heads])
    share_H = signs_H * np.array([head.weight for head in heads]) / spread_H
    old = model.score.weight
    model.score = nn.Linear(old.shape[1], 1, bias=False, device=old.device, dtype=old.dtype)
    with torch.no_grad():
        model.score.weight.copy_((torch.from_numpy(share_H).float() @ weight_HD)[None])
    scales = [
        HeadScale(head.name, head.kind, 1.0 / spread, -float(raw.mean()) / spread)
        for head, spread, raw in zip(heads, spread_H.tolist(), raw_HN, strict=True)
    ]
    return scales, weight_HD, share_H @ raw_HN


def save_heads(weight_HD: Tensor, folder: Path) -> None:
    """Write the heads beside the model."""
    from safetensors.torch import save_file

    save_file({"weight": weight_HD.contiguous()}, str(folder / HEADS_FILE))


def load_heads(folder: Path) -> Tensor:
    """The heads of a folder, [H, D] fp32."""
    from safetensors.torch import load_file

    return load_file(str(folder / HEADS_FILE))["weight"]
