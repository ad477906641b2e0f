"""Register: the candidate as a version in the MLflow registry, with its evidence."""

from __future__ import annotations

import json
from pathlib import Path

from tunegate.stages.card import card_facts
from tunegate.stages.context import Outcome, StageContext, run_stage
from tunegate.stages.versions import parent_run, record_balance


def run(*, spec: Path, candidate: Path, evaluation: Path, decision: Path) -> str:
    """Register the candidate and give it the alias `candidate`.

    Args:
        spec: The spec artifact.
        candidate: The model.
        evaluation: What was measured.
        decision: The gates' decision.

    Returns:
        The version's number.
    """

    def body(context: StageContext) -> Outcome:
        from tunegate.registry import names
        from tunegate.registry.model_card import model_card
        from tunegate.registry.registry import register

        card = model_card(card_facts(context, json.loads((decision / "decision.json").read_text())))
        if (parent := parent_run(context)) is not None:
            context.tracker.log_text(parent, card, names.CARD_ARTIFACT)
        # The run may have begun during an outage, or unsent: MLflow's own id is what the version links to.
        context.tracker.flush()
        registered = register(
            context.tracking_uri,
            context.spec.registry,
            model=candidate,
            decision=decision / "decision.json",
            evaluation=evaluation,
            run_id=context.run.run_id,
            mlflow_run_id=context.tracker.resolve(context.mlflow_run_id),
            metrics=_figures(context),
            lineage=context.lineage(),
            model_card=card,
            experiment=context.spec.tracking.experiment,
            report_run_id=None if parent is None else context.tracker.resolve(parent),
        )
        return Outcome(
            summary=f"{registered.name} version {registered.version}, alias {registered.alias}",
            values={"name": registered.name, "version": registered.version, "alias": registered.alias},
            files=record_balance(context),
        )

    record = run_stage(
        "register",
        spec,
        inputs={"candidate": candidate, "evaluation": evaluation, "decision": decision},
        outputs={},
        sections=("registry",),
        body=body,
        cacheable=False,
        live=True,
    )
    return record.values["version"]


def _figures(context: StageContext) -> dict[str, float]:
    """The headline figures of the run, shown on the registered model's page."""
    return {
        f"{record.stage}/{name}": value
        for record in context.run.stages()
        if record.stage in {"sft", "reward", "ppo"}
        for name, value in record.figures.items()
        if name.startswith("heldout/")
    }
