"""Decoding steps of our own against the model's own, and who gets them."""

from __future__ import annotations

import copy

import pytest
import torch
from training_samples import SIZES

from tunegate.training.batching import pad_left
from tunegate.training.decoding import Decoding, LlamaDecoding, next_logits, start
from tunegate.training.losses import Head
from tunegate.training.models import load_causal_lm
from tunegate.training.ppo_config import SamplingSpec
from tunegate.training.rollout import Generator

ROWS = [[5, 9, 300, 41], [7], [200, 201, 8, 8, 8, 8, 130, 2, 90, 77, 11], [31, 32, 33]] * 4
SAMPLING = SamplingSpec(max_new_tokens=10, temperature=0.8)


def rescale(model) -> None:
    """Weights so large that attention is far from uniform: else a wrong rotation or scale would hardly show."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            weight.copy_(1.0 + 0.3 * drawn if weight.ndim == 1 else drawn * (0.25 if "proj" in name else 0.5))


@pytest.fixture(scope="module")
def models(tiny_model):
    """The same weights in fp32 and bf16."""
    found = {}
    for precision in ("fp32", "bf16"):
        found[precision] = load_causal_lm(tiny_model, precision)
        rescale(found[precision])
    return found


@pytest.fixture(scope="module")
def generator(tiny_model) -> Generator:
    """Answers that end now and then."""
    found = Generator.load(tiny_model, precision="fp32")
    rescale(found.model)
    return found


def full_hidden(model, ids: list[int]) -> torch.Tensor:
    """Last hidden states of one row, without a cache or padding."""
    with torch.inference_mode():
        return model.base_model(torch.tensor([ids]), use_cache=False).last_hidden_state[0]


@pytest.mark.parametrize("rows", [16, 5])  # below 12 rows fp32 products are computed in the other order
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.06)])
def test_steps_equal_whole_passes_while_rows_leave(models, precision, tolerance, rows):
    """Hidden states of ragged rows are those of each row by itself, also after rows have left in the middle."""
    model = models[precision]
    prompts = ROWS[:rows]
    said = (torch.arange(5 * rows).view(5, rows) * 37 + 11) % model.config.vocab_size
    live = list(range(rows))
    with torch.inference_mode():
        decoding = start(model, pad_left(prompts, 0), 5)
        assert type(decoding) is LlamaDecoding
        hidden_BD = decoding.prefill()
        for step in range(6):
            for place, row in enumerate(live):
                expected_D = full_hidden(model, [*prompts[row], *said[:step, row].tolist()])[-1].float()
                error = (hidden_BD[place].float() - expected_D).norm() / expected_D.norm()
                assert error < tolerance
            if step in (2, 3):
                kept = torch.arange(1, len(live), 2 if step == 2 else 1)
                decoding.keep(kept)
                live = [live[place] for place in kept]
                assert decoding.rows == len(live)
            if step < 5:
                hidden_BD = decoding.step(said[step, live])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_logits_equal_those_of_the_model(models, precision):
    """Both ways of decoding, and the output layer of the model itself."""
    model = models[precision]
    prompt = pad_left(ROWS, 0)
    with torch.inference_mode():
        own, here = Decoding(model, prompt, 3), LlamaDecoding(model, prompt, 3)
        own.prefill()
        here.prefill()
        for token in (3, 250, 21):
            token_B = torch.full((16,), token)
            own_BD, here_BD = own.step(token_B), here.step(token_B)
            own_BV, here_BV = model.lm_head(own_BD).float(), next_logits(Head.of(model), here_BD)
            scale = float(own_BV.abs().max())
            torch.testing.assert_close(here_BV, own_BV, rtol=0, atol=(1e-5 if precision == "fp32" else 0.04) * scale)


def test_padding_is_not_seen(models):
    """What stands in the padding of a row changes nothing, to the last bit."""
    model, found = models["fp32"], []
    for pad_id in (0, 77):
        with torch.inference_mode():
            decoding = LlamaDecoding(model, pad_left(ROWS, pad_id), 2)
            decoding.prefill()
            found.append(decoding.step(torch.arange(16)))
    assert torch.equal(*found)


def test_weights_that_change_between_calls_are_seen(tiny_model):
    """Nothing of the weights is kept: a sampler is refreshed in place."""
    generator = Generator.load(tiny_model, precision="fp32")
    rescale(generator.model)
    generator.generate_ids(ROWS, SAMPLING, seed=[1])
    for weight in ("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj", "layers.1.input_layernorm", "norm"):
        with torch.no_grad():
            generator.model.get_submodule(f"model.{weight}").weight.mul_(1.7)
        fresh = copy.deepcopy(generator.model)
        found = generator.generate_ids(ROWS, SAMPLING, seed=[1])
        for prompt, completion in zip(ROWS, found, strict=True):
            assert completion.logprobs == pytest.approx(exact(fresh, prompt, completion.token_ids), abs=1e-4)


def exact(model, prompt: list[int], response: list[int]) -> list[float]:
    """Log-probabilities of a response by a teacher-forced pass."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *response]]), use_cache=False).logits[0].float() / SAMPLING.temperature
    logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return logprobs[torch.arange(len(response)), response].tolist()


