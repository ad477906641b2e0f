"""What every stage does around its work: load the spec, keep its record, log, reuse, seal its outputs."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunegate.config import TuneSpec
from tunegate.errors import StorageError, StorageUnavailableError, TrainingStoppedError, TunegateError
from tunegate.stages.observe import StageObserver
from tunegate.storage.manifest import code_digest, digest_json, verify, write_manifest
from tunegate.storage.runs import OutputRef, RunStore, StageRecord, list_runs, now
from tunegate.storage.stores import link_tree, open_store
from tunegate.training.mirror import Mirror
from tunegate.training.onednn import limit_product_cache

if TYPE_CHECKING:
    from tunegate.tracking.tracker import Tracker

SPEC_FILE = "spec.json"
_TRAINING = frozenset({"sft", "reward", "ppo"})
"""The stages that write checkpoints."""

limit_product_cache()


@dataclass(frozen=True)
class ResolvedSpec:
    """The content of the spec artifact that preflight hands to every stage."""

    spec: TuneSpec
    run_id: str

    @classmethod
    def read(cls, path: Path) -> ResolvedSpec:
        """Read the spec artifact (a folder with `spec.json`)."""
        content = json.loads((path / SPEC_FILE).read_text())
        return cls(spec=TuneSpec.model_validate(content["spec"]), run_id=content["run_id"])

    def write(self, path: Path) -> None:
        """Write the spec artifact."""
        path.mkdir(parents=True, exist_ok=True)
        content = {"run_id": self.run_id, "spec": self.spec.model_dump(mode="json")}
        (path / SPEC_FILE).write_text(json.dumps(content, indent=2) + "\n")


@dataclass
class Outcome:
    """What the body of a stage hands back."""

    summary: str = ""
    """The key figures in one line."""
    figures: dict[str, float] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)
    verdict: str | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    """Small files for the report, by name."""


@dataclass(frozen=True)
class StageContext:
    """What the body of a stage works with."""

    stage: str
    spec: TuneSpec
    run: RunStore
    observer: StageObserver
    tracker: Tracker
    mlflow_run_id: str
    seed: int
    digests: dict[str, str]
    """Digest of every input artifact, by role."""

    @property
    def checkpoints(self) -> Path:
        """A folder for this stage's training checkpoints that outlives the process."""
        return scratch(self.spec, self.run.run_id) / "checkpoints" / self.stage

    @property
    def mirror(self) -> Mirror | None:
        """Where copies of the checkpoints go, so that another node can resume: the storage root, if it is on S3."""
        storage = self.spec.storage
        if not (storage.mirror_checkpoints and storage.root.startswith("s3://")):
            return None
        return Mirror(open_store(storage.root), f"runs/{self.run.run_id}/checkpoints/{self.stage}")

    @property
    def tracking_uri(self) -> str:
        """The MLflow store that the run logs to."""
        from tunegate.tracking.uri import resolve_tracking_uri

        return resolve_tracking_uri(self.spec.tracking, self.spec.storage.root)

    def lineage(self) -> dict[str, str]:
        """Digest of every artifact that the run has made so far, by `stage.output`."""
        return {
            f"{record.stage}.{role}": ref.digest for record in self.run.stages() for role, ref in record.outputs.items()
        }

    def log_dataset(self, name: str, rows: int, context: str, role: str) -> None:
        """Log an input artifact as an MLflow dataset of this stage's run."""
        self.tracker.log_dataset(
            self.mlflow_run_id, name=name, digest=self.digests[role], source=self.run.uri, rows=rows, context=context
        )


@dataclass(frozen=True)
class Output:
    """An artifact that a stage makes: where to put it and what kind it is."""

    path: Path
    kind: str


ABSENT_FILE = "absent.json"


def mark_absent(folder: Path, reason: str) -> None:
    """Stand for an optional artifact that was not asked for: KFP has no optional outputs."""
    (folder / ABSENT_FILE).write_text(json.dumps({"reason": reason}) + "\n")


def absent(folder: Path) -> bool:
    """Whether an artifact only stands for one that was not asked for."""
    return (folder / ABSENT_FILE).exists()


def scratch(spec: TuneSpec, run_id: str) -> Path:
    """A folder on this machine for what a run leaves between processes: the storage root, or scratch space with S3."""
    root = spec.storage.root
    base = Path(os.environ.get("TUNEGATE_SCRATCH", "/tmp")) / "tunegate" if root.startswith("s3://") else Path(root)
    return base / "runs" / run_id


def open_tracker(spec: TuneSpec, run_id: str, *, live: bool | None = None) -> Tracker:
    """The tracker of a run; what MLflow cannot take at once is buffered beside the run's records.

    Args:
        spec: The run's spec.
        run_id: Id of the run.
        live: Whether to talk to MLflow now; unset means as the spec says.
    """
    from tunegate.tracking.tracker import Tracker
    from tunegate.tracking.uri import local_artifact_location, resolve_tracking_uri

    uri = resolve_tracking_uri(spec.tracking, spec.storage.root)
    return Tracker.open(
        uri,
        spec.tracking.experiment,
        artifact_location=local_artifact_location(uri),
        buffer=scratch(spec, run_id) / "tracking-buffer",
        system_metrics=spec.tracking.system_metrics,
        live=spec.tracking.live if live is None else live,
    )


