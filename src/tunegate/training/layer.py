"""Decoder layers for CPUs, with their gradient in closed form.

Left to autograd, a layer of a Llama is some forty passes over its activations, most of which are kept. Here a layer is
one step of autograd. Its forward pass keeps what cannot be had again by an element-wise pass; residuals are added by
the matrix routines themselves. With SmolLM2-135M in fp32 the matrix products take three quarters of a training step.

Right-padded rows go through the layers without their padding, end to end (`without_padding`): only the attention itself
sees rows.

Shape suffixes: B rows, T tokens of the longest row, N real tokens of all rows, D width of the trunk, H query heads, K
key-value heads, G = H / K, W head width, h = W / 2, F width of the feed-forward part.
"""

# ruff: noqa: N815, RUF100 - names carry shape suffixes
from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tunegate.training.accumulation import add_product, takes_directly
from tunegate.training.attention import LONGEST, NAME, stacked_bias
from tunegate.training.batching import Batch, chunks
from tunegate.training.norm import normalise, normalise_backward, rescaled

_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_BLOCK = 1 << 17  # elements; five such blocks stay in the cores' caches
_MARK = "has_closed_form_gradient"
_FORMATS = (torch.float32, torch.bfloat16)
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


def use_fast_layers(model: nn.Module) -> int:
    """Give the model's decoder layers the closed-form gradient, where they are built like Llama's.

    Layers whose forward pass is asked for something else (a cache, dropout, adapters, long rows) do it their own way.

    Args:
        model: Changed in place; parameters, names and what is saved stay the same.

    Returns:
        How many layers were changed.
    """
    rotary = next((module for name, module in model.named_modules() if name.endswith("rotary_emb")), None)
    changed = 0
    for module in model.modules():
        own = type(module)
        if rotary is not None and own not in _CLASSES.values() and is_llama_layer(module) and _agrees(module, rotary):
            module.__class__ = _fast(own)
            changed += 1
    return changed


@dataclass(frozen=True, slots=True)
class RowLayout:
    """Where the tokens of right-padded rows stand.

    Attributes:
        rows: B.
        length: T.
        real_N: Places of the real tokens in the flattened rows [B T], in order; None if there is no padding.
    """

    rows: int
    length: int
    real_N: Tensor | None


def without_padding(model: Any, batch: Batch) -> dict[str, Any] | None:
    """What a trunk is called with, to run on the real tokens of right-padded rows alone, end to end in one row.

    Args:
        model: A model.
        batch: Right-padded rows.

    Returns:
        `position_ids` and `attention_mask` (which no layer but those here understands); None where the rows have no
        padding, or where some layer would do its work in its own way.
    """
    rows, length = batch.ids_BT.shape
    real_N = batch.mask_BT.flatten().nonzero()[:, 0]
    layers = getattr(model.base_model, "layers", None)
    if len(real_N) == rows * length or not 1 < length <= LONGEST or not isinstance(layers, nn.ModuleList):
        return None
    if batch.ids_BT.device.type != "cpu" or not all(is_ready(layer) for layer in layers):
        return None
    mask_1111 = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    # The mask is the one thing that transformers hands to every layer as it is.
    mask_1111.row_layout = RowLayout(rows, length, real_N)  # type: ignore[attr-defined]
    return {"position_ids": batch.positions_BT[batch.mask_BT][None], "attention_mask": mask_1111}


def is_llama_layer(layer: nn.Module) -> bool:
    """Whether a module has the parts of a Llama's decoder layer, and no others."""
    if {name for name, _ in layer.named_children()} != _PARTS:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    if {name for name, _ in attention.named_children()} != set(_PROJECTIONS):  # type: ignore[union-attr]
        return False
    if {name for name, _ in mlp.named_children()} != {*_FEED_FORWARD, "act_fn"}:  # type: ignore[union-attr]
        return False
    return all(hasattr(attention, name) for name in ("head_dim", "num_key_value_groups", "scaling", "config"))


