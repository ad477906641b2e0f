"""The likelihood of the assistant's tokens: the loss of supervised fine-tuning and its held-out measure.

Shape suffixes: B rows, T tokens, N answer tokens of a batch, D hidden width.
"""

# ruff: noqa: N815 - fields carry shape suffixes
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunegate.data.records import Conversation
from tunegate.observer import Observer
from tunegate.training.batching import Batch, pack, packed_batch, pad_right, token_budget_batches
from tunegate.training.chat import Chat, EncodedChat
from tunegate.training.cross_entropy import linear_cross_entropy, token_nll
from tunegate.training.models import head_of, hidden_states
from tunegate.training.results import NLL

_EVALUATION_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class EncodedRows:
    """Conversations as ids, and what was lost on the way.

    Attributes:
        rows: Those of which at least one answer token fits.
        ids: Record ids of `rows`.
        dropped: Ids of the conversations whose answer does not fit at all.
        cut: Rows that lost the end of their last answer.
        shortened: Rows that lost their oldest turns.
    """

    rows: list[EncodedChat]
    ids: list[str]
    dropped: list[str]
    cut: int
    shortened: int

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(row.ids) for row in self.rows]


def encode_conversations(chat: Chat, conversations: Sequence[Conversation], max_length: int) -> EncodedRows:
    """Encode conversations, each to at most `max_length` tokens (see `Chat.fit`)."""
    rows, ids, dropped = [], [], []
    for conversation in conversations:
        fitted = chat.fit(conversation.messages, max_length)
        if fitted is None:
            dropped.append(conversation.id)
        else:
            rows.append(fitted)
            ids.append(conversation.id)
    return EncodedRows(
        rows=rows,
        ids=ids,
        dropped=dropped,
        cut=sum(row.cut for row in rows),
        shortened=sum(row.dropped_turns > 0 for row in rows),
    )


@dataclass(frozen=True, slots=True)
class AnswerBatch:
    """A microbatch and which of its tokens the assistant says."""

    batch: Batch
    answer_mask_BT: Tensor

    @property
    def tokens(self) -> int:
        """Real tokens."""
        return int(self.batch.lengths_B.sum())

    def to(self, device: torch.device) -> AnswerBatch:
        """The same on another device."""
        return AnswerBatch(self.batch.to(device), self.answer_mask_BT.to(device))


def padded(rows: Sequence[EncodedChat], pad_id: int) -> AnswerBatch:
    """One conversation a row."""
    batch = pad_right([row.ids for row in rows], pad_id)
    mask_BT = torch.zeros_like(batch.mask_BT)
    for index, row in enumerate(rows):
        mask_BT[index, : len(row.ids)] = torch.tensor(row.answer_mask)
    return AnswerBatch(batch, mask_BT)


def packed(rows: Sequence[Sequence[EncodedChat]], pad_id: int) -> AnswerBatch:
    """Several conversations a row, each seeing only itself."""
    batch = packed_batch([[row.ids for row in group] for group in rows], pad_id)
    mask_BT = torch.zeros_like(batch.mask_BT)
    for index, group in enumerate(rows):
        joined = [said for row in group for said in row.answer_mask]
        mask_BT[index, : len(joined)] = torch.tensor(joined)
    return AnswerBatch(batch, mask_BT)


def microbatches(
    rows: Sequence[EncodedChat], pad_id: int, *, budget: int, pack_to: int | None = None
) -> list[AnswerBatch]:
    """Cut an optimizer step into batches of at most `budget` tokens, padding included.

    Args:
        rows: The step's conversations.
        pad_id: Padding token.
        budget: Tokens.
        pack_to: Width of packed rows; unset means one conversation a row, sorted by length.
    """
    lengths = [len(row.ids) for row in rows]
    if pack_to is None:
        return [padded([rows[i] for i in group], pad_id) for group in token_budget_batches(lengths, budget)]
    bins = pack(lengths, pack_to)
    widths = [sum(lengths[i] for i in group) for group in bins]
    return [
        packed([[rows[i] for i in bins[b]] for b in group], pad_id) for group in token_budget_batches(widths, budget)
    ]


def answer_loss(model: Any, answers: AnswerBatch, *, neftune_alpha: float = 0.0) -> Tensor:
    """Sum over the assistant's tokens of their negative log-likelihood (nats), with gradients.

    Token t is predicted from the hidden state at t - 1; the output layer runs on those alone.

    Args:
        model: Causal model.
        answers: On the model's device.
        neftune_alpha: Size of the noise on the embeddings (NEFTune, arXiv 2310.05914, algorithm 1).
    """
    embeddings_BTD = _noisy_embeddings(model, answers.batch, neftune_alpha) if neftune_alpha else None
    hidden_ND, targets_N = _predictors(hidden_states(model, answers.batch, embeddings_BTD=embeddings_BTD), answers)
    return linear_cross_entropy(hidden_ND, *head_of(model), targets_N)


def answer_nll(model: Any, chat: Chat, encoded: EncodedRows, observer: Observer) -> NLL:
    """Negative log-likelihood of each conversation's assistant tokens, without gradients."""
    device = next(model.parameters()).device
    sums = [0.0] * len(encoded.rows)
    tokens = [0] * len(encoded.rows)
    done = 0
    for group in token_budget_batches(encoded.lengths, _EVALUATION_TOKENS):
        answers = padded([encoded.rows[index] for index in group], chat.pad_id).to(device)
        with torch.no_grad():  # inference tensors could not take part in a later backward pass of sharded layers
            hidden_ND, targets_N = _predictors(hidden_states(model, answers.batch), answers)
            nll_N = token_nll(hidden_ND, *head_of(model), targets_N).double()
            counts_B = answers.answer_mask_BT.sum(1)
            rows_N = torch.repeat_interleave(torch.arange(len(group), device=device), counts_B)
            sums_B = torch.zeros(len(group), dtype=torch.float64, device=device).index_add_(0, rows_N, nll_N)
        for row, index in enumerate(group):
            sums[index] = float(sums_B[row])
            tokens[index] = int(counts_B[row])
        done += len(group)
        observer.progress(done, len(encoded.rows), "conversation", "held-out loss")
    return NLL(
        ids=[*encoded.ids, *encoded.dropped],
        sums=[*sums, *([0.0] * len(encoded.dropped))],
        tokens=[*tokens, *([0] * len(encoded.dropped))],
    )


def _predictors(hidden_BTD: Tensor, answers: AnswerBatch) -> tuple[Tensor, Tensor]:
    """Hidden states [N, D] that predict the assistant's tokens, and those tokens [N].

    The first token of a sequence is never the assistant's, so this holds for packed rows as well.
    """
    mask_BT = answers.answer_mask_BT[:, 1:]
    return hidden_BTD[:, :-1][mask_BT], answers.batch.ids_BT[:, 1:][mask_BT]


def _noisy_embeddings(model: Any, batch: Batch, alpha: float) -> Tensor:
    embeddings_BTD: Tensor = model.get_input_embeddings()(batch.ids_BT)
    size_B11 = alpha / (batch.lengths_B * embeddings_BTD.shape[-1]).sqrt()[:, None, None]
    noise_BTD = (torch.rand_like(embeddings_BTD, dtype=torch.float32) * 2 - 1) * size_B11 * batch.mask_BT[..., None]
    return embeddings_BTD + noise_BTD.to(embeddings_BTD.dtype)
