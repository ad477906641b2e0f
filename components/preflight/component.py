"""Preflight: resolve and check the run spec, open the run."""

from kfp import dsl
from kfp.dsl import Artifact, Output
from tunegate.components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def preflight(
    spec: Output[Artifact],
    run_id: str = "",
    job_id: str = "",
    storage_root: str = "",
    pipeline_root: str = "",
    profile: str = "",
    spec_uri: str = "",
    overrides: dict = {},  # noqa: B006  (KFP reads the default, nothing mutates it)
    run_name: str = "",
    seed: int = 0,
    model_source: str = "",
    data_sft: str = "",
    data_preferences: str = "",
    data_evaluation: str = "",
    sft_epochs: int = 0,
    sft_learning_rate: float = 0.0,
    reward_epochs: int = 0,
    reward_learning_rate: float = 0.0,
    ppo_steps: int = 0,
    ppo_learning_rate: float = 0.0,
    ppo_kl_coefficient: float = 0.0,
    evaluation_prompts_per_tag: int = 0,
    registry_model_name: str = "",
    registry_promote: bool = False,
    tracking_uri: str = "",
    tracking_experiment: str = "",
    pipeline: str = "instruction-tuning",
) -> str:
    """Resolve the run spec, check all that can be checked before money is spent, and open the run.

    Empty strings and zeros leave the spec as it is.

    Args:
        spec: The resolved spec, read by every later stage.
        run_id: Id of the run; empty takes Kubeflow's id of the pipeline run.
        job_id: Kubeflow's id of the pipeline run.
        storage_root: Folder or s3:// prefix for records and artifacts; empty takes TUNEGATE_S3_ROOT of the pods.
        pipeline_root: Kubeflow's pipeline root.
        profile: Profile to start from: smoke or demo.
        spec_uri: Path or s3:// URI of a run spec.
        overrides: A partial spec that wins over everything else.
        run_name: Name of the run.
        seed: The one seed that all others are derived from.
        model_source: The base model.
        data_sft: Sources of supervised conversations, separated by commas.
        data_preferences: Sources of preference pairs, separated by commas.
        data_evaluation: Sources of evaluation prompts, separated by commas.
        sft_epochs: Passes over the supervised set.
        sft_learning_rate: Peak learning rate of SFT.
        reward_epochs: Passes over the preferences.
        reward_learning_rate: Peak learning rate of the reward model.
        ppo_steps: Number of PPO updates.
        ppo_learning_rate: Peak learning rate of PPO.
        ppo_kl_coefficient: Coefficient of the KL penalty.
        evaluation_prompts_per_tag: Evaluation prompts a tag.
        registry_model_name: Name of the registered model.
        registry_promote: Whether to move the champion alias when the verdict is PROMOTE.
        tracking_uri: MLflow tracking URI.
        tracking_experiment: MLflow experiment.
        pipeline: The pipeline that this task begins; decides what the spec must hold.

    Returns:
        The run's id.
    """
    arguments = dict(locals())

    from pathlib import Path

    from tunegate.stages import preflight as stage

    return stage.run(
        spec=Path(spec.path),
        parameters={name: arguments[name] for name in stage.PARAMETERS},
        overrides=overrides,
        profile=profile,
        spec_uri=spec_uri,
        run_id=run_id,
        job_id=job_id,
        storage_root=storage_root,
        pipeline_root=pipeline_root,
        pipeline=pipeline,
    )
