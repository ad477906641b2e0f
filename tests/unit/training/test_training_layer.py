"""Decoder layers with their gradient in closed form: what the model's own layers give, forward and backward."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tunegate.training.attention import LONGEST, register
from tunegate.training.batching import packed_batch, pad_right
from tunegate.training.config import LoraSpec, OptimizerSpec
from tunegate.training.layer import use_fast_layers, without_padding
from tunegate.training.lora import add_lora
from tunegate.training.models import checkpoint_activations, hidden_states
from tunegate.training.optim import Optimizer

RAGGED = [[5, 9, 13, 7, 22, 31, 8], [6, 11, 4], [17, 3, 29, 12, 10]]
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def models(dtype: torch.dtype = torch.float32, attention: str | None = None) -> tuple[Any, Any]:
    """A Llama as it is (its attention computed step by step), and the same with the layers under test."""
    torch.manual_seed(1)
    own = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(5.0)  # so that attention is not nearly even
    own = own.to(dtype)
    here = copy.deepcopy(own)
    own.set_attn_implementation("eager")
    here.set_attn_implementation(attention or register())
    assert use_fast_layers(here) == (0 if attention else SIZES["num_hidden_layers"])
    assert use_fast_layers(here) == 0  # a second time changes nothing
    return own, here


def loss_of(model: Any, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Hidden states at the real tokens, and a loss to which each of them matters in its own way."""
    batch = pad_right(rows, 0)
    hidden_ND = hidden_states(model, batch)[batch.mask_BT]
    mix_ND = torch.randn(hidden_ND.shape, generator=torch.Generator().manual_seed(2))
    return hidden_ND, (hidden_ND.float() * mix_ND).sum()


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rows", [RAGGED, RAGGED[:1], [RAGGED[0], RAGGED[0][::-1]]], ids=["ragged", "one", "even"])
@pytest.mark.parametrize("direct", [False, True], ids=["autograd", "direct"])
def test_outputs_and_gradients_are_those_of_the_models_own_layers(rows: list[list[int]], direct: bool) -> None:
    own, here = models()
    if direct:
        Optimizer(here.named_parameters(), OptimizerSpec(), learning_rate=1.0, total_steps=1)
    expected_ND, expected_loss = loss_of(own, rows)
    found_ND, loss = loss_of(here, rows)
    torch.testing.assert_close(found_ND, expected_ND, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(loss_of(here, rows)[0], found_ND), "without gradients the outputs are the same bits"
    expected_loss.backward()
    loss.backward()
    expected, found = gradients(own), gradients(here)
    assert found.keys() == expected.keys()
    assert len(found) == 3 * 9 + 2  # all layers, the embedding and the last norm
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()), msg=name)


def test_bf16_errs_no_more_than_the_models_own_layers() -> None:
    exact, _ = models()
    own, here = models(torch.bfloat16)
    errors = {}
    for name, model in (("exact", exact), ("own", own), ("here", here)):
        loss_of(model, RAGGED)[1].backward()
        errors[name] = gradients(model)
    for weight in ("model.layers.0.mlp.gate_proj.weight", "model.layers.1.self_attn.k_proj.weight"):
        own_error, error = (float((errors[who][weight] - errors["exact"][weight]).norm()) for who in ("own", "here"))
        assert error < 1.3 * own_error
        assert error < 0.2 * float(errors["exact"][weight].norm())


def test_padding_is_left_out_and_changes_nothing() -> None:
    _, here = models()
    batch = pad_right(RAGGED, 0)
    seen: list[tuple[int, ...]] = []
    for layer in here.model.layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    padded_BTD = hidden_states(here, batch)
    assert set(seen) == {(1, sum(map(len, RAGGED)), SIZES["hidden_size"])}
    assert not padded_BTD[~batch.mask_BT].any()
    for index, row in enumerate(RAGGED):
        alone_1TD = hidden_states(here, pad_right([row], 0))
        torch.testing.assert_close(padded_BTD[index, : len(row)], alone_1TD[0], rtol=1e-5, atol=1e-5)


