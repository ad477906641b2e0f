"""Attention for short sequences on CPUs, by plain batched matrix products.

torch's fused attention kernel pays off on long sequences; on CPUs its backward pass takes six times as long as batched
products at 100 tokens, and as long at about 600 (bf16 with AMX, torch 2.13). Here the query heads that share a
key-value head are stacked, so that keys and values are not copied, and the mask goes into the first product.

Shape suffixes: B rows, H query heads, K key-value heads, G = H / K, T tokens, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NAME = "tunegate_short"
LONGEST = 512
"""Tokens up to which the plain products are used; longer rows go to torch's fused kernel."""

_UNUSUAL = ("softcap", "position_bias", "s_aux", "sliding_window", "cache")


def register() -> str:
    """Make the attention known to transformers, under the name that is returned."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, short_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def short_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BKTD: Tensor,
    value_BKTD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal or masked attention in the signature of transformers' attention functions.

    Whatever is not plain self-attention over at most `LONGEST` tokens (decoding on a cache, dropout, capped scores,
    windows) goes to transformers' own SDPA function.

    Args:
        module: The attention layer; says if it is causal.
        query_BHTD: Queries.
        key_BKTD: Keys.
        value_BKTD: Values.
        attention_mask: True (or 0) where a query may look, [B or 1, 1, T, T]; None means causal.
        scaling: Of the scores; unset means 1 / sqrt(D).
        dropout: On the attention weights.
        is_causal: Overrides the module.
        **options: Of other attention functions.

    Returns:
        The output [B, T, H, D], and None for the weights.
    """
    rows, heads, length, width = query_BHTD.shape
    groups = key_BKTD.shape[1]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    plain = (
        query_BHTD.device.type == "cpu"
        and key_BKTD.shape[2] == length <= LONGEST
        and length > 1
        and not dropout
        and (causal or attention_mask is not None)
        and all(options.get(name) is None for name in _UNUSUAL)
    )
    if not plain:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        output: tuple[Tensor, None] = sdpa_attention_forward(
            module,
            query_BHTD,
            key_BKTD,
            value_BKTD,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **options,
        )
        return output
    stacked = heads // groups * length
    # Key-value head k serves query heads k G .. k G + G - 1, which are neighbours, so stacking is a reshape.
    query_BgTD = query_BHTD.reshape(rows * groups, stacked, width)
    key_BgTD = key_BKTD.reshape(rows * groups, length, width)
    bias = stacked_bias(attention_mask, rows, length, groups, heads // groups, query_BHTD)
    scale = width**-0.5 if scaling is None else scaling
    weights_BgTT = torch.baddbmm(bias, query_BgTD, key_BgTD.transpose(1, 2), alpha=scale).softmax(-1)
    mixed_BgTD = torch.bmm(weights_BgTT, value_BKTD.reshape(rows * groups, length, width))
    return mixed_BgTD.view(rows, heads, length, width).transpose(1, 2), None


def stacked_bias(mask: Tensor | None, rows: int, length: int, groups: int, heads: int, like: Tensor) -> Tensor:
    """What is added to the scores of stacked query heads, [B K, G T, T].

    Args:
        mask: As `short_attention` takes it.
        rows: B.
        length: T.
        groups: K.
        heads: G.
        like: Says the number format and the device.
    """
    bias = _bias(mask, length, like).repeat(1, heads, 1)
    return bias[:, None].expand(rows, groups, heads * length, length).reshape(-1, heads * length, length)


def _bias(mask: Tensor | None, length: int, like: Tensor) -> Tensor:
    """What is added to the scores, [B or 1, T, T]: 0 where a query may look, else the lowest number."""
    lowest = torch.finfo(like.dtype).min
    if mask is None:
        return torch.full((1, length, length), lowest, dtype=like.dtype).triu_(1)
    if mask.dtype == torch.bool:
        return torch.zeros(mask[:, 0].shape, dtype=like.dtype).masked_fill_(~mask[:, 0], lowest)
    return mask[:, 0].to(like.dtype)
