"""The exit handler: what it makes of every way a run can end, and that it can be run twice."""

import pytest

from tunegate.errors import SpecError
from tunegate.stages import finish, preflight
from tunegate.stages.finish import close_run
from tunegate.stages.preflight import effective_root, effective_run_id, spec_from_parameters
from tunegate.storage.runs import RunRecord, RunStore, StageRecord
from tunegate.tracking.tracker import Tracker


@pytest.fixture
def store(tmp_path):
    run = RunStore(str(tmp_path), "r")
    started = "2026-01-01T00:00:00+00:00"
    run.write_run(RunRecord(run_id="r", name="n", pipeline="p", status="running", started=started))
    return run


def add(store, stage, status="done", verdict=None, error=None, seconds=1.0):
    started = f"2026-01-01T00:00:{len(store.stages()):02d}+00:00"
    store.write_stage(
        StageRecord(stage=stage, status=status, started=started, verdict=verdict, error=error, seconds=seconds)
    )


@pytest.mark.parametrize(
    ("stages", "state", "status", "verdict"),
    [
        ([("decide", "done", "PROMOTE")], "SUCCEEDED", "done", "PROMOTE"),
        ([("validate", "done", "PROMOTE"), ("decide", "done", "HOLD")], "SUCCEEDED", "done", "HOLD"),
        ([("validate", "done", "INVALID")], "SUCCEEDED", "done", "INVALID"),
        ([("validate", "done", "PROMOTE"), ("reward", "done", "REJECT")], "SUCCEEDED", "done", "REJECT"),
        ([("sft", "failed", None)], "FAILED", "failed", None),
        ([("sft", "running", None)], "FAILED", "interrupted", None),
        ([("sft", "interrupted", None)], "FAILED", "interrupted", None),
        ([("ingest", "done", None)], "FAILED", "failed", None),
        ([("decide", "done", "PROMOTE")], "COMPLETE", "done", "PROMOTE"),
    ],
)
def test_status_and_verdict(store, stages, state, status, verdict):
    for name, stage_status, stage_verdict in stages:
        add(store, name, stage_status, stage_verdict)
    close_run(store, state=state)
    record = store.read_run()
    assert (record.status, record.verdict) == (status, verdict)
    assert record.ended
    assert store.read_file("report.html")


@pytest.mark.parametrize(
    ("pipeline", "stages", "done"),
    [
        ("instruction-tuning", {"validate": "REJECT"}, True),
        ("instruction-tuning", {"validate": "PROMOTE"}, False),
        ("instruction-tuning", {"validate": "PROMOTE", "sft": None}, False),
        ("instruction-tuning", {"validate": "PROMOTE", "guard": {"proceed": "no"}}, True),
        ("instruction-tuning", {"validate": "PROMOTE", "guard": {"proceed": "yes"}}, False),
        ("instruction-tuning", {"guard": {"proceed": "yes"}, "reward": {"proceed": "no"}}, True),
        ("instruction-tuning", {"guard": {"proceed": "yes"}, "reward": {"proceed": "yes"}}, False),
        ("instruction-tuning", {"reward": {"proceed": "yes"}, "decide": {"follows": "stop"}}, True),
        ("instruction-tuning", {"decide": {"follows": "register"}}, False),
        ("instruction-tuning", {"decide": {"follows": "register"}, "register": {}}, True),
        ("instruction-tuning", {"decide": {"follows": "promote"}, "register": {}}, False),
        ("instruction-tuning", {"decide": {"follows": "promote"}, "register": {}, "promote": {}}, True),
        ("evaluation", {"evaluate": None}, False),
        ("evaluation", {"evaluate": None, "decide": {"follows": "promote"}}, True),
    ],
)
def test_kubeflow_often_says_that_a_run_is_running_which_is_over(store, pipeline, stages, done):
    store.update_run(pipeline=pipeline)
    for number, (name, said) in enumerate(stages.items()):
        started = f"2026-01-01T00:00:{number:02d}+00:00"
        verdict, values = (said, {}) if isinstance(said, str) else (None, said or {})
        store.write_stage(
            StageRecord(stage=name, status="done", started=started, ended=started, verdict=verdict, values=values)
        )
    close_run(store, state="RUNNING")
    assert store.read_run().status == ("done" if done else "failed")
    assert done or "see its pod's events" in store.read_run().error
    close_run(store, state="COMPLETE")
    assert store.read_run().status == "done"
    close_run(store, state="CANCELED")
    assert store.read_run().status == ("done" if done else "interrupted")


def test_a_stage_that_was_killed_is_closed_here_and_in_mlflow(store, tmp_path, monkeypatch):
    ended = []

    class Closing(Tracker):
        def end_run(self, run_id, status):
            ended.append((run_id, status))

    def opened(spec, run_id, live):
        return Closing.open("", "", artifact_location=None, buffer=tmp_path / "unsent", live=False)

    monkeypatch.setattr("tunegate.stages.context.open_tracker", opened)
    store.update_run(mlflow_run_id="parent", spec={"storage": {"root": str(tmp_path)}})
    store.write_stage(
        StageRecord(stage="sft", status="running", started="2026-01-01T00:00:00+00:00", mlflow_run_id="child")
    )
    assert close_run(store, state="FAILED") == "interrupted"
    record = store.read_stage("sft")
    assert record.status == "interrupted" and "killed or ran out of memory" in record.error and record.ended
    assert ended == [("child", "KILLED"), ("parent", "KILLED")]
    assert "killed" in store.read_run().error
    assert close_run(store, state="FAILED") == "interrupted"


