"""Stage 3 of instruction tuning: PPO, or what `last_stage` names in its place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tunegate.data import read_records
from tunegate.stages.context import Outcome, Output, StageContext, absent, run_stage
from tunegate.stages.metrics import MetricsArtifact, publish
from tunegate.stages.nodes import run_work
from tunegate.stages.training import train
from tunegate.training.ppo_results import HeldoutFigures, PairedDifference

_SECTIONS = ("ppo", "dpo", "last_stage", "model")


def run(
    *,
    spec: Path,
    dataset: Path,
    sft_model: Path,
    reward: Path,
    judge: Path,
    model: Path,
    metrics: MetricsArtifact | None = None,
) -> None:
    """Optimise the policy against the reward model, or on the preferences.

    Args:
        spec: The spec artifact.
        dataset: The clean dataset, for its prompts (and preferences, for DPO).
        sft_model: The initial policy and the reference.
        reward: The reward model, or the mark of its absence.
        judge: The reward model that PPO never sees, or the mark of its absence.
        model: Where the candidate goes.
        metrics: Kubeflow's metrics artifact.
    """
    inputs = {"dataset": dataset, "sft_model": sft_model, "reward": reward, "judge": judge}
    outputs = {"model": Output(model, "model")}
    record = run_stage(
        "ppo",
        spec,
        inputs=inputs,
        outputs=outputs,
        sections=_SECTIONS,
        body=lambda context: run_work(context, work, inputs=inputs, outputs=outputs, sections=_SECTIONS),
    )
    publish(record, metrics)


def work(context: StageContext, inputs: Mapping[str, Path], outputs: Mapping[str, Path]) -> Outcome:
    """The stage's work, on every rank of it: optimise the policy."""
    if context.spec.last_stage == "dpo":
        return _dpo(context, inputs, outputs["model"])
    return _rollouts(context, inputs, outputs["model"])


def _rollouts(context: StageContext, inputs: Mapping[str, Path], model: Path) -> Outcome:
    """PPO, GRPO or RLOO."""
    from tunegate.training.ppo import train_ppo

    dataset, reward, judge = inputs["dataset"], inputs["reward"], inputs["judge"]
    prompts, heldout = read_records(dataset, "prompts", "train"), read_records(dataset, "prompts", "heldout")
    context.log_dataset("prompts", len(prompts), "training", "dataset")
    result = train(
        context,
        train_ppo,
        inputs["sft_model"],
        None if absent(reward) else reward,
        prompts,
        heldout,
        model,
        spec=context.spec.rollouts,
        seed=context.seed,
        judge=None if absent(judge) else judge,
    )
    stopped = f"; stopped by {result.stopped}" if result.stopped else ""
    figures = _figures(result.before, result.after, result.reward_gain, result.judge_gain)
    return Outcome(
        summary=_summary(result.before, result.after, result.reward_gain) + stopped,
        figures=figures | {"train/updates": result.updates, "train/seconds": result.seconds},
        files={"ppo.json": result.model_dump_json(indent=2).encode()},
    )


def _dpo(context: StageContext, inputs: Mapping[str, Path], model: Path) -> Outcome:
    """The preferences themselves; reward model and judge only measure."""
    from tunegate.training.dpo import train_dpo

    dataset, reward, judge = inputs["dataset"], inputs["reward"], inputs["judge"]
    pairs, heldout = read_records(dataset, "preferences", "train"), read_records(dataset, "preferences", "heldout")
    context.log_dataset("preferences", len(pairs), "training", "dataset")
    result = train(
        context,
        train_dpo,
        inputs["sft_model"],
        pairs,
        heldout,
        read_records(dataset, "prompts", "heldout"),
        model,
        spec=context.spec.dpo,
        seed=context.seed,
        reward=None if absent(reward) else reward,
        judge=None if absent(judge) else judge,
    )
    figures: dict[str, float] = {"train/steps": result.steps, "train/seconds": result.seconds}
    parts = []
    if result.preferences:
        kept = next(point for point in result.preferences if point.step == result.kept_update)
        figures |= {"heldout/preference_loss": kept.loss, "heldout/preference_accuracy": kept.accuracy.value}
        parts.append(f"DPO: held-out preferences {kept.accuracy.value:.1%} right after {kept.step} steps")
    if result.before is not None and result.after is not None and result.reward_gain is not None:
        figures |= _figures(result.before, result.after, result.reward_gain, result.judge_gain)
        parts.append(_summary(result.before, result.after, result.reward_gain))
    return Outcome(
        summary="; ".join(parts) or f"DPO: {result.steps} steps",
        figures=figures,
        files={"ppo.json": result.model_dump_json(indent=2).encode()},
    )


def _figures(
    before: HeldoutFigures, after: HeldoutFigures, gain: PairedDifference, judge: PairedDifference | None
) -> dict[str, float]:
    figures = {
        "heldout/reward_before": before.reward,
        "heldout/reward_after": after.reward,
        "heldout/reward_gain": gain.mean,
        "heldout/reward_gain_low": gain.low,
        "heldout/reward_gain_high": gain.high,
        "heldout/kl": after.kl_k3,
        "heldout/length_before": before.length,
        "heldout/length_after": after.length,
    }
    return figures if judge is None else figures | {"heldout/judge_gain": judge.mean}


def _summary(before: HeldoutFigures, after: HeldoutFigures, gain: PairedDifference) -> str:
    return (
        f"held-out reward {before.reward:+.2f} -> {after.reward:+.2f} (gain {gain.mean:+.2f} "
        f"[{gain.low:+.2f}, {gain.high:+.2f}]) at KL {after.kl_k3:.1f} nats"
    )
