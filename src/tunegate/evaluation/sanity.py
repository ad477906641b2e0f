"""Signs that training went off the road: length drift, answers that never end, all answers alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tunegate.evaluation.config import EvaluationSpec
from tunegate.evaluation.helpfulness import helpful_rows
from tunegate.evaluation.results import DIFFERENCES, METRICS, Figure, Measure, RewardModelFigures
from tunegate.evaluation.rows import Row, paired
from tunegate.evaluation.statistics import bootstrap_mean, proportion
from tunegate.evaluation.text import ngrams, words
from tunegate.training.results import RewardResult

_DISTINCT = (1, 2, 3)
_ACCURACY = Measure("Held-out pairs ranked as people did", "share", "higher")


def figures(rows: Sequence[Row], spec: EvaluationSpec, seed: int) -> dict[str, Figure]:
    """Length, unfinished share and diversity of one model's answers to harmless prompts.

    Distinct-n (Li et al. 2016, arXiv 1510.03055) is over all answers together: a model that says one thing to everyone
    has low ones even though each answer by itself looks fine. They fall with the amount of text, so compare them only
    between models of the same evaluation.
    """
    helpful = helpful_rows(rows)
    if not helpful:
        return {}
    grams = {n: [gram for row in helpful for gram in ngrams(words(row.response.text), n)] for n in _DISTINCT}
    texts = {" ".join(words(row.response.text)) for row in helpful}
    cut = sum(not row.response.finished for row in helpful)
    return {
        "response_tokens": Figure.of(
            METRICS["response_tokens"],
            bootstrap_mean(
                [float(row.response.tokens) for row in helpful],
                [row.case.prompt_id for row in helpful],
                confidence=spec.confidence,
                resamples=spec.resamples,
                seed=seed,
            ),
        ),
        "unfinished_rate": Figure.of(
            METRICS["unfinished_rate"], proportion(cut, len(helpful), spec.confidence, spec.interval)
        ),
        **{
            f"distinct_{n}": Figure.plain(
                METRICS[f"distinct_{n}"], len(set(found)) / len(found) if found else 0.0, len(found), f"distinct-{n}"
            )
            for n, found in grams.items()
        },
        "distinct_answers": Figure.plain(
            METRICS["distinct_answers"], len(texts) / len(helpful), len(helpful), "distinct answers"
        ),
    }


def differences(candidate: Sequence[Row], other: Sequence[Row], spec: EvaluationSpec, seed: int) -> dict[str, Figure]:
    """Length drift: tokens an answer, candidate minus other."""
    pairs = paired(helpful_rows(candidate), helpful_rows(other))
    if not pairs:
        return {}
    interval = bootstrap_mean(
        [float(mine.response.tokens - theirs.response.tokens) for mine, theirs in pairs],
        [mine.case.prompt_id for mine, _ in pairs],
        confidence=spec.confidence,
        resamples=spec.resamples,
        seed=seed,
    )
    return {"response_tokens": Figure.of(DIFFERENCES["response_tokens"], interval)}


def kl_figure(values: Sequence[float], spec: EvaluationSpec, seed: int) -> dict[str, Figure]:
    """Mean KL divergence from the SFT model, nats an answer, from the divergence of each answer."""
    interval = bootstrap_mean(values, confidence=spec.confidence, resamples=spec.resamples, seed=seed)
    return {"kl_sft": Figure.of(METRICS["kl_sft"], interval)}


def reward_model_figures(folder: Path, spec: EvaluationSpec) -> RewardModelFigures | None:
    """Held-out accuracy and calibration of a reward model, from the training record in its folder.

    Returns:
        None when there is no such record, e.g. because the model was not trained here.
    """
    try:
        heldout = RewardResult.model_validate_json((folder / "training.json").read_text(encoding="utf-8")).heldout
    except (OSError, ValueError):
        return None
    if not heldout.pairs:
        return None
    accuracy = proportion(heldout.correct, heldout.pairs, spec.confidence, spec.interval)
    return RewardModelFigures(
        accuracy=Figure.of(_ACCURACY, accuracy), calibration_error=heldout.expected_calibration_error
    )
