"""Evaluate: candidate, SFT model, base model and champion on the same prompts."""

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Metrics, Model, Output
from tunegate.components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate(
    spec: Input[Artifact],
    dataset: Input[Dataset],
    base_model: Input[Model],
    sft_model: Input[Model],
    candidate: Input[Model],
    reward: Input[Model],
    judge: Input[Model],
    evaluation: Output[Artifact],
    metrics: Output[Metrics],
    against: str = "",
) -> None:
    """Measure harmlessness, over-refusal, helpfulness, bias and capability, with intervals.

    Args:
        spec: The resolved run spec.
        dataset: The clean data, for evaluation prompts and held-out conversations.
        base_model: The anchor.
        sft_model: The model before PPO, or the mark that there is none.
        candidate: The model that asks for promotion.
        reward: The reward model that PPO optimised, or the mark that there is none.
        judge: The independent reward model, or the mark that there is none.
        evaluation: All figures, and one row a prompt and model.
        metrics: The headline figures.
        against: The model to compare with in place of the registered champion, named as in the evaluation pipeline;
            none compares with the base model alone.
    """
    from pathlib import Path

    from tunegate.stages import evaluate as stage

    stage.run(
        spec=Path(spec.path),
        dataset=Path(dataset.path),
        base_model=Path(base_model.path),
        sft_model=Path(sft_model.path),
        candidate=Path(candidate.path),
        reward=Path(reward.path),
        judge=Path(judge.path),
        evaluation=Path(evaluation.path),
        metrics=metrics,
        against=against,
    )
