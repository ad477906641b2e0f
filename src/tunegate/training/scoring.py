"""Everything about a rollout that is computed once: scores, log-probabilities, values, features.

Shape suffixes: B responses, T response tokens (padded), K reward models, D width of a trunk, N response tokens.
"""

# ruff: noqa: N815 - fields carry shape suffixes
from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunegate.data.records import Messages
from tunegate.errors import SpecError, TrainingError
from tunegate.training.advantages import ensemble_scores
from tunegate.training.batching import length_mask, pad_right, token_budget_batches
from tunegate.training.chat import Chat
from tunegate.training.critic import Critic, Features
from tunegate.training.losses import logprobs_and_entropy, token_logprobs
from tunegate.training.models import hidden_states
from tunegate.training.policy import Policy, ResponseBatch
from tunegate.training.ppo_config import EnsembleSpec
from tunegate.training.ranks import gather
from tunegate.training.reward_model import RewardModel
from tunegate.training.rollout import Completion
from tunegate.training.sharding import in_step

RewardFunction = Callable[[list[Messages], list[str]], Sequence[float]]

SCORING_TOKENS = 8_192
"""Tokens a forward pass without gradients."""


@dataclass(frozen=True, slots=True)
class FirstPass:
    """The policy's or a critic's forward pass over a whole rollout, with what its gradient needs.

    The first step of an update reads the rollout with the very weights that scored it, so it need not be run again.

    Attributes:
        rows: The rows, in the order of the pass.
        output_N: log pi of their response tokens, or the values before them, differentiable.
    """

    rows: list[int]
    output_N: Tensor


@dataclass
class Signal:
    """What one source of feedback (the reward, or a cost) says about a rollout.

    Attributes:
        scores_B: Standardised scores (a cost: in its own units).
        features: Of each response, for a critic on a shared trunk; else empty.
        values_BT: V_old.
        advantages_BT: Set by `update.set_advantages`.
        returns_BT: Likewise.
        first_pass: The critic's forward pass behind `values_BT`, until the update's first step has used it.
    """

    scores_B: Tensor
    features: list[Features] = field(default_factory=list)
    values_BT: Tensor = field(default_factory=lambda: torch.empty(0))
    advantages_BT: Tensor = field(default_factory=lambda: torch.empty(0))
    returns_BT: Tensor = field(default_factory=lambda: torch.empty(0))
    first_pass: FirstPass | None = None

    def features_of(self, rows: Sequence[int]) -> list[Features]:
        """Features of some responses."""
        return [self.features[row] for row in rows] if self.features else []


@dataclass
class Rollout:
    """Responses and what is known about them; frozen while an update makes its passes.

    Attributes:
        prompts: Prompts as ids.
        completions: The responses.
        lengths_B: Response tokens.
        finished_B: True where a stop token ended the response.
        mask_BT: Valid response tokens (the action mask).
        old_logprobs_BT: log pi_old at the sampling temperature.
        reference_logprobs_BT: log pi_ref likewise.
        entropy_BT: Entropy of pi_old before each token (nats).
        stems: Hidden states below the adapters, [prompt + response, D] of each row; empty if there is no stem.
        reference_features: The reference's hidden states at the response tokens, for a critic that reads them.
        sources: Where each prompt is from.
        signals: What reward and cost say.
        first_pass: The forward pass behind `old_logprobs_BT`, until the update's first step has used it.
    """

    prompts: list[list[int]]
    completions: list[Completion]
    lengths_B: Tensor
    finished_B: Tensor
    mask_BT: Tensor
    old_logprobs_BT: Tensor
    reference_logprobs_BT: Tensor
    entropy_BT: Tensor
    stems: list[Tensor]
    reference_features: list[Features]
    sources: list[str] = field(default_factory=list)
    signals: dict[str, Signal] = field(default_factory=dict)
    first_pass: FirstPass | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def row_lengths(self) -> list[int]:
        """Prompt and response tokens of each row."""
        return [
            len(prompt) + len(completion.token_ids)
            for prompt, completion in zip(self.prompts, self.completions, strict=True)
        ]

    def batch(self, rows: Sequence[int], pad_id: int) -> ResponseBatch:
        """Some rows as a right-padded batch."""
        return ResponseBatch.of(
            [self.prompts[row] for row in rows],
            [self.completions[row].token_ids for row in rows],
            pad_id,
            self.mask_BT.device,
        )

    def stem(self, rows: Sequence[int]) -> Tensor | None:
        """The stems of some rows, padded like `batch`, [B, T, D]; None if there are none."""
        if not self.stems:
            return None
        return torch.nn.utils.rnn.pad_sequence([self.stems[row] for row in rows], batch_first=True)

    def valid(self, values_BT: Tensor, rows: Sequence[int]) -> Tensor:
        """Valid elements of some rows, row by row, [N]: the order of `ResponseBatch`."""
        index = torch.as_tensor(rows, device=values_BT.device)
        return values_BT[index][self.mask_BT[index]]


