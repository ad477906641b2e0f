"""One token a row at a time, on a key-value cache.

`Decoding` asks the model itself, through transformers, and works for every model. Others take over after the prompt
where they can: `GraphDecoding` on a GPU (see `decoding_graph`), `LlamaDecoding` on a CPU, for a Llama. On a CPU a step
of 16 rows through a small model is bound by moving weights and by the cost of starting operations, so the step is made
of as few operations as it takes:

- Keys and values stay where they are, in a cache made for the longest response, and are neither joined to what is new
  nor copied for the query heads that share them.
- Hidden states are held with the rows along the second dimension. A product is then W x with W as it lies in memory,
  which for 16 rows takes 0.76 of the time of x W^T in bf16 and 0.9 in fp32 (all layers of SmolLM2-135M, two cores
  with AMX, torch 2.13). Below `_FEW` rows in fp32 the other order is the faster one.
- Residuals are added by the matrix routines.

Weights are used where they are, so a step sees whatever was last written to them.

Shape suffixes: B rows still being decoded, T columns (prompt and response), D width of the trunk, H query heads, K
key-value heads, G = H / K, W head width, h = W / 2, C = (H + 2 K) W, F width of the feed-forward part, V vocabulary, I
and O inputs and outputs of any linear layer.
"""

# ruff: noqa: N815, RUF100 - names carry shape suffixes
from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tunegate.training.batching import Batch, pad_left
from tunegate.training.layer import is_ready
from tunegate.training.losses import Head
from tunegate.training.models import trunk_of

_log = logging.getLogger(__name__)

