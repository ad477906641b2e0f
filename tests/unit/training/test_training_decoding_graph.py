"""Decoding by replayed steps: against the model's own, on a CPU with something that stands in for a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from training_samples import SIZES
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tunegate.training import decoding as decoding_module
from tunegate.training.batching import pad_left
from tunegate.training.decoding import Decoding, start
from tunegate.training.decoding_graph import GraphDecoding, fits

ROWS = [[5, 9, 300, 41], [7], [200, 201, 8, 8, 8, 8, 130, 2, 90, 77, 11], [31, 32, 33]] * 2
BUILD: dict[str, Callable[..., object]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=600, n_positions=128, n_embd=32, n_layer=2, n_head=2)),
}


def model_of(name: str):
    torch.manual_seed(0)
    model = BUILD[name]().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(8.0)  # attention far from uniform, so that a wrong mask or place shows
    return model


class Tape:
    """Does what a CUDA graph does: nothing when it is made, then work on the tensors that stood there at that time."""

    made: ClassVar[list[int]] = []

    def __init__(self, work: Callable[[], Tensor]) -> None:
        self.work = work
        self.decoding = work.__self__  # type: ignore[attr-defined]
        self.places = self.addresses()
        Tape.made.append(len(self.decoding._token_S1))

    def addresses(self) -> list[tuple[int, torch.Size]]:
        own = self.decoding
        tensors = [own._token_S1, own._position_B1, own._visible_S11T]
        for layer in own._cache.layers:
            tensors += [layer.keys, layer.values, layer.cumulative_length]
        return [(tensor.data_ptr(), tensor.shape) for tensor in tensors]

    def __call__(self) -> Tensor:
        assert self.addresses() == self.places
        return self.work()


def taped(model, prompt, steps: int) -> GraphDecoding:
    return GraphDecoding(model, prompt, steps, record=Tape)


@pytest.fixture(autouse=True)
def no_tapes():
    Tape.made.clear()


@pytest.mark.parametrize("name", list(BUILD))
def test_replayed_steps_equal_whole_passes_while_rows_leave(name):
    """Each row is what it would be by itself; places are given up by halves, and only then is a step recorded anew."""
    model = model_of(name)
    said = (torch.arange(9 * 8).view(9, 8) * 37 + 11) % 600
    live = list(range(8))
    leaving = {2: [1, 2, 3, 4, 5, 7], 5: [0, 2, 5], 7: [2]}  # 8 -> 6 of 8 places, 3 of 3, 1 of 1
    with torch.inference_mode():
        decoding = taped(model, pad_left(ROWS, 0), 9)
        hidden_BD = decoding.prefill()
        for step in range(10):
            for place, row in enumerate(live):
                ids = torch.tensor([[*ROWS[row], *said[:step, row].tolist()]])
                expected_D = model.base_model(ids, use_cache=False).last_hidden_state[0, -1]
                torch.testing.assert_close(hidden_BD[place], expected_D, rtol=1e-4, atol=1e-5)
            if step in leaving:
                kept = torch.tensor(leaving[step])
                decoding.keep(kept)
                live = [live[place] for place in kept]
                assert decoding.rows == len(live)
            if step < 9:
                hidden_BD = decoding.step(said[step, live])
    assert Tape.made == [8, 3, 1]


def test_who_is_asked():
    """On a GPU whatever gives what it gives itself; never a model that sees a window alone, or is watched."""
    assert decoding_module._agrees(model_of("llama"), taped)
    assert Tape.made
    windowed = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)).eval()
    assert not decoding_module._agrees(windowed, taped)
    assert not decoding_module._agrees(model_of("llama").half(), taped)

    def refuse(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    assert not decoding_module._agrees(model_of("llama"), lambda *given: GraphDecoding(*given, record=refuse))

    class Forgetful(Tape):
        def __call__(self) -> Tensor:
            self.decoding._visible_S11T[:] = True
            return super().__call__()

    assert not decoding_module._agrees(model_of("llama"), lambda *given: GraphDecoding(*given, record=Forgetful))
    assert not fits(model_of("llama").base_model)  # on a CPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", list(BUILD))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_steps_are_recorded(name, dtype):
    model = model_of(name).to("cuda", dtype)
    prompt = pad_left(ROWS, 0).to("cuda")
    tolerance = 1e-3 if dtype == torch.float32 else 0.05
    with torch.inference_mode():
        here, own = start(model, prompt, 6), Decoding(model, prompt, 6)
        assert type(here) is GraphDecoding
        here.prefill()
        own.prefill()
        for step in range(6):
            if step == 3:
                for decoding in (here, own):
                    decoding.keep(torch.tensor([1, 2, 6], device="cuda"))
            token_B = torch.arange(here.rows, device="cuda") * 31 + step
            here_BD, own_BD = here.step(token_B).float(), own.step(token_B).float()
            assert float((here_BD - own_BD).norm() / own_BD.norm()) < tolerance
