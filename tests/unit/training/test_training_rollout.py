"""Generation against transformers' own, and the rules that rollouts are held to."""

from __future__ import annotations

import pytest
import torch

from tunegate.errors import SpecError
from tunegate.training.ppo_config import SamplingSpec
from tunegate.training.rollout import Generator
from tunegate.training.sampling import draw

PROMPTS = [
    [{"role": "user", "content": text}]
    for text in (
        "What about bread?",
        "What about a bicycle, and the moon, and tea, and garlic, and rice? Take your time.",
        "Tea?",
        "Yes, please Yes, please",
        "What about a violin?",
    )
]
SAMPLING = SamplingSpec(max_new_tokens=12, temperature=0.7)


@pytest.fixture(scope="module")
def generator(tiny_model) -> Generator:
    """A tiny model whose answers end now and then: the output layer favours the stop token a little."""
    generator = Generator.load(tiny_model, precision="fp32")
    model = generator.model
    model.lm_head = torch.nn.Linear(64, model.config.vocab_size, bias=True)
    with torch.no_grad():
        torch.manual_seed(0)
        model.lm_head.weight.normal_(std=0.3)
        model.lm_head.bias.zero_()
        model.lm_head.bias[list(generator.chat.stop_ids)] = 4.0
    return generator


def full_logits(generator: Generator, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Logits that predict each response token: no cache, no padding, one row."""
    ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        logits = generator.model(ids, use_cache=False).logits[0]
    return logits[len(prompt) - 1 : len(prompt) - 1 + len(response)].float()


def test_log_probabilities_are_exact_at_the_sampling_temperature(generator):
    """Left padding and the cache change nothing; token t is predicted at t - 1, at the temperature."""
    for prompt, completion in zip(PROMPTS, generator.generate(PROMPTS, SAMPLING, seed=3), strict=True):
        ids = generator.chat.prompt_ids(prompt)
        logits = full_logits(generator, ids, completion.token_ids) / 0.7
        exact = logits.log_softmax(-1)[torch.arange(len(logits)), completion.token_ids]
        assert completion.logprobs == pytest.approx(exact.tolist(), abs=2e-5)
        assert completion.prompt_tokens == len(ids)


def test_greedy_equals_transformers(generator):
    """The decoding loop finds what `generate` finds, row by row."""
    completions = generator.generate(PROMPTS, SamplingSpec(max_new_tokens=12, temperature=0.0), seed=0)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids = torch.tensor([generator.chat.prompt_ids(prompt)])
        expected = generator.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=list(generator.chat.stop_ids),
            pad_token_id=generator.chat.pad_id,
        )[0, ids.shape[1] :]
        assert completion.token_ids == expected.tolist()


def test_a_row_is_drawn_the_same_in_any_batch(generator):
    """The noise belongs to seed and place, so batch size and batch mates do not matter."""
    together = generator.generate(PROMPTS, SAMPLING, seed=5)
    small = SAMPLING.model_copy(update={"batch_tokens": 64})
    assert [c.token_ids for c in generator.generate(PROMPTS, small, seed=5)] == [c.token_ids for c in together]
    rows = [generator.chat.prompt_ids(PROMPTS[3])]
    assert generator.generate_ids(rows, SAMPLING, seed=[5], numbers=[3])[0].token_ids == together[3].token_ids
    assert [c.token_ids for c in generator.generate(PROMPTS, SAMPLING, seed=6)] != [c.token_ids for c in together]


@pytest.mark.parametrize("share", [0.01, 1.0])
def test_finished_rows_leave_without_a_trace(generator, monkeypatch, share):
    """Compacting the cache as soon as possible or never gives the same responses."""
    expected = [c.token_ids for c in generator.generate(PROMPTS * 4, SAMPLING, seed=7)]
    assert len({len(ids) for ids in expected}) > 2  # they do end at different times
    widths: list[int] = []
    original = Generator._logits

    def spy(self, hidden_BD):
        widths.append(hidden_BD.shape[0])
        return original(self, hidden_BD)

    monkeypatch.setattr(Generator, "_logits", spy)
    monkeypatch.setattr("tunegate.training.rollout.COMPACT_SHARE", share)
    assert [c.token_ids for c in generator.generate(PROMPTS * 4, SAMPLING, seed=7)] == expected
    assert (min(widths) < 20) == (share < 1.0)


def test_responses_end_at_the_first_stop_token(generator):
    """Cut after the first stop token, which is part of the response; `finished` says whether there was one."""
    completions = generator.generate(PROMPTS * 4, SAMPLING, seed=8)
    stops = set(generator.chat.stop_ids)
    assert {completion.finished for completion in completions} == {True, False}
    for completion in completions:
        assert not stops & set(completion.token_ids[:-1])
        assert completion.finished == (completion.token_ids[-1] in stops)
        assert completion.finished or len(completion.token_ids) == 12
        assert len(completion.logprobs) == len(completion.token_ids)
        assert completion.text == generator.chat.decode(completion.token_ids)


def test_a_padding_token_that_is_drawn_counts(generator):
    """The mask comes from lengths; a real token with the padding id does not shorten the response."""
    head = generator.model.lm_head
    saved = head.bias.detach().clone()
    with torch.no_grad():
        head.bias[generator.chat.pad_id] = 50.0
    try:
        completion = generator.generate(PROMPTS[:1], SAMPLING, seed=0)[0]
    finally:
        with torch.no_grad():
            head.bias.copy_(saved)
    assert completion.token_ids == [generator.chat.pad_id] * 12
    assert not completion.finished


def test_rollouts_draw_from_the_whole_distribution(generator, monkeypatch):
    """What PPO samples with is top_p = 1, top_k = 0, and the head sees one position a step, prompt included."""
    from tunegate.training.ppo_config import PPOSpec

    seen: list[tuple[int, float, int, float]] = []

    def spy(logits_BV, noise_B, *, temperature, top_p, top_k):
        seen.append((logits_BV.dim(), top_p, top_k, temperature))
        return draw(logits_BV, noise_B, temperature=temperature, top_p=top_p, top_k=top_k)

    monkeypatch.setattr("tunegate.training.rollout.draw", spy)
    spec = PPOSpec(max_new_tokens=4, temperature=0.9)
    generator.generate(PROMPTS, spec.rollout_sampling, seed=0)
    assert set(seen) == {(2, 1.0, 0, 0.9)}


def test_long_prompts_lose_their_oldest_turns(generator):
    """Prompts are shortened turn by turn, and only then in the middle of one."""
    long = [
        {"role": "user", "content": "Tea? " * 30},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "What about bread?"},
    ]
    sampling = SAMPLING.model_copy(update={"max_prompt_tokens": 40})
    assert generator.encode(long, sampling) == generator.chat.prompt_ids(long[2:])
    whole = generator.chat.prompt_ids(long[:1])
    assert generator.encode(long[:1], sampling) == whole[-40:]


def test_no_room_for_a_prompt_is_an_error(generator):
    with pytest.raises(SpecError, match="leaves no room"):
        generator.generate(PROMPTS, SamplingSpec(max_new_tokens=4096), seed=0)


def test_sampling_spec_refuses_a_nucleus_without_chance():
    with pytest.raises(ValueError, match="greedy"):
        SamplingSpec(temperature=0.0, top_p=0.9)
