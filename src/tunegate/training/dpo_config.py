"""The section of the run spec that configures direct preference optimisation.

Only pydantic and the standard library are imported here, so that the command line can read a spec without loading
torch.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from tunegate.training.config import LoraSpec, Method, OptimizerSpec, Precision
from tunegate.training.ppo_config import KLSpec, PPOSpec, RewardShapingSpec


class DPOSpec(OptimizerSpec):
    """The policy straight from the preferences, without rollouts (Rafailov et al. 2023, arXiv 2305.18290)."""

    enabled: bool = True
    """`false` passes the policy through unchanged."""

    beta: float = Field(default=0.1, gt=0.0, le=10.0)
    """How dearly leaving the reference is paid for: the implicit reward is beta log(policy / reference)."""

    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """`sigmoid` is DPO's own (eq. 7); `ipo` aims at a difference of 1 / (2 beta) instead of an ever larger one
    (Azar et al. 2023, arXiv 2310.12036, eq. 17)."""

    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    """Share of the preferences that are taken to be the wrong way round (conservative DPO); for `sigmoid`."""

    sft_weight: float = Field(default=0.0, ge=0.0, le=100.0)
    """Weight of the negative log-likelihood of the chosen response, per token, beside the preference loss: keeps its
    probability from falling together with the rejected one's (arXiv 2404.19733, eq. 1)."""

    method: Method = "lora"
    """`lora` trains adapters on a frozen trunk that is the reference as well (merged into the saved model); `full`
    trains every weight beside a frozen copy."""

    lora: LoraSpec = LoraSpec()
    """The policy's adapters, when `method` is `lora`; their dropout must be 0, as in PPO."""

    epochs: int = Field(default=1, ge=1, le=20)
    """Passes over the training pairs."""

    max_steps: int | None = Field(default=None, ge=1)
    """Stop after so many optimizer steps."""

    batch_pairs: int = Field(default=16, ge=1)
    """Pairs an optimizer step."""

    microbatch_tokens: int | None = Field(default=None, ge=64)
    """Tokens (padding included) that go through the model at once; bounds memory, does not change the gradient. Unset
    means 1024 on CPUs, 16384 on GPUs."""

    max_length: int = Field(default=512, ge=16)
    """Longest prompt and response (tokens). Longer ones lose the prompt's oldest turns first, then the end of the
    response."""

    evaluate_every: int | None = Field(default=None, ge=1)
    """Optimizer steps between measurements of the held-out loss; unset means at the end of each epoch."""

    evaluate_pairs: int = Field(default=256, ge=1)
    """Held-out pairs that these measurements use."""

    evaluate_prompts: int = Field(default=128, ge=2)
    """Held-out prompts that reference and final policy answer, to be scored by the reward model."""

    max_new_tokens: int = Field(default=128, ge=2, le=65_536)
    """Longest of those answers (tokens, the stop token included)."""

    max_prompt_tokens: int = Field(default=512, ge=8)
    """A held-out prompt loses its oldest turns until it has so few tokens."""

    temperature: float = Field(default=0.7, gt=0.0, le=10.0)
    """Of those answers."""

    keep: Literal["best", "last"] = "best"
    """Which policy is saved: the one with the lowest held-out loss, or the last."""

    checkpoint_every: int | None = Field(default=None, ge=1)
    """Optimizer steps between checkpoints; unset means at each measurement of the held-out loss."""

    keep_checkpoints: int = Field(default=2, ge=1)
    """How many checkpoints are kept."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about 30% slower."""

    precision: Precision = "auto"
    """Number format of the matrix products; trained parameters and optimizer state are always fp32."""

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate that is used: `learning_rate`, or 5e-6 for full and 5e-5 for LoRA training."""
        return self.learning_rate or (5e-5 if self.method == "lora" else 5e-6)

    @model_validator(mode="after")
    def _no_dropout(self) -> Self:
        if self.lora.dropout > 0.0:
            raise ValueError(
                f"lora.dropout is {self.lora.dropout}, but DPO compares probabilities of the policy with the "
                "reference's, and dropout would make them differ by chance; set it to 0"
            )
        return self

    @property
    def policy(self) -> PPOSpec:
        """What policy, reference and held-out answers need, as PPO's own section says it: scores as they are."""
        return PPOSpec(
            method=self.method,
            lora=self.lora,
            adapted_layers=1.0,
            max_new_tokens=self.max_new_tokens,
            max_prompt_tokens=self.max_prompt_tokens,
            temperature=self.temperature,
            evaluate_prompts=self.evaluate_prompts,
            kl=KLSpec(),
            shaping=RewardShapingSpec(standardise=False, clip=None, missing_eos="none"),
            gradient_checkpointing=self.gradient_checkpointing,
            precision=self.precision,
        )
