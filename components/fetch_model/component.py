"""Fetch model: bring a model that exists, and what belongs to it."""

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Model, Output
from tunegate.components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def fetch_model(
    spec: Input[Artifact],
    dataset: Input[Dataset],
    candidate: Output[Model],
    sft_model: Output[Model],
    reward: Output[Model],
    judge: Output[Model],
    model: str,
    reward_source: str = "",
    judge_source: str = "",
) -> str:
    """Bring the model to evaluate, the SFT model it came from, and the reward models that compare answers.

    Args:
        spec: The resolved run spec.
        dataset: The data, for the tokenizer of a model made on the spot.
        candidate: The model to evaluate.
        sft_model: The SFT model it came from, or the mark that there is none.
        reward: The reward model that PPO trained on, or the mark that there is none.
        judge: The reward model that PPO never saw, or the mark that there is none.
        model: A folder, s3:// prefix, known name or Hub id, the id of a run, NAME@VERSION or NAME@ALIAS of the
            registry, or an alias of the spec's registered model.
        reward_source: A folder, s3:// prefix or the id of a run; empty takes that of the run that made the model, none
            does without.
        judge_source: Likewise.

    Returns:
        What was fetched, in words.
    """
    from pathlib import Path

    from tunegate.stages import fetch as stage

    return stage.run(
        spec=Path(spec.path),
        dataset=Path(dataset.path),
        model=model,
        reward=reward_source,
        judge=judge_source,
        candidate=Path(candidate.path),
        sft_model=Path(sft_model.path),
        reward_model=Path(reward.path),
        judge_model=Path(judge.path),
    )
