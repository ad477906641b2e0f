"""What PPO reports: versioned, JSON, written next to the policy it describes."""

from __future__ import annotations

from typing import Literal

from tunegate.training.results import Result


class PairedDifference(Result):
    """Mean difference on the same held-out prompts, drawn with the same noise, with a paired bootstrap interval."""

    mean: float
    low: float
    high: float
    level: float
    """Of the interval, e.g. 0.95."""
    n: int
    """Prompts."""


class HeldoutFigures(Result):
    """A policy's responses to the held-out prompts."""

    update: int
    """After so many updates; 0 is the reference."""
    n: int
    """Prompts."""
    reward: float
    """Mean of what PPO maximises, without the KL term: standardised score, clipped, less penalties."""
    score: float
    """Mean standardised score of the reward model."""
    judge: float | None
    """Mean score of the judge, as its own model folder normalises it; None without a judge."""
    cost: float | None
    """Mean cost, in its own units; None without a cost."""
    kl: float
    """Mean KL(policy, reference), nats a response: k1, unbiased."""
    kl_k3: float
    """The same by k3: less noise, never negative."""
    length: float
    """Mean response tokens, the stop token included."""
    finished: float
    """Share that ended with a stop token."""
    distinct_2: float
    """Distinct word pairs over all word pairs of all responses."""
    entropy: float
    """Mean entropy of the policy, nats a token."""


class SourceFigures(Result):
    """Held-out scores by source of the prompt."""

    n: int
    before: float
    """Mean standardised score of the reference."""
    after: float
    """Mean standardised score of the kept policy."""


class UpdateSummary(Result):
    """One update: a rollout and the passes over it."""

    update: int
    """Counted from 1."""
    reward: float
    """Mean final reward of the rollout, without the KL term."""
    score: float
    """Mean standardised score."""
    cost: float | None
    kl: float
    """KL(policy, reference) of the rollout, nats a response (k1)."""
    entropy: float
    """Nats a token."""
    length: float
    finished: float
    policy_loss: float
    value_loss: float
    clip_fraction: float
    divergence: float
    """KL(old, new) at the last step of the update, nats a token (k3)."""
    explained_variance: float
    """Of the reward's returns by V_old; NaN if the returns did not vary."""
    gradient_norm: float
    """Of the policy, before clipping, mean over the steps."""
    learning_rate: float
    kl_coefficient: float
    """beta during this update."""
    multiplier: float | None
    """Lambda of the cost during this update."""
    steps: int
    """Optimizer steps taken."""
    skipped_steps: int
    stopped_early: bool
    """True if KL(old, new) ended the update."""
    sampling_gap: float
    """Root mean square difference between the log-probabilities that tokens were drawn with and those that training
    computes: rounding, of merged weights and of another batch (nats)."""
    seconds_generate: float
    seconds_score: float
    seconds_update: float


class WatchdogEvent(Result):
    """Trouble that a watchdog saw."""

    update: int
    name: str
    """`kl_blow_up`, `entropy_collapse`, `one_answer`, `length_drift`, `reward_hacking`, `useless_critic`."""
    message: str
    """What was seen, with the figures and what to do."""
    action: Literal["stop", "back_off", "warn"]
    """What was done."""


class Example(Result):
    """One held-out prompt before and after."""

    prompt: str
    """Its last message."""
    before: str
    after: str
    score_before: float
    score_after: float


class RewardScale(Result):
    """Standardised score = gain x score + bias of one reward model, from the reference's own responses."""

    gain: float
    bias: float
    mean: float
    """Of the reference's scores."""
    deviation: float
    n: int


class PPOResult(Result):
    """PPO: what was trained, what came out, what went wrong on the way."""

    schema_version: Literal[1] = 1
    method: Literal["lora", "full", "disabled"]
    algorithm: Literal["ppo", "grpo", "rloo"] = "ppo"
    critic: Literal["shared_trunk", "separate", "none"]
    precision: Literal["bf16", "fp32"]
    seed: int
    learning_rate: float
    trained_parameters: int
    """Of the policy."""
    prompts: int
    """Training prompts used."""
    prompts_dropped: int
    """Training prompts that do not fit."""
    updates_planned: int
    updates: int
    """Done; updates that a watchdog took back are counted."""
    stopped: str | None
    """Name of the watchdog that ended training early; None if all updates were done."""
    resumed_from: int | None
    """Update that a checkpoint was resumed at."""
    kept: Literal["best", "last"]
    kept_update: int
    """The saved policy is the one after this many updates; 0 is the reference itself."""
    candidates: int
    """Evaluated policies that `kept_update` was chosen from, by held-out reward within the KL limit."""
    scale: list[RewardScale]
    """One a reward model; empty if scores were not standardised."""
    before: HeldoutFigures
    after: HeldoutFigures
    """Of the saved policy."""
    reward_gain: PairedDifference
    score_gain: PairedDifference
    judge_gain: PairedDifference | None
    by_source: dict[str, SourceFigures]
    evaluations: list[HeldoutFigures]
    history: list[UpdateSummary]
    events: list[WatchdogEvent]
    examples: list[Example]
    skipped_steps: int
    kl_coefficient: float
    """beta at the end."""
    multiplier: float | None
    """Lambda of the cost at the end."""
    response_tokens: int
    """Drawn in rollouts."""
    seconds: float
    """Of this process, loading included; the phases below count those before a resume as well."""
    seconds_generate: float
    seconds_score: float
    seconds_update: float
    seconds_evaluate: float
    peak_memory_bytes: int
