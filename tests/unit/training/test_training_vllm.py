"""The vLLM backend against a stand-in for the package: the calls it makes, and that PPO on it is the same PPO.

What vLLM itself does with these calls is not tested here: that takes a GPU.
"""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace
from typing import ClassVar

import pytest

from tunegate.data.records import Prompt
from tunegate.errors import SpecError
from tunegate.training.ppo import train_ppo
from tunegate.training.ppo_config import PPOSpec, SamplingSpec
from tunegate.training.rollout import Generator
from tunegate.training.vllm_rollout import VLLMGenerator

PROMPTS = [Prompt(id=f"p{n}", messages=[{"role": "user", "content": f"What about {n}?"}]) for n in range(16)]
sys.modules["vllm_rewards"] = module = type(sys)("vllm_rewards")
module.vowels = lambda prompts, responses: [sum(c in "aeiou" for c in r) / max(1, len(r)) for r in responses]


class Engine:
    """Stands for `vllm.LLM`: draws with our own generator, on weights of its own, noise by each request's seed."""

    made: ClassVar[list] = []

    def __init__(self, model, **settings):
        from pathlib import Path

        self.settings, self.resets, self.pushed = settings, 0, []
        self.own = Generator.load(Path(model), precision="fp32")
        Engine.made.append(self)

    def generate(self, prompts, parameters, use_tqdm=True):
        assert use_tqdm is False
        outputs = []
        for prompt, own in zip(prompts, parameters, strict=True):
            assert own.ignore_eos and own.stop_token_ids == list(self.own.chat.stop_ids) and own.logprobs == 0
            sampling = SamplingSpec(max_new_tokens=own.max_tokens, temperature=own.temperature)
            (drawn,) = self.own.generate_ids([prompt["prompt_token_ids"]], sampling, seed=[own.seed])
            steps = [{t: SimpleNamespace(logprob=v)} for t, v in zip(drawn.token_ids, drawn.logprobs, strict=True)]
            outputs.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=drawn.token_ids, logprobs=steps)]))
        return outputs

    def apply_model(self, function):
        model = self.own.model

        def load_weights(weights):
            mine = dict(model.named_parameters())
            for name, weight in weights:
                self.pushed.append(name)
                mine[name].data.copy_(weight)

        function(SimpleNamespace(load_weights=load_weights))

    def reset_prefix_cache(self):
        self.resets += 1


@pytest.fixture
def vllm(monkeypatch):
    Engine.made = []
    fake = type(sys)("vllm")
    fake.LLM, fake.SamplingParams = Engine, SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", fake)
    return Engine


def test_responses_come_back_as_from_our_own_generator(vllm, tiny_model):
    """Greedy, so that no noise is involved: tokens, text, log-probabilities and ends."""
    own = Generator.load(tiny_model, precision="fp32")
    other = VLLMGenerator(own, str(tiny_model), memory=0.4)
    sampling = SamplingSpec(max_new_tokens=10, temperature=0.0)
    rows = [own.encode(prompt.messages, sampling) for prompt in PROMPTS[:4]]
    expected = own.generate_ids(rows, sampling, seed=[1])
    found = other.generate_ids(rows, sampling, seed=[1])
    for one, two in zip(expected, found, strict=True):
        assert (one.text, one.token_ids, one.finished, one.prompt_tokens) == (
            two.text, two.token_ids, two.finished, two.prompt_tokens,
        )  # fmt: skip
        assert two.logprobs == pytest.approx(one.logprobs, abs=1e-5)
    settings = vllm.made[0].settings
    assert settings["gpu_memory_utilization"] == 0.4 and settings["logprobs_mode"] == "processed_logprobs"


def test_a_rows_noise_is_its_own(vllm, tiny_model):
    """The seed of a request is a function of the draw and of the row's number, not of its place in the call."""
    own = Generator.load(tiny_model, precision="fp32")
    other = VLLMGenerator(own, str(tiny_model), memory=0.4)
    sampling = SamplingSpec(max_new_tokens=8, temperature=1.0)
    rows = [own.encode(PROMPTS[0].messages, sampling)] * 4
    whole = other.generate_ids(rows, sampling, seed=[3, 1])
    part = other.generate_ids(rows[:2], sampling, seed=[3, 1], numbers=[2, 3])
    assert [c.token_ids for c in part] == [c.token_ids for c in whole[2:]]
    assert len({tuple(c.token_ids) for c in whole}) == 4


@pytest.mark.parametrize("method", ["lora", "full"])
def test_ppo_pushes_the_weights_after_every_update(vllm, tiny_model, tmp_path, method):
    """What is drawn follows the policy: the drawn and the recomputed log-probabilities agree in every update."""
    spec = PPOSpec(
        generator="vllm", vllm_memory=0.2, reward_function="vllm_rewards:vowels", method=method, steps=3,
        prompts_per_update=8, max_new_tokens=8, max_prompt_tokens=64, epochs=2, learning_rate=1e-2, evaluate_every=3,
        evaluate_prompts=6, critic_warmup_epochs=1, precision="fp32", keep="last",
        shaping={"standardise_prompts": 8, "missing_eos": "none"}, kl={"early_stop": None, "limit": 100.0},
    )  # fmt: skip
    result = train_ppo(tiny_model, None, PROMPTS[:10], PROMPTS[10:], tmp_path / "o", spec=spec, seed=1)
    (engine,) = vllm.made
    assert engine.resets >= 3
    assert all(summary.sampling_gap < 1e-4 for summary in result.history)
    names = set(engine.pushed)
    adapted = {name for name in names if ".layers.1." in name}
    assert (
        (names == adapted and names)
        if method == "lora"
        else len(names) == len(dict(engine.own.model.named_parameters()))
    )
    saved = Generator.load(tmp_path / "o", precision="fp32").model.state_dict()
    assert all((saved[name] == tensor).all() for name, tensor in copy.deepcopy(engine.own.model.state_dict()).items())


def test_without_the_package_the_fix_is_named(monkeypatch, tiny_model):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(SpecError, match="pip install vllm"):
        VLLMGenerator(Generator.load(tiny_model, precision="fp32"), str(tiny_model), memory=0.4)
