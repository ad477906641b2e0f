"""The `evaluation` pipeline: measure a model that exists and apply the gates, without training anything."""

from kfp import dsl
from tunegate.components.decide import decide
from tunegate.components.evaluate import evaluate
from tunegate.components.fetch_model import fetch_model
from tunegate.components.finish import finish
from tunegate.components.ingest import ingest
from tunegate.components.preflight import preflight


@dsl.pipeline(
    name="evaluation",
    display_name="Evaluation",
    description="A model or registered version against base and champion: measured, then judged by the gates.",
)
def evaluation(
    model: str = "champion",
    against: str = "",
    reward: str = "",
    judge: str = "",
    run_name: str = "",
    profile: str = "",
    spec_uri: str = "",
    overrides: dict = {},  # noqa: B006  (KFP reads the default, nothing mutates it)
    seed: int = 0,
    model_source: str = "",
    data_sft: str = "",
    data_evaluation: str = "",
    evaluation_prompts_per_tag: int = 0,
    registry_model_name: str = "",
    tracking_uri: str = "",
    tracking_experiment: str = "",
    storage_root: str = "",
    run_id: str = "",
) -> None:
    """Evaluate any model or registered version and say what the gates make of it; nothing is registered or promoted.

    Empty strings and zeros mean "as the spec says"; `spec_uri` and `overrides` reach every other setting.

    Args:
        model: What to evaluate: a folder, s3:// prefix, known name or Hub id, the id of a run, NAME@VERSION or
            NAME@ALIAS of the registry, or an alias of the spec's registered model.
        against: The model to compare with in place of the registered champion, named likewise; none compares with the
            base model alone.
        reward: The reward model that PPO trained on: a folder, s3:// prefix or the id of a run; empty takes that of the
            run that made the model, none does without.
        judge: The reward model that PPO never saw, which compares the answers; likewise.
        run_name: Name of the run, shown in MLflow and in the report.
        profile: Profile to start from: smoke (tiny random model) or demo (SmolLM2-135M on the starter data).
        spec_uri: Path or s3:// URI of a run spec; its sections data, evaluation and gates count.
        overrides: A partial spec that wins over everything else.
        seed: The one seed that all others are derived from.
        model_source: The base model that the model is compared with.
        data_sft: Sources of conversations, for the held-out likelihood, separated by commas.
        data_evaluation: Sources of evaluation prompts, separated by commas.
        evaluation_prompts_per_tag: Evaluation prompts a tag.
        registry_model_name: Name of the registered model.
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

    with dsl.ExitHandler(closing, name="measure-and-decide"):
        start = preflight(
            pipeline="evaluation",
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
            data_evaluation=data_evaluation,
            evaluation_prompts_per_tag=evaluation_prompts_per_tag,
            registry_model_name=registry_model_name,
            tracking_uri=tracking_uri,
            tracking_experiment=tracking_experiment,
        ).set_display_name("Preflight")
        # Preflight opens the run of this very execution, so a cached one would point at another run's records.
        start.set_caching_options(enable_caching=False)
        spec = start.outputs["spec"]

        raw = ingest(spec=spec).set_display_name("Ingest data and base model")
        fetched = fetch_model(
            spec=spec, dataset=raw.outputs["dataset"], model=model, reward_source=reward, judge_source=judge
        ).set_display_name("Fetch the model")
        # A name of a registry stands for another version tomorrow, and so does its champion.
        fetched.set_caching_options(enable_caching=False)
        candidate = fetched.outputs["candidate"]
        measured = evaluate(
            spec=spec,
            dataset=raw.outputs["dataset"],
            base_model=raw.outputs["base_model"],
            sft_model=fetched.outputs["sft_model"],
            candidate=candidate,
            reward=fetched.outputs["reward"],
            judge=fetched.outputs["judge"],
            against=against,
        ).set_display_name("Evaluate")
        measured.set_caching_options(enable_caching=False)
        decide(spec=spec, evaluation=measured.outputs["evaluation"], candidate=candidate).set_display_name("Decide")
