"""What tuning cost: likelihood of held-out answers, and small multiple-choice tasks decided by likelihood.

A task counts as solved when the right option has the lowest negative log-likelihood a token (length-normalised, as in
common harnesses' `acc_norm`); the chat template and the stop token are the same for all options and cancel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunegate.data.records import Conversation
from tunegate.errors import DataError
from tunegate.evaluation.backends import Likelihoods
from tunegate.evaluation.config import EvaluationSpec
from tunegate.evaluation.files import read_items
from tunegate.evaluation.results import DIFFERENCES, METRICS, Figure
from tunegate.evaluation.rows import LikelihoodRow
from tunegate.evaluation.statistics import bootstrap_mean, paired_proportions, proportion

TASKS_PATH = Path(__file__).parent / "assets" / "tasks.jsonl"


@dataclass(frozen=True, slots=True)
class Task:
    """A multiple-choice item; `answer` is the index of the right option."""

    id: str
    kind: str
    question: str
    options: tuple[str, ...]
    answer: int


@dataclass(frozen=True, slots=True)
class Capability:
    """What one model showed.

    Attributes:
        conversations: Ids of the held-out conversations that have tokens.
        nll: Their nats a token.
        tokens: Their assistant tokens.
        solved: Whether each task was solved, in the order of the tasks.
    """

    conversations: list[str]
    nll: list[float]
    tokens: list[int]
    solved: list[bool]


def read_tasks(files: tuple[str, ...] = ()) -> tuple[Task, ...]:
    """The tasks of JSONL files (`id`, `kind`, `question`, `options`, `answer`), or the shipped ones.

    Raises:
        DataError: A file cannot be read, or an item has fewer than two different options, or no such answer.
    """
    wanted = '{"id": "t1", "kind": "facts", "question": "…?", "options": ["…", "…"], "answer": 0}'
    return tuple(read_items(files or (str(TASKS_PATH),), "evaluation.capability.task_files", _task, wanted=wanted))


def _task(row: dict[str, Any]) -> Task:
    options = tuple(str(option) for option in row["options"])
    if len(set(options)) < 2 or len(set(options)) != len(options) or not 0 <= row["answer"] < len(options):
        raise ValueError(f"a task needs at least two different options, one of which is the answer (got {options})")
    return Task(str(row["id"]), str(row["kind"]), str(row["question"]), options, int(row["answer"]))


def chosen_tasks(spec: EvaluationSpec) -> list[Task]:
    """The tasks that are used: every k-th, so that a smaller number keeps the mix of kinds."""
    tasks = read_tasks(spec.capability.task_files)
    wanted = min(spec.capability.tasks, len(tasks))
    return [tasks[index * len(tasks) // wanted] for index in range(wanted)]


def task_conversations(tasks: Sequence[Task]) -> list[Conversation]:
    """Every option as the assistant's answer to its question."""
    return [
        Conversation(
            f"{task.id}#{index}",
            [{"role": "user", "content": task.question}, {"role": "assistant", "content": option}],
        )
        for task in tasks
        for index, option in enumerate(task.options)
    ]


def read_likelihoods(found: Likelihoods, heldout: Sequence[Conversation], tasks: Sequence[Task]) -> Capability:
    """Sort the likelihoods of `[*heldout, *task_conversations(tasks)]` into capability.

    Raises:
        DataError: There are not as many as there were conversations.
    """
    expected = len(heldout) + sum(len(task.options) for task in tasks)
    if len(found.sums) != expected or len(found.tokens) != expected:
        raise DataError("one likelihood a conversation is needed", key="likelihoods", value=(len(found.sums), expected))
    kept = [index for index in range(len(heldout)) if found.tokens[index] > 0]
    solved = []
    for task, scores in _option_scores(found, len(heldout), tasks):
        best = min(scores)
        # A tie with a wrong option is not solved.
        solved.append(scores[task.answer] == best and scores.count(best) == 1)
    return Capability(
        conversations=[heldout[i].id for i in kept],
        nll=[found.sums[i] / found.tokens[i] for i in kept],
        tokens=[found.tokens[i] for i in kept],
        solved=solved,
    )


def _option_scores(found: Likelihoods, start: int, tasks: Sequence[Task]) -> Iterator[tuple[Task, list[float]]]:
    """Every task with the nats a token of its options."""
    for task in tasks:
        block = range(start, start + len(task.options))
        start += len(task.options)
        yield task, [found.sums[i] / found.tokens[i] if found.tokens[i] else float("inf") for i in block]


def likelihood_rows(
    role: str, found: Likelihoods, heldout: Sequence[Conversation], tasks: Sequence[Task]
) -> list[LikelihoodRow]:
    """One row a conversation and one an option, for `likelihoods.parquet`."""
    rows = [
        LikelihoodRow(role, "heldout", c.id, c.id, nats, tokens)
        for c, nats, tokens in zip(heldout, found.sums, found.tokens, strict=False)
    ]
    place = len(heldout)
    for task, scores in _option_scores(found, place, tasks):
        for index, option in enumerate(task.options):
            rows.append(
                LikelihoodRow(
                    role,
                    "task",
                    task.id,
                    task.id,
                    found.sums[place],
                    found.tokens[place],
                    option,
                    right=index == task.answer,
                    chosen=index == scores.index(min(scores)),
                )
            )
            place += 1
    return rows


def figures(found: Capability, spec: EvaluationSpec, seed: int) -> dict[str, Figure]:
    """One model's figures."""
    figures = {}
    if found.nll:
        interval = bootstrap_mean(
            found.nll,
            found.conversations,
            weights=found.tokens,
            confidence=spec.confidence,
            resamples=spec.resamples,
            seed=seed,
        )
        figures["nll"] = Figure.of(METRICS["nll"], interval)
    if found.solved:
        interval = proportion(sum(found.solved), len(found.solved), spec.confidence, spec.interval)
        figures["task_accuracy"] = Figure.of(METRICS["task_accuracy"], interval)
    return figures


def differences(candidate: Capability, other: Capability, spec: EvaluationSpec, seed: int) -> dict[str, Figure]:
    """Candidate minus other. Likelihoods are compared only if both models cut the text into the same tokens."""
    figures = {}
    same_tokens = (candidate.conversations, candidate.tokens) == (other.conversations, other.tokens)
    if candidate.nll and same_tokens:
        interval = bootstrap_mean(
            [mine - theirs for mine, theirs in zip(candidate.nll, other.nll, strict=True)],
            candidate.conversations,
            weights=candidate.tokens,
            confidence=spec.confidence,
            resamples=spec.resamples,
            seed=seed,
        )
        figures["nll"] = Figure.of(DIFFERENCES["nll"], interval)
    if candidate.solved and len(candidate.solved) == len(other.solved):
        pairs = list(zip(candidate.solved, other.solved, strict=True))
        gained, lost = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
        interval = paired_proportions(gained, lost, len(pairs), spec.confidence)
        figures["task_accuracy"] = Figure.of(DIFFERENCES["task_accuracy"], interval)
    return figures
