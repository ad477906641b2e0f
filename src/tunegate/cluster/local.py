"""Run a compiled pipeline on this machine, watch it, and tell how it ended."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Protocol

from tunegate import __version__
from tunegate.cluster.exit_codes import VERDICT_EXIT_CODES
from tunegate.config import TuneSpec, dump_spec
from tunegate.errors import SpecError, StorageError, TunegateError
from tunegate.stages.observe import EVENTS_VARIABLE
from tunegate.storage.runs import RunRecord, RunStore, now

Runner = Literal["subprocess", "docker"]
_POLL_SECONDS = 0.1
_GRACE_SECONDS = 20.0
_JOB_FILE = "job.json"
_OWN_PARAMETERS = ("spec_uri", "run_id", "run_name", "storage_root")


class Watcher(Protocol):
    """Whatever shows a run's events while it goes on."""

    def handle(self, event: Mapping[str, Any]) -> None:
        """One event of a stage, see `tunegate.stages.observe`."""

    def tick(self) -> None:
        """Called several times a second."""


@dataclass(frozen=True)
class LocalRun:
    """How a local run ended."""

    record: RunRecord
    store: RunStore
    exit_code: int
    log: Path


def run_folder(spec: TuneSpec, run_id: str) -> Path:
    """The folder of a run on this machine: events, log, KFP's working files (records are there or on S3)."""
    root = spec.storage.root
    return Path(".tunegate" if root.startswith("s3://") else root).absolute() / "runs" / run_id


def start(
    spec: TuneSpec,
    run_id: str,
    *,
    watcher: Watcher,
    runner: Runner = "subprocess",
    image: str | None = None,
    resume: bool = False,
    pipeline: str = "instruction-tuning",
    parameters: Mapping[str, str] | None = None,
) -> LocalRun:
    """Run the pipeline to its end.

    Args:
        spec: The resolved spec.
        run_id: Id of the run.
        watcher: Shows the events.
        runner: `subprocess` (this environment) or `docker` (the project image).
        image: Image for the Docker runner in place of the one in the compiled pipeline.
        resume: Whether the run exists and is to go on where it was; it keeps its pipeline and parameters.
        pipeline: Which pipeline.
        parameters: Its parameters besides spec, run and storage root.

    Returns:
        The outcome; `exit_code` is the documented one.

    Raises:
        SpecError: The run exists already, or does not exist on resume.
        StorageError: The folder cannot be written.
        KeyboardInterrupt: Interrupted; the run can be resumed.
    """
    folder = run_folder(spec, run_id)
    store = RunStore(spec.storage.root, run_id)
    known = store.read_run()
    if known is not None and not resume:
        raise SpecError("a run with this id exists already", key="--run-id", value=run_id, fix="tunegate resume RUN")
    if known is not None:
        pipeline, parameters = known.pipeline, _given_parameters(folder)
    job = _prepare(spec, run_id, folder, runner, image, pipeline, parameters or {})
    if known is None:
        store.write_run(
            RunRecord(
                run_id=run_id,
                name=spec.name,
                pipeline=pipeline,
                status="running",
                started=now(),
                spec=spec.model_dump(mode="json"),
                code_version=__version__,
            )
        )
    else:
        store.update_run(status="running", ended=None, error=None, failed_stage=None, verdict=None)
    events = folder / "events.jsonl"
    log = folder / "pipeline.log"
    with _only_one(folder, run_id):
        events.write_bytes(b"")
        _follow(job, events, log, watcher, store, runner)
    record = store.read_run()
    if record is None or record.status == "running":
        record = _close_abandoned(store)
    return LocalRun(record=record, store=store, exit_code=exit_code(store, record), log=log)


def exit_code(store: RunStore, record: RunRecord) -> int:
    """The documented exit code of a finished run."""
    if record.status == "done":
        return VERDICT_EXIT_CODES.get(record.verdict or "", 1)
    if record.failed_stage and (stage := store.read_stage(record.failed_stage)) and stage.exit_code:
        return stage.exit_code
    return 1


def _given_parameters(folder: Path) -> dict[str, str]:
    """The parameters that an existing run was started with."""
    try:
        given = json.loads((folder / _JOB_FILE).read_text())["arguments"]
    except (OSError, ValueError, KeyError):
        return {}
    return {name: value for name, value in given.items() if name not in _OWN_PARAMETERS}


