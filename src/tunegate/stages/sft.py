"""SFT: stage 1 of instruction tuning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tunegate.data import read_records
from tunegate.stages.context import Outcome, Output, StageContext, run_stage
from tunegate.stages.metrics import MetricsArtifact, publish
from tunegate.stages.nodes import run_work
from tunegate.stages.training import train

_SECTIONS = ("sft", "model")


def run(*, spec: Path, dataset: Path, base_model: Path, model: Path, metrics: MetricsArtifact | None = None) -> None:
    """Fine-tune the base model on the training split.

    Args:
        spec: The spec artifact.
        dataset: The clean dataset.
        base_model: The base model.
        model: Where the tuned model goes.
        metrics: Kubeflow's metrics artifact.
    """
    inputs = {"dataset": dataset, "base_model": base_model}
    outputs = {"model": Output(model, "model")}
    record = run_stage(
        "sft",
        spec,
        inputs=inputs,
        outputs=outputs,
        sections=_SECTIONS,
        body=lambda context: run_work(context, work, inputs=inputs, outputs=outputs, sections=_SECTIONS),
    )
    publish(record, metrics)


def work(context: StageContext, inputs: Mapping[str, Path], outputs: Mapping[str, Path]) -> Outcome:
    """The stage's work, on every rank of it: fine-tune."""
    from tunegate.training.sft import train_sft

    dataset, base_model = inputs["dataset"], inputs["base_model"]
    model = outputs["model"]
    rows, heldout = read_records(dataset, "sft", "train"), read_records(dataset, "sft", "heldout")
    context.log_dataset("sft", len(rows), "training", "dataset")
    result = train(context, train_sft, base_model, rows, heldout, model, spec=context.spec.sft, seed=context.seed)
    figures: dict[str, float] = {
        "train/steps": result.steps,
        "train/tokens": result.tokens,
        "train/tokens_per_second": result.tokens_per_second,
    }
    summary = f"{result.steps} steps over {len(rows)} conversations"
    if result.heldout_before is not None and result.heldout_after is not None:
        before, after = result.heldout_before.mean, result.heldout_after.mean
        figures |= {"heldout/nll_before": before, "heldout/nll_after": after}
        summary = f"held-out loss {before:.3f} -> {after:.3f} nats a token; {summary}"
    return Outcome(
        summary=summary,
        figures=figures,
        files={"sft.json": result.model_dump_json(indent=2).encode()},
    )
