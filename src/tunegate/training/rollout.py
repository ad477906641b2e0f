"""Responses from a model: batched decoding with a key-value cache, exact log-probabilities, reproducible noise.

What is drawn depends on the seed and on a prompt's place in the list, not on the batch it is decoded in (up to the
rounding of the logits). Shape suffixes: B rows, T tokens, D width of the trunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunegate.data.records import Messages
from tunegate.errors import SpecError
from tunegate.observer import NullObserver, Observer
from tunegate.training.batching import pad_left, token_budget_batches
from tunegate.training.chat import Chat
from tunegate.training.config import Precision
from tunegate.training.decoding import next_logits, start
from tunegate.training.losses import Head
from tunegate.training.models import effective_max_length, load_causal_lm
from tunegate.training.ppo_config import SamplingSpec
from tunegate.training.sampling import draw, row_noise

COMPACT_SHARE = 0.125
"""Share of the decoded rows that must have finished before the cache is copied without them. A copy costs about as
much as one decoding step saves on an eighth of the rows over ten steps (measured on a CPU, 24 rows)."""

_UNLIMITED = 2**31


@dataclass(frozen=True, slots=True)
class Completion:
    """One response.

    Attributes:
        text: Without control tokens.
        token_ids: As drawn, the stop token included.
        logprobs: Log-probability each token was drawn with (nats); see `sampling.draw`.
        finished: True if the response ended with a stop token, False if it ran into the length limit.
        prompt_tokens: Tokens of the prompt it was given.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finished: bool
    prompt_tokens: int


