"""What a version's page in MLflow shows: the verdict, where to read on, every gate's figure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tunegate.registry import names
from tunegate.registry.evidence import DecisionFacts, GateFacts

_CHARS = 4900  # MLflow's column takes 5,000
_REPORT_FILES = {"report.html": "report of the run", "balance.svg": "balance over versions"}


def describe(
    facts: DecisionFacts, model_card: str, *, experiment_id: str, model_id: str, report_run_id: str | None
) -> str:
    """The description of a version.

    Args:
        facts: The decision.
        model_card: The whole card, in Markdown; as much of it follows as fits.
        experiment_id: MLflow's experiment of the run.
        model_id: MLflow's logged model that holds card and evidence.
        report_run_id: The MLflow run that gets the run's report; None leaves its links out.
    """
    model = f"#/experiments/{experiment_id}/models/{model_id}/artifacts"
    links = {"model card": f"{model}/{names.MODEL_CARD}"}
    links["evidence"] = f"{model}/{names.EVIDENCE_FOLDER}/{names.DECISION_FILE}"
    if report_run_id:
        run = f"#/experiments/{experiment_id}/runs/{report_run_id}/artifacts"
        links = {title: f"{run}/{file}" for file, title in _REPORT_FILES.items()} | links
    parts = [
        f"**Gates: {facts.verdict}**",
        "\n".join(f"- {reason}" for reason in facts.reasons[:8]),
        "Read on: " + ", ".join(f"[{title}]({link})" for title, link in links.items()),
        _table(facts.gates),
    ]
    text = "\n\n".join(part for part in parts if part)
    return _fitted(text, _body(model_card))


def _table(gates: Sequence[GateFacts]) -> str:
    """One row a gate that has a figure; the verdicts of the others are tags of the version."""
    rows = []
    for gate in gates:
        if gate.estimate is None:
            continue
        estimate, low, high, limit = (_figure(v, gate) for v in (gate.estimate, gate.low, gate.high, gate.limit))
        n = "" if gate.n is None else gate.n
        rows.append(
            f"| {_words(gate.title or gate.name)} | {estimate} | {low} to {high} | {limit} | {n} | {gate.verdict} |"
        )
    head = ["| Gate | Estimate | Interval | Limit | n | |", "|---|---:|---:|---:|---:|---|"]
    return "\n".join([*head, *rows]) if rows else ""


def _figure(value: float | None, gate: GateFacts) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:.1f}%" if gate.unit == "share" else f"{value:.3g}"


def _words(text: str) -> str:
    return " ".join(text.replace("|", "/").split())


def _body(model_card: str) -> str:
    """The card without its header for the Hub."""
    card = model_card.split("\n---\n", 1)[-1] if model_card.startswith("---\n") else model_card
    return card.strip()


def _fitted(text: str, card: str) -> str:
    """The text and as many whole lines of the card as fit."""
    whole = f"{text}\n\n{card}\n"
    if len(whole) <= _CHARS:
        return whole
    note = f"\n\n… (the whole card: artifact {names.MODEL_CARD})"
    cut = whole[: _CHARS - len(note)]
    return cut.rsplit("\n", 1)[0].rstrip() + note