def spread(values_N: Tensor, rows: Sequence[int], mask_BT: Tensor, out_BT: Tensor) -> None:
    """Write values of response tokens, row by row, into the valid places of some rows: the inverse of `valid`."""
    index = torch.as_tensor(rows, device=mask_BT.device)
    part_BT = torch.zeros(len(rows), mask_BT.shape[1], dtype=out_BT.dtype, device=out_BT.device)
    part_BT[mask_BT[index]] = values_N.to(out_BT.dtype)
    out_BT[index] = part_BT


@torch.no_grad()
def score_policy(
    policy: Policy,
    prompts: Sequence[list[int]],
    completions: Sequence[Completion],
    *,
    temperature: float,
    keep_stems: bool = True,
    keep_reference_features: bool = False,
    keep_first_pass: bool = False,
) -> Rollout:
    """Log-probabilities of responses under policy and reference, recomputed by the forward pass that training uses.

    Args:
        policy: The policy as it drew the responses.
        prompts: Prompts as ids.
        completions: One response each.
        temperature: That they were drawn at.
        keep_stems: Keep what updates need; an evaluation does not.
        keep_reference_features: Keep the reference's hidden states for a critic.
        keep_first_pass: Keep the policy's forward pass for the first step of the update, where one microbatch holds the
            whole rollout.
    """
    device = policy.device
    lengths = [len(completion.token_ids) for completion in completions]
    lengths_B = torch.tensor(lengths, device=device)
    mask_BT = length_mask(lengths_B, max(lengths))
    old_BT, reference_BT, entropy_BT = (torch.zeros(mask_BT.shape, device=device) for _ in range(3))
    stems: list[Tensor] = [torch.empty(0)] * len(lengths)
    features: list[Features] = []
    rollout = Rollout(
        prompts=[list(prompt) for prompt in prompts],
        completions=list(completions),
        lengths_B=lengths_B,
        finished_B=torch.tensor([completion.finished for completion in completions], device=device),
        mask_BT=mask_BT,
        old_logprobs_BT=old_BT,
        reference_logprobs_BT=reference_BT,
        entropy_BT=entropy_BT,
        stems=stems if policy.has_stem and keep_stems else [],
        reference_features=features,
    )
    by_row: dict[int, Features] = {}
    # The batches are those of an update with one minibatch, so that its first ratio is 1 to the last bit.
    groups = token_budget_batches(rollout.row_lengths, policy.spec.microbatch_tokens)
    keep = keep_first_pass and len(groups) == 1
    with torch.set_grad_enabled(keep):
        head = policy.head()  # of a model trained in bf16 a copy in fp32, through which gradients go
    for rows in groups:
        batch = rollout.batch(rows, policy.chat.pad_id)
        reference_BTD, stem_BTD = policy.reference_hidden(batch.batch)
        reference_ND = batch.predictors(reference_BTD)
        with torch.set_grad_enabled(keep):
            hidden_ND = batch.predictors(policy.hidden(batch.batch, stem_BTD))
            old_N, entropy_N = logprobs_and_entropy(hidden_ND, head, batch.tokens_N, temperature)
        if keep:
            rollout.first_pass = FirstPass(rows, old_N)
        reference_N = token_logprobs(reference_ND, policy.reference_head(), batch.tokens_N, temperature)
        for values_N, out_BT in ((old_N.detach(), old_BT), (reference_N, reference_BT), (entropy_N, entropy_BT)):
            spread(values_N, rows, mask_BT, out_BT)
        if rollout.stems and stem_BTD is not None:
            for place, row in enumerate(rows):
                stems[row] = stem_BTD[place, : rollout.row_lengths[row]].clone()
        if keep_reference_features:
            counts = [lengths[row] for row in rows]
            for row, hidden_TD in zip(rows, torch.split(reference_ND, counts), strict=True):
                by_row[row] = Features(hidden_TD.clone(), torch.zeros(len(hidden_TD), device=device))
    features += [by_row[row] for row in sorted(by_row)]
    return rollout