@torch.no_grad()
def _agrees(layer: Any, rotary: nn.Module) -> bool:
    """Whether a layer gives here what it gives itself, up to rounding."""
    weight_D = layer.input_layernorm.weight
    generator = torch.Generator().manual_seed(0)
    hidden_BTD = torch.randn(2, 5, len(weight_D), generator=generator).to(weight_D)
    positions_BT = torch.arange(5)[None].to(weight_D.device)
    embeddings = rotary(hidden_BTD, positions_BT)
    options = {"attention_mask": None, "position_embeddings": embeddings, "position_ids": positions_BT}
    if not (_is_plain(layer) and _fits(layer, hidden_BTD, None, embeddings)):
        return False
    own_BTD = layer(hidden_BTD, **options)
    here_BTD = _run(layer, hidden_BTD, None, embeddings)
    tolerance = 16 * torch.finfo(hidden_BTD.dtype).eps
    return torch.allclose(own_BTD, here_BTD, rtol=tolerance, atol=tolerance * float(own_BTD.abs().max()))


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _fast(own: type[nn.Module]) -> type[nn.Module]:
    """The same class with another forward pass."""
    if own in _CLASSES:
        return _CLASSES[own]

    def forward(
        self: nn.Module,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **options: Any,
    ) -> Tensor:
        fits = past_key_values is None and _fits(self, hidden_states, attention_mask, position_embeddings)
        if fits and _is_plain(self):
            return _run(self, hidden_states, attention_mask, position_embeddings)  # type: ignore[arg-type]
        found: Tensor = own.forward(
            self,
            hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **options,
        )
        return found

    _CLASSES[own] = type(own.__name__, (own,), {"forward": forward, "__module__": own.__module__, _MARK: True})
    return _CLASSES[own]


def is_ready(layer: Any) -> bool:
    """Whether a layer, asked for nothing unusual, does its work here."""
    return getattr(layer, _MARK, False) and layer.input_layernorm.weight.dtype in _FORMATS and _is_plain(layer)


def _is_plain(layer: Any) -> bool:
    """Whether nothing was changed about a layer, and its attention is plain."""
    attention, mlp = layer.self_attn, layer.mlp
    return (
        attention.config._attn_implementation == NAME
        and not (attention.training and attention.attention_dropout)
        and getattr(attention, "sliding_window", None) is None
        and type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
        and all(is_plain_linear(getattr(attention, name)) for name in _PROJECTIONS)
        and all(is_plain_linear(getattr(mlp, name)) for name in _FEED_FORWARD)
    )


def is_plain_linear(module: nn.Module) -> bool:
    """A linear layer without bias, adapters and hooks."""
    return (
        isinstance(module, nn.Linear)
        and not hasattr(module, "base_layer")
        and getattr(module, "bias", None) is None
        and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
    )


def _fits(layer: Any, hidden_BTD: Tensor, mask: Tensor | None, embeddings: tuple[Tensor, Tensor] | None) -> bool:
    """Whether the inputs are such as are dealt with here."""
    return (
        hidden_BTD.device.type == "cpu"
        and hidden_BTD.dtype in _FORMATS
        and (hasattr(mask, "row_layout") or 1 < hidden_BTD.shape[1] <= LONGEST)
        and embeddings is not None
        and embeddings[0].shape[-1] == layer.self_attn.head_dim
        and (mask is None or mask.ndim == 4)
    )


class _Weights(NamedTuple):
    """All weights of a layer, in the order of their use."""

    norm_D: Tensor
    query_HD: Tensor
    key_KD: Tensor
    value_KD: Tensor
    output_DH: Tensor
    second_norm_D: Tensor
    gate_FD: Tensor
    up_FD: Tensor
    down_DF: Tensor


@dataclass(frozen=True, slots=True)
class _Shape:
    """Sizes and constants of a layer at a batch."""

    layout: RowLayout
    groups: int
    """K."""
    heads: int
    """G, query heads to a key-value head."""
    width: int
    """W."""
    scale: float
    epsilon: float
    second_epsilon: float