def test_it_is_idempotent(store, tmp_path):
    add(store, "decide", verdict="PROMOTE")
    first = close_run(store, state="SUCCEEDED", report=tmp_path / "a" / "report.html")
    again = close_run(store, state="SUCCEEDED", report=tmp_path / "a" / "report.html")
    assert first == again == "PROMOTE"
    assert (tmp_path / "a" / "report.html").read_text().startswith("<!")


def test_a_run_that_never_got_a_record_still_gets_a_report(tmp_path):
    store = RunStore(str(tmp_path), "ghost")
    assert close_run(store, state="FAILED") == "failed"
    assert b"ghost" in store.read_file("report.html")


def test_cost_is_time_times_price(store):
    import json

    store.update_run(spec={"cost": {"hourly_price": 36.0, "currency": "EUR"}})
    record = store.read_run()
    store.write_run(record.model_copy(update={"mlflow_run_id": None}))
    add(store, "sft", seconds=100.0)
    add(store, "ppo", seconds=50.0)
    close_run(store, state="SUCCEEDED")
    cost = json.loads(store.read_file("cost.json"))
    assert cost["per_stage"] == {"sft": 1.0, "ppo": 0.5}
    assert (cost["total"], cost["currency"]) == (1.5, "EUR")


def test_the_id_falls_back_to_kubeflows():
    assert effective_run_id("", "job-1") == "job-1"
    assert effective_run_id("mine", "job-1") == "mine"


PLACEHOLDER = "{{$.pipeline_root}}"


@pytest.mark.parametrize(
    ("given", "pipeline_root", "site", "root"),
    [
        ("", "/here/artifacts/", None, "/here/artifacts/tunegate"),
        ("/data", "/here/artifacts", None, "/data"),
        ("s3://bucket/mine", "/here/artifacts", None, "s3://bucket/mine"),
        ("", "/here/artifacts", "s3://site/root", "/here/artifacts/tunegate"),
        ("s3://bucket/mine/", PLACEHOLDER, "s3://site/root", "s3://bucket/mine"),
        ("", PLACEHOLDER, "s3://site/root/", "s3://site/root"),
        ("", "s3://bucket/root/", None, "s3://bucket/root/tunegate"),
        ("", "minio://mlpipeline/v2/artifacts", "s3://site/root", "s3://site/root"),
    ],
)
def test_where_the_records_go(monkeypatch, given, pipeline_root, site, root):
    monkeypatch.delenv("TUNEGATE_S3_ROOT", raising=False)
    if site:
        monkeypatch.setenv("TUNEGATE_S3_ROOT", site)
    assert effective_root(given, pipeline_root) == root


@pytest.mark.parametrize(
    ("given", "pipeline_root", "words"),
    [
        ("", PLACEHOLDER, "TUNEGATE_S3_ROOT in the pods' environment"),
        ("/data", PLACEHOLDER, "storage_root to s3://bucket/prefix"),
        (".tunegate", "s3://bucket/root", "storage_root to s3://bucket/prefix"),
        ("", "minio://mlpipeline/v2", "s3://mlpipeline/v2/tunegate, with AWS_ENDPOINT_URL_S3"),
        ("gs://bucket/here", PLACEHOLDER, "s3://bucket/here with AWS_ENDPOINT_URL_S3=https://storage.googleapis.com"),
        ("", "", "give a folder"),
    ],
)
def test_a_cluster_s_pods_never_keep_records_to_themselves(monkeypatch, given, pipeline_root, words):
    monkeypatch.delenv("TUNEGATE_S3_ROOT", raising=False)
    with pytest.raises(SpecError) as caught:
        effective_root(given, pipeline_root)
    assert words in str(caught.value)
    assert caught.value.key == "storage_root"


def test_preflight_and_finish_refuse_before_they_write(monkeypatch, tmp_path):
    monkeypatch.delenv("TUNEGATE_S3_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    place = {"run_id": "", "job_id": "job-1", "storage_root": "", "pipeline_root": PLACEHOLDER}
    with pytest.raises(SpecError, match="a place on S3"):
        preflight.run(spec=tmp_path / "spec", parameters={}, overrides={}, profile="smoke", spec_uri="", **place)
    with pytest.raises(SpecError, match="a place on S3"):
        finish.run(state="FAILED", report=tmp_path / "report.html", **place)
    assert list(tmp_path.iterdir()) == []


def test_flat_parameters_make_a_layer_and_empty_ones_do_not():
    layer = spec_from_parameters(
        {"seed": 0, "sft_epochs": 3, "data_sft": "a.jsonl, b.jsonl", "model_source": "", "registry_promote": True},
        {"sft": {"epochs": 4}},
    )
    assert layer == {
        "sft": {"epochs": 4},
        "data": {"sft": ["a.jsonl", "b.jsonl"]},
        "registry": {"promote": True},
    }