@torch.no_grad()
def set_values(
    rollout: Rollout, signal: Signal, critic: Critic, *, pad_id: int, budget: int, keep_first_pass: bool = False
) -> None:
    """Compute V_old of every response token.

    Args:
        rollout: The responses.
        signal: What the critic speaks of; gets the values.
        critic: As it is before the update.
        pad_id: Padding token.
        budget: Tokens of a microbatch.
        keep_first_pass: As `score_policy` has it.
    """
    signal.values_BT = torch.zeros(rollout.mask_BT.shape, device=rollout.mask_BT.device)
    groups = token_budget_batches(rollout.row_lengths, budget)
    keep = keep_first_pass and len(groups) == 1
    for rows, _ in in_step(groups, groups[0], needed=critic.sharded):
        with torch.set_grad_enabled(keep):
            values_N = critic.values(rollout.batch(rows, pad_id), signal.features_of(rows))
        if keep:
            signal.first_pass = FirstPass(rows, values_N)
        spread(values_N.detach(), rows, rollout.mask_BT, signal.values_BT)


# -- scores -------------------------------------------------------------------------------------------------------


@dataclass
class Standardisation:
    """Scores of the reference's own responses get mean 0 and variance 1.

    Attributes:
        gain: Standardised = gain x score + bias, one a model.
        bias: See `gain`.
    """

    gain: list[float]
    bias: list[float]

    @classmethod
    def of(cls, scores_KB: np.ndarray) -> Standardisation:
        """From scores of the reference's responses.

        Raises:
            TrainingError: If a model gives every response the same score.
        """
        spread_K, mean_K = scores_KB.std(axis=1), scores_KB.mean(axis=1)
        if not np.isfinite(scores_KB).all() or (spread_K < 1e-9).any():
            raise TrainingError(
                "the reward gives every response of the reference the same score, or scores that are not finite",
                key="ppo.shaping.standardise",
                value=f"standard deviation {spread_K.tolist()} over {scores_KB.shape[1]} responses",
                fix="check the reward model's held-out accuracy, or the reward function",
            )
        return cls((1.0 / spread_K).tolist(), (-mean_K / spread_K).tolist())

    def __call__(self, scores_KB: np.ndarray) -> np.ndarray:
        """Standardised scores, [K, B]."""
        gain_K, bias_K = np.asarray(self.gain), np.asarray(self.bias)
        return np.asarray(gain_K[:, None] * scores_KB + bias_K[:, None])


