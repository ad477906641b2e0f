"""What the training stages report: versioned, JSON, written next to the model they describe."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Result(BaseModel):
    """Base of the results: unknown keys are errors, NaN and infinity survive JSON as strings."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class ModelFacts(Result):
    """What `resolve_model` found out about a model."""

    schema_version: Literal[1] = 1
    source: str
    """As given in the spec."""
    architecture: str
    """E.g. `LlamaForCausalLM`."""
    parameters: int
    vocabulary: int
    """Rows of the embedding."""
    layers: int
    hidden_size: int
    max_length: int
    """Longest sequence (tokens) the stages use."""
    pad_token: str
    stop_tokens: list[str]
    """Tokens that end an answer."""
    precision: Literal["bf16", "fp32"]
    """Number format of the saved weights."""
    template_added: bool
    """True if the model had no chat template and got the plain one."""


class NLL(Result):
    """Negative log-likelihood of answers under a model, by row, in nats (natural logarithm).

    `mean` is weighted by tokens; rows that were too long to hold any of their answer have 0 tokens.
    """

    ids: list[str]
    sums: list[float]
    """Per conversation the sum over the assistant's tokens."""
    tokens: list[int]
    """Per conversation the number of the assistant's tokens."""

    @property
    def total_tokens(self) -> int:
        """Assistant tokens over all conversations."""
        return sum(self.tokens)

    @property
    def mean(self) -> float:
        """Nats per token; NaN without tokens."""
        return sum(self.sums) / self.total_tokens if self.total_tokens else float("nan")


class HeldoutPoint(Result):
    """The held-out loss at one step."""

    step: int
    nll: float
    """Nats per token."""


class SFTResult(Result):
    """Supervised fine-tuning: what went in, what came out."""

    schema_version: Literal[1] = 1
    method: Literal["full", "lora", "disabled"]
    precision: Literal["bf16", "fp32"]
    learning_rate: float
    """At the peak."""
    trained_parameters: int
    steps: int
    """Optimizer steps taken."""
    best_step: int
    """The step whose weights were kept."""
    stopped: Literal["completed", "patience", "disabled"]
    skipped_steps: int
    """Steps whose gradient was not finite."""
    resumed_from: int | None
    """The checkpoint's step, if training was resumed."""
    rows: int
    """Training conversations used."""
    rows_dropped: int
    """Too long for any of their answer to fit."""
    rows_cut: int
    """Lost the end of their last answer."""
    rows_shortened: int
    """Lost their oldest turns."""
    tokens: int
    """Real tokens that went through the model in training."""
    answer_tokens: int
    """Of these, the assistant's."""
    seconds: float
    """Training, without loading, measuring and saving."""
    tokens_per_second: float
    peak_memory_bytes: int
    """Largest resident memory of the process, or memory allocated on the GPU."""
    final_loss: float | None
    """Mean training loss over the last tenth of the steps (nats per token)."""
    heldout_before: NLL | None
    heldout_after: NLL | None
    history: list[HeldoutPoint]
    """The held-out loss during training, on the rows measured then."""


class Share(Result):
    """A share of n cases with its 95% interval (Wilson 1927)."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, successes: float, n: int) -> Share:
        """The share `successes / n`; half successes (ties) are allowed; without cases NaN, bounds 0 and 1."""
        if n == 0:
            return cls(value=float("nan"), low=0.0, high=1.0, n=0)
        z = 1.959963984540054  # the 97.5% quantile of the normal distribution
        share = successes / n
        middle = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
        return cls(value=share, low=max(0.0, middle - half), high=min(1.0, middle + half), n=n)


class LengthBucket(Result):
    """Pairs whose responses differ in length by `low` (inclusive) to `high` (exclusive) tokens."""

    low: int | None
    """Chosen minus rejected, tokens; None is unbounded."""
    high: int | None
    accuracy: Share


class ReliabilityBin(Result):
    """Pairs whose winner the model is between `low` and `high` sure of."""

    low: float
    high: float
    confidence: float
    """Mean predicted probability of the response that scored higher."""
    accuracy: float
    """How often it was the chosen one."""
    n: int


class PairScores(Result):
    """Normalised scores of the held-out pairs, for paired comparisons."""

    ids: list[str]
    chosen: list[float]
    rejected: list[float]


class Correlation(Result):
    """Spearman's rank correlation between scores and ratings."""

    rho: float
    low: float
    high: float
    """95% interval by Fisher's z with the variance of Bonett & Wright (2000)."""
    n: int
    mean_absolute_error: float | None
    """Of the predicted rating, on the raters' common scale; None if the model was not fitted to ratings."""


class RewardEvaluation(Result):
    """What the reward model knows about held-out preferences and ratings."""

    pairs: int
    dropped: int
    """Held-out pairs that do not fit."""
    correct: float
    """Pairs in which the chosen response scored higher; ties count one half."""
    accuracy: Share
    by_source: dict[str, Share]
    by_length: list[LengthBucket]
    log_loss: float
    """Mean -log sigmoid(r_chosen - r_rejected) of the raw scores, nats; log 2 = 0.693 is a coin."""
    expected_calibration_error: float
    """Mean over pairs of |confidence - accuracy| of their bin (ten bins between 0.5 and 1)."""
    reliability: list[ReliabilityBin]
    length_correct: float
    """Pairs that "the longer response is better" gets right; ties count one half."""
    only_model: int
    """Pairs that the model gets right and the length rule does not."""
    only_length: int
    """Pairs that the length rule gets right and the model does not."""
    length_baseline: Share
    tfidf_baseline: Share | None
    """Logistic regression on the difference of TF-IDF vectors, fitted on the training pairs."""
    ratings: Correlation | None
    scores: PairScores
    by_head: dict[str, Share] = {}
    """Accuracy of each of several heads on its own pairs."""


class RewardResult(Result):
    """Reward model training: what went in, what came out."""

    schema_version: Literal[1] = 1
    objective: Literal["pairwise", "pointwise", "joint"]
    trunk: Literal["full", "lora", "frozen"]
    precision: Literal["bf16", "fp32"]
    learning_rate: float
    """At the peak; 0 for a frozen trunk, whose head is fitted by L-BFGS."""
    ridge: float | None
    """L2 penalty of the head fitted on the frozen trunk, chosen by cross-validation on the training split; None if the
    head was drawn at random."""
    trained_parameters: int
    steps: int
    skipped_steps: int
    resumed_from: int | None
    pairs: int
    ratings: int
    labels: int = 0
    """Responses that heads which are costs were told to be harmful or not."""
    heads: list[str] = []
    """Names of the heads, if there are several."""
    dropped: int
    """Training pairs and ratings whose prompt does not fit."""
    cut: int
    """Training pairs and ratings with a response that was cut."""
    tokens: int
    """Tokens that went through the model in training, a pair's prompt counted once."""
    seconds: float
    pairs_per_second: float
    """Pairs (or ratings, without pairs) a second of training."""
    peak_memory_bytes: int
    final_loss: float | None
    """Mean training loss over the last tenth of the steps."""
    gain: float
    """score = gain x raw + bias."""
    bias: float
    rating_mean: float | None
    rating_scale: float | None
    heldout: RewardEvaluation
