"""Register a model as a version with its evidence, and fetch registered models."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from tunegate.errors import GateError, RegistryError
from tunegate.registry import names
from tunegate.registry.config import RegistrySpec
from tunegate.registry.description import describe
from tunegate.registry.evidence import DecisionFacts, digest_bytes, file_of, model_problems, parse_decision
from tunegate.registry.session import Session, Version
from tunegate.storage.manifest import Manifest, digest_files, list_files, verify
from tunegate.tracking.apply import entity_key
from tunegate.tracking.client import ensure_experiment, error_code, patience
from tunegate.tracking.uri import local_artifact_location


class Registered(BaseModel):
    """A version that was registered."""

    model_config = ConfigDict(frozen=True)

    name: str
    version: str
    alias: str
    model_id: str
    """Id of MLflow's logged model that holds the files."""
    verdict: str
    existed: bool = False
    """True when the very same model with the same evidence had been registered before, by the same run."""


def register(
    uri: str,
    spec: RegistrySpec,
    *,
    model: Path,
    decision: Path,
    evaluation: Path | None,
    run_id: str,
    mlflow_run_id: str | None,
    lineage: Mapping[str, str],
    model_card: str,
    params: Mapping[str, str] | None = None,
    metrics: Mapping[str, float] | None = None,
    experiment: str = "tunegate",
    report_run_id: str | None = None,
) -> Registered:
    """Register a model with the evidence for it and give the version the alias `candidate`.

    The files go to MLflow's artifact store as they are (`mlflow.transformers.log_model` would convert them, and fails
    with transformers 5): the root of the artifacts is the Hugging Face folder, so `models:/NAME@champion` downloads a
    folder that transformers, vLLM and KServe load. Beside it lie the model card and, in `tunegate/`, the evidence.
    Doing it again with the same model, evidence and run returns the version that exists.

    Args:
        uri: MLflow tracking URI.
        spec: The `registry` section.
        model: The model artifact, with its manifest.
        decision: `decision.json`, or the folder that holds it.
        evaluation: The evaluation artifact, kept as evidence; None keeps the decision alone.
        run_id: Id of the pipeline run.
        mlflow_run_id: Id of the MLflow run that the model came from, if MLflow knows it.
        lineage: Digests of what the model came from, by role, e.g. `{"dataset": "ab12…"}`; become tags.
        model_card: The model card in Markdown.
        params: Parameters shown on the logged model's page.
        metrics: Figures shown on the logged model's page; MLflow keeps them with the run, so without one they are
            left out.
        experiment: The experiment to use when there is no MLflow run.
        report_run_id: The MLflow run that gets the report of the pipeline run; the version's page links there.

    Raises:
        StorageError: The model's files do not match its manifest.
        GateError: The decision is about another model or another evaluation.
        RegistryError: MLflow cannot be reached or refuses.
    """
    manifest = verify(model)
    decision_data = file_of(decision, names.DECISION_FILE).read_bytes()
    facts = parse_decision(decision_data, str(decision))
    evaluation_digest = None if evaluation is None else _evaluation_digest(evaluation)
    _check_belongs(facts, manifest, evaluation_digest)

    session = Session(uri)
    tags = _tags(spec, manifest, facts, digest_bytes(decision_data), evaluation_digest, run_id, lineage)
    if (existing := _find_equal(session, spec.model_name, tags)) is not None:
        _place_candidate(session, spec.model_name)
        return _registered(existing, existed=True)
    source_run = _known_run(session, mlflow_run_id)
    report_run = _known_run(session, report_run_id)
    with session.talking(f"register {spec.model_name}"):
        experiment_id = (
            source_run[1] if source_run else ensure_experiment(session.client, experiment, local_artifact_location(uri))
        )
        logged = session.client.create_logged_model(
            experiment_id=experiment_id,
            name=_logged_name(spec.model_name),
            source_run_id=source_run[0] if source_run else None,
            tags={k: v for k, v in tags.items() if k != names.TAG_APPROVALS_REQUIRED},
            params=dict(params or {}),
            model_type="text-generation",
        )
        model_id = str(logged.model_id)
        try:
            with tempfile.TemporaryDirectory(prefix="tunegate-") as folder, patience():
                beside = Path(folder)
                _lay_out_evidence(beside, manifest, decision_data, evaluation, model_card, spec.model_name, tags)
                session.client.log_model_artifacts(model_id, str(model))
                session.client.log_model_artifacts(model_id, str(beside))
            session.client.finalize_logged_model(model_id, "READY")
        except BaseException:
            _finalize_failed(session, model_id)
            raise
        _ensure_model(session, spec.model_name)
        tags[names.TAG_MODEL_ID] = model_id
        created = session.client.create_model_version(
            name=spec.model_name,
            source=f"models:/{model_id}",
            run_id=source_run[0] if source_run else None,
            tags=tags,
            description=describe(
                facts,
                model_card,
                experiment_id=experiment_id,
                model_id=model_id,
                report_run_id=None if report_run is None else report_run[0],
            ),
            model_id=model_id,
            await_creation_for=0,  # both kinds of store have made it when they answer
        )
        _link(session, model_id, spec.model_name, int(created.version))
        if source_run is not None:
            _log_on_run(session, source_run[0], model_id, metrics or {})
    version = session.version(spec.model_name, int(created.version))
    _place_candidate(session, spec.model_name)
    return _registered(version, existed=False)