def test_given_embeddings_lose_their_padding_too() -> None:
    own, here = models()
    batch = pad_right(RAGGED, 0)
    noise_BTD = torch.randn(*batch.ids_BT.shape, SIZES["hidden_size"], generator=torch.Generator().manual_seed(3))
    found, expected = (hidden_states(model, batch, embeddings_BTD=noise_BTD)[batch.mask_BT] for model in (here, own))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefix", [False, True])
def test_packed_rows_see_what_their_mask_says(prefix: bool) -> None:
    own, here = models()
    batch = packed_batch([RAGGED, RAGGED[::-1]], 0)
    if prefix:
        batch = replace(batch, shared_prefix=True)
    found, expected = (hidden_states(model, batch)[batch.mask_BT] for model in (here, own))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    mixed = hidden_states(here, replace(batch, segments_BT=None, shared_prefix=False))[batch.mask_BT]
    assert not torch.allclose(found, mixed, atol=1e-2)


def test_recomputed_activations_give_the_same_gradients() -> None:
    _, here = models()
    again = copy.deepcopy(here)
    checkpoint_activations(again)
    for model in (here, again):
        loss_of(model, RAGGED)[1].backward()
    kept, recomputed = gradients(here), gradients(again)
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def test_only_what_is_trained_gets_a_gradient() -> None:
    own, here = models()
    for model in (own, here):
        model.requires_grad_(False)
        model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
        model.model.layers[2].input_layernorm.weight.requires_grad_(True)
        loss_of(model, RAGGED)[1].backward()
    expected, found = gradients(own), gradients(here)
    assert list(found) == list(expected)
    assert len(found) == 2
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


def _adapted(model: Any) -> Any:
    torch.manual_seed(4)
    adapted = add_lora(model, LoraSpec(), key="lora")
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def _hooked(model: Any) -> Any:
    for layer in model.model.layers:
        layer.mlp.up_proj.register_forward_hook(lambda _, __, output: 2.0 * output)
    return model


def _dropping(model: Any) -> Any:
    for layer in model.model.layers:
        layer.self_attn.training = True
        layer.self_attn.attention_dropout = 0.999
    return model


@pytest.mark.parametrize("change", [_adapted, _hooked])
def test_changed_layers_do_their_own_work(change: Any) -> None:
    own, here = (change(model) for model in models())
    assert without_padding(here, pad_right(RAGGED, 0)) is None
    found_ND, expected_ND = loss_of(here, RAGGED)[0], loss_of(own, RAGGED)[0]
    torch.testing.assert_close(found_ND, expected_ND, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found_ND, loss_of(models()[1], RAGGED)[0], atol=1e-2)


def test_dropout_is_not_left_out() -> None:
    here = _dropping(models()[1])
    torch.manual_seed(5)
    assert not torch.allclose(loss_of(here, RAGGED)[0], loss_of(models()[1], RAGGED)[0], atol=1e-2)


def test_other_kernels_long_rows_and_a_cache_are_left_alone() -> None:
    own, here = models()
    assert without_padding(models(attention="eager")[1], pad_right(RAGGED, 0)) is None
    longest = [[index % 40 for index in range(LONGEST + 1)], [1, 2]]
    batch = pad_right(longest, 0)
    assert without_padding(here, batch) is None
    found, expected = (hidden_states(model, batch)[batch.mask_BT] for model in (here, own))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    ids = torch.tensor([RAGGED[0]])
    steps = here(ids[:, :4], use_cache=True)
    rest = here(ids[:, 4:], past_key_values=steps.past_key_values, use_cache=True)
    torch.testing.assert_close(rest.logits, own(ids).logits[:, 4:], rtol=1e-4, atol=1e-4)


def test_layers_of_another_build_are_not_changed() -> None:
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, attn_implementation=register()))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.bias.normal_()
    assert use_fast_layers(model) == 0
    assert use_fast_layers(nn.Linear(3, 3)) == 0
