"""What an evaluation finds: the versioned schema of `evaluation.json`."""

from __future__ import annotations

import math
from datetime import datetime
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from tunegate.errors import StorageError
from tunegate.evaluation.statistics import Interval
from tunegate.storage.manifest import digest_json

FILE_NAME = "evaluation.json"
ROWS_NAME = "responses.parquet"
LIKELIHOODS_NAME = "likelihoods.parquet"
COMPARISONS_NAME = "comparisons.parquet"

Unit = Literal["share", "nats", "reward", "tokens", "plain"]
Better = Literal["higher", "lower", "none"]
CANDIDATE, ANCHOR, SFT, CHAMPION = "candidate", "anchor", "sft", "champion"
ROLES = (ANCHOR, SFT, CANDIDATE, CHAMPION)


class Measure(NamedTuple):
    """What a metric's name stands for."""

    title: str
    unit: Unit
    better: Better


METRICS: dict[str, Measure] = {
    "violation_rate": Measure("Harmful requests complied with", "share", "lower"),
    "unsafe_rate": Measure("Harmful requests not safely declined", "share", "lower"),
    "attacked_violation_rate": Measure("Attacked harmful requests complied with", "share", "lower"),
    "attacked_unsafe_rate": Measure("Attacked harmful requests not safely declined", "share", "lower"),
    "over_refusal_rate": Measure("Harmless look-alikes refused", "share", "lower"),
    "lookalike_failure_rate": Measure("Harmless look-alikes refused or answered incoherently", "share", "lower"),
    "everyday_refusal_rate": Measure("Everyday requests refused", "share", "lower"),
    "everyday_failure_rate": Measure("Everyday requests refused or answered incoherently", "share", "lower"),
    "incoherent_rate": Measure("Incoherent answers", "share", "lower"),
    "llm_unsafe_rate": Measure("Harmful requests not safely declined, by the language model judge", "share", "lower"),
    "toxic_rate": Measure("Toxic answers", "share", "lower"),
    "reward_mean": Measure("Judge's score", "reward", "higher"),
    "proxy_reward_mean": Measure("Score of the reward model that PPO trained on", "reward", "higher"),
    "win_rate_anchor": Measure("Win rate against the base model", "share", "higher"),
    "nll": Measure("Held-out negative log-likelihood", "nats", "lower"),
    "task_accuracy": Measure("Accuracy on checkable tasks", "share", "higher"),
    "response_tokens": Measure("Length of answers", "tokens", "none"),
    "unfinished_rate": Measure("Answers cut at the length limit", "share", "lower"),
    "distinct_2": Measure("Distinct word pairs over all answers", "share", "higher"),
    "distinct_answers": Measure("Distinct answers over all answers", "share", "higher"),
    "distinct_1": Measure("Distinct words over all answers", "share", "higher"),
    "distinct_3": Measure("Distinct word triples over all answers", "share", "higher"),
    "kl_sft": Measure("KL divergence from the SFT model, an answer", "nats", "none"),
    "counterfactual_gap": Measure("Refusals that change with the group named", "share", "lower"),
    "bbq_accuracy_ambiguous": Measure("Bias questions right where the text does not tell", "share", "higher"),
    "bbq_accuracy_disambiguated": Measure("Bias questions right where the text tells", "share", "higher"),
    "bbq_bias_ambiguous": Measure("Bias score where the text does not tell (-1 to 1)", "plain", "none"),
    "bbq_bias_disambiguated": Measure("Bias score where the text tells (-1 to 1)", "plain", "none"),
}
"""Per model, in `ModelFigures.metrics`."""

DIFFERENCES: dict[str, Measure] = {
    "violation": Measure("Violations on harmful requests, candidate minus other", "share", "lower"),
    "attacked_violation": Measure("Violations on attacked requests, candidate minus other", "share", "lower"),
    "over_refusal": Measure("Refusals of harmless look-alikes, candidate minus other", "share", "lower"),
    "everyday_refusal": Measure("Refusals of everyday requests, candidate minus other", "share", "lower"),
    "win_rate": Measure("Win rate of the candidate", "share", "higher"),
    "win_rate_length_controlled": Measure("Win rate of the candidate at equal length", "share", "higher"),
    "reward": Measure("Judge's score, candidate minus other", "reward", "higher"),
    "nll": Measure("Held-out negative log-likelihood, candidate minus other", "nats", "lower"),
    "task_accuracy": Measure("Accuracy on checkable tasks, candidate minus other", "share", "higher"),
    "response_tokens": Measure("Length of answers, candidate minus other", "tokens", "none"),
    "bbq_accuracy": Measure("Bias questions right, candidate minus other", "share", "higher"),
    "bbq_bias_ambiguous": Measure("Bias score where the text does not tell, candidate minus other", "plain", "none"),
    "bbq_bias_disambiguated": Measure("Bias score where the text tells, candidate minus other", "plain", "none"),
    "llm_win_rate": Measure("Win rate of the candidate by the language model judge", "share", "higher"),
    "llm_win_rate_length_controlled": Measure(
        "Win rate of the candidate at equal length by the language model judge", "share", "higher"
    ),
    "proxy_gap": Measure("Gain in PPO's own reward beyond the judge's gain", "reward", "lower"),
}
"""Candidate against another model on the same prompts, in `Evaluation.differences`."""


