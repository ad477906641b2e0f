"""Guard: a cheap look at the SFT model before the reward model and PPO build on it."""

from __future__ import annotations

from pathlib import Path

from tunegate.data import read_records
from tunegate.evaluation.config import AttackSpec, CapabilitySpec, EvaluationSpec, JudgeSpec, Tag
from tunegate.gates.config import SFTGateSpec
from tunegate.stages.context import Outcome, Output, StageContext, mark_absent, run_stage
from tunegate.stages.evaluate import answers_cache
from tunegate.stages.metrics import MetricsArtifact, publish

_TAGS: tuple[Tag, ...] = ("harmful", "everyday")


def run(
    *,
    spec: Path,
    dataset: Path,
    base_model: Path,
    sft_model: Path,
    evaluation: Path,
    metrics: MetricsArtifact | None = None,
) -> str:
    """Ask base and SFT model a few harmful and everyday prompts and apply the gate after SFT.

    Args:
        spec: The spec artifact.
        dataset: The clean dataset, for evaluation prompts.
        base_model: The model before SFT.
        sft_model: The model after SFT.
        evaluation: Where answers and figures go.
        metrics: Kubeflow's metrics artifact.

    Returns:
        "yes" when the run may go on, "no" when an alarm rang or nothing could be seen.
    """

    def body(context: StageContext) -> Outcome:
        from tunegate.evaluation.suite import evaluate
        from tunegate.gates.stage_gates import gate_sft

        section = context.spec.gates.after_sft
        if not section.enabled:
            mark_absent(evaluation, "gates.after_sft.enabled is false")
            return Outcome(summary="switched off: gates.after_sft.enabled is false", values={"proceed": "yes"})
        result = evaluate(
            {"candidate": sft_model, "anchor": base_model},
            reward=None,
            judge=None,
            prompts=[prompt for prompt in read_records(dataset, "evaluation") if prompt.tag in _TAGS],
            heldout=[],
            out=evaluation,
            spec=subset(context.spec.evaluation, section),
            seed=context.spec.stage_seed("evaluate"),
            observer=context.observer,
            precision=context.spec.model.precision,
            cache=answers_cache(context.spec),
        )
        gate = gate_sft(section, result)
        figures = {
            f"{role}/{name}": figure.estimate
            for role, model in (("sft", result.models["candidate"]), ("base", result.models["anchor"]))
            for name, figure in model.metrics.items()
            if name in {"unsafe_rate", "violation_rate", "everyday_failure_rate", "incoherent_rate"}
        }
        return Outcome(
            summary=gate.reason.removeprefix(f"{gate.title}: "),
            verdict=gate.verdict,
            figures=figures,
            values={"proceed": "yes" if gate.passed else "no"},
            files={"gate-sft.json": gate.model_dump_json().encode()},
        )

    record = run_stage(
        "guard",
        spec,
        inputs={"dataset": dataset, "base_model": base_model, "sft_model": sft_model},
        outputs={"evaluation": Output(evaluation, "evaluation")},
        sections=("gates", "evaluation", "model"),
        body=body,
    )
    publish(record, metrics)
    return record.values["proceed"]


def subset(evaluation: EvaluationSpec, section: SFTGateSpec) -> EvaluationSpec:
    """The evaluation without all that the gate after SFT does not read.

    Args:
        evaluation: The `evaluation` section of the run.
        section: How many prompts are asked, and how long answers may be.
    """
    shorter = min(section.max_new_tokens, evaluation.decoding.max_new_tokens)
    return evaluation.model_copy(
        update={
            **{f"{tag}_prompts": min(section.prompts, evaluation.cap(tag)) for tag in _TAGS},
            "decoding": evaluation.decoding.model_copy(update={"max_new_tokens": shorter}),
            "attacks": AttackSpec(names=()),
            "judge": JudgeSpec(),
            "bias": evaluation.bias.model_copy(update={"categories": (), "questions": ()}),
            "capability": CapabilitySpec(enabled=False),
        }
    )
