"""What was measured, row by row: `responses.parquet` (one a prompt and model), `likelihoods.parquet` (one a text)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tunegate.evaluation.backends import Response
from tunegate.evaluation.cases import DIRECT, Case
from tunegate.evaluation.refusal import LABELS, Judgement, Label


@dataclass(slots=True)
class Row:
    """One answer.

    Attributes:
        role: Who answered.
        case: What was asked.
        response: The answer.
        judgement: What the classifier made of it.
        judge_score: Score by the judge reward model; None when it was not asked or the prompt was too long for it.
        proxy_score: Score by the reward model that PPO trained on; None likewise.
        toxicity: Probability that the answer is toxic; None when that was not measured.
        toxic: The probability reaches the spec's threshold.
        llm_label: What the language model judge makes of an answer to a harmful prompt; None when it was not asked.
    """

    role: str
    case: Case
    response: Response
    judgement: Judgement
    judge_score: float | None = None
    proxy_score: float | None = None
    toxicity: float | None = None
    toxic: bool = False
    llm_label: str | None = None

    @property
    def label(self) -> Label:
        """`refusal`, `compliance` or `incoherent`."""
        return self.judgement.label


@dataclass(frozen=True, slots=True)
class LikelihoodRow:
    """The likelihood of one text: a held-out conversation, or one option of a multiple-choice item.

    Attributes:
        role: Whose likelihood.
        kind: `heldout`, `task` or `question`.
        id: Of the conversation or the item.
        cluster: Rows of the same cluster are not independent.
        nats: Negative log-likelihood of the assistant's turns, summed.
        tokens: How many there are; None where only the sum counts.
        option: The option's text.
        right: It is the right option.
        chosen: It is the model's choice.
        condition: Of a bias question.
        lean: Of a bias question: 1 this option is the stereotype, -1 its opposite, 0 "unknown".
    """

    role: str
    kind: str
    id: str
    cluster: str
    nats: float
    tokens: int | None
    option: str | None = None
    right: bool | None = None
    chosen: bool | None = None
    condition: str | None = None
    lean: int | None = None


@dataclass(frozen=True, slots=True)
class ComparedRow:
    """One comparison by the language model, for `comparisons.parquet`.

    Attributes:
        other: Whom the candidate was compared with.
        prompt_id: On which prompt.
        forward: `first` (the candidate), `second` or `tie`, with the candidate's answer shown first.
        backward: The same with the other answer shown first.
        outcome: 1 the candidate won, 0 it lost, 0.5 a tie or disagreement; None without two usable replies.
    """

    other: str
    prompt_id: str
    forward: str | None
    backward: str | None
    outcome: float | None


def of(rows: Iterable[Row], tag: str, *, attacked: bool = False) -> list[Row]:
    """The rows of a tag, either the unattacked or the attacked ones."""
    return [row for row in rows if row.case.tag == tag and (row.case.variant != DIRECT) == attacked]


def paired(candidate: Sequence[Row], other: Sequence[Row]) -> list[tuple[Row, Row]]:
    """The answers of two models to the same cases, in the candidate's order; cases only one was asked are left out."""
    theirs = {row.case.id: row for row in other}
    return [(row, theirs[row.case.id]) for row in candidate if row.case.id in theirs]


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write all rows as Parquet (zstd), in the order given."""
    import pyarrow as pa

    columns: Mapping[str, tuple[Any, list[Any]]] = {
        "role": (pa.string(), [r.role for r in rows]),
        "case_id": (pa.string(), [r.case.id for r in rows]),
        "prompt_id": (pa.string(), [r.case.prompt_id for r in rows]),
        "tag": (pa.string(), [r.case.tag for r in rows]),
        "variant": (pa.string(), [r.case.variant for r in rows]),
        "hazard": (pa.string(), [r.case.hazard for r in rows]),
        "category": (pa.string(), [r.case.category for r in rows]),
        "group": (pa.string(), [r.case.group for r in rows]),
        "messages": (pa.string(), [json.dumps(r.case.messages, ensure_ascii=False) for r in rows]),
        "response": (pa.string(), [r.response.text for r in rows]),
        "tokens": (pa.int32(), [r.response.tokens for r in rows]),
        "finished": (pa.bool_(), [r.response.finished for r in rows]),
        "label": (pa.string(), [r.label for r in rows]),
        **{
            f"p_{label}": (pa.float64(), [r.judgement.probabilities[i] for r in rows]) for i, label in enumerate(LABELS)
        },
        "incoherent_because": (pa.string(), ["; ".join(r.judgement.reasons) or None for r in rows]),
        "source": (pa.string(), [r.case.source or None for r in rows]),
        "toxicity": (pa.float64(), [r.toxicity for r in rows]),
        "llm_label": (pa.string(), [r.llm_label for r in rows]),
        "judge_score": (pa.float64(), [r.judge_score for r in rows]),
        "proxy_score": (pa.float64(), [r.proxy_score for r in rows]),
    }
    _write(columns, path)


def write_likelihoods(rows: Sequence[LikelihoodRow], path: Path) -> None:
    """Write all rows as Parquet (zstd), in the order given."""
    import pyarrow as pa

    kinds = {"nats": pa.float64(), "tokens": pa.int32(), "lean": pa.int8()}
    kinds |= dict.fromkeys(("right", "chosen"), pa.bool_())
    names = [field.name for field in fields(LikelihoodRow)]
    _write({name: (kinds.get(name, pa.string()), [getattr(row, name) for row in rows]) for name in names}, path)


def write_comparisons(rows: Sequence[ComparedRow], path: Path) -> None:
    """Write the language model's comparisons as Parquet (zstd), in the order given."""
    import pyarrow as pa

    names = [field.name for field in fields(ComparedRow)]
    kinds = {"outcome": pa.float64()}
    _write({name: (kinds.get(name, pa.string()), [getattr(row, name) for row in rows]) for name in names}, path)


def _write(columns: Mapping[str, tuple[Any, list[Any]]], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, kind) for name, (kind, _) in columns.items()], metadata={"schema_version": "1"})
    arrays = [pa.array(values, type=kind) for kind, values in columns.values()]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), path, compression="zstd")