def run_stage(
    stage: str,
    spec_path: Path,
    *,
    inputs: Mapping[str, Path],
    outputs: Mapping[str, Output],
    sections: Sequence[str],
    body: Callable[[StageContext], Outcome],
    cacheable: bool = True,
    arguments: Mapping[str, str] | None = None,
    live: bool | None = None,
) -> StageRecord:
    """Run one stage: reuse a finished equal one, or do the work, and leave a record either way.

    Args:
        stage: Name of the stage; also the name of its nested MLflow run.
        spec_path: The spec artifact.
        inputs: Input artifacts by role; each is verified against its manifest.
        outputs: Output artifacts by role; the body fills the folders, this function seals them.
        sections: The spec sections that shape the outcome (for the reuse key).
        body: The work.
        cacheable: False for stages that act on the outside (registration).
        arguments: Further short values that shape the outcome (for the reuse key).
        live: Whether the stage must talk to MLflow itself; unset means as the spec says.

    Returns:
        The record of the stage as written to the run's store.

    Raises:
        TunegateError: As raised by the body, after the failure was recorded.
        SystemExit: With status 75, when training stopped on request with a checkpoint written: the record says
            `interrupted`, and the stage, started again by a retry of its pod or by `tunegate resume`, goes on from it.
    """
    resolved = ResolvedSpec.read(spec_path)
    spec, run = resolved.spec, RunStore(resolved.spec.storage.root, resolved.run_id)
    digests = {role: verify(path).digest for role, path in inputs.items()}
    key = digest_json([stage, code_digest(), spec.digest(sections), spec.stage_seed(stage), digests, arguments or {}])
    if (done := _find_finished(run, spec, stage, key, cacheable)) is not None:
        record = _take_over(run, done, outputs)
        if record is not None:
            return record

    tracker = open_tracker(spec, resolved.run_id, live=live)
    run_record = run.read_run()
    parent = run_record.mlflow_run_id if run_record else None
    mlflow_run_id = tracker.start_run(
        stage, parent=parent, tags={"tunegate.stage": stage, "tunegate.key": key, **spec.tracking.tags}
    )
    tracker.log_params(mlflow_run_id, _flatten({name: spec.model_dump(mode="json")[name] for name in sections}))
    observer = StageObserver(stage, tracker=tracker, mlflow_run_id=mlflow_run_id)
    record = StageRecord(stage=stage, status="running", key=key, started=now(), mlflow_run_id=mlflow_run_id)
    run.write_stage(record)
    observer.event("started")
    started = time.monotonic()
    context = StageContext(stage, spec, run, observer, tracker, mlflow_run_id, spec.stage_seed(stage), digests)
    for output in outputs.values():
        # A half-written output of an earlier, killed attempt must not mix with this one.
        shutil.rmtree(output.path, ignore_errors=True)
        output.path.mkdir(parents=True)
    try:
        outcome = body(context)
        refs = {role: seal(output, digests, spec, sections, run, stage) for role, output in outputs.items()}
    except BaseException as error:
        _record_failure(run, record, observer, tracker, error, time.monotonic() - started)
        if isinstance(error, TrainingStoppedError):
            raise SystemExit(error.exit_code) from error
        raise
    for name, data in outcome.files.items():
        run.write_file(name, data)
    run.write_metrics(stage, observer.rows)
    # The finished artifact replaces the checkpoints, which are several times its size.
    shutil.rmtree(context.checkpoints, ignore_errors=True)
    if stage in _TRAINING and (mirror := context.mirror) is not None:
        mirror.clear()
    record = record.model_copy(
        update={
            "status": "done",
            "ended": now(),
            "seconds": round(time.monotonic() - started, 3),
            "verdict": outcome.verdict,
            "summary": outcome.summary,
            "figures": {k: float(v) for k, v in outcome.figures.items()},
            "values": outcome.values,
            "outputs": refs,
            "peak_memory_bytes": _peak_memory_bytes(),
        }
    )
    tracker.log_metrics(mlflow_run_id, record.figures, step=0)
    tracker.set_tags(mlflow_run_id, {"tunegate.summary": outcome.summary, "tunegate.verdict": outcome.verdict or ""})
    tracker.end_run(mlflow_run_id, "FINISHED")
    tracker.flush()
    run.write_stage(record)
    observer.event("done", summary=outcome.summary, verdict=outcome.verdict)
    return record