_FEW = 12
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Of the last hidden states, relative. With SmolLM2-135M the two ways differ by 1e-6 and 0.017."""

_agreed: weakref.WeakKeyDictionary[nn.Module, dict[type[Decoding], bool]] = weakref.WeakKeyDictionary()


def start(model: Any, prompt: Batch, steps: int) -> Decoding:
    """The fastest way of decoding that gives what the model gives.

    Args:
        model: A causal model.
        prompt: From `pad_left`, on the model's device.
        steps: Tokens to decode at most.
    """
    fast = _fast_way(model)
    if fast is None:
        return Decoding(model, prompt, steps)
    agreed = _agreed.setdefault(trunk_of(model), {})
    if fast not in agreed:
        agreed[fast] = _agrees(model, fast)
    return (fast if agreed[fast] else Decoding)(model, prompt, steps)


def _fast_way(model: Any) -> type[Decoding] | None:
    """What might take over from `Decoding`."""
    from tunegate.training import decoding_graph  # which builds on this module

    if _is_llama(model):
        return LlamaDecoding
    return decoding_graph.GraphDecoding if decoding_graph.fits(trunk_of(model)) else None


class Decoding:
    """A batch of left-padded prompts and what was said after them, by the model's own forward pass.

    Attributes:
        rows: How many are still being decoded.
    """

    def __init__(self, model: Any, prompt: Batch, steps: int) -> None:
        """Prepare; see `start`."""
        from transformers import DynamicCache

        self.rows, self._width = prompt.ids_BT.shape
        self._trunk = trunk_of(model)
        self._prompt = prompt
        self._cache: Any = DynamicCache(config=model.config)
        self._mask_BT = nn.functional.pad(prompt.mask_BT.long(), (0, steps), value=1)
        self._position_B1 = prompt.positions_BT[:, -1:]

    def prefill(self) -> Tensor:
        """Read the prompts: last hidden states after each, [B, D]."""
        return self._ask(self._prompt.ids_BT, self._prompt.positions_BT)

    def step(self, token_B: Tensor) -> Tensor:
        """Read one token a row: last hidden states after it, [B, D]."""
        self._position_B1 = self._position_B1 + 1
        self._width += 1
        return self._ask(token_B[:, None], self._position_B1)

    def keep(self, kept_B: Tensor) -> None:
        """Go on with some of the rows alone, given by their places in ascending order."""
        self.rows = len(kept_B)
        self._mask_BT, self._position_B1 = self._mask_BT[kept_B], self._position_B1[kept_B]
        self._cache.batch_select_indices(kept_B)

    def _ask(self, ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
        output = self._trunk(
            input_ids=ids_BT,
            attention_mask=self._mask_BT[:, : self._width],
            position_ids=positions_BT,
            past_key_values=self._cache,
            use_cache=True,
        )
        hidden_BD: Tensor = output.last_hidden_state[:, -1]
        return hidden_BD


class LlamaDecoding(Decoding):
    """The same with a step of our own, for models of plain Llama layers on a CPU."""

    def __init__(self, model: Any, prompt: Batch, steps: int) -> None:
        super().__init__(model, prompt, steps)
        self._longest = self._width + steps
        self._keys_and_values_2BKTW: list[Tensor] = []

    def prefill(self) -> Tensor:
        """Read the prompts with the model's own forward pass, and take over its cache."""
        hidden_BD = super().prefill()
        bias_BT = hidden_BD.new_zeros(self._mask_BT.shape)
        bias_BT.masked_fill_(self._mask_BT == 0, torch.finfo(hidden_BD.dtype).min)
        self._bias_B11T = bias_BT[:, None, None]
        # One block a layer, so that each part of the model's cache is given back as soon as it is copied.
        for layer in self._cache.layers:
            rows, heads, _, width = layer.keys.shape
            block = hidden_BD.new_empty(2, rows, heads, self._longest, width)
            block[0, :, :, : self._width], block[1, :, :, : self._width] = layer.keys, layer.values
            layer.keys = layer.values = None
            self._keys_and_values_2BKTW.append(block)
        return hidden_BD

    def keep(self, kept_B: Tensor) -> None:
        """Move the rows that stay to the front of the cache."""
        self.rows = len(kept_B)
        self._bias_B11T, self._position_B1 = self._bias_B11T[kept_B], self._position_B1[kept_B]
        for block in self._keys_and_values_2BKTW:
            for half in block[..., : self._width, :]:
                half[: self.rows] = half[kept_B]

    def step(self, token_B: Tensor) -> Tensor:
        """Read one token a row: last hidden states after it, [B, D]."""
        self._position_B1 = self._position_B1 + 1
        self._width += 1
        embedded_BD = self._trunk.embed_tokens(token_B)
        cos_B1W, sin_B1W = self._trunk.rotary_emb(embedded_BD[:, None], self._position_B1)
        # Both halves of cosine and sine are the same (Su et al. 2021, arXiv 2104.09864, in the layout of GPT-NeoX).
        half = cos_B1W.shape[-1] // 2
        cos_hB, sin_hB = (part[:, 0, :half].T.contiguous() for part in (cos_B1W, sin_B1W))
        signed_sin_2hB = torch.stack((-sin_hB, sin_hB))
        hidden_DB = _empty(embedded_BD.shape[1], self.rows, embedded_BD).copy_(embedded_BD.T)
        for layer, block in zip(self._trunk.layers, self._keys_and_values_2BKTW, strict=True):
            self._through(layer, block, hidden_DB, cos_hB, signed_sin_2hB)
        hidden_B1D: Tensor = self._trunk.norm(hidden_DB.T.contiguous()[:, None])
        return hidden_B1D[:, 0]

    def _through(self, layer: Any, block_2BKTW: Tensor, hidden_DB: Tensor, cos_hB: Tensor, sin_2hB: Tensor) -> None:
        """One decoder layer; changes the hidden states in place and adds to the cache."""
        attention, mlp = layer.self_attn, layer.mlp
        rows, heads = self.rows, attention.num_key_value_groups
        keys, width = block_2BKTW.shape[2], block_2BKTW.shape[4]

        normalised_DB = _normalised(hidden_DB, layer.input_layernorm)
        mixed_CB = _products(normalised_DB, attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
        query_end, key_end = keys * heads * width, keys * (heads + 1) * width
        # Queries and keys are turned by their positions: (a, b) becomes (a cos - b sin, b cos + a sin).
        turned = mixed_CB[:key_end].view(-1, 2, width // 2, rows)
        swapped = turned.flip(1)
        turned.mul_(cos_hB).addcmul_(swapped, sin_2hB)
        query_BKGW = mixed_CB[:query_end].view(keys, heads, width, rows).permute(3, 0, 1, 2).contiguous()
        new_2BKW = mixed_CB[query_end:].view(2, keys, width, rows).permute(0, 3, 1, 2)
        block_2BKTW[:, :rows, :, self._width - 1] = new_2BKW
        # The query heads of a group stand where the queries of one head would: none looks ahead of the others.
        answer_BKGW = nn.functional.scaled_dot_product_attention(
            query_BKGW,
            block_2BKTW[0, :rows, :, : self._width],
            block_2BKTW[1, :rows, :, : self._width],
            self._bias_B11T[..., : self._width].expand(-1, -1, heads, -1),
            scale=attention.scaling,
        )
        hidden_DB.addmm_(attention.o_proj.weight, answer_BKGW.permute(1, 2, 3, 0).reshape(-1, rows))

        normalised_DB = _normalised(hidden_DB, layer.post_attention_layernorm)
        gate_FB = _products(normalised_DB, mlp.gate_proj.weight)
        nn.functional.silu(gate_FB, inplace=True).mul_(_products(normalised_DB, mlp.up_proj.weight))
        hidden_DB.addmm_(mlp.down_proj.weight, gate_FB)


def next_logits(head: Head, hidden_BD: Tensor) -> Tensor:
    """Logits in fp32, [B, V].

    In fp32 on a CPU the product is computed in the other order and turned round: 8 ms whatever the rows, where the
    usual order takes 9 for 16 rows and 17 for 8 to 10 (vocabulary 49,152, width 576).

    Args:
        head: The output layer.
        hidden_BD: Last hidden states.
    """
    if head.weight_VD.dtype != torch.float32 or head.weight_VD.device.type != "cpu" or head.bias_V is not None:
        return head.logits(hidden_BD)
    return torch.mm(head.weight_VD, hidden_BD.T).T.contiguous()


def _is_llama(model: Any) -> bool:
    """Whether a model is on a CPU and made of plain Llama layers, with nothing added to any of them."""
    trunk = trunk_of(model)
    layers = getattr(trunk, "layers", None)
    return (
        isinstance(layers, nn.ModuleList)
        and all(hasattr(trunk, name) for name in ("embed_tokens", "rotary_emb", "norm"))
        and next(model.parameters()).device.type == "cpu"
        and all(is_ready(layer) for layer in layers)
        and not any(module._forward_hooks or module._forward_pre_hooks for module in trunk.modules())
    )


@torch.inference_mode()
def _agrees(model: Any, fast: Callable[[Any, Batch, int], Decoding]) -> bool:
    """Whether another way gives what `Decoding` gives, on rows of different lengths, one of which leaves.

    Args:
        model: That it may be for.
        fast: The other way.
    """
    from transformers.cache_utils import DynamicLayer

    vocabulary, device = int(model.config.vocab_size), next(model.parameters()).device
    rows = [[index * 7 % vocabulary for index in range(start, end)] for start, end in ((1, 9), (11, 16))]
    prompt, kept = pad_left(rows, 0).to(device), [[0, 1]] * 3 + [[1], [0], [0]]
    own, here = Decoding(model, prompt, len(kept)), fast(model, prompt, len(kept))
    # Layers that see a window alone, or keep a state, have a cache of another kind.
    if model.dtype not in _TOLERANCE or not all(type(layer) is DynamicLayer for layer in own._cache.layers):
        return False
    try:
        own.prefill()
        here.prefill()
        for step, places in enumerate(kept):
            token_B = torch.tensor(places, device=device) * 13 + step
            for decoding in (own, here):
                decoding.keep(torch.tensor(places, device=device))
            own_BD, here_BD = own.step(token_B % vocabulary).float(), here.step(token_B % vocabulary).float()
            # The rounding of some thirty layers adds up; a layer by itself was compared when it was loaded.
            if not (own_BD - here_BD).norm() <= _TOLERANCE[model.dtype] * own_BD.norm():
                return False
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        # Models whose code cannot be recorded, or does not take what it is given.
        _log.info("decoding by the model's own forward pass: %s", error)
        return False
    return True


def _empty(width: int, rows: int, like: Tensor) -> Tensor:
    """Room for hidden states, [width, B]; how it lies in memory decides in which order the products are computed."""
    if like.dtype == torch.float32 and rows < _FEW:
        return like.new_empty(rows, width).T
    return like.new_empty(width, rows)


def _products(input_IB: Tensor, *weights: Tensor) -> Tensor:
    """W x for each weight [O, I], one below the other."""
    output = _empty(sum(len(weight) for weight in weights), input_IB.shape[1], input_IB)
    start = 0
    for weight in weights:
        torch.mm(weight, input_IB, out=output[start : start + len(weight)])
        start += len(weight)
    return output


def _normalised(hidden_DB: Tensor, norm: Any) -> Tensor:
    """Each column x becomes x / sqrt(mean(x^2) + eps) w, rounded as transformers rounds it."""
    wide_DB = hidden_DB.float()
    scale_1B = torch.linalg.vector_norm(wide_DB, dim=0, keepdim=True)
    scale_1B.square_().mul_(1.0 / len(wide_DB)).add_(norm.variance_epsilon).rsqrt_()
    normalised_DB: Tensor = (wide_DB * scale_1B).to(hidden_DB.dtype).mul_(norm.weight[:, None])
    return normalised_DB
