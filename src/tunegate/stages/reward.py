"""Reward model: stage 2 of instruction tuning, its independent judge, and its gate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tunegate.data import read_records
from tunegate.gates.results import RewardFigures
from tunegate.gates.stage_gates import gate_reward
from tunegate.stages.context import Outcome, Output, StageContext, mark_absent, run_stage
from tunegate.stages.metrics import MetricsArtifact, publish
from tunegate.stages.nodes import run_work
from tunegate.stages.training import train
from tunegate.training.config import MEMBERS

_SECTIONS = ("reward", "gates", "model")


def run(
    *,
    spec: Path,
    dataset: Path,
    sft_model: Path,
    model: Path,
    judge: Path,
    metrics: MetricsArtifact | None = None,
) -> str:
    """Fit the reward model and the judge, and judge the reward model on held-out pairs.

    Args:
        spec: The spec artifact.
        dataset: The clean dataset.
        sft_model: The model that both start from.
        model: Where the reward model goes.
        judge: Where the judge goes.
        metrics: Kubeflow's metrics artifact.

    Returns:
        "yes" when PPO may start: the gate did not say REJECT or INVALID. A HOLD goes on, and stays on the record
        as a gate of the final decision.
    """
    inputs = {"dataset": dataset, "sft_model": sft_model}
    outputs = {"model": Output(model, "reward_model"), "judge": Output(judge, "reward_model")}
    record = run_stage(
        "reward",
        spec,
        inputs=inputs,
        outputs=outputs,
        sections=_SECTIONS,
        body=lambda context: run_work(context, work, inputs=inputs, outputs=outputs, sections=_SECTIONS),
    )
    publish(record, metrics)
    return record.values["proceed"]


def work(context: StageContext, inputs: Mapping[str, Path], outputs: Mapping[str, Path]) -> Outcome:
    """The stage's work, on every rank of it: fit the reward model and the judge."""
    from tunegate.training.reward import train_reward

    dataset, sft_model = inputs["dataset"], inputs["sft_model"]
    model, judge = outputs["model"], outputs["judge"]
    pairs, heldout = read_records(dataset, "preferences", "train"), read_records(dataset, "preferences", "heldout")
    ratings = read_records(dataset, "ratings", "train")
    heldout_ratings = read_records(dataset, "ratings", "heldout")
    context.log_dataset("preferences", len(pairs), "training", "dataset")
    section = context.spec.reward
    result = train(
        context,
        train_reward,
        sft_model,
        pairs,
        ratings,
        heldout,
        heldout_ratings,
        model,
        spec=section,
        seed=context.seed,
    )
    found = result.heldout
    gate = gate_reward(
        context.spec.gates,
        RewardFigures(
            pairs=found.pairs,
            correct=found.correct,
            length_correct=found.length_correct,
            only_model=found.only_model,
            only_length=found.only_length,
        ),
    )
    figures = {
        "heldout/accuracy": found.accuracy.value,
        "heldout/accuracy_low": found.accuracy.low,
        "heldout/accuracy_high": found.accuracy.high,
        "heldout/length_baseline": found.length_baseline.value,
        "heldout/calibration_error": found.expected_calibration_error,
        "heldout/pairs": found.pairs,
        "train/pairs_per_second": result.pairs_per_second,
    }
    files = {
        "reward.json": result.model_dump_json(indent=2).encode(),
        "gate-reward.json": gate.model_dump_json().encode(),
    }
    for number in range(1, section.ensemble):
        context.observer.note(f"training reward model {number + 1} of {section.ensemble}")
        member = train(
            context,
            train_reward,
            sft_model,
            pairs,
            ratings,
            heldout,
            heldout_ratings,
            model / MEMBERS / str(number),
            spec=section.for_member(),
            seed=context.spec.stage_seed(f"reward-{number}"),
            name=f"member-{number}",
            observer=context.observer.quiet(),
        )
        figures[f"members/{number}/heldout_accuracy"] = member.heldout.accuracy.value
    if section.judge.enabled:
        context.observer.note("training the judge, which PPO never sees")
        judged = train(
            context,
            train_reward,
            sft_model,
            pairs,
            ratings,
            heldout,
            [],
            judge,
            spec=section.for_judge(),
            seed=context.spec.stage_seed("judge"),
            name="judge",
            observer=context.observer.quiet(),
        )
        figures["judge/heldout_accuracy"] = judged.heldout.accuracy.value
        files["judge.json"] = judged.model_dump_json(indent=2).encode()
    else:
        mark_absent(judge, "reward.judge.enabled is false")
    proceed = gate.verdict in {"PROMOTE", "HOLD"}
    return Outcome(
        summary=(
            f"held-out accuracy {found.accuracy.value:.1%} [{found.accuracy.low:.1%}, {found.accuracy.high:.1%}] "
            f"on {found.pairs} pairs; longer answer {found.length_baseline.value:.1%}"
        ),
        verdict=gate.verdict,
        figures=figures,
        values={"proceed": "yes" if proceed else "no", "gate": gate.verdict},
        files=files,
    )