def download_model(uri: str, name: str, which: str, out: Path) -> Version:
    """Fetch a registered model as the plain model artifact that was registered, and check its digest.

    Args:
        uri: MLflow tracking URI.
        name: The registered model.
        which: A version number or an alias.
        out: The folder to write; it must be empty or not exist.

    Raises:
        RegistryError: There is no such model, version or alias, or MLflow cannot be reached.
        GateError: The files are not those that were registered.
    """
    session = Session(uri)
    version = find_version(session, name, which)
    out.mkdir(parents=True, exist_ok=True)
    session.download(version, out)
    problems = model_problems(out, version.tags.get(names.TAG_MODEL_DIGEST, ""))
    if problems:
        raise GateError(
            "the registered model's files are not those that were registered: " + "; ".join(problems),
            key=version.uri,
            fix="restore them in the artifact store, or roll back: tunegate rollback",
        )
    shutil.rmtree(out / names.EVIDENCE_FOLDER, ignore_errors=True)
    if not any(entry.path == names.MODEL_CARD for entry in verify_listing(out)):
        (out / names.MODEL_CARD).unlink(missing_ok=True)
    return version


def champion_model(uri: str, name: str, out: Path) -> Path | None:
    """Fetch the champion, to measure a candidate against it.

    Args:
        uri: MLflow tracking URI.
        name: The registered model.
        out: The folder to write.

    Returns:
        `out`, or None when the model is not registered yet or has no champion.

    Raises:
        RegistryError: MLflow cannot be reached.
        GateError: The champion's files are not those that were registered.
    """
    found = Session(uri).find_model(name)
    if found is None or names.CHAMPION not in found.aliases:
        return None
    download_model(uri, name, names.CHAMPION, out)
    return out


def find_version(session: Session, name: str, which: str | int) -> Version:
    """The version that a number or an alias stands for.

    Raises:
        RegistryError: There is none.
    """
    if str(which).isdigit():
        return session.version(name, int(which))
    model = session.model(name)
    if which not in model.aliases:
        known = ", ".join(sorted(model.aliases)) or "none yet"
        raise RegistryError(
            "the model has no such alias", key=name, value=which, fix=f"give a version number or an alias ({known})"
        )
    return session.version(name, model.aliases[str(which)])


def newest_candidate(versions: list[Version]) -> int | None:
    """The newest version that came with a decision and was not rejected: where the alias `candidate` belongs.

    Args:
        versions: All versions, newest first.
    """
    for version in versions:
        if names.TAG_VERDICT in version.tags and names.TAG_REJECTED not in version.tags:
            return version.number
    return None


def _place_candidate(session: Session, name: str) -> None:
    session.set_alias(name, names.CANDIDATE, newest_candidate(session.versions(name)))


def verify_listing(folder: Path) -> list[Any]:
    """The files that a model's own manifest lists."""
    from tunegate.storage.manifest import read_manifest

    return list(read_manifest(folder).files)


def _evaluation_digest(evaluation: Path) -> str:
    return digest_files(list_files(evaluation))


def _check_belongs(facts: DecisionFacts, manifest: Manifest, evaluation_digest: str | None) -> None:
    if facts.model_digest != manifest.digest:
        raise GateError(
            f"the decision is about the model {facts.model_digest[:12] or '(none named)'}…, "
            f"but the model given is {manifest.digest[:12]}…",
            key="decision.json",
            fix="evaluate and decide about this very model",
        )
    judged = facts.digests.get("evaluation")
    if judged and evaluation_digest and judged != evaluation_digest:
        raise GateError(
            f"the decision rests on the evaluation {judged[:12]}…, but the one given is {evaluation_digest[:12]}…",
            key="decision.json",
            fix="give the evaluation that the decision was made from",
        )


