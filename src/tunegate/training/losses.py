"""The PPO losses and the log-probabilities they need, as pure tensor functions.

Losses are returned as sums over valid tokens divided by a given count, never as means over whatever happens to be in
the tensor: the gradient is then the same whatever the microbatch size and the number of ranks.

Shape suffixes: N response tokens (flattened, valid ones only), D width of the trunk, V vocabulary.
"""

# ruff: noqa: N815 - fields carry shape suffixes
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tunegate.training.accumulation import add_product, takes_directly
from tunegate.training.batching import chunks
from tunegate.training.cross_entropy import chunk_rows
from tunegate.training.kl import LOG_RATIO_LIMIT, kl_estimate
from tunegate.training.models import head_of

KEPT_BYTES = 256 << 20
"""Most memory for the probabilities of a microbatch that are kept for its gradient."""

Entropy = Literal["none", "watched", "trained"]
"""What is wanted of the entropy of a distribution: nothing, its value, or its value with gradients."""

# -- log-probabilities --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Head:
    """An output layer whose logits are computed in fp32.

    In bf16 a logit of 16 to 32 is rounded to a multiple of 1/8, and the probability ratio of two nearly equal policies
    jumps by 13%: as much as PPO's whole clipping range. The products of bf16 factors are exact in fp32, so an fp32
    copy of the weights is all it takes.

    Attributes:
        weight_VD: As the model holds it.
        exact_VD: The same in fp32 (or the very same tensor, if it is fp32 or fp64 already).
        bias_V: In the precision of `exact_VD`, or None.
    """

    weight_VD: Tensor
    exact_VD: Tensor
    bias_V: Tensor | None

    @classmethod
    def of(cls, model: Any) -> Head:
        """The head of a causal model; gradients flow to the model's weights where those require them."""
        weight_VD, bias_V = head_of(model)
        if weight_VD.dtype in (torch.float32, torch.float64):
            return cls(weight_VD, weight_VD, bias_V)
        return cls(weight_VD, weight_VD.float(), None if bias_V is None else bias_V.float())

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits in fp32 (fp64 for an fp64 model), [N, V]."""
        factors_are_bf16 = hidden_ND.dtype == self.weight_VD.dtype == torch.bfloat16
        with _bf16_factors() if factors_are_bf16 and hidden_ND.device.type == "cpu" else nullcontext():
            return torch.nn.functional.linear(hidden_ND.to(self.exact_VD.dtype), self.exact_VD, self.bias_V)


@contextmanager
def _bf16_factors() -> Iterator[None]:
    """Let oneDNN multiply fp32 factors as bf16 and add up in fp32: exact where they hold bf16 numbers, 3x as fast."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def token_logprobs(hidden_ND: Tensor, head: Head, tokens_N: Tensor, temperature: float) -> Tensor:
    """Find log pi of given tokens, at the sampling temperature, in fp32, [N]; see `logprobs_and_entropy`."""
    return logprobs_and_entropy(hidden_ND, head, tokens_N, temperature, entropy="none")[0]


