"""A trained reward model: scores of responses, normalised so that reference responses have mean 0 and variance 1."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunegate.data.records import Messages
from tunegate.errors import ModelError
from tunegate.observer import NullObserver, Observer
from tunegate.training.batching import Batch, pad_right, token_budget_batches
from tunegate.training.chat import Chat
from tunegate.training.config import Precision
from tunegate.training.models import (
    hidden_states,
    load_sequence_scorer,
    save_model,
)
from tunegate.training.reward_heads import HeadScale, load_heads

HEAD_FILE = "reward_head.json"
_SCORING_TOKENS = 8192  # tokens a forward pass: no gradients are kept, so memory is no concern


@dataclass(frozen=True, slots=True)
class RewardHead:
    """How raw scores read: score = gain x raw + bias; rating = rating_mean + rating_scale x raw.

    Attributes:
        gain: So that scores of reference responses have variance 1.
        bias: So that they have mean 0.
        rating_mean: Mean of the training ratings; None if the model was not fitted to ratings.
        rating_scale: Their standard deviation.
        max_length: Longest prompt and response (tokens) the model was trained on.
        heads: Of a model with several, which `load` can read one by one.
    """

    gain: float = 1.0
    bias: float = 0.0
    rating_mean: float | None = None
    rating_scale: float | None = None
    max_length: int = 512
    heads: tuple[HeadScale, ...] = ()

    def normalised_on(self, raw: np.ndarray) -> RewardHead:
        """The head whose scores of the given raw scores have mean 0 and variance 1.

        Raises:
            ModelError: If there are fewer than two scores, or all are equal: the model tells nothing apart.
        """
        spread = float(np.std(raw)) if len(raw) > 1 else 0.0
        if not np.isfinite(raw).all() or spread < 1e-12:
            raise ModelError(
                "the reward model gives every response the same score, or scores that are not finite",
                key="reward",
                value=f"n={len(raw)}, standard deviation {spread:g}",
                fix="train longer, or lower reward.learning_rate",
            )
        return replace(self, gain=1.0 / spread, bias=-float(np.mean(raw)) / spread)


def raw_scores(model: Any, batch: Batch) -> Tensor:
    """Raw score of each right-padded row, read at its last real token, [B] fp32.

    Args:
        model: Sequence scorer; its `score` head has no bias.
        batch: From `pad_right`, on the model's device.
    """
    hidden_BTD = hidden_states(model, batch)
    rows_B = torch.arange(len(batch.lengths_B), device=hidden_BTD.device)
    last_BD = hidden_BTD[rows_B, batch.lengths_B - 1]
    scores_B: Tensor = last_BD.float() @ model.score.weight[0].float()
    return scores_B


class RewardModel:
    """Scores responses.

    Attributes:
        model: `AutoModelForSequenceClassification` with one label.
        chat: Its tokenizer and template.
        head: Normalisation of the scores.
    """

    def __init__(self, model: Any, chat: Chat, head: RewardHead) -> None:
        self.model = model
        self.chat = chat
        self.head = head

    @classmethod
    def load(cls, path: Path, *, precision: Precision = "auto", head: str | None = None) -> RewardModel:
        """Load what `save` wrote.

        Args:
            path: The folder.
            precision: Of the computation.
            head: Read this one of several heads instead of the joint one; a cost is not standardised.

        Raises:
            ModelError: If the folder is not a reward model, or has no such head.
        """
        file = path / HEAD_FILE
        if not file.is_file():
            raise ModelError(
                f"the folder has no {HEAD_FILE}",
                key=str(path),
                fix="give the folder that the reward stage wrote",
            )
        content = json.loads(file.read_text())
        scales = tuple(HeadScale(**scale) for scale in content.pop("heads", []))
        found = RewardHead(**content, heads=scales)
        model = load_sequence_scorer(path, precision)
        if head is not None:
            names = [scale.name for scale in scales]
            if head not in names:
                raise ModelError(
                    "the reward model has no such head",
                    key=str(path),
                    value=head,
                    fix=f"use one of {', '.join(names)}" if names else "train it with reward.heads",
                )
            place = names.index(head)
            with torch.no_grad():
                model.score.weight.copy_(load_heads(path)[place][None])
            scale = scales[place]
            gain, bias = (scale.gain, scale.bias) if scale.kind == "reward" else (1.0, 0.0)
            found = replace(found, gain=gain, bias=bias, rating_mean=None, rating_scale=None)
        return cls(model, Chat.load(path), found)

    def save(self, out: Path, *, like: Path | None = None) -> None:
        """Write a plain Hugging Face folder and `reward_head.json`.

        Args:
            out: Folder, created if missing.
            like: The model folder this one was trained from; its runtime settings are kept.
        """
        save_model(self.model, self.chat.tokenizer, out, like=like)
        write_head(self.head, out)

    def score(
        self, prompts: Sequence[Messages], responses: Sequence[str], *, observer: Observer | None = None
    ) -> np.ndarray:
        """Normalised scores of complete responses, [N] float64, in input order.

        Args:
            prompts: Conversations that end with a user turn.
            responses: One assistant turn each.
            observer: Told the progress.

        Returns:
            Scores; NaN where a prompt alone is longer than the model's `max_length`.
        """
        limit = self.head.max_length
        rows = []
        for prompt, response in zip(prompts, responses, strict=True):
            fitted = self.chat.fit_exchange(prompt, [response], limit)
            rows.append(fitted.row() if fitted is not None else [])
        scores = np.full(len(rows), np.nan)
        kept = [index for index, row in enumerate(rows) if row]
        if kept:
            scores[kept] = self.score_ids([rows[index] for index in kept], observer=observer)
        return scores

    def score_ids(self, rows: Sequence[Sequence[int]], *, observer: Observer | None = None) -> np.ndarray:
        """Normalised scores of prompt and response ids in a row, [N] float64; read at the last token of each row."""
        return self.head.gain * self.raw_ids(rows, observer=observer) + self.head.bias

    def raw_ids(self, rows: Sequence[Sequence[int]], *, observer: Observer | None = None) -> np.ndarray:
        """Scores before normalisation, [N] float64; see `score_ids`."""
        observer = observer or NullObserver()
        device = next(self.model.parameters()).device
        scores = np.zeros(len(rows))
        done = 0
        for group in token_budget_batches([len(row) for row in rows], _SCORING_TOKENS):
            batch = pad_right([rows[index] for index in group], self.chat.pad_id).to(device)
            with torch.inference_mode():
                scores[group] = raw_scores(self.model, batch).double().cpu().numpy()
            done += len(group)
            observer.progress(done, len(rows), "response", "scoring")
        return scores

    def normalise_on(self, raw: np.ndarray) -> None:
        """Set gain and bias so that these raw scores become mean 0, variance 1 (e.g. of reference-policy samples)."""
        self.head = self.head.normalised_on(raw)

    def predicted_ratings(self, scores: np.ndarray) -> np.ndarray:
        """Normalised scores on the raters' scale.

        Raises:
            ModelError: If the model was not fitted to ratings.
        """
        if self.head.rating_mean is None or self.head.rating_scale is None:
            raise ModelError(
                "this reward model was not fitted to ratings",
                key="reward.objective",
                fix="train with objective 'pointwise' or 'joint'",
            )
        raw = (scores - self.head.bias) / self.head.gain
        return np.asarray(self.head.rating_mean + self.head.rating_scale * raw)


def write_head(head: RewardHead, folder: Path) -> None:
    """Write `reward_head.json`."""
    fields = asdict(head)
    (folder / HEAD_FILE).write_text(json.dumps(fields, indent=2) + "\n")
