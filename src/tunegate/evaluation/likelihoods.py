"""Likelihoods of assistant turns, with a prompt that several answers share computed once.

The options of a multiple-choice item have the prompt in common, which is most of the text: for the three options of a
bias question it saves more than half of the work. Each option sees the prompt and itself, so the likelihoods are those
of separate conversations.

Shape suffixes: B rows, T tokens, N answer tokens, D width of the trunk.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunegate.data.records import Conversation
from tunegate.evaluation.backends import Likelihoods
from tunegate.observer import Observer
from tunegate.training.answers import answer_nll, encode_conversations
from tunegate.training.batching import shared_prefix_batch, token_budget_batches
from tunegate.training.chat import Chat
from tunegate.training.config import Precision
from tunegate.training.cross_entropy import token_nll
from tunegate.training.models import effective_max_length, head_of, hidden_states, load_causal_lm

_UNLIMITED = 1 << 30
_BATCH_TOKENS = 4_096


@dataclass(frozen=True, slots=True)
class _Item:
    """Several answers to one prompt.

    Attributes:
        places: Where the conversations stand in the input.
        prompt: Ids of the prompt.
        answers: Ids of each answer, the end-of-turn token included.
    """

    places: list[int]
    prompt: list[int]
    answers: list[list[int]]

    @property
    def tokens(self) -> int:
        return len(self.prompt) + sum(len(answer) for answer in self.answers)


def measure_likelihoods(
    path: Path, conversations: Sequence[Conversation], precision: Precision, observer: Observer
) -> Likelihoods:
    """Negative log-likelihood of every conversation's assistant turns.

    Args:
        path: Folder of the model.
        conversations: Those with the same prompt and one assistant turn are computed together.
        precision: Number format of the model.
        observer: Told the progress.

    Returns:
        Sums and token counts in input order; conversations of which nothing fits the context have 0 tokens.
    """
    chat = Chat.load(path)
    limit = effective_max_length(path, _UNLIMITED)
    model = load_causal_lm(path, precision)
    sums, tokens = [0.0] * len(conversations), [0] * len(conversations)
    items, alone = _items(chat, conversations, limit)
    for place, (total, count) in _shared(model, items, chat.pad_id, observer).items():
        sums[place], tokens[place] = total, count
    if alone:
        names = {conversations[place].id: place for place in alone}
        found = answer_nll(model, chat, encode_conversations(chat, [conversations[i] for i in alone], limit), observer)
        # Conversations that do not fit come last there.
        for name, total, count in zip(found.ids, found.sums, found.tokens, strict=True):
            sums[names[name]], tokens[names[name]] = total, count
    return Likelihoods(sums, tokens)


def _items(chat: Chat, conversations: Sequence[Conversation], limit: int) -> tuple[list[_Item], list[int]]:
    """Conversations that share a prompt, and the places of all others."""
    by_prompt: dict[str, list[int]] = defaultdict(list)
    for place, conversation in enumerate(conversations):
        roles = [message["role"] for message in conversation.messages]
        # With an earlier assistant turn there is more than the last answer to measure.
        if roles.count("assistant") == 1 and roles[-1] == "assistant":
            by_prompt[json.dumps(conversation.messages[:-1])].append(place)
    items = []
    for places in by_prompt.values():
        if len(places) < 2:
            continue
        answers = [conversations[place].messages[-1]["content"] for place in places]
        exchange = chat.exchange(conversations[places[0]].messages[:-1], answers)
        if len(exchange.prompt_ids) + max(len(ids) for ids in exchange.response_ids) <= limit:
            items.append(_Item(places, exchange.prompt_ids, exchange.response_ids))
    taken = {place for item in items for place in item.places}
    return items, [place for place in range(len(conversations)) if place not in taken]


@torch.inference_mode()
def _shared(model: Any, items: Sequence[_Item], pad_id: int, observer: Observer) -> dict[int, tuple[float, int]]:
    """Sum of nats and number of tokens of every answer, by its place in the input."""
    device = next(model.parameters()).device
    found: dict[int, tuple[float, int]] = {}
    for group in token_budget_batches([item.tokens for item in items], _BATCH_TOKENS):
        part = [items[index] for index in group]
        batch, _ = shared_prefix_batch([item.prompt for item in part], [item.answers for item in part], pad_id)
        rows: list[int] = []
        columns: list[int] = []
        for row, item in enumerate(part):
            start = len(item.prompt)
            for answer in item.answers:
                # The first token is predicted by the prompt's last one, the others by the one before.
                rows += [row] * len(answer)
                columns += [len(item.prompt) - 1, *range(start, start + len(answer) - 1)]
                start += len(answer)
        hidden_BTD = hidden_states(model, batch.to(device))
        targets_N = torch.tensor([token for item in part for answer in item.answers for token in answer], device=device)
        hidden_ND = hidden_BTD[torch.tensor(rows, device=device), torch.tensor(columns, device=device)]
        nats_N = token_nll(hidden_ND, *head_of(model), targets_N).double().cpu()
        lengths = [len(answer) for item in part for answer in item.answers]
        places = [place for item in part for place in item.places]
        for place, length, answer_N in zip(places, lengths, torch.split(nats_N, lengths), strict=True):
            found[place] = (float(answer_N.sum()), length)
        observer.progress(len(found), sum(len(item.places) for item in items), "option", "likelihood of options")
    return found