def logprobs_and_entropy(
    hidden_ND: Tensor, head: Head, tokens_N: Tensor, temperature: float, *, entropy: Entropy = "watched"
) -> tuple[Tensor, Tensor]:
    """Find log pi of given tokens and the entropy of each distribution (nats), both [N] fp32.

    The logits never exist for more than a chunk of positions. Where the head is frozen the gradient with respect to
    the hidden states is computed with the forward pass, so nothing of vocabulary size is kept or computed twice. Where
    it is trained in fp32, the probabilities of up to `KEPT_BYTES` are kept, and not computed again for the gradient.
    Else, and where the entropy is trained, each chunk is computed again in the backward pass.

    Args:
        hidden_ND: Last hidden state at the position *before* each token.
        head: The output layer.
        tokens_N: The tokens that were said.
        temperature: Logits are divided by this.
        entropy: `none` gives 0, `watched` no gradients.
    """
    differentiable = torch.is_grad_enabled() and (hidden_ND.requires_grad or head.weight_VD.requires_grad)
    if differentiable and entropy != "trained":
        arguments = (hidden_ND, head, tokens_N, temperature, entropy)
        kept = 4 * hidden_ND.shape[0] * head.weight_VD.shape[0] <= KEPT_BYTES and head.bias_V is None
        if not head.weight_VD.requires_grad:
            return _FrozenHeadLogprobs.apply(*arguments)  # type: ignore[no-untyped-call, no-any-return]
        if kept and hidden_ND.dtype == torch.float32 and takes_directly(head.weight_VD):
            return _TrainedHeadLogprobs.apply(*arguments)  # type: ignore[no-untyped-call, no-any-return]

    def one(hidden_CD: Tensor, tokens_C: Tensor) -> tuple[Tensor, Tensor]:
        logprobs_CV = (head.logits(hidden_CD) / temperature).log_softmax(dim=-1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and entropy == "trained"):
            entropy_C = _entropy(logprobs_CV, entropy)
        return logprobs_CV.gather(1, tokens_C[:, None])[:, 0], entropy_C

    parts: list[tuple[Tensor, Tensor]] = []
    for part in chunks(hidden_ND.shape[0], chunk_rows(head.weight_VD.shape[0], hidden_ND.device)):
        hidden_CD, tokens_C = hidden_ND[part], tokens_N[part]
        parts.append(
            checkpoint(one, hidden_CD, tokens_C, use_reentrant=False) if differentiable else one(hidden_CD, tokens_C)
        )
    if not parts:
        empty = hidden_ND.new_zeros(0, dtype=torch.float32)
        return empty, empty
    return torch.cat([logprobs for logprobs, _ in parts]), torch.cat([entropies for _, entropies in parts])


def _entropy(logprobs_CV: Tensor, entropy: Entropy) -> Tensor:
    """Entropy of each distribution, -sum p log p, [C]."""
    if entropy == "none":
        return logprobs_CV.new_zeros(logprobs_CV.shape[0])
    return -(logprobs_CV.exp() * logprobs_CV).sum(dim=-1)


class _FrozenHeadLogprobs(torch.autograd.Function):
    """log softmax(h W^T / temp)[token] with d/dh = (W[token] - E_p[W]) / temp computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, head: Head, tokens_N: Tensor, temperature: float, entropy: Entropy
    ) -> tuple[Tensor, Tensor]:
        selected_N = torch.empty(hidden_ND.shape[0], dtype=head.exact_VD.dtype, device=hidden_ND.device)
        entropy_N = torch.empty_like(selected_N)
        gradient_ND = torch.empty_like(hidden_ND)
        for part in chunks(hidden_ND.shape[0], chunk_rows(head.weight_VD.shape[0], hidden_ND.device)):
            tokens_C = tokens_N[part]
            logprobs_CV = (head.logits(hidden_ND[part]) / temperature).log_softmax(dim=-1)
            selected_N[part] = logprobs_CV.gather(1, tokens_C[:, None])[:, 0]
            entropy_N[part] = _entropy(logprobs_CV, entropy)
            mean_CD = logprobs_CV.exp_().to(head.weight_VD.dtype) @ head.weight_VD
            gradient_ND[part] = ((head.weight_VD[tokens_C] - mean_CD) / temperature).to(hidden_ND.dtype)
        ctx.save_for_backward(gradient_ND)
        ctx.mark_non_differentiable(entropy_N)
        return selected_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        (gradient_ND,) = ctx.saved_tensors
        return (grad_outputs[0][:, None] * gradient_ND).to(gradient_ND.dtype), None, None, None, None


class _TrainedHeadLogprobs(torch.autograd.Function):
    """log softmax(h W^T / temp)[token], with d/d logits = (onehot(token) - softmax) / temp from the kept softmax."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, head: Head, tokens_N: Tensor, temperature: float, entropy: Entropy
    ) -> tuple[Tensor, Tensor]:
        weight_VD = head.weight_VD
        selected_N = hidden_ND.new_empty(hidden_ND.shape[0])
        entropy_N = torch.empty_like(selected_N)
        probabilities_NV = hidden_ND.new_empty(hidden_ND.shape[0], weight_VD.shape[0])
        for part in chunks(hidden_ND.shape[0], chunk_rows(weight_VD.shape[0], hidden_ND.device)):
            logprobs_CV = probabilities_NV[part]
            torch.mm(hidden_ND[part], weight_VD.T, out=logprobs_CV)
            torch.log_softmax(logprobs_CV.div_(temperature), dim=-1, out=logprobs_CV)
            selected_N[part] = logprobs_CV.gather(1, tokens_N[part, None])[:, 0]
            entropy_N[part] = _entropy(logprobs_CV, entropy)
            logprobs_CV.exp_()
        ctx.weight_VD, ctx.temperature = weight_VD, temperature
        ctx.save_for_backward(hidden_ND, probabilities_NV, tokens_N)
        ctx.mark_non_differentiable(entropy_N)
        return selected_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        hidden_ND, probabilities_NV, tokens_N = ctx.saved_tensors
        scaled_N1 = grad_outputs[0][:, None] / ctx.temperature
        gradient_NV = probabilities_NV.mul_(-scaled_N1)  # nobody else has them, and no second pass asks for them
        gradient_NV.scatter_add_(1, tokens_N[:, None], scaled_N1)
        add_product(ctx.weight_VD, gradient_NV, hidden_ND)
        return gradient_NV @ ctx.weight_VD.detach(), None, None, None, None


