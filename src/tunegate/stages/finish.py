"""Finish: the exit handler. Closes the run whatever happened and writes the final report; safe to run twice."""

from __future__ import annotations

import json
from pathlib import Path

from tunegate.stages.nodes import delete_train_jobs
from tunegate.stages.observe import StageObserver
from tunegate.stages.preflight import effective_root, effective_run_id
from tunegate.storage.runs import RunRecord, RunStore, StageRecord, now

REPORT_FILE = "report.html"
#: Stages with a gate, the last one first: the run's verdict is that of the last gate it came to.
_GATE_STAGES = ("decide", "reward", "guard", "validate")
#: What Kubeflow says of a pipeline that went well: SUCCEEDED since 2.18, and before COMPLETE, from ML Metadata. There
#: it often says RUNNING of one that is over, namely where conditions are nested or a pod died; then the records decide.
_DONE_STATES = frozenset({"", "SUCCEEDED", "COMPLETE", "CACHED"})
_STOPPED_STATES = frozenset({"CANCELED", "CANCELING"})


def run(*, run_id: str, job_id: str, storage_root: str, pipeline_root: str, state: str, report: Path) -> str:
    """Close the run and write its report.

    Args:
        run_id: Id of the run, or empty for Kubeflow's.
        job_id: Kubeflow's id of the pipeline run.
        storage_root: As in preflight.
        pipeline_root: Kubeflow's pipeline root.
        state: Kubeflow's state of the pipeline's body, e.g. `SUCCEEDED`; see `_DONE_STATES`.
        report: Where to write the HTML report.

    Returns:
        The run's verdict, or its status when it has none.
    """
    store = RunStore(effective_root(storage_root, pipeline_root), effective_run_id(run_id, job_id))
    return close_run(store, state=state, report=report)


def close_run(store: RunStore, *, state: str, report: Path | None = None) -> str:
    """Settle the run's status and verdict from its stages' records, then write the report everywhere it belongs."""
    from tunegate.report.html import render_report

    observer = StageObserver("finish")
    observer.event("started")
    delete_train_jobs(store.run_id, observer.note)
    record = store.read_run()
    if record is None:
        record = RunRecord(
            run_id=store.run_id, name=store.run_id, pipeline="instruction-tuning", status="failed", started=now()
        )
    killed = _close_killed(store)
    stages = [s for s in store.stages() if s.stage != "finish"]
    record = record.model_copy(update={**_settle(record.pipeline, stages, state), "ended": now()})
    store.write_run(record)
    _write_cost(store, record, stages)
    html = render_report(store)
    store.write_file(REPORT_FILE, html.encode())
    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(html)
    _close_tracking(store, record, killed)
    outcome = record.verdict or record.status
    observer.event("done", summary=outcome)
    return outcome


def _close_killed(store: RunStore) -> list[StageRecord]:
    """Write down that stages ended whose process was killed: stopped, out of memory, evicted. They could not say so."""
    killed = [s for s in store.stages() if s.status == "running" and s.stage != "finish"]
    for stage in killed:
        error = f"{stage.stage} ended without a record: it was killed or ran out of memory"
        store.write_stage(stage.model_copy(update={"status": "interrupted", "ended": now(), "error": error}))
    return killed


def _settle(pipeline: str, stages: list[StageRecord], state: str) -> dict[str, str | None]:
    for stage in stages:
        if stage.status in {"failed", "interrupted"}:
            return {"status": stage.status, "failed_stage": stage.stage, "error": stage.error, "verdict": None}
    if state not in _DONE_STATES and not _at_its_end(pipeline, stages):
        stopped = state in _STOPPED_STATES
        reason = "it was stopped" if stopped else "a task failed before its stage began: see its pod's events and log"
        return {
            "status": "interrupted" if stopped else "failed",
            "failed_stage": None,
            "error": f"the pipeline ended before its last stage (Kubeflow's state: {state}): {reason}",
            "verdict": None,
        }
    verdicts = {s.stage: s.verdict for s in stages if s.verdict}
    verdict = next((verdicts[name] for name in _GATE_STAGES if name in verdicts), None)
    return {"status": "done", "verdict": verdict, "failed_stage": None, "error": None}


def _at_its_end(pipeline: str, stages: list[StageRecord]) -> bool:
    """Whether the pipeline's last stage is done, or one after which none follows."""
    done = {s.stage: s for s in stages if s.status == "done"}
    if "promote" in done:
        return True
    if "decide" in done:
        follows = done["decide"].values.get("follows")
        return pipeline == "evaluation" or follows == "stop" or ("register" in done and follows != "promote")
    for name in ("reward", "guard"):
        if name in done:
            return done[name].values.get("proceed") == "no"
    return "validate" in done and done["validate"].verdict != "PROMOTE"


def _write_cost(store: RunStore, record: RunRecord, stages: list[StageRecord]) -> None:
    cost = record.spec.get("cost", {})
    price = float(cost.get("hourly_price", 0.0))
    per_stage = {s.stage: (s.seconds or 0.0) / 3600 * price for s in stages}
    content = {
        "schema_version": 1,
        "currency": cost.get("currency", "USD"),
        "hourly_price": price,
        "per_stage": per_stage,
        "total": sum(per_stage.values()),
    }
    store.write_file("cost.json", json.dumps(content, indent=2).encode())


def _close_tracking(store: RunStore, record: RunRecord, killed: list[StageRecord]) -> None:
    if record.mlflow_run_id is None or not record.spec:
        return
    from tunegate.config import TuneSpec
    from tunegate.stages.context import open_tracker

    spec = TuneSpec.model_validate(record.spec)
    tracker = open_tracker(spec, record.run_id, live=True)
    for stage in killed:
        if stage.mlflow_run_id:
            tracker.end_run(stage.mlflow_run_id, "KILLED")
    report = store.read_file(REPORT_FILE)
    if report is not None:
        tracker.log_text(record.mlflow_run_id, report.decode(), REPORT_FILE)
    tracker.set_tags(record.mlflow_run_id, {"tunegate.verdict": record.verdict or "", "tunegate.status": record.status})
    status = {"done": "FINISHED", "interrupted": "KILLED"}.get(record.status, "FAILED")
    tracker.end_run(record.mlflow_run_id, status)  # type: ignore[arg-type]
    tracker.flush()
    resolved = tracker.resolve(record.mlflow_run_id)
    if resolved is not None and resolved != record.mlflow_run_id:
        store.update_run(mlflow_run_id=resolved)
