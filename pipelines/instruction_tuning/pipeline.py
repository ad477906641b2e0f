"""The `instruction-tuning` pipeline: from data sources to a registered model that earned it."""

from kfp import dsl
from tunegate.components.decide import decide
from tunegate.components.evaluate import evaluate
from tunegate.components.finish import finish
from tunegate.components.guard import guard
from tunegate.components.ingest import ingest
from tunegate.components.ppo import ppo
from tunegate.components.preflight import preflight
from tunegate.components.promote import promote
from tunegate.components.register import register
from tunegate.components.reward_model import reward_model
from tunegate.components.sft import sft
from tunegate.components.validate_data import validate_data


@dsl.pipeline(
    name="instruction-tuning",
    display_name="Instruction tuning",
    description="SFT, reward model and PPO, evaluated and gated; the model is registered only when it earned it.",
)
def instruction_tuning(
    run_name: str = "",
    profile: str = "",
    spec_uri: str = "",
    overrides: dict = {},  # noqa: B006  (KFP reads the default, nothing mutates it)
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
    storage_root: str = "",
    run_id: str = "",
) -> None:
    """Take a base model through the three stages of instruction tuning and register what has earned it.

    Empty strings and zeros mean "as the spec says"; `spec_uri` and `overrides` reach every other setting.

    Args:
        run_name: Name of the run, shown in MLflow and in the report.
        profile: Profile to start from: smoke (tiny random model) or demo (SmolLM2-135M on the starter data).
        spec_uri: Path or s3:// URI of a run spec.
        overrides: A partial spec that wins over everything else.
        seed: The one seed that all others are derived from.
        model_source: The base model: a known name, a folder, s3:// or a Hub id.
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
        storage_root: Folder or s3:// prefix for records and artifacts; empty takes TUNEGATE_S3_ROOT of the pods.
        run_id: Id of the run; empty takes Kubeflow's id of the pipeline run.
    """
    closing = finish(
        run_id=run_id,
        job_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
        storage_root=storage_root,
        pipeline_root=dsl.PIPELINE_ROOT_PLACEHOLDER,
    ).set_display_name("Finish and report")
    closing.set_caching_options(enable_caching=False)

    with dsl.ExitHandler(closing, name="tune-and-gate"):
        start = preflight(
            run_id=run_id,
            job_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
            storage_root=storage_root,
            pipeline_root=dsl.PIPELINE_ROOT_PLACEHOLDER,
            profile=profile,
            spec_uri=spec_uri,
            overrides=overrides,
            run_name=run_name,
            seed=seed,
            model_source=model_source,
            data_sft=data_sft,
            data_preferences=data_preferences,
            data_evaluation=data_evaluation,
            sft_epochs=sft_epochs,
            sft_learning_rate=sft_learning_rate,
            reward_epochs=reward_epochs,
            reward_learning_rate=reward_learning_rate,
            ppo_steps=ppo_steps,
            ppo_learning_rate=ppo_learning_rate,
            ppo_kl_coefficient=ppo_kl_coefficient,
            evaluation_prompts_per_tag=evaluation_prompts_per_tag,
            registry_model_name=registry_model_name,
            registry_promote=registry_promote,
            tracking_uri=tracking_uri,
            tracking_experiment=tracking_experiment,
        ).set_display_name("Preflight")
        # Preflight opens the run of this very execution, so a cached one would point at another run's records.
        start.set_caching_options(enable_caching=False)
        spec = start.outputs["spec"]

        raw = ingest(spec=spec).set_display_name("Ingest data and base model")
        base_model = raw.outputs["base_model"]
        checked = validate_data(spec=spec, dataset=raw.outputs["dataset"], base_model=base_model)
        checked.set_display_name("Data gate")
        clean = checked.outputs["clean"]

        with dsl.If(checked.outputs["Output"] == "PROMOTE", name="data-gate-passed"):
            tuned = sft(spec=spec, dataset=clean, base_model=base_model).set_display_name("SFT")
            sft_model = tuned.outputs["model"]
            watched = guard(spec=spec, dataset=clean, base_model=base_model, sft_model=sft_model)
            watched.set_display_name("Safety after SFT")

            with dsl.If(watched.outputs["Output"] == "yes", name="guard-passed"):
                scored = reward_model(spec=spec, dataset=clean, sft_model=sft_model)
                scored.set_display_name("Reward model and its gate")

                with dsl.If(scored.outputs["Output"] == "yes", name="reward-gate-passed"):
                    aligned = ppo(
                        spec=spec,
                        dataset=clean,
                        sft_model=sft_model,
                        reward=scored.outputs["model"],
                        judge=scored.outputs["judge"],
                    ).set_display_name("PPO")
                    candidate = aligned.outputs["model"]
                    measured = evaluate(
                        spec=spec,
                        dataset=clean,
                        base_model=base_model,
                        sft_model=sft_model,
                        candidate=candidate,
                        reward=scored.outputs["model"],
                        judge=scored.outputs["judge"],
                    ).set_display_name("Evaluate")
                    evaluation = measured.outputs["evaluation"]
                    decision = decide(spec=spec, evaluation=evaluation, candidate=candidate).set_display_name("Decide")

                    with dsl.If(decision.outputs["Output"] != "stop", name="registration-earned"):
                        registered = register(
                            spec=spec,
                            candidate=candidate,
                            evaluation=evaluation,
                            decision=decision.outputs["decision"],
                        ).set_display_name("Register")
                        registered.set_caching_options(enable_caching=False)

                        with dsl.If(decision.outputs["Output"] == "promote", name="promotion-earned"):
                            promoted = promote(spec=spec, version=registered.outputs["Output"])
                            promoted.set_display_name("Promote").set_caching_options(enable_caching=False)
