"""How far a model moved from the one it was trained from: KL divergence on its own answers.

Answers are drawn from the policy at temperature 1 and read again by both models. Of the two unbiased estimators of
J. Schulman, "Approximating KL divergence" (2020), k3 is used, token by token: it has less noise and is never negative.

Shape suffixes: N response tokens.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tunegate.data.records import Messages
from tunegate.evaluation.backends import Decoding
from tunegate.observer import Observer
from tunegate.training.batching import token_budget_batches
from tunegate.training.chat import Chat
from tunegate.training.config import Precision
from tunegate.training.kl import kl_estimate
from tunegate.training.losses import Head, token_logprobs
from tunegate.training.models import hidden_states, load_causal_lm
from tunegate.training.policy import ResponseBatch
from tunegate.training.ppo_config import SamplingSpec
from tunegate.training.rollout import Generator

_BATCH_TOKENS = 8_192


def measure_divergence(
    policy: Path,
    reference: Path,
    prompts: Sequence[Messages],
    decoding: Decoding,
    precision: Precision,
    observer: Observer,
) -> list[float] | None:
    """KL(policy, reference) of each answer.

    Args:
        policy: Folder of the model that answers.
        reference: Folder of the model that it came from.
        prompts: What is asked.
        decoding: Length limits, batch size and seed; its temperature is not used.
        precision: Number format of both models.
        observer: Told the progress.

    Returns:
        Nats an answer, in the order of the prompts; None when the models cut text into different tokens.
    """
    sampling = SamplingSpec(
        max_new_tokens=decoding.max_new_tokens,
        temperature=1.0,
        max_prompt_tokens=decoding.max_prompt_tokens,
        batch_tokens=decoding.batch_tokens,
    )
    generator = Generator.load(policy, precision=precision)
    if Chat.load(reference).tokenizer.get_vocab() != generator.chat.tokenizer.get_vocab():
        return None
    asked = [generator.encode(prompt, sampling) for prompt in prompts]
    answers = [c.token_ids for c in generator.generate_ids(asked, sampling, seed=[decoding.seed], observer=observer)]
    pad_id = generator.chat.pad_id
    own = _logprobs(generator.model, asked, answers, pad_id)
    del generator
    gc.collect()  # one model in memory at a time
    theirs = _logprobs(load_causal_lm(reference, precision), asked, answers, pad_id)
    return [float(kl_estimate(p_N, r_N, "k3").double().sum()) for p_N, r_N in zip(own, theirs, strict=True)]


@torch.inference_mode()
def _logprobs(
    model: Any, prompts: Sequence[list[int]], answers: Sequence[list[int]], pad_id: int
) -> list[torch.Tensor]:
    """Log-probabilities [N] of each answer's tokens (nats, fp32), all by the same kind of forward pass."""
    device = next(model.parameters()).device
    head = Head.of(model)
    found: list[torch.Tensor] = [torch.empty(0)] * len(prompts)
    lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
    for rows in token_budget_batches(lengths, _BATCH_TOKENS):
        batch = ResponseBatch.of([prompts[row] for row in rows], [answers[row] for row in rows], pad_id, device)
        hidden_ND = batch.predictors(hidden_states(model, batch.batch))
        logprobs_N = token_logprobs(hidden_ND, head, batch.tokens_N, 1.0).cpu()
        for row, part_N in zip(rows, torch.split(logprobs_N, [len(answers[row]) for row in rows]), strict=True):
            found[row] = part_N
    return found
