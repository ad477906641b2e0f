"""Adding up gradients: of a narrow number format, and straight into the sum, without a tensor in between.

Autograd makes a new tensor for the gradient of every weight in every microbatch and adds it to `.grad`: with
SmolLM2-135M in fp32 half a gigabyte a microbatch that is written and read again, and for an embedding a tensor of the
vocabulary's size that is zero nearly everywhere. A weight that an optimizer has taken over (`take_directly`) gets its
gradient added by whoever computes it: the product is accumulated by the matrix routine itself.

Shape suffixes: N tokens, O width of an output, I width of an input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_BLOCK = 1 << 18  # elements; an fp32 block of this size and its source stay in a core's cache
_MARK = "_takes_gradients_directly"


def accumulate(total: Tensor, part: Tensor) -> None:
    """Add `part` to `total`, in place.

    On CPUs torch adds tensors of different formats at a third of the speed of a conversion and an addition, so these
    are done here block by block.

    Args:
        total: fp32.
        part: Of the same shape, in any format.
    """
    if total.dtype == part.dtype or total.device.type != "cpu" or not total.is_contiguous():
        total.add_(part)
        return
    for into, source in zip(torch.split(total.view(-1), _BLOCK), torch.split(part.reshape(-1), _BLOCK), strict=True):
        into.add_(source.to(torch.float32))


def take_directly(parameter: nn.Parameter) -> None:
    """Let layers add the gradient of this weight to `.grad` themselves; autograd then does not see it.

    Only for whole weights on a CPU whose `.grad` nobody watches by hooks; anything else is left as it is.
    """
    if type(parameter) is nn.Parameter and parameter.device.type == "cpu":
        setattr(parameter, _MARK, True)


def takes_directly(weight: Any) -> bool:
    """True if the gradient of this weight is to be added to `.grad` by the layer that uses it."""
    return torch.is_grad_enabled() and getattr(weight, _MARK, False) and weight.requires_grad


@torch.no_grad()
def add_product(weight_OI: nn.Parameter, gradient_NO: Tensor, input_NI: Tensor, *, scale: float = 1.0) -> None:
    """Add the gradient of a linear layer's weight, scale x gradient^T input, to `.grad`."""
    if weight_OI.grad is None:
        weight_OI.grad = torch.empty_like(weight_OI, memory_format=torch.contiguous_format)
        torch.addmm(weight_OI.grad, gradient_NO.T, input_NI, beta=0.0, alpha=scale, out=weight_OI.grad)
    else:
        torch.addmm(weight_OI.grad, gradient_NO.T, input_NI, alpha=scale, out=weight_OI.grad)


def use_direct_gradients(model: nn.Module) -> int:
    """Let the linear layers and embeddings of a model add their weights' gradients directly, where `take_directly` was.

    Args:
        model: Changed in place; parameters, names, outputs and what is saved stay the same.

    Returns:
        How many layers were changed.
    """
    changed = 0
    for module in model.modules():
        if type(module) in _CLASSES:
            module.__class__ = _CLASSES[type(module)]
            changed += 1
    return changed


class Linear(nn.Linear):
    """`nn.Linear`, whose backward pass adds the weight's gradient to `.grad` where that was asked for."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        if not takes_directly(self.weight):
            return super().forward(input)
        found: Tensor = _Linear.apply(input, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return found


class Embedding(nn.Embedding):
    """`nn.Embedding`, whose backward pass adds the gradients of the rows that were read to `.grad`."""

    def forward(self, input: Tensor) -> Tensor:
        """Look up rows."""
        if not takes_directly(self.weight) or self.max_norm is not None or self.scale_grad_by_freq or self.sparse:
            return super().forward(input)
        found: Tensor = _Embedding.apply(input, self.weight, self.padding_idx)  # type: ignore[no-untyped-call]
        return found


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: Linear, nn.Embedding: Embedding}


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight_OI: nn.Parameter, bias_O: Tensor | None) -> Tensor:
        # The weight is not saved as tensors are: where activations are recomputed, that would give a copy of it.
        ctx.weight_OI = weight_OI
        ctx.save_for_backward(inputs)
        return nn.functional.linear(inputs, weight_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (inputs,) = ctx.saved_tensors
        weight_OI = ctx.weight_OI
        gradient_NO = gradient.reshape(-1, weight_OI.shape[0])
        add_product(weight_OI, gradient_NO, inputs.reshape(-1, weight_OI.shape[1]))
        input_gradient = (gradient_NO @ weight_OI.detach()).view_as(inputs) if ctx.needs_input_grad[0] else None
        return input_gradient, None, gradient_NO.sum(0) if ctx.needs_input_grad[2] else None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight_OI: nn.Parameter, padding_id: int | None) -> Tensor:
        ctx.weight_OI, ctx.padding_id = weight_OI, padding_id
        ctx.save_for_backward(ids)
        return nn.functional.embedding(ids, weight_OI, padding_id)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        (ids,) = ctx.saved_tensors
        weight_OI, ids_N = ctx.weight_OI, ids.reshape(-1)
        gradient_NI = gradient.reshape(-1, weight_OI.shape[1])
        if ctx.padding_id is not None:  # that row is never trained
            gradient_NI = gradient_NI.masked_fill((ids_N == ctx.padding_id)[:, None], 0.0)
        if weight_OI.grad is None:
            weight_OI.grad = torch.zeros_like(weight_OI, memory_format=torch.contiguous_format)
        weight_OI.grad.index_add_(0, ids_N, gradient_NI)
        return None, None, None