def _run(layer: Any, hidden_BTD: Tensor, mask: Tensor | None, embeddings: tuple[Tensor, Tensor]) -> Tensor:
    attention, mlp = layer.self_attn, layer.mlp
    weights = _Weights._make(
        part.weight
        for part in (
            layer.input_layernorm,
            *(getattr(attention, name) for name in _PROJECTIONS),
            layer.post_attention_layernorm,
            *(getattr(mlp, name) for name in _FEED_FORWARD),
        )
    )
    layout: RowLayout | None = getattr(mask, "row_layout", None)
    if layout is not None:
        mask = None
    shape = _Shape(
        layout or RowLayout(hidden_BTD.shape[0], hidden_BTD.shape[1], None),
        weights.key_KD.shape[0] // attention.head_dim,
        attention.num_key_value_groups,
        attention.head_dim,
        attention.scaling,
        layer.input_layernorm.variance_epsilon,
        layer.post_attention_layernorm.variance_epsilon,
    )
    bias = _bias_of(mask, shape, hidden_BTD)
    # Both halves of cosine and sine are the same (Su et al. 2021, arXiv 2104.09864, in the layout of GPT-NeoX).
    cos, sin = (part[:, :, None, : shape.width // 2] for part in embeddings)
    if torch.is_grad_enabled() and (hidden_BTD.requires_grad or any(weight.requires_grad for weight in weights)):
        direct = tuple(takes_directly(weight) for weight in weights)
        found: Tensor = _Layer.apply(hidden_BTD, bias, cos, sin, shape, direct, *weights)  # type: ignore[no-untyped-call]
        return found
    return _forward(hidden_BTD, bias, cos, sin, shape, weights)[0].view(hidden_BTD.shape)


_latest: tuple[Any, tuple[Any, ...], Tensor] | None = None


def _bias_of(mask: Tensor | None, shape: _Shape, like: Tensor) -> Tensor:
    """What is added to the scores, the same for all layers of a pass: kept from one to the next."""
    global _latest
    layout = shape.layout
    key = (layout.rows, layout.length, shape.groups, shape.heads, like.dtype)
    latest = _latest
    if latest is not None and latest[1] == key:
        kept_for = latest[0]
        # A mask that is gone must not pass for no mask at all.
        if (kept_for is None) if mask is None else (kept_for is not None and kept_for() is mask):
            return latest[2]
    bias = stacked_bias(mask, layout.rows, layout.length, shape.groups, shape.heads, like)
    _latest = (None if mask is None else weakref.ref(mask), key, bias)
    return bias


def _forward(
    hidden_BTD: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, shape: _Shape, weights: _Weights
) -> tuple[Tensor, ...]:
    """The output [N, D], and what the backward pass needs."""
    hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    normalised_ND, scale_N1 = normalise(hidden_ND, weights.norm_D, shape.epsilon)
    query = _by_head(_turned(normalised_ND @ weights.query_HD.T, cos, sin, 1.0), shape)
    key = _by_head(_turned(normalised_ND @ weights.key_KD.T, cos, sin, 1.0), shape)
    value = _by_head(normalised_ND @ weights.value_KD.T, shape)
    del normalised_ND
    scores = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=shape.scale)
    attended = torch.softmax(scores, -1, out=scores)
    mixed_NH = _by_token(torch.bmm(attended, value), shape)
    middle_ND = torch.addmm(hidden_ND, mixed_NH, weights.output_DH.T)
    normalised_ND, second_scale_N1 = normalise(middle_ND, weights.second_norm_D, shape.second_epsilon)
    gate_NF = normalised_ND @ weights.gate_FD.T
    up_NF = normalised_ND @ weights.up_FD.T
    output_ND = torch.addmm(middle_ND, _gated(gate_NF, up_NF), weights.down_DF.T)
    kept = (hidden_ND, scale_N1, query, key, value, attended, mixed_NH, middle_ND, second_scale_N1, gate_NF, up_NF)
    return output_ND, *kept


class _Layer(torch.autograd.Function):
    """One decoder layer: attention and feed-forward part with their residuals."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_BTD: Tensor,
        bias: Tensor,
        cos: Tensor,
        sin: Tensor,
        shape: _Shape,
        direct: tuple[bool, ...],
        *weights: Tensor,
    ) -> Tensor:
        output_ND, *kept = _forward(hidden_BTD, bias, cos, sin, shape, _Weights(*weights))
        ctx.save_for_backward(*kept, cos, sin)
        # Weights are not saved as tensors are: where activations are recomputed, that would give copies of them.
        ctx.weights, ctx.shape, ctx.direct = _Weights(*weights), shape, direct
        return output_ND.view(hidden_BTD.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (
            hidden_ND, scale_N1, query, key, value, attended, mixed_NH, middle_ND, second_scale_N1, gate_NF, up_NF,
            cos, sin,
        ) = ctx.saved_tensors  # fmt: skip
        weights, shape = ctx.weights, ctx.shape
        needs = dict(zip(_Weights._fields, ctx.needs_input_grad[6:], strict=True))
        direct = dict(zip(_Weights._fields, ctx.direct, strict=True))
        found: dict[str, Tensor | None] = dict.fromkeys(_Weights._fields)

        def learn(name: str, gradient_NO: Tensor, input_NI: Tensor) -> None:
            if direct[name]:
                add_product(getattr(weights, name), gradient_NO, input_NI)
            elif needs[name]:
                found[name] = gradient_NO.T @ input_NI

        # Feed-forward part: y = m + (silu(g) * u) W_down^T.
        output_grad_ND = gradient.reshape(hidden_ND.shape)
        product_NF, gate_grad_NF, up_grad_NF = _gated_backward(output_grad_ND @ weights.down_DF, gate_NF, up_NF)
        learn("down_DF", output_grad_ND, product_NF)
        del product_NF
        normalised_ND = rescaled(middle_ND, weights.second_norm_D, second_scale_N1)
        learn("gate_FD", gate_grad_NF, normalised_ND)
        learn("up_FD", up_grad_NF, normalised_ND)
        normalised_grad_ND = torch.addmm(gate_grad_NF @ weights.gate_FD, up_grad_NF, weights.up_FD)
        del up_grad_NF, gate_grad_NF
        middle_grad_ND, found["second_norm_D"] = normalise_backward(
            normalised_grad_ND, middle_ND, weights.second_norm_D, second_scale_N1, needs["second_norm_D"]
        )
        middle_grad_ND += output_grad_ND

        # Attention: m = x + concat(softmax(q k^T s + bias) v) W_out^T.
        learn("output_DH", middle_grad_ND, mixed_NH)
        mixed_grad = _by_head(middle_grad_ND @ weights.output_DH, shape)
        value_grad = torch.bmm(attended.transpose(1, 2), mixed_grad)
        scores_grad = torch.bmm(mixed_grad, value.transpose(1, 2))
        scores_grad = torch.ops.aten._softmax_backward_data(scores_grad, attended, -1, attended.dtype)
        # The scale of the scores goes into the rotation of their gradients.
        cos, sin = cos * shape.scale, sin * shape.scale
        query_grad_N = _turned(_by_token(torch.bmm(scores_grad, key), shape), cos, sin, -1.0)
        key_grad_N = _turned(_by_token(torch.bmm(scores_grad.transpose(1, 2), query), shape), cos, sin, -1.0)
        value_grad_N = _by_token(value_grad, shape)
        normalised_ND = rescaled(hidden_ND, weights.norm_D, scale_N1)
        learn("query_HD", query_grad_N, normalised_ND)
        learn("key_KD", key_grad_N, normalised_ND)
        learn("value_KD", value_grad_N, normalised_ND)
        if not (ctx.needs_input_grad[0] or needs["norm_D"]):
            return (None,) * 6 + tuple(found[name] for name in _Weights._fields)
        normalised_grad_ND = query_grad_N @ weights.query_HD
        normalised_grad_ND.addmm_(key_grad_N, weights.key_KD).addmm_(value_grad_N, weights.value_KD)
        hidden_grad_ND, found["norm_D"] = normalise_backward(
            normalised_grad_ND, hidden_ND, weights.norm_D, scale_N1, needs["norm_D"]
        )
        hidden_grad_ND += middle_grad_ND
        return (
            hidden_grad_ND.view_as(gradient),
            *(None,) * 5,
            *(found[name] for name in _Weights._fields),
        )


# -- the gate -----------------------------------------------------------------------------------------------------
# Several passes over a block that stays in the cache, then the next block: a fifth of the traffic to memory.


def _gated(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """silu(g) * u."""
    product_NF = torch.empty_like(up_NF)
    for part in _blocks(gate_NF):
        torch.mul(nn.functional.silu(gate_NF[part]), up_NF[part], out=product_NF[part])
    return product_NF


def _gated_backward(gradient_NF: Tensor, gate_NF: Tensor, up_NF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """silu(g) * u once more, and the gradients of g and u; `gradient_NF` is used up."""
    product_NF, up_grad_NF = torch.empty_like(up_NF), torch.empty_like(up_NF)
    for part in _blocks(gate_NF):
        activated, gradient = nn.functional.silu(gate_NF[part]), gradient_NF[part]
        torch.mul(activated, up_NF[part], out=product_NF[part])
        torch.mul(activated, gradient, out=up_grad_NF[part])
        torch.ops.aten.silu_backward(gradient.mul_(up_NF[part]), gate_NF[part], grad_input=gradient)
    return product_NF, gradient_NF, up_grad_NF


def _blocks(values_NF: Tensor) -> Iterator[slice]:
    rows, width = values_NF.shape
    return chunks(rows, max(1, _BLOCK // width))


# -- layouts ------------------------------------------------------------------------------------------------------


def _by_head(values_N: Tensor, shape: _Shape) -> Tensor:
    """From tokens [N, heads W] to rows and heads, those of a group stacked, [B K, (G or 1) T, W]; 0 at padding."""
    layout = shape.layout
    if layout.real_N is not None:
        padded = values_N.new_zeros(layout.rows * layout.length, values_N.shape[1])
        values_N = padded.index_copy_(0, layout.real_N, values_N)
    by_row = values_N.view(layout.rows, layout.length, -1, shape.width)
    return by_row.transpose(1, 2).reshape(layout.rows * shape.groups, -1, shape.width)


def _by_token(values: Tensor, shape: _Shape) -> Tensor:
    """From rows and heads [B K, heads T, W] back to tokens, [N, heads W]."""
    layout = shape.layout
    by_row = values.view(layout.rows, -1, layout.length, shape.width)
    values_N = by_row.transpose(1, 2).reshape(layout.rows * layout.length, -1)
    return values_N if layout.real_N is None else values_N.index_select(0, layout.real_N)


def _turned(values_N: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    """Queries or keys turned by their positions, or turned back: each (a, b) becomes (a cos - b sin, b cos + a sin).

    Args:
        values_N: [N, heads W].
        cos: [B or 1, T, 1, h], or [1, N, 1, h].
        sin: Likewise.
        direction: 1, or -1 for back.
    """
    half = cos.shape[-1]
    source = values_N.view(-1, cos.shape[1], values_N.shape[1] // (2 * half), 2 * half)
    target = torch.empty_like(source)
    first, second = source[..., :half], source[..., half:]
    torch.mul(first, cos, out=target[..., :half]).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=target[..., half:]).addcmul_(first, sin, value=direction)
    return target.view(values_N.shape)
