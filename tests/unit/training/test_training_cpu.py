"""What is done so that training is fast on CPUs, and that it changes no result."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tunegate.training import accumulation, losses
from tunegate.training.accumulation import accumulate, use_direct_gradients
from tunegate.training.config import OptimizerSpec
from tunegate.training.losses import Head, token_logprobs
from tunegate.training.models import checkpoint_activations, load_causal_lm
from tunegate.training.norm import use_fast_norms
from tunegate.training.optim import Optimizer


def norms(dtype: torch.dtype, width: int = 48) -> tuple[nn.Module, nn.Module]:
    """A Llama norm as it is, and the same with the closed-form gradient."""
    plain = LlamaRMSNorm(width, eps=1e-5)
    with torch.no_grad():
        plain.weight.copy_(1.0 + 0.1 * torch.randn(width, generator=torch.Generator().manual_seed(1)))
    plain = plain.to(dtype)
    fast = nn.Sequential(copy.deepcopy(plain))
    assert use_fast_norms(fast) == 1
    assert use_fast_norms(fast) == 0  # a second time changes nothing
    return plain, fast[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_is_the_models_own_to_the_last_bit(dtype: torch.dtype) -> None:
    plain, fast = norms(dtype)
    hidden = torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert torch.equal(plain(hidden), fast(hidden))
    with torch.no_grad():
        assert torch.equal(plain(hidden), fast(hidden))
    assert isinstance(fast, LlamaRMSNorm)
    assert list(fast.state_dict()) == ["weight"]


def gradients(norm: nn.Module, hidden: torch.Tensor, upstream: torch.Tensor) -> list[torch.Tensor]:
    hidden = hidden.detach().clone().requires_grad_()
    return list(torch.autograd.grad(norm(hidden), [hidden, norm.weight], upstream))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_the_gradient_is_that_of_the_formula_in_fp64(dtype: torch.dtype, tolerance: float) -> None:
    _, fast = norms(dtype)
    generator = torch.Generator().manual_seed(3)
    hidden, upstream = (torch.randn(4, 7, 48, generator=generator).to(dtype) for _ in range(2))
    exact = hidden.double().requires_grad_()
    weight = fast.weight.detach().double().requires_grad_()
    output = weight * exact * (exact.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    expected = torch.autograd.grad(output, [exact, weight], upstream.double())
    for found, wanted in zip(gradients(fast, hidden, upstream), expected, strict=True):
        assert found.dtype == dtype
        assert float((found.double() - wanted).abs().max() / wanted.abs().max()) < tolerance


def test_the_bf16_gradient_is_no_worse_than_autograds() -> None:
    plain, fast = norms(torch.bfloat16)
    generator = torch.Generator().manual_seed(4)
    hidden, upstream = (torch.randn(64, 48, generator=generator).bfloat16() for _ in range(2))
    exact_norm = copy.deepcopy(plain).double()
    exact = hidden.double().requires_grad_()
    weight = exact_norm.weight
    output = weight * exact * (exact.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    wanted = torch.autograd.grad(output, exact, upstream.double())[0]
    error_fast = (gradients(fast, hidden, upstream)[0].double() - wanted).norm()
    error_plain = (gradients(plain, hidden, upstream)[0].double() - wanted).norm()
    assert float(error_fast) <= 1.05 * float(error_plain)


def test_a_frozen_weight_gets_no_gradient_and_upstream_stays_as_it_was() -> None:
    _, fast = norms(torch.float32)
    fast.weight.requires_grad_(False)
    hidden = torch.randn(2, 48, generator=torch.Generator().manual_seed(5)).requires_grad_()
    upstream = torch.ones(2, 48)
    fast(hidden).backward(upstream)
    assert hidden.grad is not None and fast.weight.grad is None
    assert torch.equal(upstream, torch.ones(2, 48))


def test_a_norm_with_another_formula_is_left_alone() -> None:
    gemma = nn.Sequential(GemmaRMSNorm(16))
    with torch.no_grad():
        gemma[0].weight.fill_(0.3)
    assert use_fast_norms(gemma) == 0
    assert type(gemma[0]) is GemmaRMSNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accumulate_adds_every_element_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    total = torch.randn(700, 600, generator=generator)  # more than one block
    part = torch.randn(700, 600, generator=generator).to(dtype)
    expected = total.double() + part.double()
    accumulate(total, part)
    assert torch.equal(total, expected.float())


def test_accumulate_takes_transposed_parts() -> None:
    total, part = torch.zeros(5, 3), torch.arange(15.0).bfloat16().view(3, 5).T
    accumulate(total, part)
    assert torch.equal(total, part.float())


def test_logits_of_a_bf16_model_are_exact_products_summed_in_fp32() -> None:
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(300, 64, generator=generator).bfloat16()
    hidden = torch.randn(20, 64, generator=generator).bfloat16()
    before = torch.backends.mkldnn.matmul.fp32_precision
    logits = Head(weight, weight.float(), None).logits(hidden)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    exact = hidden.double() @ weight.double().T
    assert logits.dtype == torch.float32
    assert float((logits.double() - exact).abs().max()) < 2e-5
    # Rounded to bf16 they would be off by a thousand times as much.
    assert float(((hidden @ weight.T).double() - exact).abs().max()) > 2e-3


def test_fp32_logits_are_not_rounded() -> None:
    generator = torch.Generator().manual_seed(8)
    weight, hidden = (torch.randn(40, 64, generator=generator) for _ in range(2))
    exact = hidden.double() @ weight.double().T
    assert float((Head(weight, weight, None).logits(hidden).double() - exact).abs().max()) < 2e-5


def llama() -> LlamaForCausalLM:
    """A tiny model whose output layer is its embedding, with a padding token that is never trained."""
    torch.manual_seed(9)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        tie_word_embeddings=True,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


def two_microbatches(model: LlamaForCausalLM) -> list[torch.Tensor]:
    """Log-probabilities of two microbatches, with their gradients added up in the model."""
    generator = torch.Generator().manual_seed(10)
    found = []
    for rows in (3, 2):
        ids = torch.randint(0, 61, (rows, 11), generator=generator)  # token 0, the padding, is among them
        hidden = model.model(ids).last_hidden_state[:, :-1].flatten(0, 1)
        logprobs = token_logprobs(hidden, Head.of(model), ids[:, 1:].flatten(), 0.7)
        (logprobs * torch.randn(len(logprobs), generator=generator)).sum().backward()
        found.append(logprobs.detach())
    return found


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("kept_bytes", [0, 64 << 20])
def test_gradients_that_layers_add_themselves_are_autograds(
    recomputed: bool, kept_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "KEPT_BYTES", kept_bytes)
    plain, direct = llama(), llama()
    if recomputed:
        checkpoint_activations(direct)
    assert use_direct_gradients(direct) == 16  # 7 linear layers in each of 2 layers, embedding and output layer
    assert use_direct_gradients(direct) == 0
    optimizer = Optimizer(direct.named_parameters(), OptimizerSpec(), learning_rate=1e-3, total_steps=2)
    added = []
    add_product = accumulation.add_product
    monkeypatch.setattr(accumulation, "add_product", lambda *args: added.append(args) or add_product(*args))
    exact = copy.deepcopy(plain).double()
    for found, wanted in zip(two_microbatches(direct), two_microbatches(plain), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    two_microbatches(exact)
    assert len(added) == 2 * 14
    for (name, found), wanted in zip(direct.named_parameters(), exact.parameters(), strict=True):
        assert found.grad is not None and wanted.grad is not None
        error = float((found.grad.double() - wanted.grad).abs().max() / wanted.grad.abs().max())
        assert error < 2e-6, name
    optimizer.step()
    assert all(parameter.grad is None for parameter in direct.parameters())


def test_frozen_and_copied_weights_keep_to_autograd() -> None:
    model = llama()
    use_direct_gradients(model)
    model.model.layers[0].requires_grad_(False)
    Optimizer(model.named_parameters(), OptimizerSpec(), learning_rate=1e-3, total_steps=2)
    ids = torch.arange(12).view(2, 6)
    model.model(ids).last_hidden_state.square().sum().backward()
    assert all(parameter.grad is None for parameter in model.model.layers[0].parameters())
    assert all(parameter.grad is not None for parameter in model.model.layers[1].parameters())
    twin = copy.deepcopy(model)
    weight = twin.model.layers[1].mlp.up_proj.weight
    (gradient,) = torch.autograd.grad(twin.model(ids).last_hidden_state.square().sum(), weight)
    torch.testing.assert_close(gradient, model.model.layers[1].mlp.up_proj.weight.grad)


def test_training_in_bf16_keeps_to_autograd_and_its_fp32_sums() -> None:
    model = llama().bfloat16()
    use_direct_gradients(model)
    Optimizer(model.named_parameters(), OptimizerSpec(), learning_rate=1e-3, total_steps=2)
    two_microbatches(model)
    assert all(parameter.grad is None for parameter in model.parameters())  # moved to the fp32 masters


_PAGES = """
import torch
from tunegate.training.measure import reuse_memory
reuse_memory()
reuse_memory()
tensor = torch.ones(16 << 20)
address, inside = tensor.data_ptr() + (8 << 20), False  # its first bytes may lie before the first huge page
for line in open("/proc/self/smaps"):
    first = line.split()[0]
    if "-" in first and ":" not in first:
        low, high = (int(part, 16) for part in first.split("-"))
        inside = low <= address < high
    elif inside and first == "VmFlags:":
        print("hg" in line.split())
"""


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").is_dir() or torch.cuda.is_available(),
    reason="the system has no transparent huge pages, or training is on a GPU",
)
def test_tensors_lie_where_huge_pages_were_asked_for() -> None:
    done = subprocess.run([sys.executable, "-c", _PAGES], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"]


def test_loading_a_model_limits_what_onednn_keeps(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    load_causal_lm(tiny_model)
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "32"
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    load_causal_lm(tiny_model)
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"
