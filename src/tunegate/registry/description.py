"""What a version's page in MLflow shows: the verdict, where to read on, every gate's figure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tunegate.registry import names
from tunegate.registry.evidence import DecisionFacts, GateFacts

_CHARS = 4900  # MLflow's column takes 5,000
#: What the stages leave in the run's artifacts, as the page calls it.
_RUN_FILES = {
    "report.html": "report of the run",
    "balance.svg": "balance over versions",
    names.CARD_ARTIFACT: "model card",
}
_SIGNS = {"PROMOTE": "✓", "HOLD": "‖", "REJECT": "✗", "INVALID": "!"}
#: Sections of the card that follow; the others say again what stands above, or are long tables.
_SECTIONS = ("Data", "Limits", "Licence")


def describe(
    facts: DecisionFacts, model_card: str, *, experiment_id: str, model_id: str, report_run_id: str | None
) -> str:
    """The description of a version, in Markdown.

    Args:
        facts: The decision.
        model_card: The whole card, in Markdown; what it says of data, limits and licence follows, as much as fits.
        experiment_id: MLflow's experiment of the run.
        model_id: MLflow's logged model that holds card and evidence.
        report_run_id: The MLflow run that gets the run's report; None leaves its links out.
    """
    links = {}
    if report_run_id:
        run = f"#/experiments/{experiment_id}/runs/{report_run_id}/artifacts"
        links = {title: f"{run}/{file}" for file, title in _RUN_FILES.items()}
    # MLflow has no address for a single file of a logged model.
    links["files and evidence"] = f"#/experiments/{experiment_id}/models/{model_id}/artifacts"
    parts = [
        f"**Gates: {facts.verdict}**",
        "\n".join(f"- {reason}" for reason in facts.reasons[:8]),
        "Read on: " + ", ".join(f"[{title}]({link})" for title, link in links.items()),
        _gates(facts.gates),
        *_sections(model_card),
    ]
    return _fitted("\n\n".join(part for part in parts if part) + "\n")


def _gates(gates: Sequence[GateFacts]) -> str:
    """One line a gate that has a figure; the verdicts of all are tags of the version.

    A list, since MLflow's page draws tables without room between their columns.
    """
    lines = []
    for gate in gates:
        if gate.estimate is None:
            continue
        estimate, low, high, limit = (_figure(v, gate) for v in (gate.estimate, gate.low, gate.high, gate.limit))
        told = f"{estimate} [{low}, {high}], limit {limit}" + ("" if gate.n is None else f", n = {gate.n}")
        lines.append(f"- {_SIGNS.get(gate.verdict, '')} {_words(gate.title or gate.name)}: {told}")
    return "\n".join(lines)


def _figure(value: float | None, gate: GateFacts) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:.1f}%" if gate.unit == "share" else f"{value:.3g}"


def _words(text: str) -> str:
    return " ".join(text.split())


def _sections(model_card: str) -> list[str]:
    """The card's introduction, without its header for the Hub and its title, and the sections that are kept."""
    card = model_card.split("\n---\n", 1)[-1] if model_card.startswith("---\n") else model_card
    first, *sections = card.split("\n## ")
    introduction = "\n".join(line for line in first.splitlines() if not line.startswith("# ")).strip()
    return [introduction, *(_without_tables(f"### {s.strip()}") for s in sections if s.split("\n", 1)[0] in _SECTIONS)]


def _without_tables(text: str) -> str:
    """Each row of a table as a line of a list: `- first cell, heading cell, heading cell`."""
    lines: list[str] = []
    head: list[str] = []
    for line in text.splitlines():
        if not line.startswith("|"):
            head = []
            lines.append(line)
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not head:
            head = cells
        elif not set(line) <= set("|-: "):
            told = [f"{name.lower()} {cell}" for name, cell in zip(head[1:], cells[1:], strict=False) if cell != "–"]
            lines.append("- " + ", ".join([cells[0], *told]))
    return "\n".join(lines)


def _fitted(text: str) -> str:
    """As many whole lines as MLflow takes."""
    if len(text) <= _CHARS:
        return text
    note = f"\n\n… (more in the artifact {names.MODEL_CARD})"
    return text[: _CHARS - len(note)].rsplit("\n", 1)[0].rstrip() + note