class Generator:
    """Draws responses from a causal language model.

    Attributes:
        model: In evaluation mode.
        chat: Its tokenizer and template; says which tokens stop a response.
        context: Longest prompt and response together (tokens).
    """

    def __init__(self, model: Any, chat: Chat, *, context: int) -> None:
        self.model = model
        self.chat = chat
        self.context = context
        self._head: Head | None = None  # of the current call: the weights may change between calls

    @classmethod
    def load(cls, path: Path, *, precision: Precision = "auto") -> Generator:
        """A generator for a model folder.

        Raises:
            ModelError: If the folder is not a causal language model.
        """
        return cls(load_causal_lm(path, precision), Chat.load(path), context=effective_max_length(path, _UNLIMITED))

    def generate(
        self,
        prompts: Sequence[Messages],
        sampling: SamplingSpec,
        *,
        seed: int,
        observer: Observer | None = None,
    ) -> list[Completion]:
        """One response to each prompt, in input order.

        Args:
            prompts: Conversations that end with a user turn.
            sampling: How to draw.
            seed: Of the noise; the same seed and place in the list give the same noise.
            observer: Told the progress.

        Raises:
            SpecError: If the model's context leaves no room for a prompt beside the response.
        """
        rows = [self.encode(prompt, sampling) for prompt in prompts]
        return self.generate_ids(rows, sampling, seed=[seed], observer=observer)

    def encode(self, prompt: Messages, sampling: SamplingSpec) -> list[int]:
        """Ids of a prompt, shortened to what the sampling allows.

        It loses its oldest turns first; if its last exchange alone is too long, the beginning of that.

        Raises:
            SpecError: If the model's context leaves no room for a prompt beside the response.
        """
        limit = self.context - sampling.max_new_tokens
        if limit < 1:
            raise SpecError(
                f"the model's context of {self.context} tokens leaves no room for a prompt",
                key="max_new_tokens",
                value=sampling.max_new_tokens,
                fix=f"set max_new_tokens below {self.context // 2}",
            )
        limit = min(limit, sampling.max_prompt_tokens or limit)
        fitted = self.chat.fit_prompt(prompt, limit)
        return fitted if fitted is not None else self.chat.prompt_ids(prompt)[-limit:]

    def generate_ids(
        self,
        rows: Sequence[Sequence[int]],
        sampling: SamplingSpec,
        *,
        seed: Sequence[int],
        numbers: Sequence[int] | None = None,
        observer: Observer | None = None,
    ) -> list[Completion]:
        """One response to each prompt given as ids, in input order.

        Args:
            rows: Ids of each prompt, ending where the assistant begins to speak.
            sampling: How to draw.
            seed: Which draw this is, e.g. (run seed, update).
            numbers: Each row's number for the noise; unset counts from 0. A rank that generates its share of a list
                gives the places in the whole list, so that no two ranks draw the same noise.
            observer: Told the progress.
        """
        observer = observer or NullObserver()
        numbers = numbers if numbers is not None else range(len(rows))
        completions: list[Completion | None] = [None] * len(rows)
        lengths = [len(row) + sampling.max_new_tokens for row in rows]
        done = 0
        for group in token_budget_batches(lengths, sampling.batch_tokens):
            noise_BT = row_noise(seed, [numbers[index] for index in group], sampling.max_new_tokens)
            for index, completion in zip(
                group, self._decode([rows[index] for index in group], noise_BT, sampling), strict=True
            ):
                completions[index] = completion
            done += len(group)
            observer.progress(done, len(rows), "response", "generating")
        self._head = None
        return [completion for completion in completions if completion is not None]

    @torch.inference_mode()
    def _decode(self, rows: Sequence[Sequence[int]], noise_BT: Tensor, sampling: SamplingSpec) -> list[Completion]:
        """Decode one batch; finished rows leave it."""
        device = next(self.model.parameters()).device
        prompt = pad_left(rows, self.chat.pad_id).to(device)
        steps = sampling.max_new_tokens
        tokens_BT = torch.full((len(rows), steps), self.chat.pad_id, dtype=torch.int64, device=device)
        logprobs_BT = torch.zeros(len(rows), steps, dtype=torch.float32, device=device)
        stops = torch.tensor(self.chat.stop_ids, device=device)
        noise_BT = noise_BT.to(device)

        # Everything below is of the rows still being decoded; `live_B` says which rows of the batch they are.
        live_B = torch.arange(len(rows), device=device)
        open_B = torch.ones(len(rows), dtype=torch.bool, device=device)
        decoding = start(self.model, prompt, steps)
        logits_BV = self._logits(decoding.prefill())
        for step in range(steps):
            token_B, logprob_B = draw(
                logits_BV,
                noise_BT[live_B, step],
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
            )
            # A row that has finished but not yet left keeps its padding.
            tokens_BT[live_B, step] = torch.where(open_B, token_B, self.chat.pad_id)
            logprobs_BT[live_B, step] = torch.where(open_B, logprob_B, 0.0)
            open_B = open_B & ~torch.isin(token_B, stops)
            still_open = int(open_B.sum())
            if still_open == 0 or step == steps - 1:
                break
            if still_open <= (1.0 - COMPACT_SHARE) * len(live_B):
                kept = open_B.nonzero()[:, 0]
                decoding.keep(kept)
                live_B, token_B, open_B = live_B[kept], token_B[kept], open_B[kept]
            logits_BV = self._logits(decoding.step(token_B))
        return self._completions(rows, tokens_BT.tolist(), logprobs_BT.tolist())

    def _logits(self, hidden_BD: Tensor) -> Tensor:
        """Logits of the next token, in fp32, [B, V]."""
        if self._head is None:
            self._head = Head.of(self.model)
        return next_logits(self._head, hidden_BD)

    def _completions(
        self, rows: Sequence[Sequence[int]], tokens: list[list[int]], logprobs: list[list[float]]
    ) -> list[Completion]:
        """Cut each row at its first stop token, inclusive."""
        stops = set(self.chat.stop_ids)
        completions = []
        for prompt, ids, values in zip(rows, tokens, logprobs, strict=True):
            end = next((index + 1 for index, token in enumerate(ids) if token in stops), len(ids))
            completions.append(
                Completion(
                    text=self.chat.decode(ids[:end]),
                    token_ids=ids[:end],
                    logprobs=values[:end],
                    finished=ids[end - 1] in stops,
                    prompt_tokens=len(prompt),
                )
            )
        return completions
