"""The sections of the run spec that configure sampling and PPO.

Only pydantic and the standard library are imported here, so that the command line can read a spec without loading
torch. Where a default comes from: "The N+ Implementation Details of RLHF with PPO" (arXiv 2403.17031) unless the field
says otherwise.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from tunegate.section import Section
from tunegate.training.config import LoraSpec, Method, Precision

KLEstimator = Literal["k1", "k2", "k3"]
CriticKind = Literal["shared_trunk", "separate"]
Algorithm = Literal["ppo", "grpo", "rloo"]
WatchdogAction = Literal["stop", "back_off", "warn"]

ENTRY_POINT = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"


class SamplingSpec(Section):
    """How responses are drawn from a model."""

    max_new_tokens: int = Field(default=128, ge=1, le=65_536)
    """Longest response (tokens, the stop token included)."""

    temperature: float = Field(default=0.7, ge=0.0, le=10.0)
    """The logits are divided by this before the softmax; 0 takes the most likely token each time."""

    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Sample from the smallest set of tokens with this much probability; 1 is the whole distribution."""

    top_k: int = Field(default=0, ge=0)
    """Sample from the so many most likely tokens; 0 is the whole vocabulary."""

    max_prompt_tokens: int | None = Field(default=None, ge=8)
    """Longer prompts lose their oldest turns; unset means what the model's context leaves beside the response."""

    batch_tokens: int = Field(default=16_384, ge=64)
    """Rows x (prompt + response) tokens that are decoded at once; bounds the memory of the key-value cache."""

    @property
    def greedy(self) -> bool:
        """True if no chance is involved."""
        return self.temperature == 0.0

    @model_validator(mode="after")
    def _greedy_has_no_nucleus(self) -> Self:
        if self.greedy and (self.top_p < 1.0 or self.top_k > 0):
            raise ValueError(
                f"temperature is 0 (greedy), so top_p={self.top_p} and top_k={self.top_k} would have no effect; "
                "leave them out, or set a temperature above 0"
            )
        return self


class KLSpec(Section):
    """How far the policy may move from the reference (the model that PPO starts from)."""

    coefficient: float = Field(default=0.05, ge=0.0, le=100.0)
    """Beta: standardised reward units a nat. With an adaptive controller the value it starts from."""

    controller: Literal["fixed", "adaptive"] = "fixed"
    """`adaptive` raises and lowers beta so that the KL settles at `target` (Ziegler et al. 2019, arXiv 1909.08593)."""

    target: float = Field(default=6.0, gt=0.0)
    """KL(policy, reference) that the adaptive controller aims at (nats a response)."""

    horizon: int = Field(default=2_000, ge=1)
    """Responses over which the adaptive controller reacts: beta *= 1 + clip(KL/target - 1, +-0.2) n/horizon."""

    placement: Literal["reward", "loss"] = "reward"
    """`reward` subtracts beta x KL from each token's reward; `loss` adds beta x k2 to the policy loss."""

    estimator: KLEstimator | None = None
    """k1 = log(pi/ref), k2 = k1^2/2, k3 = exp(-k1) - 1 + k1 (Schulman 2020). Unset means k1 in the reward, k2 in the
    loss."""

    early_stop: float | None = Field(default=0.05, gt=0.0)
    """The epochs of an update end when KL(new, old) > 1.5 x this (nats a token); unset never ends them early."""

    limit: float = Field(default=10.0, gt=0.0)
    """A policy whose KL to the reference on held-out prompts exceeds this (nats a response) is not kept as best."""

    @property
    def used_estimator(self) -> KLEstimator:
        """The estimator in use: the one that is set, or the right one for the placement."""
        return self.estimator or ("k1" if self.placement == "reward" else "k2")

    @model_validator(mode="after")
    def _loss_needs_k2(self) -> Self:
        if self.placement == "loss" and self.used_estimator != "k2":
            raise ValueError(
                f"placement 'loss' with estimator {self.used_estimator!r}: differentiated on samples of the policy, "
                "the expected gradient of k1 is 0 and that of k3 is that of the reverse divergence; use 'k2', or "
                "placement 'reward'"
            )
        return self


