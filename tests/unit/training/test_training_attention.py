from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from tunegate.training.attention import short_attention
from tunegate.training.batching import packed_batch, pad_left, visible_keys
from tunegate.training.models import load_causal_lm


@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("mask", ["none", "packed", "additive"])
def test_equals_torchs_attention_with_gradients(heads, groups, mask):
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(3, 9, heads, 8, generator=draw).transpose(1, 2).requires_grad_()
    key, value = (torch.randn(3, 9, groups, 8, generator=draw).transpose(1, 2).requires_grad_() for _ in range(2))
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1, -1], [0] * 9, [0, 1, 1, 1, 1, 2, 2, 2, -1]])
    seen = None if mask == "none" else visible_keys(segments)
    given = torch.zeros(seen.shape).masked_fill_(~seen, -1e30) if mask == "additive" else seen
    found, _ = short_attention(nn.Module(), query, key, value, given, scaling=0.3)
    expected = scaled_dot_product_attention(
        query, key, value, attn_mask=seen, is_causal=seen is None, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn(found.shape, generator=draw)
    for ours, theirs in zip(
        torch.autograd.grad((found * weight).sum(), (query, key, value)),
        torch.autograd.grad((expected * weight).sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_model_computes_the_same_with_it(tiny_model):
    """The attention kernel changes no logit; decoding against a cache falls back."""
    ours, theirs = load_causal_lm(tiny_model), load_causal_lm(tiny_model)
    assert ours.config._attn_implementation == "tunegate_short"
    theirs.set_attn_implementation("sdpa")
    rows = [[7, 8, 9, 10, 11, 12], [20, 21], [30, 31, 32, 33]]
    left = pad_left(rows, 0)
    inputs = {"attention_mask": left.mask_BT, "position_ids": left.positions_BT}
    packed = packed_batch([rows], 0)
    packed_inputs = {"attention_mask": visible_keys(packed.segments_BT), "position_ids": packed.positions_BT}
    with torch.no_grad():
        a, b = (m(left.ids_BT, **inputs).logits[left.mask_BT] for m in (ours, theirs))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        a, b = (m(packed.ids_BT, **packed_inputs).logits for m in (ours, theirs))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        sampling = {"max_new_tokens": 6, "do_sample": False, "attention_mask": left.mask_BT}
        assert torch.equal(*(m.generate(left.ids_BT, **sampling) for m in (ours, theirs)))