# -- losses -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """The clipped surrogate and what is watched about it; sums over the given tokens, divided by `tokens`."""

    loss: Tensor
    """Differentiable."""
    clipped: Tensor
    """Share of tokens whose clipped term is the larger one."""
    divergence: Tensor
    """k3 estimate of KL(old, new), nats a token."""


def policy_loss(
    logprobs_N: Tensor, old_logprobs_N: Tensor, advantages_N: Tensor, *, clip: float, tokens: float
) -> PolicyLoss:
    """L_pg = mean max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) (arXiv 1707.06347, eq. 7).

    Args:
        logprobs_N: log pi of each valid token, differentiable.
        old_logprobs_N: The same under the policy before the update, recomputed by the same forward pass.
        advantages_N: Advantages, already whitened.
        clip: eps.
        tokens: Valid tokens of the whole minibatch on all ranks: the denominator of the mean.
    """
    log_ratio_N = (logprobs_N - old_logprobs_N).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio_N = log_ratio_N.exp()
    plain_N = -advantages_N * ratio_N
    clipped_N = -advantages_N * ratio_N.clamp(1.0 - clip, 1.0 + clip)
    with torch.no_grad():
        clipped = (clipped_N > plain_N).sum() / tokens
        divergence = kl_estimate(old_logprobs_N, logprobs_N, "k3").sum() / tokens
    return PolicyLoss(torch.maximum(plain_N, clipped_N).sum() / tokens, clipped, divergence)


def value_loss(values_N: Tensor, old_values_N: Tensor, returns_N: Tensor, *, clip: float, tokens: float) -> Tensor:
    """L_v = 1/2 mean max((V - R)^2, (V_old + clip(V - V_old, +-eps_v) - R)^2).

    Args:
        values_N: V of each valid token, differentiable.
        old_values_N: V before the update.
        returns_N: Returns, unwhitened.
        clip: eps_v.
        tokens: Valid tokens of the whole minibatch on all ranks.
    """
    clipped_N = old_values_N + (values_N - old_values_N).clamp(-clip, clip)
    return 0.5 * torch.maximum((values_N - returns_N).square(), (clipped_N - returns_N).square()).sum() / tokens


def preference_loss(
    chosen_B: Tensor, rejected_B: Tensor, *, beta: float, kind: str = "sigmoid", label_smoothing: float = 0.0
) -> Tensor:
    """Loss of direct preference optimisation, [B].

    `sigmoid`: -(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h) with h the difference of the log-ratios and s the
    label smoothing (Rafailov et al. 2023, arXiv 2305.18290, eq. 7). `ipo`: (h - 1 / (2 beta))^2 (Azar et al. 2023,
    arXiv 2310.12036, eq. 17).

    Args:
        chosen_B: log(policy / reference) of each chosen response, summed over its tokens (nats), differentiable.
        rejected_B: The same of each rejected response.
        beta: Strength of the tie to the reference.
        kind: `sigmoid` or `ipo`.
        label_smoothing: s.
    """
    difference_B = chosen_B - rejected_B
    if kind == "ipo":
        return (difference_B - 1.0 / (2.0 * beta)).square()
    logsigmoid = torch.nn.functional.logsigmoid
    return -(1.0 - label_smoothing) * logsigmoid(beta * difference_B) - label_smoothing * logsigmoid(
        -beta * difference_B
    )