class Scorer:
    """Scores responses by one or more reward models, or by a Python function.

    Attributes:
        models: The reward models; empty for a function.
        function: The function, if any.
        name: For messages, e.g. `ppo.reward_function`.
        ensemble: How several scores become one.
        standardisation: Identity until set.
    """

    def __init__(
        self,
        models: Sequence[RewardModel] = (),
        *,
        function: RewardFunction | None = None,
        name: str = "reward",
        ensemble: EnsembleSpec | None = None,
    ) -> None:
        self.models = list(models)
        self.function = function
        self.name = name
        self.ensemble = ensemble
        count = max(1, len(self.models))
        self.standardisation = Standardisation([1.0] * count, [0.0] * count)

    def can_read(self, chat: Chat) -> bool:
        """True if the first reward model has the tokens of `chat`, so that it can read a policy's ids."""
        if not self.models:
            return False
        return bool(self.models[0].chat.tokenizer.get_vocab() == chat.tokenizer.get_vocab())

    def raw(self, prompts: Sequence[Messages], completions: Sequence[Completion], *, skip: int = 0) -> np.ndarray:
        """Scores as the models give them, [K - skip, N].

        Args:
            prompts: Conversations that end with a user turn.
            completions: One response each.
            skip: Leave out so many of the first models.

        Raises:
            TrainingError: If a score is not finite, or a function returns something else than one number a response.
        """
        texts = [completion.text for completion in completions]
        if self.function is not None:
            rows = [call_reward_function(self.function, self.name, prompts, texts)]
        else:
            rows = [model.score(prompts, texts) for model in self.models[skip:]]
        return self._checked(np.stack(rows)) if rows else np.empty((0, len(texts)))

    def raw_with_features(
        self,
        prompts: Sequence[Messages],
        prompt_ids: Sequence[list[int]],
        completions: Sequence[Completion],
    ) -> tuple[np.ndarray, list[Features]]:
        """Like `raw`, and the first reward model's features of each response, from the same forward pass.

        The reward model reads the response as text; where its tokens are the ones that were drawn, one row serves
        both, else the drawn tokens get a row of their own.
        """
        model = self.models[0]
        scored = [
            model.chat.fit_exchange(prompt, [completion.text], model.head.max_length)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        rows: list[list[int]] = []
        score_at: list[int] = []  # index of the row whose last token is scored
        read_at: list[int] = []  # index of the row whose response tokens are read
        for ids, completion, exchange in zip(prompt_ids, completions, scored, strict=True):
            if exchange is None:
                raise TrainingError(
                    "a prompt is longer than the reward model's context",
                    key="ppo.max_prompt_tokens",
                    value=len(ids),
                    fix=f"keep max_prompt_tokens below {model.head.max_length}",
                )
            drawn = [*ids, *completion.token_ids]
            score_at.append(len(rows))
            rows.append(exchange.row())
            if rows[-1][: len(drawn)] != drawn:
                rows.append(drawn)
            read_at.append(len(rows) - 1)
        starts = {at: len(ids) - 1 for at, ids in zip(read_at, prompt_ids, strict=True)}
        counts = {at: len(item.token_ids) for at, item in zip(read_at, completions, strict=True)}
        last, features = _read(model, rows, starts, counts)
        raw_KB = np.stack([np.asarray([last[at] for at in score_at])])
        others = self.raw(prompts, completions, skip=1)
        return self._checked(np.concatenate([raw_KB, others])), [features[at] for at in read_at]

    def combined(self, raw_KB: np.ndarray) -> np.ndarray:
        """One standardised score a response, [B]."""
        standardised = self.standardisation(raw_KB)
        if self.ensemble is None:
            return np.asarray(standardised[0])
        scores_B = ensemble_scores(torch.from_numpy(standardised), self.ensemble.combine, self.ensemble.variance_weight)
        return np.asarray(scores_B.numpy())

    def standardise_on(self, raw_KB: np.ndarray) -> Standardisation:
        """Take gain and bias from scores of the reference's responses."""
        self.standardisation = Standardisation.of(raw_KB)
        return self.standardisation

    def _checked(self, scores_KB: np.ndarray) -> np.ndarray:
        if not np.isfinite(scores_KB).all():
            raise TrainingError(
                "a score is not finite",
                key=self.name,
                value=f"response {int(np.argwhere(~np.isfinite(scores_KB))[0][1])}",
                fix="check the reward model (a prompt longer than its max_length has no score) or the reward function",
            )
        return scores_KB


@torch.no_grad()
def _read(
    model: RewardModel, rows: Sequence[list[int]], starts: dict[int, int], counts: dict[int, int]
) -> tuple[dict[int, float], dict[int, Features]]:
    """Normalised score at the end of each row, and features of `counts` columns from `starts`."""
    device = next(model.model.parameters()).device
    weight_D = model.model.score.weight[0].float()
    last: dict[int, float] = {}
    features: dict[int, Features] = {}
    for group in token_budget_batches([len(row) for row in rows], SCORING_TOKENS):
        batch = pad_right([rows[at] for at in group], model.chat.pad_id).to(device)
        hidden_BTD = hidden_states(model.model, batch)
        last_BD = hidden_BTD[torch.arange(len(group), device=device), batch.lengths_B - 1]
        scores_B = model.head.gain * (last_BD.float() @ weight_D) + model.head.bias
        last.update(zip(group, scores_B.tolist(), strict=True))
        for place, at in enumerate(group):
            if at in starts:
                hidden_TD = hidden_BTD[place, starts[at] : starts[at] + counts[at]].clone()
                features[at] = Features(hidden_TD, model.head.gain * (hidden_TD.float() @ weight_D) + model.head.bias)
    return last, features


def call_reward_function(
    function: RewardFunction, name: str, prompts: Sequence[Messages], texts: Sequence[str]
) -> np.ndarray:
    """Call a reward function and check what it returns, [N] float64.

    Raises:
        TrainingError: If it fails or returns something else than one number a response.
    """
    try:
        scores = np.asarray(list(function(list(prompts), list(texts))), dtype=np.float64)
    except Exception as error:
        raise TrainingError(
            f"the function failed: {type(error).__name__}: {error}",
            key=name,
            fix="it is called with (prompts, responses) and returns one number a response",
        ) from error
    if scores.shape != (len(texts),):
        raise TrainingError(
            "the function must return one number a response",
            key=name,
            value=f"shape {scores.shape} for {len(texts)} responses",
            fix="return a list of floats, in the order of the responses",
        )
    return scores


def load_function(entry: str, *, key: str) -> RewardFunction:
    """Import `module:function`; the working directory counts as a place for modules.

    Raises:
        SpecError: If there is no such function.
    """
    module_name, _, name = entry.partition(":")
    if os.getcwd() not in sys.path:  # noqa: PTH109 - sys.path holds strings
        sys.path.append(os.getcwd())  # noqa: PTH109
    try:
        function: Any = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise SpecError(
            f"no such function: {error}",
            key=key,
            value=entry,
            fix="give 'module:function' of an installed module, or of one in the working directory",
        ) from error
    if not callable(function):
        raise SpecError("this is not a function", key=key, value=entry, fix="give the name of a function")
    return function  # type: ignore[no-any-return]


def gathered(values: np.ndarray, total: int) -> np.ndarray:
    """This rank's share of a list of numbers, made whole again over all ranks, [..., total]."""
    columns = gather(list(np.moveaxis(values, -1, 0)), total)
    return np.moveaxis(np.stack(columns), 0, -1)
