"""Preflight: resolve the spec, check everything that can be checked before money is spent, open the run."""

from __future__ import annotations

import os
import platform
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tunegate import __version__
from tunegate.config import TuneSpec, build_spec, merge, profile_mapping, read_spec_mapping, resolve_paths
from tunegate.errors import SpecError, StorageError, TunegateError
from tunegate.stages.checks import TRAINING_DATA, check_environment, check_services
from tunegate.stages.context import Outcome, ResolvedSpec, open_tracker
from tunegate.stages.observe import StageObserver
from tunegate.stages.plan import make_plan
from tunegate.storage.runs import RunRecord, RunStore, StageRecord, now
from tunegate.storage.stores import open_store

#: Flat pipeline parameters and the spec keys that they set; a parameter left empty (or 0) leaves the spec as it is.
PARAMETERS: dict[str, str] = {
    "run_name": "name",
    "seed": "seed",
    "model_source": "model.source",
    "data_sft": "data.sft",
    "data_preferences": "data.preferences",
    "data_evaluation": "data.evaluation",
    "sft_epochs": "sft.epochs",
    "sft_learning_rate": "sft.learning_rate",
    "reward_epochs": "reward.epochs",
    "reward_learning_rate": "reward.learning_rate",
    "ppo_steps": "ppo.steps",
    "ppo_learning_rate": "ppo.learning_rate",
    "ppo_kl_coefficient": "ppo.kl.coefficient",
    "evaluation_prompts_per_tag": "evaluation.prompts_per_tag",
    "registry_model_name": "registry.model_name",
    "registry_promote": "registry.promote",
    "tracking_uri": "tracking.uri",
    "tracking_experiment": "tracking.experiment",
}

#: Kinds of data that a pipeline cannot do without.
NEEDED_DATA = {"instruction-tuning": TRAINING_DATA, "evaluation": ("evaluation",)}
#: Stages that a pipeline plans, where these are not all.
PLANNED_STAGES = {"evaluation": ("ingest", "evaluate", "decide")}

#: The storage root of a site, from the ConfigMap that chart and manifests make.
ROOT_VARIABLE = "TUNEGATE_S3_ROOT"
_ROOT_FIX = (
    f"set the pipeline's parameter storage_root to s3://bucket/prefix, or {ROOT_VARIABLE} in the pods' environment "
    "(resources.config_maps; the chart's ConfigMap tunegate-config has it)"
)
_ROOT_FIXES = {
    "minio": "s3://{place}, with AWS_ENDPOINT_URL_S3 and keys of that MinIO in the pods' environment: minio:// is "
    "Kubeflow's name for an S3 service of its own",
    "gs": "a bucket of an S3 service. Google Cloud Storage speaks S3 too: s3://{place} with "
    "AWS_ENDPOINT_URL_S3=https://storage.googleapis.com and an HMAC key (not tried)",
}


def effective_run_id(run_id: str, job_id: str) -> str:
    """The id of a run: as given, else the id that Kubeflow gave the pipeline run."""
    return run_id or job_id


def on_cluster(pipeline_root: str) -> bool:
    """Whether a cluster runs this, and not kfp.local, which puts in a folder.

    Kubeflow's backend passes the placeholder `{{$.pipeline_root}}` on as it is: its driver fills in the run's id and
    names, but not this one (kubeflow/pipelines 2.17, `backend/src/v2/driver/resolve.go`). A URI would mean that a later
    release does.
    """
    return "{{" in pipeline_root or "://" in pipeline_root


def effective_root(storage_root: str, pipeline_root: str) -> str:
    """The storage root of a run: as given, else on a cluster TUNEGATE_S3_ROOT, else below Kubeflow's pipeline root.

    Raises:
        SpecError: On a cluster it is no place on S3. A folder would be the pod's own, and gone with the pod.
    """
    if not on_cluster(pipeline_root):
        if not storage_root and not pipeline_root:
            raise SpecError("there is no place for the records", key="storage_root", fix="give a folder or s3://…")
        return storage_root or f"{pipeline_root.rstrip('/')}/tunegate"
    known = "" if "{{" in pipeline_root else f"{pipeline_root.rstrip('/')}/tunegate"
    root = storage_root or os.environ.get(ROOT_VARIABLE, "").strip() or known
    if not root.startswith("s3://"):
        scheme, _, place = root.partition("://")
        fix = _ROOT_FIXES.get(scheme, _ROOT_FIX).format(place=place)
        raise SpecError(
            "a run on a cluster needs a place on S3 for its records", key="storage_root", value=root or None, fix=fix
        )
    return root.rstrip("/")


def new_run_id(name: str) -> str:
    """A readable id that two runs started in the same second do not share."""
    slug = "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")[:40] or "run"
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{slug}-{uuid.uuid4().hex[:4]}"