def _prepare(
    spec: TuneSpec,
    run_id: str,
    folder: Path,
    runner: Runner,
    image: str | None,
    pipeline_name: str,
    parameters: Mapping[str, str],
) -> Path:
    """Write what the worker needs into the run's folder; refuse a folder that cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        spec_file = folder / "spec.yaml"
        spec_file.write_text(dump_spec(spec))
        pipeline = folder / "pipeline.yaml"
        text = (resources.files(f"tunegate.pipelines.{pipeline_name.replace('-', '_')}") / "pipeline.yaml").read_text()
        if image:
            from tunegate.components.image import DEFAULT_IMAGE

            text = text.replace(DEFAULT_IMAGE, image)
        pipeline.write_text(text)
        job = folder / _JOB_FILE
        job.write_text(
            json.dumps(
                {
                    "pipeline": str(pipeline),
                    "pipeline_root": str(folder / "artifacts"),
                    "storage_root": spec.storage.root,
                    "runner": runner,
                    "environment": _container_environment(folder) if runner == "docker" else {},
                    "passed_on": _passed_on(spec),
                    "mounts": _mounts(spec, parameters) if runner == "docker" else {},
                    "arguments": {
                        "spec_uri": str(spec_file),
                        "run_id": run_id,
                        "run_name": spec.name,
                        "storage_root": spec.storage.root,
                        **parameters,
                    },
                },
                indent=2,
            )
        )
    except OSError as error:
        raise StorageError(
            f"the run's folder cannot be written: {error.strerror or error}",
            key="storage.root",
            value=spec.storage.root,
            fix="free some space, or choose another folder with --set storage.root=FOLDER",
        ) from error
    return job


def _container_environment(folder: Path) -> dict[str, str]:
    """What is written down of a container's environment; the worker adds credentials from its own."""
    return {EVENTS_VARIABLE: str(folder / "events.jsonl"), "HOME": "/tmp"}


def _passed_on(spec: TuneSpec) -> list[str]:
    """Names of variables whose values the worker passes on to containers besides those of AWS and MLflow."""
    endpoint = spec.evaluation.judge.endpoint
    return [] if endpoint is None else [endpoint.key_variable]


def _mounts(spec: TuneSpec, parameters: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Read-only mounts for data files and model folders that the container must see under the same path."""
    paths = {spec.model.source} if spec.model.source.startswith("/") else set()
    for kind in ("sft", "preferences", "ratings", "prompts", "evaluation"):
        for source in getattr(spec.data, kind):
            if source.uri.startswith("/"):
                paths.add(str(Path(source.uri).parent))
    bias, capability = spec.evaluation.bias, spec.evaluation.capability
    for uri in (*bias.questions, *bias.template_files, *capability.task_files):
        if uri.startswith("/"):
            paths.add(str(Path(uri).parent))
    paths |= {value for value in parameters.values() if value.startswith("/")}
    return {path: {"bind": path, "mode": "ro"} for path in sorted(paths)}


@contextmanager
def _only_one(folder: Path, run_id: str) -> Iterator[None]:
    """Hold the run's lock, so that two processes never work on one run."""
    import fcntl

    with (folder / "lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise TunegateError(
                "another process is working on this run", key=run_id, fix="wait for it, or start a new run"
            ) from None
        yield


def _follow(job: Path, events: Path, log: Path, watcher: Watcher, store: RunStore, runner: Runner) -> None:
    environment = {**os.environ, EVENTS_VARIABLE: str(events), "PYTHONUNBUFFERED": "1"}
    # The tasks call `python3`, which kfp replaces by this interpreter; its tools must be found beside it.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "tunegate.cluster.worker", str(job)],
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=environment,
            cwd=job.parent,
        )
    try:
        with events.open() as reader:
            while True:
                ended = process.poll() is not None
                for line in reader:
                    watcher.handle(json.loads(line))
                watcher.tick()
                if ended:
                    return
                time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
        _stop(process)
        _mark_interrupted(store)
        raise


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt the whole process group, then kill what is left after a grace period."""
    for signum, wait in ((signal.SIGINT, _GRACE_SECONDS), (signal.SIGKILL, _GRACE_SECONDS)):
        try:
            os.killpg(process.pid, signum)
            process.wait(timeout=wait)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _mark_interrupted(store: RunStore) -> None:
    stage_name = None
    for stage in store.stages():
        if stage.status == "running":
            store.write_stage(stage.model_copy(update={"status": "interrupted", "ended": now()}))
        if stage.status in {"running", "interrupted", "failed"}:
            stage_name = stage.stage
    store.update_run(status="interrupted", ended=now(), failed_stage=stage_name, verdict=None)


def _close_abandoned(store: RunStore) -> RunRecord:
    """The pipeline ended before its exit handler could run (killed, or kfp itself failed): close the run here."""
    from tunegate.stages.finish import close_run

    close_run(store, state="FAILED")
    record = store.read_run()
    assert record is not None  # close_run writes it
    return record


def report_path(run: LocalRun) -> Path | None:
    """The report on this machine, if it was written here."""
    path = Path(run.store.uri) / "files" / "report.html"
    return path if path.exists() else None


def remove_run(spec: TuneSpec, run_id: str) -> None:
    """Delete a run's folder on this machine."""
    shutil.rmtree(run_folder(spec, run_id), ignore_errors=True)
