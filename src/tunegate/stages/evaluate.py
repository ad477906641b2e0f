"""Evaluate: candidate, SFT model, base model and champion on the same prompts with the same decoding."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tunegate.config import TuneSpec
from tunegate.data import read_records
from tunegate.evaluation.results import COMPARISONS_NAME, LIKELIHOODS_NAME, ROWS_NAME
from tunegate.stages.context import Outcome, Output, StageContext, absent, run_stage
from tunegate.stages.fetch import NONE, bring
from tunegate.stages.metrics import MetricsArtifact, publish
from tunegate.storage.manifest import digest_files, list_files
from tunegate.storage.runs import now


def run(
    *,
    spec: Path,
    dataset: Path,
    base_model: Path,
    sft_model: Path,
    candidate: Path,
    reward: Path,
    judge: Path,
    evaluation: Path,
    metrics: MetricsArtifact | None = None,
    against: str = "",
) -> None:
    """Measure the candidate beside the others.

    Args:
        spec: The spec artifact.
        dataset: The clean dataset, for evaluation prompts and held-out conversations.
        base_model: The anchor.
        sft_model: The model before PPO, or the mark of its absence.
        candidate: The model that asks for promotion.
        reward: The reward model that PPO optimised, or the mark of its absence.
        judge: The independent reward model, or the mark of its absence.
        evaluation: Where the evaluation goes.
        metrics: Kubeflow's metrics artifact.
        against: The model to compare with in place of the registered champion, see `fetch.bring`; `none` compares with
            the base model alone.
    """

    def body(context: StageContext) -> Outcome:
        from tunegate.evaluation.suite import evaluate

        prompts = read_records(dataset, "evaluation")
        heldout = read_records(dataset, "sft", "heldout")
        context.log_dataset("evaluation", len(prompts), "evaluation", "dataset")
        with tempfile.TemporaryDirectory(prefix="tunegate-") as folder:
            models = {"candidate": candidate, "anchor": base_model}
            if not absent(sft_model):
                models["sft"] = sft_model
            champion = _champion(context, against, Path(folder) / "champion")
            if champion is not None and digest_files(list_files(champion)) == context.digests["candidate"]:
                context.observer.note("the model is the champion itself: it is compared with the base model alone")
            elif champion is not None:
                models["champion"] = champion
            result = evaluate(
                models,
                reward=None if absent(reward) else reward,
                judge=None if absent(judge) else judge,
                prompts=prompts,
                heldout=heldout,
                out=evaluation,
                spec=context.spec.evaluation,
                seed=context.seed,
                observer=context.observer,
                precision=context.spec.model.precision,
                cache=answers_cache(context.spec),
            )
        for name in (ROWS_NAME, LIKELIHOODS_NAME, COMPARISONS_NAME):
            if (evaluation / name).exists():
                context.tracker.log_artifact(context.mlflow_run_id, evaluation / name, "evaluation")
        shown = result.models["candidate"].metrics
        win_rate = result.differences["anchor"].get("win_rate")
        parts = [f"win rate over base {win_rate.estimate:.0%}"] if win_rate else []
        for name, label in (("unsafe_rate", "unsafe"), ("lookalike_failure_rate", "over-refusal")):
            if name in shown:
                parts.append(f"{label} {shown[name].estimate:.0%}")
        figures = {
            f"{role}/{name}": figure.estimate
            for role, model in result.models.items()
            for name, figure in model.metrics.items()
        }
        for role, differences in result.differences.items():
            figures.update({f"vs_{role}/{name}": figure.estimate for name, figure in differences.items()})
        return Outcome(
            summary=", ".join(parts),
            figures=figures,
            files={"evaluation.json": result.model_dump_json(indent=2).encode()},
        )

    record = run_stage(
        "evaluate",
        spec,
        inputs={
            "dataset": dataset,
            "base_model": base_model,
            "sft_model": sft_model,
            "candidate": candidate,
            "reward": reward,
            "judge": judge,
        },
        outputs={"evaluation": Output(evaluation, "evaluation")},
        sections=("evaluation", "model"),
        body=body,
        arguments=_against_key(spec, against),
    )
    publish(record, metrics)


def answers_cache(spec: TuneSpec) -> str:
    """Where answers survive a run, so that an unchanged champion or base model is not asked twice: beside the runs."""
    return f"{spec.storage.root.rstrip('/')}/evaluation-cache"


def _champion(context: StageContext, against: str, out: Path) -> Path | None:
    """The model to compare with besides the base model."""
    from tunegate.registry.registry import champion_model

    if against == NONE:
        return None
    if not against:
        return champion_model(context.tracking_uri, context.spec.registry.model_name, out)
    found = bring(against, out, context)
    context.observer.note(f"compared with {found.title}")
    return out


def _against_key(spec_path: Path, against: str) -> dict[str, str]:
    """What the model is compared with: an evaluation against another one must not be taken over."""
    from tunegate.errors import RegistryError
    from tunegate.registry.registry import status
    from tunegate.stages.context import ResolvedSpec
    from tunegate.tracking.uri import resolve_tracking_uri

    if against:
        # The name of a registry or a folder may stand for another model tomorrow: such an evaluation is done anew.
        return {} if against == NONE else {"against": against, "at": now()}
    spec = ResolvedSpec.read(spec_path).spec
    try:
        found = status(resolve_tracking_uri(spec.tracking, spec.storage.root), spec.registry.model_name)
    except RegistryError:
        return {}
    champion = next((v for v in found.versions if "champion" in v.aliases), None)
    return {"champion": champion.model_digest} if champion else {}
