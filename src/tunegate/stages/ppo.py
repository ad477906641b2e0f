"""PPO: stage 3 of instruction tuning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tunegate.data import read_records
from tunegate.stages.context import Outcome, Output, StageContext, absent, run_stage
from tunegate.stages.metrics import MetricsArtifact, publish
from tunegate.stages.nodes import run_work
from tunegate.stages.training import train

_SECTIONS = ("ppo", "model")


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
    """Optimise the policy against the reward model.

    Args:
        spec: The spec artifact.
        dataset: The clean dataset, for its prompts.
        sft_model: The initial policy and the reference.
        reward: The reward model.
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
    from tunegate.training.ppo import train_ppo

    dataset, sft_model, reward, judge = inputs["dataset"], inputs["sft_model"], inputs["reward"], inputs["judge"]
    model = outputs["model"]
    prompts, heldout = read_records(dataset, "prompts", "train"), read_records(dataset, "prompts", "heldout")
    context.log_dataset("prompts", len(prompts), "training", "dataset")
    result = train(
        context,
        train_ppo,
        sft_model,
        reward,
        prompts,
        heldout,
        model,
        spec=context.spec.ppo,
        seed=context.seed,
        judge=None if absent(judge) else judge,
    )
    gain, before, after = result.reward_gain, result.before, result.after
    stopped = f"; stopped by {result.stopped}" if result.stopped else ""
    figures = {
        "heldout/reward_before": before.reward,
        "heldout/reward_after": after.reward,
        "heldout/reward_gain": gain.mean,
        "heldout/reward_gain_low": gain.low,
        "heldout/reward_gain_high": gain.high,
        "heldout/kl": after.kl_k3,
        "heldout/length_before": before.length,
        "heldout/length_after": after.length,
        "train/updates": result.updates,
        "train/seconds": result.seconds,
    }
    if result.judge_gain is not None:
        figures["heldout/judge_gain"] = result.judge_gain.mean
    return Outcome(
        summary=(
            f"held-out reward {before.reward:+.2f} -> {after.reward:+.2f} (gain {gain.mean:+.2f} "
            f"[{gain.low:+.2f}, {gain.high:+.2f}]) at KL {after.kl_k3:.1f} nats{stopped}"
        ),
        figures=figures,
        files={"ppo.json": result.model_dump_json(indent=2).encode()},
    )