def _tags(
    spec: RegistrySpec,
    manifest: Manifest,
    facts: DecisionFacts,
    decision_digest: str,
    evaluation_digest: str | None,
    run_id: str,
    lineage: Mapping[str, str],
) -> dict[str, str]:
    tags = {
        names.TAG_MODEL_DIGEST: manifest.digest,
        names.TAG_DECISION_DIGEST: decision_digest,
        names.TAG_VERDICT: facts.verdict,
        names.TAG_GATES_VERSION: str(facts.gates_version),
        names.TAG_APPROVALS_REQUIRED: str(spec.approvals),
        names.TAG_RUN_ID: run_id,
        names.TAG_SPEC_DIGEST: manifest.spec_digest,
        names.TAG_CODE_VERSION: manifest.code_version,
        names.TAG_CODE_DIGEST: manifest.code_digest,
    }
    if evaluation_digest is not None:
        tags[names.TAG_EVALUATION_DIGEST] = evaluation_digest
    tags |= {f"{names.TAG_GATE}{gate.name}": gate.verdict for gate in facts.gates}
    tags |= {f"{names.TAG_PARENT}{role}": digest for role, digest in {**manifest.parents, **lineage}.items()}
    return tags


def _find_equal(session: Session, name: str, tags: Mapping[str, str]) -> Version | None:
    """A version that an earlier attempt of the same run registered."""
    if session.find_model(name) is None:
        return None
    same = (names.TAG_MODEL_DIGEST, names.TAG_DECISION_DIGEST, names.TAG_RUN_ID)
    for version in session.versions(name):
        if all(version.tags.get(tag) == tags[tag] for tag in same):
            return version
    return None


def _known_run(session: Session, mlflow_run_id: str | None) -> tuple[str, str] | None:
    """The MLflow run and its experiment; None when it was begun while MLflow was away and is not there yet."""
    if not mlflow_run_id or mlflow_run_id.startswith("local-"):
        return None
    with session.talking(f"find the run {mlflow_run_id}"):
        try:
            run = session.client.get_run(mlflow_run_id)
        except Exception as error:
            if error_code(error) in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"):
                return None
            raise
        return str(run.info.run_id), str(run.info.experiment_id)


def _logged_name(name: str) -> str:
    """A logged model's name may not contain these characters."""
    return "".join("-" if c in "/:.%\"'" else c for c in name)


def _lay_out_evidence(
    folder: Path,
    manifest: Manifest,
    decision: bytes,
    evaluation: Path | None,
    model_card: str,
    name: str,
    tags: Mapping[str, str],
) -> None:
    evidence = folder / names.EVIDENCE_FOLDER
    evidence.mkdir()
    (evidence / names.DECISION_FILE).write_bytes(decision)
    registration = {"schema_version": 1, "name": name, "tags": dict(sorted(tags.items()))}
    (evidence / names.REGISTRATION_FILE).write_text(json.dumps(registration, indent=2) + "\n", encoding="utf-8")
    if evaluation is not None:
        shutil.copytree(evaluation, evidence / names.EVALUATION_FOLDER)
    taken = any(entry.path == names.MODEL_CARD for entry in manifest.files)
    (evidence if taken else folder).joinpath(names.MODEL_CARD).write_text(model_card)


def _finalize_failed(session: Session, model_id: str) -> None:
    try:
        session.client.finalize_logged_model(model_id, "FAILED")
    except Exception:
        # MLflow is probably away; the logged model stays PENDING and no version refers to it.
        return


def _ensure_model(session: Session, name: str) -> None:
    try:
        session.client.create_registered_model(
            name,
            description="Registered by Tunegate. `champion` moves only through `tunegate promote` and `rollback`.",
        )
    except Exception as error:
        if error_code(error) not in ("RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS"):
            raise


def _link(session: Session, model_id: str, name: str, version: int) -> None:
    """The tag by which MLflow's UI leads from the logged model to its version (set by mlflow.register_model too)."""
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

    value = json.dumps([{"name": name, "version": version}])
    session.client.set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: value})


def _log_on_run(session: Session, run_id: str, model_id: str, metrics: Mapping[str, float]) -> None:
    from mlflow.entities import LoggedModelOutput, Metric

    session.client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
    moment = int(time.time() * 1000)
    figures = [
        Metric(entity_key(key), float(value), moment, 0, model_id=model_id, run_id=run_id)
        for key, value in metrics.items()
    ]
    if figures:
        session.client.log_batch(run_id, metrics=figures[:1000], synchronous=True)


def _registered(version: Version, *, existed: bool) -> Registered:
    return Registered(
        name=version.name,
        version=str(version.number),
        alias=names.CANDIDATE,
        model_id=version.tags.get(names.TAG_MODEL_ID, ""),
        verdict=version.tags[names.TAG_VERDICT],
        existed=existed,
    )
