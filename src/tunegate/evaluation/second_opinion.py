"""What the language model judge adds: a second win rate, and a second count of harmful requests not declined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tunegate.evaluation.config import EvaluationSpec
from tunegate.evaluation.helpfulness import Comparison, decided_by_coherence, helpful_rows, win_rate
from tunegate.evaluation.llm_judge import Compared, LanguageModelJudge, Pair
from tunegate.evaluation.results import ANCHOR, CANDIDATE, CHAMPION, DIFFERENCES, METRICS, Figure
from tunegate.evaluation.rows import ComparedRow, Row, of, paired
from tunegate.evaluation.statistics import clustered_proportion, length_controlled_win_rate
from tunegate.observer import Observer

_JUDGED = (CANDIDATE, ANCHOR, CHAMPION)


@dataclass(frozen=True, slots=True)
class SecondOpinion:
    """What was found.

    Attributes:
        metrics: Per model.
        differences: Candidate against the other models.
        rows: Every comparison.
        notes: What a reader must know.
    """

    metrics: dict[str, dict[str, Figure]]
    differences: dict[str, dict[str, Figure]]
    rows: list[ComparedRow]
    notes: list[str]


def ask(
    rows: Mapping[str, Sequence[Row]], judge: LanguageModelJudge, spec: EvaluationSpec, observer: Observer
) -> SecondOpinion:
    """Let the language model compare the candidate with anchor and champion, and read the answers to harmful prompts.

    Rows get their `llm_label`. Replies that cannot be used are left out, and counted in a note.
    """
    assert spec.judge.endpoint is not None  # the caller has a judge
    cap = spec.judge.endpoint.prompts
    metrics: dict[str, dict[str, Figure]] = {}
    differences: dict[str, dict[str, Figure]] = {}
    compared: list[ComparedRow] = []
    asked = missing = 0
    for role in _JUDGED:
        harmful = of(rows.get(role, ()), "harmful")[:cap]
        verdicts = judge.harm([(row.case.asked, row.response.text) for row in harmful], observer)
        for row, verdict in zip(harmful, verdicts, strict=True):
            row.llm_label = verdict
        asked, missing = asked + len(harmful), missing + verdicts.count(None)
        read = [row for row in harmful if row.llm_label is not None]
        if read:
            unsafe = clustered_proportion(
                [float(row.llm_label != "declined") for row in read],
                [row.case.prompt_id for row in read],
                spec.confidence,
                spec.interval,
            )
            metrics[role] = {"llm_unsafe_rate": Figure.of(METRICS["llm_unsafe_rate"], unsafe)}
        if role == CANDIDATE or role not in rows:
            continue
        pairs = paired(helpful_rows(rows[CANDIDATE]), helpful_rows(rows[role]))[:cap]
        found = judge.compare([Pair(m.case.asked, m.response.text, t.response.text) for m, t in pairs], observer)
        asked, missing = asked + len(pairs), missing + sum(one.outcome is None for one in found)
        differences[role] = _win_rates(pairs, found, spec)
        compared += [
            ComparedRow(role, mine.case.prompt_id, one.forward, one.backward, one.outcome)
            for (mine, _), one in zip(pairs, found, strict=True)
        ]
    notes = []
    if missing:
        notes.append(f"the language model judge gave no usable reply on {missing} of {asked} items: they do not count")
    return SecondOpinion(metrics, differences, compared, notes)


def _win_rates(pairs: Sequence[tuple[Row, Row]], found: Sequence[Compared], spec: EvaluationSpec) -> dict[str, Figure]:
    comparison = Comparison([], [], [], [])
    for (mine, theirs), one in zip(pairs, found, strict=True):
        if one.outcome is None:
            continue
        coherence = decided_by_coherence(mine, theirs)
        comparison.outcomes.append(one.outcome if coherence is None else coherence)
        comparison.lengths.append(float(mine.response.tokens - theirs.response.tokens))
        comparison.prompts.append(mine.case.prompt_id)
    if not comparison.outcomes:
        return {}
    raw, p_value = win_rate(comparison, spec.confidence)
    controlled = length_controlled_win_rate(comparison.outcomes, comparison.lengths, spec.confidence)
    return {
        "llm_win_rate": Figure.of(DIFFERENCES["llm_win_rate"], raw, p_value=p_value),
        "llm_win_rate_length_controlled": Figure.of(DIFFERENCES["llm_win_rate_length_controlled"], controlled),
    }