class Result(BaseModel):
    """Base of the results: unknown keys are errors; NaN and infinity survive JSON as strings."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Figure(Result):
    """An estimate with its two-sided interval at the evaluation's confidence."""

    title: str
    unit: Unit
    better: Better
    estimate: float
    low: float | None = None
    """None where no interval is defined (whole-corpus figures)."""
    high: float | None = None
    n: int
    """Observations: answers, pairs, conversations or templates."""
    clusters: int
    """Independent units among them, usually prompts."""
    method: str
    p_value: float | None = None
    """Win rates: the exact sign test on decided pairs, two-sided."""

    @classmethod
    def of(cls, measure: Measure, interval: Interval, *, p_value: float | None = None) -> Figure:
        """A figure from an interval; infinite bounds stand for "unknown" and stay infinite."""
        return cls(
            title=measure.title,
            unit=measure.unit,
            better=measure.better,
            estimate=interval.estimate,
            low=interval.low,
            high=interval.high,
            n=interval.n,
            clusters=interval.clusters,
            method=interval.method,
            p_value=p_value,
        )

    @classmethod
    def plain(cls, measure: Measure, value: float, n: int, method: str) -> Figure:
        """A figure without interval."""
        return cls(
            title=measure.title,
            unit=measure.unit,
            better=measure.better,
            estimate=value,
            n=n,
            clusters=n,
            method=method,
        )

    @property
    def bounds(self) -> tuple[float, float]:
        """The interval; infinite where there is none."""
        return (-math.inf if self.low is None else self.low, math.inf if self.high is None else self.high)


class ModelFigures(Result):
    """Everything measured on one model."""

    digest: str
    """Digest of the model's files."""
    prompts_digest: str
    """Digest of what it was asked, attacks included; the same for all models that are compared."""
    decoding_digest: str
    cached: bool
    """Its answers were taken over from an earlier evaluation."""
    metrics: dict[str, Figure]


class HazardCount(Result):
    """Unsafe answers to the harmful prompts of one hazard, unattacked."""

    hazard: str
    unsafe: int
    """Answers that comply or are incoherent."""
    n: int


class GroupFigures(Result):
    """How the candidate treats one group of a counterfactual category, against the mean of the category's others."""

    category: str
    group: str
    refusal: Figure
    """Refusal rate, this group minus the others, by template (share)."""
    reward: Figure | None = None
    """Gain in the judge's score over the anchor, this group minus the others (anchor's standard deviations)."""


class SourceFigures(Result):
    """How one model does on the prompts of one source, by what is wrong with them."""

    role: str
    tag: str
    source: str
    failures: Figure
    """Share of unattacked prompts answered as they should not be: harmful ones not safely declined, others declined or
    answered incoherently."""
    attacked: Figure | None = None
    """The same with jailbreak wrappers."""


class QuestionFigures(Result):
    """Multiple choice in the form of BBQ: one category in one condition, the candidate's answers."""

    category: str
    condition: str
    """`ambiguous` (the text does not tell, only "unknown" is right) or `disambiguated`."""
    accuracy: Figure
    bias: Figure | None = None
    """1 always the stereotype, -1 always its opposite; None where no answer says anything about the groups."""


class RewardModelFigures(Result):
    """What a reward model knows about held-out preferences, as measured when it was trained."""

    accuracy: Figure
    calibration_error: float
    """Expected calibration error over ten bins: mean distance of confidence and accuracy (share)."""


class Answer(Result):
    """What one model said to a sample prompt."""

    text: str
    label: str
    reward: float | None = None
    finished: bool


class Sample(Result):
    """A prompt with every model's answer, for people to read."""

    prompt_id: str
    tag: str
    hazard: str | None = None
    messages: list[dict[str, str]]
    answers: dict[str, Answer]


class Evaluation(Result):
    """The result of `evaluate`."""

    schema_version: Literal[1] = 1
    created: datetime
    code_version: str
    confidence: float
    models: dict[str, ModelFigures]
    """By role: `candidate`, `anchor` always; `sft`, `champion` if there were any."""
    differences: dict[str, dict[str, Figure]]
    """Candidate against the other model, by its role and the name of the metric (`DIFFERENCES`)."""
    hazards: list[HazardCount]
    """Of the candidate."""
    groups: list[GroupFigures]
    """Of the candidate."""
    sources: list[SourceFigures] = []
    """Of every model, where the prompts come from more than one source."""
    questions: list[QuestionFigures] = []
    """Of the candidate."""
    reward_models: dict[str, RewardModelFigures] = {}
    """`reward` (PPO trained on it) and `judge`, where their figures lie beside them."""
    samples: list[Sample]
    judge: Literal["independent", "training", "none"]
    """Who compared the answers: a reward model that PPO never saw, the one it trained on, or nobody."""
    judge_deviation: float | None
    """Standard deviation of the anchor's scores: the unit of margins on scores."""
    digests: dict[str, str]
    """`judge`, `reward`, `classifier`, `toxicity`, `heldout`, `spec`, `counterfactuals`, `questions`, `llm_judge`."""
    notes: list[str]

    def digest(self) -> str:
        """The sha256 of the content as canonical JSON."""
        return digest_json(self.model_dump(mode="json"))


def write_evaluation(evaluation: Evaluation, folder: Path) -> Path:
    """Write `evaluation.json`; the folder is created if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE_NAME
    path.write_text(evaluation.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return path


def read_evaluation(folder: Path) -> Evaluation:
    """Read `evaluation.json` from an evaluation artifact.

    Raises:
        StorageError: It is missing, or not an evaluation of a schema that this code knows.
    """
    path = folder / FILE_NAME if folder.is_dir() else folder
    try:
        return Evaluation.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(
            f"there is no evaluation: {error.strerror}", key=str(path), fix="run `tunegate evaluate` first"
        ) from None
    except ValueError as error:
        raise StorageError(
            f"the file is not an evaluation of schema version 1: {str(error).splitlines()[0]}",
            key=str(path),
            fix="evaluate the model again with this version of tunegate",
        ) from error
