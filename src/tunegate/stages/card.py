"""The facts of a run that its model card tells."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tunegate import __version__
from tunegate.stages.context import StageContext
from tunegate.training.config import BUNDLED_MODEL

_LICENCES = {BUNDLED_MODEL: "apache-2.0"}
_STARTER_LICENCE = "apache-2.0"
#: What of each stage's section a reader of the card wants to know; a dot steps into a nested section.
_SETTINGS: dict[str, tuple[str, ...]] = {
    "sft": ("epochs", "max_steps", "learning_rate", "batch_size", "max_length", "schedule"),
    "reward": ("objective", "epochs", "learning_rate", "batch_pairs", "max_length"),
    "ppo": ("steps", "prompts_per_update", "epochs", "learning_rate", "kl.coefficient", "max_new_tokens"),
    "dpo": ("beta", "epochs", "learning_rate", "batch_pairs", "max_length"),
}
_JUDGES = {
    "independent": "Answers were compared by a reward model that PPO never saw, not by people.",
    "training": "Answers were compared by the reward model that PPO trained on, which flatters the model.",
    "none": "Nobody compared the answers: nothing is known about helpfulness.",
}


def card_facts(context: StageContext, decision: dict[str, Any]) -> dict[str, Any]:
    """What `tunegate.registry.model_card.model_card` takes.

    Args:
        context: The register stage's context.
        decision: The decision as plain data.
    """
    spec, run = context.spec, context.run
    ingest, evaluation = _read(context, "ingest.json"), _read(context, "evaluation.json")
    base_licence = _LICENCES.get(spec.model.source)
    then = " and DPO" if spec.last_stage == "dpo" else f", a reward model and {spec.last_stage.upper()}"
    return {
        "summary": (
            f"An instruction-tuned language model made from `{spec.model.source}` by supervised fine-tuning{then}."
        ),
        "methods": ["sft", spec.last_stage],
        "name": spec.registry.model_name,
        "run_id": run.run_id,
        "created": decision.get("created"),
        "code_version": __version__,
        "base_model": spec.model.source,
        "base_license": base_licence,
        "license": spec.registry.license or base_licence,
        "verdict": decision["verdict"],
        "reasons": decision["reasons"],
        "confidence": spec.evaluation.confidence,
        "data": [
            {
                "name": f"{source['kind']}: {source['name']}",
                "source": source["uri"],
                "records": source["records"]["train"] + source["records"]["heldout"],
                "license": _STARTER_LICENCE if source["uri"].startswith("starter:") else None,
                "notes": f"{source['records']['heldout']} held out",
            }
            for source in ingest.get("sources", [])
        ],
        "training": [
            {
                "stage": section,
                "method": spec.model_dump()[section].get("method") or spec.model_dump()[section].get("trunk"),
                "settings": _settings(spec.model_dump()[section], section),
                "figures": record.figures,
            }
            for record in run.stages()
            # The last stage keeps the name of PPO whatever it is.
            if (section := "dpo" if (record.stage, spec.last_stage) == ("ppo", "dpo") else record.stage) in _SETTINGS
        ],
        "evaluation": [
            {key: gate.get(key) for key in ("estimate", "low", "high", "n", "limit", "unit", "verdict", "reason")}
            | {"name": gate["title"]}
            for gate in decision["gates"]
        ],
        "measures": _measures(evaluation),
        "limits": _limits(evaluation, decision),
        "lineage": context.lineage(),
    }


def _settings(values: Mapping[str, Any], section: str) -> dict[str, Any]:
    found = {}
    for path in _SETTINGS[section]:
        value: Any = values
        for part in path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            found[path] = value
    return found


def _measures(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Everything that was measured on the candidate, gated or not."""
    metrics = evaluation.get("models", {}).get("candidate", {}).get("metrics", {})
    return [
        {"name": figure["title"], **{key: figure.get(key) for key in ("estimate", "low", "high", "n", "unit")}}
        for figure in metrics.values()
    ]


def _limits(evaluation: Mapping[str, Any], decision: Mapping[str, Any]) -> list[str]:
    """What this run cannot say about its model."""
    limits = [_JUDGES[evaluation["judge"]]] if evaluation.get("judge") in _JUDGES else []
    limits.append("Refusals were told from answers by a small classifier, not by people.")
    limits += [f"{note[:1].upper()}{note[1:].rstrip('.')}." for note in evaluation.get("notes", [])]
    limits += [
        f"Not decided: {gate['title']} ({gate['reason'].removeprefix(gate['title'] + ': ')})"
        for gate in decision["gates"]
        if gate["verdict"] == "HOLD"
    ]
    found = {hazard["hazard"]: hazard["n"] for hazard in evaluation.get("hazards", [])}
    if found:
        told = ", ".join(f"{name.replace('_', ' ')} ({n})" for name, n in found.items())
        limits.append(f"Harm was measured on these hazards only (prompts): {told}.")
    return limits


def _read(context: StageContext, name: str) -> dict[str, Any]:
    data = context.run.read_file(name)
    content: dict[str, Any] = json.loads(data) if data is not None else {}
    return content
