"""The state of a PPO run: one object that a checkpoint holds and a resumed run continues from, bit by bit.

No random generator is part of it. Every draw of a run (which prompts, the noise of a response, the order of a pass) is
a function of the seed and of counters that are part of it, so there is no generator whose state could be missed; the
global ones, which only draw the adapters at the start, are kept all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tunegate.training.best import BestWeights
from tunegate.training.checkpoint import rng_state, set_rng_state
from tunegate.training.heldout import Measurement
from tunegate.training.kl import KLController, LagrangeMultiplier
from tunegate.training.optim import Optimizer
from tunegate.training.ppo_results import HeldoutFigures, RewardScale, UpdateSummary, WatchdogEvent
from tunegate.training.scoring import Standardisation
from tunegate.training.update import Learner
from tunegate.training.watchdogs import Watchdogs


@dataclass
class PPOState:
    """Everything that changes while PPO runs.

    Attributes:
        policy_optimizer: Trained parameters of the policy and their moments.
        best_weights: The trained parameters of the best policy so far.
        learners: Critic and optimizer of each signal.
        kl: KL controller.
        watchdogs: What they remember.
        multiplier: Lambda of the cost; None without a cost.
        update: Updates done: where the prompt sampler stands.
        standardisation: Of the reward's scores.
        scale: The same, as reported.
        critic_scales: Gain and bias of each critic's reading.
        reference: Held-out measurement before the first update.
        latest: The latest held-out measurement.
        best: Held-out measurement of the best policy so far.
        evaluations: Figures of every held-out measurement.
        candidates: Evaluations within the KL limit.
        history: One summary an update.
        events: What the watchdogs saw.
        bad_in_a_row: Optimizer steps in a row whose gradient was not finite.
        response_tokens: Drawn in rollouts.
        seconds: By phase.
    """

    policy_optimizer: Optimizer
    best_weights: BestWeights
    learners: dict[str, Learner]
    kl: KLController
    watchdogs: Watchdogs
    multiplier: LagrangeMultiplier | None = None
    update: int = 0
    standardisation: Standardisation | None = None
    scale: list[RewardScale] = field(default_factory=list)
    critic_scales: dict[str, list[float]] = field(default_factory=dict)
    reference: Measurement | None = None
    latest: Measurement | None = None
    best: Measurement | None = None
    evaluations: list[HeldoutFigures] = field(default_factory=list)
    candidates: int = 0
    history: list[UpdateSummary] = field(default_factory=list)
    events: list[WatchdogEvent] = field(default_factory=list)
    bad_in_a_row: int = 0
    response_tokens: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: {"generate": 0.0, "score": 0.0, "update": 0.0, "evaluate": 0.0}
    )

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        """All of them, by name: `policy`, then the critics by signal."""
        return {"policy": self.policy_optimizer} | {name: learner.optimizer for name, learner in self.learners.items()}

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings, lists and dicts: what `CheckpointFolder.save` takes."""
        return {
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "learning_rates": {name: optimizer.learning_rate for name, optimizer in self.optimizers.items()},
            "kl": self.kl.state_dict(),
            "multiplier": self.multiplier.state_dict() if self.multiplier is not None else None,
            "watchdogs": self.watchdogs.state_dict(),
            "update": self.update,
            "standardisation": vars(self.standardisation) if self.standardisation is not None else None,
            "scale": [item.model_dump() for item in self.scale],
            "critic_scales": {name: list(scale) for name, scale in self.critic_scales.items()},
            "reference": self.reference.state_dict() if self.reference is not None else None,
            "latest": self.latest.state_dict() if self.latest is not None else None,
            "best": self.best.state_dict() if self.best is not None else None,
            "best_weights": self.best_weights.gathered(),
            "evaluations": [item.model_dump() for item in self.evaluations],
            "candidates": self.candidates,
            "history": [item.model_dump() for item in self.history],
            "events": [item.model_dump() for item in self.events],
            "bad_in_a_row": self.bad_in_a_row,
            "response_tokens": self.response_tokens,
            "seconds": dict(self.seconds),
            "rng": rng_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave; the policy's sampler and the critics' scale are the caller's to refresh."""
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
            optimizer.learning_rate = float(state["learning_rates"][name])
        self.kl.load_state_dict(state["kl"])
        if self.multiplier is not None:
            self.multiplier.load_state_dict(state["multiplier"])
        self.watchdogs.load_state_dict(state["watchdogs"])
        self.update = int(state["update"])
        self.standardisation = Standardisation(**state["standardisation"]) if state["standardisation"] else None
        self.scale = [RewardScale(**item) for item in state["scale"]]
        self.critic_scales = {name: list(scale) for name, scale in state["critic_scales"].items()}
        self.reference = Measurement(**state["reference"]) if state["reference"] else None
        self.latest = Measurement(**state["latest"]) if state["latest"] else None
        self.best = Measurement(**state["best"]) if state["best"] else None
        self.best_weights.take(state["best_weights"])
        self.evaluations = [HeldoutFigures(**item) for item in state["evaluations"]]
        self.candidates = int(state["candidates"])
        self.history = [UpdateSummary(**item) for item in state["history"]]
        self.events = [WatchdogEvent(**item) for item in state["events"]]
        self.bad_in_a_row = int(state["bad_in_a_row"])
        self.response_tokens = int(state["response_tokens"])
        self.seconds = dict(state["seconds"])
        set_rng_state(state["rng"])