class RewardShapingSpec(Section):
    """What becomes of the reward model's score before PPO sees it."""

    standardise: bool = True
    """Gain and bias so that the scores of the reference's own responses have mean 0 and variance 1."""

    standardise_prompts: int = Field(default=64, ge=8)
    """Training prompts whose responses the gain and bias are computed on; the critic is warmed up on them too."""

    clip: float | None = Field(default=5.0, gt=0.0)
    """Scores are clipped to +- this (standard deviations of the reference's scores)."""

    missing_eos: Literal["subtract", "replace", "none"] = "subtract"
    """What happens to the score of a response that ran into the length limit without its stop token: the penalty is
    subtracted, or the score is replaced by minus the penalty."""

    missing_eos_penalty: float = Field(default=1.0, ge=0.0)
    """See `missing_eos` (standard deviations of the reference's scores)."""

    length_penalty: float = Field(default=0.0, ge=0.0)
    """Subtracted for each token of the response (standard deviations); 0 is off."""


class CostSpec(Section):
    """A cost that must stay below a limit, by a Lagrange multiplier (Safe RLHF, arXiv 2310.12773)."""

    model: str | None = None
    """Folder of a reward model whose score is the cost: positive is harmful."""

    head: str | None = None
    """Or one of the heads of the reward model itself (`reward.heads`, kind `cost`)."""

    function: str | None = Field(default=None, pattern=ENTRY_POINT)
    """Or a Python function `module:function(prompts, responses) -> list[float]`."""

    limit: float = 0.0
    """d: the mean cost (the model's own units) that is tolerated."""

    multiplier: float = Field(default=1.0, gt=0.0)
    """Lambda at the start."""

    multiplier_rate: float = Field(default=0.1, gt=0.0, le=10.0)
    """eta: log lambda += eta x lambda x (mean cost - limit) after each rollout."""

    multiplier_cap: float = Field(default=10.0, gt=0.0)
    """Largest lambda."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(source is not None for source in (self.model, self.head, self.function)) != 1:
            raise ValueError("a cost needs exactly one source: set either model, head or function")
        if self.multiplier > self.multiplier_cap:
            raise ValueError(f"multiplier ({self.multiplier}) is above multiplier_cap ({self.multiplier_cap})")
        return self


class EnsembleSpec(Section):
    """Several reward models against over-optimisation (Coste et al. 2023, arXiv 2310.02743)."""

    members: tuple[str, ...] = ()
    """Folders of further reward models, beside the one the stage is given and those that `reward.ensemble` trained
    with it."""

    combine: Literal["min", "mean_minus_variance"] = "min"
    """`min` takes the worst opinion, `mean_minus_variance` the mean less k times the variance over the members."""

    variance_weight: float = Field(default=0.5, ge=0.0)
    """k of `mean_minus_variance`."""


class WatchdogSpec(Section):
    """Signs that training goes wrong, what counts as one, and what is done about it."""

    action: WatchdogAction = "back_off"
    """`stop` ends PPO with the last good policy; `back_off` returns to the last good policy with half the learning
    rate and twice the KL coefficient, and stops the second time that the same trouble shows; `warn` only says so."""

    kl_limit: float = Field(default=30.0, gt=0.0)
    """KL blow-up: mean KL(policy, reference) of a rollout above this (nats a response)."""

    entropy_floor: float = Field(default=0.05, ge=0.0, le=1.0)
    """Entropy collapse: mean entropy of a rollout below this share of the first rollout's."""

    identical_share: float = Field(default=0.5, gt=0.0, le=1.0)
    """Collapse to one answer: more than this share of a rollout's responses are one and the same text."""

    distinct_floor: float = Field(default=0.3, ge=0.0, le=1.0)
    """Collapse to one answer: share of distinct word pairs below this share of the first rollout's."""

    length_drift: float = Field(default=3.0, gt=1.0)
    """Mean response length more than this many times the first rollout's, or less than its inverse."""

    judge_drop: float = Field(default=2.0, gt=0.0)
    """Reward hacking: on held-out prompts the reward rose and the judge fell, both by more than this many standard
    errors of the paired difference to the reference."""

    explained_variance_floor: float | None = Field(default=None, le=1.0)
    """Useless critic: explained variance of the returns below this (after warm-up); unset is off."""