def _find_finished(
    run: RunStore, spec: TuneSpec, stage: str, key: str, cacheable: bool
) -> tuple[StageRecord, RunStore] | None:
    reuse = spec.storage.reuse
    if reuse == "never":
        return None
    own = run.read_stage(stage)
    if own is not None and own.status == "done" and own.key == key:
        return own, run
    if reuse == "any" and cacheable:
        for other in reversed(list(list_runs(spec.storage.root))):
            if other.run_id == run.run_id:
                continue
            store = RunStore(spec.storage.root, other.run_id)
            record = store.read_stage(stage)
            if record is not None and record.status == "done" and record.key == key:
                return record, store
    return None


def _take_over(run: RunStore, found: tuple[StageRecord, RunStore], outputs: Mapping[str, Output]) -> StageRecord | None:
    """Bring a finished stage's outputs here; None when they are gone or damaged, so that the stage runs again.

    Raises:
        StorageUnavailableError: Whether they are there cannot be told now.
    """
    record, source = found
    try:
        for role, output in outputs.items():
            ref = record.outputs[role]
            if output.path.absolute() == Path(ref.uri).absolute():
                pass
            else:
                shutil.rmtree(output.path, ignore_errors=True)
                fetch_artifact(ref, run, output.path)
            if verify(output.path).digest != ref.digest:
                return None
    except StorageUnavailableError:
        raise  # hours of work must not be done again because S3 stuttered
    except (StorageError, KeyError, OSError):
        return None
    if source.run_id != run.run_id:
        run.write_metrics(record.stage, source.read_metrics(record.stage))
        for name in _STAGE_FILES.get(record.stage, ()):
            if (data := source.read_file(name)) is not None:
                run.write_file(name, data)
    record = record.model_copy(update={"reused_from": source.run_id})
    run.write_stage(record)
    StageObserver(record.stage).event("reused", summary=record.summary, verdict=record.verdict)
    return record


#: Files for the report that a stage leaves in the run's store; they travel when another run takes the stage over.
_STAGE_FILES: dict[str, tuple[str, ...]] = {
    "ingest": ("ingest.json",),
    "validate": ("validation.json", "gate-data.json"),
    "sft": ("sft.json",),
    "guard": ("gate-sft.json",),
    "reward": ("reward.json", "gate-reward.json", "judge.json"),
    "ppo": ("ppo.json",),
    "evaluate": ("evaluation.json",),
    "decide": ("decision.json",),
    "register": ("balance.json",),
    "promote": ("balance.json",),
}


def fetch_artifact(ref: OutputRef, run: RunStore, target: Path) -> None:
    """Bring an artifact of a run here, from S3 or from another folder of this machine."""
    if ref.uri.startswith("s3://"):
        run.store.get_tree(ref.uri[len(run.store.uri) + 1 :], target)
    else:
        link_tree(Path(ref.uri), target)


def seal(
    output: Output, digests: Mapping[str, str], spec: TuneSpec, sections: Sequence[str], run: RunStore, stage: str
) -> OutputRef:
    """Write an output's manifest and, with storage on S3, publish it there."""
    manifest = write_manifest(
        output.path,
        kind=output.kind,
        parents=digests,
        spec_digest=spec.digest(sections),
        seeds={"run": spec.seed, stage: spec.stage_seed(stage)},
    )
    uri = str(output.path.absolute())
    if spec.storage.root.startswith("s3://"):
        uri = open_store(spec.storage.root).put_tree(f"artifacts/{manifest.digest}", output.path)
    return OutputRef(uri=uri, digest=manifest.digest, kind=output.kind)


def _record_failure(
    run: RunStore,
    record: StageRecord,
    observer: StageObserver,
    tracker: Tracker,
    error: BaseException,
    seconds: float,
) -> None:
    """Write down a failure wherever that is still possible; the error itself is raised again by the caller."""
    interrupted = isinstance(error, (KeyboardInterrupt, SystemExit, TrainingStoppedError))
    shown = str(error) if isinstance(error, TunegateError) else f"{type(error).__name__}: {error}"
    failed = record.model_copy(
        update={
            "status": "interrupted" if interrupted else "failed",
            "ended": now(),
            "seconds": round(seconds, 3),
            "error": shown,
            "exit_code": error.exit_code if isinstance(error, TunegateError) else 1,
            "peak_memory_bytes": _peak_memory_bytes(),
        }
    )
    steps: list[Callable[[], Any]] = [
        lambda: run.write_metrics(record.stage, observer.rows),
        lambda: run.write_stage(failed),
        lambda: observer.event("failed", summary=shown),
        lambda: tracker.log_text(record.mlflow_run_id or "", traceback.format_exc(), "error.txt"),
        lambda: tracker.end_run(record.mlflow_run_id or "", "KILLED" if interrupted else "FAILED"),
        tracker.flush,
    ]
    for step in steps:
        try:
            step()
        except Exception as second:  # the first error is what the user must see
            print(f"while recording the failure: {second}", file=sys.stderr)


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        flat: dict[str, Any] = {}
        for key, inner in value.items():
            flat.update(_flatten(inner, f"{prefix}.{key}" if prefix else str(key)))
        return flat
    return {prefix: json.dumps(value) if isinstance(value, (list, tuple)) else value}


def _peak_memory_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
