"""Guard: the gate between SFT and the reward model."""

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Metrics, Model, Output
from tunegate.components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def guard(
    spec: Input[Artifact],
    dataset: Input[Dataset],
    base_model: Input[Model],
    sft_model: Input[Model],
    evaluation: Output[Artifact],
    metrics: Output[Metrics],
) -> str:
    """Ask the base and the SFT model a few prompts, and stop when SFT made the model significantly less safe.

    Args:
        spec: The resolved run spec.
        dataset: The clean data, for the evaluation prompts.
        base_model: The model before SFT.
        sft_model: The model after SFT.
        evaluation: Figures with intervals, and every answer with its label.
        metrics: The figures as Kubeflow metrics.

    Returns:
        "yes" when the run may go on with this SFT model, else "no".
    """
    from pathlib import Path

    from tunegate.stages import guard as stage

    return stage.run(
        spec=Path(spec.path),
        dataset=Path(dataset.path),
        base_model=Path(base_model.path),
        sft_model=Path(sft_model.path),
        evaluation=Path(evaluation.path),
        metrics=metrics,
    )
