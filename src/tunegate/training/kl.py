"""Divergence between policy and reference: estimators on sampled tokens and the controllers of its coefficient.

Sources: J. Schulman, "Approximating KL divergence" (2020) for k1, k2, k3; Ziegler et al. 2019 (arXiv 1909.08593,
section 2.2) for the adaptive controller.

Shape suffixes: B responses, T response tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tunegate.training.ppo_config import KLEstimator, KLSpec

LOG_RATIO_LIMIT = 20.0
"""Logarithms of probability ratios are clamped to +- this before `exp`: e^20 is finite in every number format."""

ADAPTIVE_STEP = 0.2
"""Largest relative error that the adaptive controller reacts to (Ziegler et al. 2019)."""


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, estimator: KLEstimator) -> Tensor:
    """Estimate KL(policy, reference) on tokens drawn from the policy, element by element.

    With l = log pi - log pi_ref: k1 = l is unbiased and may be negative; k2 = l^2/2 is biased, and its gradient is the
    gradient of the divergence; k3 = exp(-l) - 1 + l is unbiased and never negative.

    Args:
        logprobs: log pi of the sampled tokens (nats), any shape.
        reference_logprobs: log pi_ref of the same tokens, the same shape.
        estimator: Which one.

    Returns:
        Nats, the shape of the input.
    """
    log_ratio = logprobs - reference_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    clamped = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.expm1(-clamped) + clamped


@dataclass
class KLController:
    """The KL coefficient beta.

    Attributes:
        coefficient: beta in use.
        target: Nats a response; unset keeps beta fixed.
        horizon: Responses over which an adaptive beta reacts.
    """

    coefficient: float
    target: float | None = None
    horizon: int = 1

    @classmethod
    def from_spec(cls, spec: KLSpec) -> KLController:
        """The controller that a spec describes, at its start."""
        return cls(spec.coefficient, spec.target if spec.controller == "adaptive" else None, spec.horizon)

    def update(self, kl: float, responses: int) -> None:
        """Set beta *= 1 + clip(kl / target - 1, +-0.2) x responses / horizon.

        Args:
            kl: Mean KL(policy, reference) of the last rollout, nats a response. Not finite: beta stays.
            responses: Responses in the rollout, over all ranks.
        """
        if self.target is None or not math.isfinite(kl):
            return
        error = min(max(kl / self.target - 1.0, -ADAPTIVE_STEP), ADAPTIVE_STEP)
        self.coefficient *= 1.0 + error * min(responses / self.horizon, 1.0)

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint needs."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take up a checkpoint's beta."""
        self.coefficient = state["coefficient"]


@dataclass
class LagrangeMultiplier:
    """The price of a cost above its limit (Safe RLHF, arXiv 2310.12773, appendix B).

    Attributes:
        value: lambda in use.
        limit: d, the mean cost that is tolerated.
        rate: eta.
        cap: Largest lambda.
    """

    value: float
    limit: float
    rate: float
    cap: float

    def update(self, mean_cost: float) -> None:
        """Set log lambda += eta lambda (mean cost - d), capped; a cost that is not finite changes nothing."""
        if math.isfinite(mean_cost):
            step = self.rate * self.value * (mean_cost - self.limit)
            self.value = math.exp(min(math.log(self.value) + step, math.log(self.cap)))

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint needs."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take up a checkpoint's lambda."""
        self.value = state["value"]