def spec_from_parameters(parameters: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The spec layer that flat pipeline parameters and the overrides struct stand for."""
    layer: dict[str, Any] = {}
    for name, path in PARAMETERS.items():
        value = parameters.get(name)
        if not value:
            continue
        if path.startswith("data."):
            value = [part.strip() for part in str(value).split(",")]
        nested: Any = value
        for part in reversed(path.split(".")):
            nested = {part: nested}
        layer = merge(layer, nested)
    return merge(layer, overrides)


def read_spec_uri(uri: str) -> dict[str, Any]:
    """Read a spec from a path or from S3.

    Raises:
        SpecError: There is nothing at `uri`.
    """
    if uri.startswith("s3://"):
        base, _, key = uri.rpartition("/")
        data = open_store(base).get(key)
    else:
        path = Path(uri)
        data = path.read_bytes() if path.is_file() else None
    if data is None:
        raise SpecError("there is no spec there", key="spec_uri", value=uri, fix="give a file or an s3:// object")
    return read_spec_mapping(data.decode(), uri)


def run(
    *,
    spec: Path,
    parameters: Mapping[str, Any],
    overrides: Mapping[str, Any],
    profile: str,
    spec_uri: str,
    run_id: str,
    job_id: str,
    storage_root: str,
    pipeline_root: str,
    pipeline: str = "instruction-tuning",
) -> str:
    """Resolve and check the spec, open the run and its MLflow parent run.

    Args:
        spec: Where to write the spec artifact.
        parameters: Flat pipeline parameters, see `PARAMETERS`.
        overrides: A partial spec that wins over everything else.
        profile: Name of a profile to start from, or empty.
        spec_uri: Path or `s3://` URI of a spec, or empty.
        run_id: Id of the run, or empty for Kubeflow's.
        job_id: Kubeflow's id of the pipeline run.
        storage_root: Folder or `s3://` prefix for records and artifacts, or empty, see `effective_root`.
        pipeline_root: Kubeflow's pipeline root.
        pipeline: Name of the pipeline that begins; `evaluation` trains nothing and needs no training data.

    Returns:
        The run's id.

    Raises:
        SpecError: The spec is wrong.
        TunegateError: A check failed; all that failed are named.
    """
    root = effective_root(storage_root, pipeline_root)
    run_store = RunStore(root, effective_run_id(run_id, job_id))
    record = StageRecord(stage="preflight", status="running", started=now())
    observer = StageObserver("preflight")
    opened = run_store.read_run()
    run_record = RunRecord(
        run_id=run_store.run_id,
        name=str(parameters.get("run_name") or pipeline),
        pipeline=pipeline,
        status="running",
        started=opened.started if opened else now(),
        code_version=__version__,
        host=_host(),
        mlflow_run_id=opened.mlflow_run_id if opened else None,
    )
    run_store.write_run(run_record)
    run_store.write_stage(record)
    observer.event("started")
    begun = datetime.now(UTC)
    try:
        resolved = _resolve(parameters, overrides, profile, spec_uri, root)
        if on_cluster(pipeline_root):
            check_services(resolved)
        facts = check_environment(resolved, run_store, needed=NEEDED_DATA[pipeline])
        plan = make_plan(resolved, stages=PLANNED_STAGES.get(pipeline))
        for warning in plan.warnings:
            observer.note(f"no candidate can pass the gates as they are set: {warning}")
        ResolvedSpec(resolved, run_store.run_id).write(spec)
        mlflow_run_id, uri = _open_tracking(resolved, run_store, run_record)
    except BaseException as error:
        shown = str(error) if isinstance(error, TunegateError) else f"{type(error).__name__}: {error}"
        code = error.exit_code if isinstance(error, TunegateError) else 1
        record = record.model_copy(update={"status": "failed", "ended": now(), "error": shown, "exit_code": code})
        run_store.write_stage(record)
        observer.event("failed", summary=shown)
        raise
    run_store.write_run(
        run_record.model_copy(
            update={
                "name": resolved.name,
                "spec": resolved.model_dump(mode="json"),
                "spec_digest": resolved.digest(),
                "mlflow_run_id": mlflow_run_id,
                "tracking_uri": uri,
            }
        )
    )
    outcome = Outcome(summary=facts.summary(), figures=facts.figures())
    run_store.write_file("plan.json", plan.model_dump_json(indent=2).encode())
    record = record.model_copy(
        update={
            "status": "done",
            "ended": now(),
            "seconds": round((datetime.now(UTC) - begun).total_seconds(), 3),
            "summary": outcome.summary,
            "figures": outcome.figures,
        }
    )
    run_store.write_stage(record)
    observer.event("done", summary=outcome.summary)
    return run_store.run_id


def _resolve(
    parameters: Mapping[str, Any], overrides: Mapping[str, Any], profile: str, spec_uri: str, root: str
) -> TuneSpec:
    layers: list[Mapping[str, Any]] = [profile_mapping(profile)] if profile else []
    base_dir = Path.cwd()
    if spec_uri:
        layers.append(read_spec_uri(spec_uri))
        if not spec_uri.startswith("s3://"):
            base_dir = Path(spec_uri).absolute().parent
    layers.append(spec_from_parameters(parameters, overrides))
    layers.append({"storage": {"root": root}})
    return resolve_paths(build_spec(*layers, origin=spec_uri or profile or "pipeline parameters"), base_dir)


def _open_tracking(spec: TuneSpec, run_store: RunStore, record: RunRecord) -> tuple[str, str]:
    """Start (or, on resume, continue) the parent MLflow run; an outage leaves a buffered run, never an error."""
    from tunegate.tracking.uri import resolve_tracking_uri

    tracker = open_tracker(spec, run_store.run_id)
    tags = {
        "tunegate.run_id": run_store.run_id,
        "tunegate.pipeline": record.pipeline,
        "tunegate.spec_digest": spec.digest(),
        "tunegate.code_version": __version__,
        **spec.tracking.tags,
    }
    mlflow_run_id = tracker.start_run(spec.name, tags=tags, run_id=record.mlflow_run_id)
    tracker.log_params(
        mlflow_run_id,
        {"seed": spec.seed, "model.source": spec.model.source, "spec_digest": spec.digest()},
    )
    tracker.log_text(mlflow_run_id, spec.model_dump_json(indent=2), "spec.json")
    tracker.flush()
    return mlflow_run_id, resolve_tracking_uri(spec.tracking, spec.storage.root)


def _host() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cores": str(os.cpu_count() or 0),
        "node": platform.node(),
    }


__all__ = ["PARAMETERS", "StorageError", "new_run_id", "run", "spec_from_parameters"]