class PPOSpec(Section):
    """Reinforcement learning from a reward model by proximal policy optimisation (arXiv 1707.06347)."""

    enabled: bool = True
    """`false` passes the policy through unchanged."""

    algorithm: Algorithm = "ppo"
    """Where advantages come from; set by `last_stage` in a run spec. `ppo` asks a critic about every token. `grpo`
    (DeepSeekMath, arXiv 2402.03300) and `rloo` (arXiv 2402.14740) have no critic: they compare `group_size` responses
    to one prompt, by their mean and standard deviation, or each with the mean of the others."""

    group_size: int = Field(default=4, ge=2, le=256)
    """Responses to each prompt, for `grpo` and `rloo`; a rollout has `prompts_per_update` times as many. `ppo` draws
    one."""

    reward_function: str | None = Field(default=None, pattern=ENTRY_POINT)
    """A Python function `module:function(prompts, responses) -> list[float]` instead of the reward model."""

    ensemble: EnsembleSpec | None = None
    """How several reward models are joined; unset means the one reward model alone, or `min` over those that
    `reward.ensemble` trained."""

    cost: CostSpec | None = None
    """A constrained cost beside the reward; unset means none."""

    method: Method = "lora"
    """`lora` trains adapters on a frozen trunk that is the reference as well (merged into the saved model); `full`
    trains every weight beside a frozen copy."""

    lora: LoraSpec = LoraSpec()
    """The policy's adapters, when `method` is `lora`."""

    adapted_layers: float = Field(default=0.5, gt=0.0, le=1.0)
    """Share of the layers, from the top, that get adapters. The layers below are computed once a rollout, for the
    reference and for every epoch, so that 0.5 nearly halves the cost of an update. Ignored when `method` is `full`."""

    critic: CriticKind = "shared_trunk"
    """`shared_trunk` trains a value head on the frozen reward model, whose features are computed once a rollout;
    `separate` trains a whole model that starts from the reward model's weights: twice the time, more memory."""

    critic_hidden: int = Field(default=256, ge=0)
    """Width of the hidden layer that a shared trunk's value head has beside the reward head; 0 keeps it linear."""

    critic_warmup_epochs: int = Field(default=20, ge=0)
    """Epochs in which the critic alone is trained on the reference's responses before the policy moves (with a
    separate critic each epoch costs a forward and backward pass)."""

    steps: int = Field(default=40, ge=1)
    """Rollouts, each followed by `epochs` passes over it."""

    prompts_per_update: int = Field(default=64, ge=2)
    """Prompts a rollout; one response each, or `group_size`."""

    epochs: int = Field(default=4, ge=1, le=64)
    """K: passes over a rollout."""

    minibatches: int = Field(default=1, ge=1, le=1024)
    """Optimizer steps an epoch."""

    microbatch_tokens: int = Field(default=4_096, ge=64)
    """Tokens (padding included) that go through the model at once; bounds memory, does not change the gradient."""

    max_new_tokens: int = Field(default=128, ge=2, le=65_536)
    """Longest response (tokens, the stop token included)."""

    max_prompt_tokens: int = Field(default=512, ge=8)
    """Longer prompts lose their oldest turns; a prompt whose last turn alone is longer is left out."""

    generator: Literal["own", "vllm"] = "own"
    """What draws the responses: our own decoding loop, or vLLM (`pip install vllm`, a GPU, one process), which keeps a
    second copy of the weights on the GPU and is given the new ones after every update."""

    vllm_memory: float = Field(default=0.3, gt=0.0, lt=1.0)
    """Share of the GPU's memory that vLLM may take, with `generator: vllm`; training needs the rest."""

    temperature: float = Field(default=0.7, gt=0.0, le=10.0)
    """Of the rollouts; old, new and reference log-probabilities are all taken at this temperature."""

    learning_rate: float | None = Field(default=None, gt=0.0, le=1.0)
    """Of the policy, at the first update; unset means 3e-6 for `full`, 2e-4 for `lora`."""

    critic_learning_rate: float | None = Field(default=None, gt=0.0, le=1.0)
    """Of the critic; unset means 1e-3 for the head of a shared trunk, 1e-5 for a separate critic."""

    schedule: Literal["linear", "constant"] = "linear"
    """Both learning rates fall linearly to 0 over the updates, or stay."""

    adam_epsilon: float = Field(default=1e-5, gt=0.0)
    """Added to the root of Adam's second moment."""

    gradient_clip: float = Field(default=1.0, ge=0.0)
    """Largest gradient norm, of policy and critic each; 0 switches clipping off."""

    gamma: float = Field(default=1.0, gt=0.0, le=1.0)
    """Discount."""

    gae_lambda: float = Field(default=0.95, ge=0.0, le=1.0)
    """Lambda of generalised advantage estimation (arXiv 1506.02438)."""

    clip: float = Field(default=0.2, gt=0.0, lt=1.0)
    """eps: the probability ratio is clipped to [1 - eps, 1 + eps]."""

    value_clip: float = Field(default=0.2, gt=0.0)
    """eps_v: new values are clipped to old values +- this in the value loss."""

    value_coefficient: float = Field(default=0.1, gt=0.0)
    """c_v: weight of the value loss."""

    entropy_coefficient: float = Field(default=0.0, ge=0.0)
    """c_H: weight of the entropy bonus."""

    whiten_advantages: bool = True
    """Advantages to mean 0, variance 1 over all valid tokens. `grpo` and `rloo` leave theirs as they are."""

    whiten_rewards: bool = False
    """Token rewards to variance 1; the mean is kept."""

    kl: KLSpec = KLSpec()
    """Distance to the reference."""

    shaping: RewardShapingSpec = RewardShapingSpec()
    """From score to reward."""

    watchdogs: WatchdogSpec = WatchdogSpec()
    """What stops a run that goes wrong."""

    evaluate_every: int = Field(default=5, ge=1)
    """Updates between evaluations on held-out prompts; the first is before the first update, the last at the end."""

    evaluate_prompts: int = Field(default=128, ge=2)
    """At most so many held-out prompts are used, the same every time."""

    keep: Literal["best", "last"] = "best"
    """Which policy is saved: the one with the best held-out reward among those within `kl.limit`, or the last."""

    checkpoint_every: int | None = Field(default=None, ge=1)
    """Updates between checkpoints; unset means at each evaluation."""

    keep_checkpoints: int = Field(default=2, ge=1)
    """How many checkpoints are kept."""

    max_bad_steps: int = Field(default=5, ge=1)
    """Training ends with an error after so many optimizer steps in a row with a gradient that is not finite."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about 30% slower."""

    precision: Precision = "auto"
    """Number format of the matrix products; trained parameters and optimizer state are always fp32."""

    @property
    def grouped(self) -> bool:
        """True if responses to one prompt are compared with each other, and there is no critic."""
        return self.algorithm != "ppo"

    @property
    def responses_per_update(self) -> int:
        """Responses a rollout."""
        return self.prompts_per_update * (self.group_size if self.grouped else 1)

    @property
    def policy_learning_rate(self) -> float:
        """The policy's learning rate that is used."""
        return self.learning_rate or (2e-4 if self.method == "lora" else 3e-6)

    @property
    def value_learning_rate(self) -> float:
        """The critic's learning rate that is used."""
        return self.critic_learning_rate or (1e-3 if self.critic == "shared_trunk" else 1e-5)

    @property
    def rollout_sampling(self) -> SamplingSpec:
        """How rollouts are drawn: from the whole distribution, so that what is sampled is what is trained."""
        return SamplingSpec(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=1.0,
            top_k=0,
            max_prompt_tokens=self.max_prompt_tokens,
        )

    @model_validator(mode="after")
    def _no_dropout(self) -> Self:
        if self.lora.dropout > 0.0:
            raise ValueError(
                f"lora.dropout is {self.lora.dropout}, but PPO compares probabilities of one policy at two moments, "
                "and dropout would make them differ by chance; set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _minibatches_have_rows(self) -> Self:
        if self.minibatches > self.prompts_per_update:
            raise ValueError(
                f"minibatches ({self.minibatches}) is above prompts_per_update ({self.prompts_per_update}); "
                "every minibatch needs at least one response"
            )
        return self

    @model_validator(mode="after")
    def _ensemble_has_models(self) -> Self:
        if self.ensemble is not None and self.reward_function is not None:
            raise ValueError(
                "ensemble and reward_function are both set; an ensemble joins reward models, so leave one out"
            )
        return self
