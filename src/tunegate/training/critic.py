"""Critics: what a response will be worth, said before each of its tokens.

Both kinds start as the reward model's own reading of the unfinished response. The one on a shared
trunk adds a small trained head to features that are computed once a rollout, in the very pass that scores it; the
separate one is a whole trained model.

Shape suffixes: D width of the trunk, N response tokens.
"""

# ruff: noqa: N815 - fields carry shape suffixes
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tunegate.training.config import Precision, Sharding
from tunegate.training.models import checkpoint_activations, hidden_states, load_sequence_scorer
from tunegate.training.policy import ResponseBatch
from tunegate.training.sharding import ShardedModel


@dataclass(frozen=True, slots=True)
class Features:
    """What a frozen trunk says about one response.

    Attributes:
        hidden_TD: Hidden state before each response token.
        reading_T: The reward model's score of what stood there; 0 without a reward model.
    """

    hidden_TD: Tensor
    reading_T: Tensor


class ValueHead(nn.Module):
    """V = scale x reading + bias + MLP(normalised hidden state); the MLP starts at 0, scale at 1."""

    def __init__(self, width: int, hidden: int) -> None:
        """Build the head in fp32.

        Args:
            width: Of the trunk.
            hidden: Of the MLP's hidden layer; 0 makes it linear.
        """
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.bias = nn.Parameter(torch.zeros(()))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.inner = nn.Sequential(nn.Linear(width, hidden), nn.SiLU()) if hidden else nn.Identity()
        self.outer = nn.Linear(hidden or width, 1, bias=False)
        nn.init.zeros_(self.outer.weight)

    def forward(self, hidden_ND: Tensor, reading_N: Tensor) -> Tensor:
        """Values, [N]."""
        correction_N: Tensor = self.outer(self.inner(self.norm(hidden_ND)))[:, 0]
        return self.scale * reading_N + self.bias + correction_N


class SharedTrunkCritic:
    """A value head on a frozen trunk that someone else runs.

    Attributes:
        module: What is trained.
        sharded: True if its layers are cut over the ranks.
        gain: Readings are taken as gain x reading + bias, so that the critic starts out on the scale of the scores.
        bias: See `gain`.
    """

    def __init__(self, width: int, hidden: int, device: torch.device) -> None:
        self.module: nn.Module = ValueHead(width, hidden).to(device)
        self.sharded = False
        self.gain = 1.0
        self.bias = 0.0

    def values(self, batch: ResponseBatch, features: Sequence[Features]) -> Tensor:
        """Value before each response token of the batch, [N] fp32.

        Args:
            batch: The responses; only their order matters here.
            features: Of each row of the batch.
        """
        hidden_ND = torch.cat([row.hidden_TD for row in features]).float()
        reading_N = torch.cat([row.reading_T for row in features]).float()
        values_N: Tensor = self.module(hidden_ND, self.gain * reading_N + self.bias)
        return values_N


class SeparateCritic:
    """A whole model, every weight of it trained.

    Attributes:
        module: What is trained.
        sharded: True if its layers are cut over the ranks.
        gain: Value = gain x raw output + bias, so that the critic starts out on the scale of the scores.
        bias: See `gain`.
    """

    def __init__(
        self, path: Path, *, precision: Precision, gradient_checkpointing: bool, sharding: Sharding = "none"
    ) -> None:
        """Start from the weights of a folder.

        Args:
            path: A reward model, or a causal model (whose head starts at 0).
            precision: Of the matrix products.
            gradient_checkpointing: Recompute activations in the backward pass.
            sharding: `full` cuts the layers over the ranks.
        """
        model = load_sequence_scorer(path, precision)
        self.gain, self.bias = 1.0, 0.0
        if gradient_checkpointing:
            checkpoint_activations(model)
        whole = ShardedModel(model, sharding)
        self.module: nn.Module = whole.model
        self.sharded = whole.sharded

    def values(self, batch: ResponseBatch, features: Sequence[Features]) -> Tensor:
        """Value before each response token of the batch, [N] fp32; `features` are not used."""
        hidden_ND = batch.predictors(hidden_states(self.module, batch.batch))
        weight_1D: Tensor = self.module.score.weight  # type: ignore[union-attr, assignment]
        raw_N = hidden_ND.float() @ weight_1D[0].float()
        return self.gain * raw_N + self.bias


Critic = SharedTrunkCritic | SeparateCritic
