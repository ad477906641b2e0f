"""What evaluation needs of the training room, as protocols, and the real thing loaded on first use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from tunegate.data.records import Conversation, Messages
from tunegate.observer import Observer
from tunegate.storage.manifest import digest_files, list_files

Precision = Literal["auto", "bf16", "fp32"]


@dataclass(frozen=True, slots=True)
class Decoding:
    """How answers are drawn: the part of the spec that decides what a model says.

    Attributes:
        max_new_tokens: Longest answer.
        temperature: 0 is greedy.
        max_prompt_tokens: Longest prompt, or None.
        batch_tokens: Memory bound; does not enter the digest.
        seed: Of the noise; enters the digest only when there is noise.
    """

    max_new_tokens: int
    temperature: float
    max_prompt_tokens: int | None
    batch_tokens: int
    seed: int

    def facts(self) -> dict[str, Any]:
        """What the digest is made of."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "max_prompt_tokens": self.max_prompt_tokens,
            "seed": self.seed if self.temperature > 0 else None,
        }


@dataclass(frozen=True, slots=True)
class Response:
    """One answer: its text, how many tokens it took, and whether the model stopped by itself."""

    text: str
    tokens: int
    finished: bool


@dataclass(frozen=True, slots=True)
class Likelihoods:
    """Negative log-likelihood of the assistant's turns, nats: sums and token counts by conversation, in input order."""

    sums: list[float]
    tokens: list[int]


class Answerer(Protocol):
    """A loaded language model."""

    def answer(self, prompts: Sequence[Messages], decoding: Decoding, observer: Observer) -> list[Response]:
        """One answer a prompt, in input order."""


class Scorer(Protocol):
    """A loaded reward model."""

    def score(self, prompts: Sequence[Messages], responses: Sequence[str], observer: Observer) -> list[float]:
        """One score a response, in input order."""


@dataclass(frozen=True, slots=True)
class Backends:
    """How models are loaded and asked; tests put fakes here.

    Attributes:
        answerer: Loads a language model folder.
        scorer: Loads a reward model folder.
        likelihoods: Measures conversations under a model folder.
        digest: Digest of a model folder's files.
        divergence: KL of a model (first folder) from another (second) on each prompt, nats an answer; None where their
            tokens differ. Unset: it is not measured.
    """

    answerer: Callable[[Path], Answerer]
    scorer: Callable[[Path], Scorer]
    likelihoods: Callable[[Path, Sequence[Conversation], Observer], Likelihoods]
    digest: Callable[[Path], str]
    divergence: Callable[[Path, Path, Sequence[Messages], Decoding, Observer], list[float] | None] | None = None


def folder_digest(path: Path) -> str:
    """Digest of the files that are there now, not of what a manifest claims."""
    return digest_files(list_files(path))


def real_backends(precision: Precision = "auto") -> Backends:
    """The training room's generator, reward model and likelihood; torch is imported when the first one is used."""
    return Backends(
        answerer=lambda path: _RealAnswerer(path, precision),
        scorer=lambda path: _RealScorer(path, precision),
        likelihoods=lambda path, conversations, observer: _real_likelihoods(path, conversations, precision, observer),
        digest=folder_digest,
        divergence=lambda policy, reference, prompts, decoding, observer: _real_divergence(
            policy, reference, prompts, decoding, precision, observer
        ),
    )


class _RealAnswerer:
    def __init__(self, path: Path, precision: Precision) -> None:
        from tunegate.training.rollout import Generator

        self._generator = Generator.load(path, precision=precision)

    def answer(self, prompts: Sequence[Messages], decoding: Decoding, observer: Observer) -> list[Response]:
        from tunegate.training.ppo_config import SamplingSpec

        sampling = SamplingSpec(
            max_new_tokens=decoding.max_new_tokens,
            temperature=decoding.temperature,
            max_prompt_tokens=decoding.max_prompt_tokens,
            batch_tokens=decoding.batch_tokens,
        )
        completions = self._generator.generate(prompts, sampling, seed=decoding.seed, observer=observer)
        return [Response(c.text, len(c.token_ids), c.finished) for c in completions]


class _RealScorer:
    def __init__(self, path: Path, precision: Precision) -> None:
        from tunegate.training.reward_model import RewardModel

        self._model = RewardModel.load(path, precision=precision)

    def score(self, prompts: Sequence[Messages], responses: Sequence[str], observer: Observer) -> list[float]:
        scores = self._model.score(prompts, responses, observer=observer)
        return [float(score) for score in scores]


def _real_likelihoods(
    path: Path, conversations: Sequence[Conversation], precision: Precision, observer: Observer
) -> Likelihoods:
    from tunegate.evaluation.likelihoods import measure_likelihoods

    return measure_likelihoods(path, conversations, precision, observer)


def _real_divergence(
    policy: Path,
    reference: Path,
    prompts: Sequence[Messages],
    decoding: Decoding,
    precision: Precision,
    observer: Observer,
) -> list[float] | None:
    from tunegate.evaluation.divergence import measure_divergence

    return measure_divergence(policy, reference, prompts, decoding, precision, observer)
