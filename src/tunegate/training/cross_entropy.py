"""Cross-entropy of an output layer without ever holding its logits for all tokens.

A vocabulary of 49,152 makes 192 KiB of fp32 logits a token; their gradient costs as much again. Here logits exist for
one chunk of tokens at a time, and the gradient of the sum is computed right away, in the forward pass, since it needs
the same softmax: d nll / d logits = softmax(logits) - onehot(target). The idea is that of Liger Kernel's fused linear
cross-entropy (arXiv 2410.10989).

Shape suffixes: N tokens, C tokens of a chunk, P tokens of several chunks, D hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tunegate.training.accumulation import accumulate
from tunegate.training.batching import chunks

_CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}
_CHUNKS_A_PRODUCT = {"cpu": 4}
"""So many chunks of the logits' gradient, in the model's precision, are multiplied with the hidden states at once: each
product writes a gradient as large as the output layer, and adding these up takes longer than the products."""


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """How many tokens' logits are held at once."""
    return max(16, _CHUNK_BYTES.get(device.type, 64 << 20) // (4 * vocabulary))


def token_nll(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor) -> Tensor:
    """Negative log-likelihood of each target in nats, [N] fp32, without gradients."""
    with torch.no_grad():
        rows = chunk_rows(weight_VD.shape[0], hidden_ND.device)
        parts = [
            nn.functional.cross_entropy(_logits(hidden_ND[part], weight_VD, bias_V), targets_N[part], reduction="none")
            for part in chunks(len(targets_N), rows)
        ]
        return torch.cat(parts) if parts else hidden_ND.new_zeros(0, dtype=torch.float32)


def linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor) -> Tensor:
    """Sum over tokens of the negative log-likelihood of `targets_N`, a scalar fp32, with gradients.

    Args:
        hidden_ND: Hidden states at the positions that predict the targets.
        weight_VD: Output layer.
        bias_V: Its bias, if any.
        targets_N: Token ids.
    """
    total: Tensor = _SumNLL.apply(hidden_ND, weight_VD, bias_V, targets_N)  # type: ignore[no-untyped-call]
    return total


def _logits(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    return nn.functional.linear(hidden_CD, weight_VD, bias_V).float()


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    """Sums of chunks are kept in fp32; the only chunk of a short batch stays as it is."""
    if total is None:
        return part
    total = total.float()
    accumulate(total, part)
    return total


class _SumNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor) -> Tensor:
        needs_hidden, needs_weight, needs_bias, _ = ctx.needs_input_grad
        rows = chunk_rows(weight_VD.shape[0], hidden_ND.device)
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        hidden_grad_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        weight_grad_VD: Tensor | None = None
        bias_grad_V: Tensor | None = None
        wanted = needs_hidden or needs_weight or needs_bias
        for part in chunks(len(targets_N), rows * _CHUNKS_A_PRODUCT.get(hidden_ND.device.type, 1)):
            hidden_PD, targets_P1 = hidden_ND[part], targets_N[part, None]
            grad_PV = hidden_PD.new_empty(len(targets_P1), weight_VD.shape[0]) if wanted else None
            for piece in chunks(len(targets_P1), rows):
                targets_C1 = targets_P1[piece]
                logprobs_CV = _logits(hidden_PD[piece], weight_VD, bias_V).log_softmax(dim=1)
                total -= logprobs_CV.gather(1, targets_C1).sum()
                if grad_PV is None:
                    continue
                grad_CV = logprobs_CV.exp_()  # softmax, in place
                grad_CV.scatter_add_(1, targets_C1, torch.full_like(targets_C1, -1.0, dtype=grad_CV.dtype))
                if needs_bias:
                    bias_grad_V = _added(bias_grad_V, grad_CV.sum(0))
                grad_PV[piece] = grad_CV
            if grad_PV is None:
                continue
            if hidden_grad_ND is not None:
                torch.mm(grad_PV, weight_VD, out=hidden_grad_ND[part])
            if needs_weight:
                weight_grad_VD = _added(weight_grad_VD, grad_PV.T @ hidden_PD)
        ctx.dtypes = (weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        ctx.save_for_backward(hidden_grad_ND, weight_grad_VD, bias_grad_V)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        hidden_grad_ND, weight_grad_VD, bias_grad_V = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if hidden_grad_ND is None else hidden_grad_ND * grad.to(hidden_grad_ND.dtype),
            None if weight_grad_VD is None else (weight_grad_VD * grad).to(weight_dtype),
            None if bias_grad_V is None else (bias_grad_V * grad).to(bias_dtype),
            None,
        )