def test_log_probabilities_are_those_of_a_teacher_forced_pass(generator):
    """Of rows that end at different times."""
    completions = generator.generate_ids(ROWS, SAMPLING, seed=[3])
    assert isinstance(start(generator.model, pad_left(ROWS, 0), 1), LlamaDecoding)
    for prompt, completion in zip(ROWS, completions, strict=True):
        assert completion.logprobs == pytest.approx(exact(generator.model, prompt, completion.token_ids), abs=1e-4)


def test_tokens_are_those_of_the_models_own_steps(generator, monkeypatch):
    """The same seed draws the same tokens either way, in one batch or in several."""
    expected = [c.token_ids for c in generator.generate_ids(ROWS, SAMPLING, seed=[2])]
    small = SAMPLING.model_copy(update={"batch_tokens": 60})
    assert [c.token_ids for c in generator.generate_ids(ROWS, small, seed=[2])] == expected
    monkeypatch.setattr("tunegate.training.rollout.start", Decoding)
    assert [c.token_ids for c in generator.generate_ids(ROWS, SAMPLING, seed=[2])] == expected


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=600, n_positions=128, n_embd=32, n_layer=2, n_head=2))


def qwen2():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**SIZES))  # biases on q, k, v


def mistral():
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4))


def granite():
    from transformers import GraniteConfig, GraniteForCausalLM

    return GraniteForCausalLM(GraniteConfig(**SIZES, embedding_multiplier=12.0))


def smollm3():
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    return SmolLM3ForCausalLM(SmolLM3Config(**SIZES, no_rope_layers=[1, 0]))


@pytest.mark.parametrize("build", [gpt2, qwen2, mistral, granite, smollm3])
def test_other_models_are_asked_themselves(build, tmp_path, generator):
    """And so give what they gave: greedy tokens are those of whole passes."""
    torch.manual_seed(0)
    model = build().eval()
    model.save_pretrained(tmp_path)
    model = load_causal_lm_of(tmp_path)
    rescale(model)
    with torch.inference_mode():
        assert type(start(model, pad_left(ROWS, 0), 2)) is Decoding
    other = Generator(model, generator.chat, context=128)
    completions = other.generate_ids(ROWS, SamplingSpec(max_new_tokens=6, temperature=0.0), seed=[0])
    for prompt, completion in zip(ROWS[:4], completions[:4], strict=True):
        ids = list(prompt)
        for token in completion.token_ids:
            with torch.inference_mode():
                assert int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()) == token
            ids.append(token)


def load_causal_lm_of(folder):
    """As every model is loaded, layers that can be made fast included."""
    return load_causal_lm(folder, "fp32")


def test_a_changed_layer_is_asked_itself(tiny_model):
    """Hooks and adapters on a layer are not passed over."""
    model = load_causal_lm(tiny_model, "fp32")
    prompt = pad_left(ROWS, 0)
    assert type(start(model, prompt, 1)) is LlamaDecoding
    handle = model.model.layers[1].register_forward_hook(lambda *_: None)
    assert type(start(model, prompt, 1)) is Decoding
    handle.remove()
    assert type(start(model, prompt, 1)) is LlamaDecoding
    attention = model.model.layers[0].self_attn
    attention.v_proj = torch.nn.Linear(attention.v_proj.in_features, attention.v_proj.out_features)
    assert type(start(model, prompt, 1)) is Decoding


def test_a_trunk_that_does_more_is_found_out(tiny_model, monkeypatch):
    """Layers may be plain and the trunk around them not: then the comparison on a probe fails."""
    model = load_causal_lm(tiny_model, "fp32")
    trunk = type(model.model)
    original = trunk.forward

    def scaled(self, input_ids=None, inputs_embeds=None, **options):
        return original(self, inputs_embeds=3.0 * self.embed_tokens(input_ids), **options)

    monkeypatch.setattr(trunk, "forward", scaled)
    assert type(start(model, pad_left(ROWS, 0), 1)) is Decoding
