"""`tunegate cluster …` as a person types it, against the fake Kubeflow."""

import json
from datetime import UTC, datetime

import pytest
import yaml
from fake_kubeflow import FakeKubeflow, task
from typer.testing import CliRunner

from tunegate.cli import cluster as commands
from tunegate.cli.app import app
from tunegate.errors import SpecError, TunegateError
from tunegate.storage import runs as records
from tunegate.storage.runs import RunRecord, RunStore, StageRecord
from tunegate.storage.stores import LocalStore

ROOT = "s3://bucket/prod"
ENDED = datetime(2026, 11, 22, 9, 30, tzinfo=UTC)


@pytest.fixture
def kubeflow(monkeypatch, tmp_path):
    """The server, the environment that points to it, and a folder that plays S3."""
    fake = FakeKubeflow()
    for name in ("TUNEGATE_IMAGE", "TUNEGATE_RESOURCES", "TUNEGATE_S3_ROOT", "TUNEGATE_SERVICE_ACCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TUNEGATE_KFP_HOST", fake.url)
    monkeypatch.setenv("TUNEGATE_KFP_AUTH", "none")
    monkeypatch.setenv("TUNEGATE_ROOT", ROOT)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    monkeypatch.setattr("tunegate.cluster.follow.POLL_SECONDS", 0)

    def open_store(root):
        return LocalStore(tmp_path / "s3" / root.removeprefix("s3://"))

    monkeypatch.setattr(records, "open_store", open_store)
    monkeypatch.setattr("tunegate.cluster.submission.open_store", open_store)
    fake.s3 = tmp_path / "s3"
    yield fake
    fake.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Compile the pipeline once: what compiling does is tested elsewhere."""
    from tunegate.cluster import compilation

    original = compilation.compile_pipeline

    def compile_pipeline(name="instruction-tuning", *, spec=None, defaults=None):
        key = (name, spec.model_dump_json() if spec else "", json.dumps(defaults, sort_keys=True))
        if key not in _COMPILED:
            _COMPILED[key] = original(name, spec=spec, defaults=defaults)
        return _COMPILED[key]

    monkeypatch.setattr(compilation, "compile_pipeline", compile_pipeline)


_COMPILED = {}


@pytest.fixture
def spec(tmp_path):
    file = tmp_path / "spec.yaml"
    file.write_text(
        "name: nightly\n"
        "model: {source: tiny-random}\n"
        "data:\n"
        '  sft: [{uri: "s3://data/sft.jsonl"}]\n'
        '  preferences: [{uri: "starter:preferences.jsonl"}]\n'
        '  evaluation: [{uri: "starter:evaluation.jsonl"}]\n'
    )
    return file


def call(*arguments):
    """Exit code and output of a command; an error of Tunegate is raised as it is."""
    result = CliRunner().invoke(app, ["cluster", *[str(a) for a in arguments]])
    if isinstance(result.exception, TunegateError):
        raise result.exception
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def said(*arguments):
    code, output = call(*arguments)
    assert code == 0
    return json.loads(output)


def ends(kubeflow, **record):
    """A step after which the run has ended with this record."""

    def apply(run):
        store = RunStore(ROOT, run.run_id)
        store.write_stage(StageRecord(stage="preflight", status="done", started="2026-11-22T09:00:00+00:00"))
        store.write_run(
            RunRecord(run_id=run.run_id, name="x", pipeline="p", started="2026-11-22T09:00:00+00:00", **record)
        )
        run.state = "SUCCEEDED" if record["status"] == "done" else "FAILED"
        run.finished_at = ENDED

    return apply


def test_run_uploads_code_and_spec_and_starts(kubeflow, spec):
    started = said("run", spec, "--set", "ppo.steps=7", "-p", "seed=3", "--service-account", "runner", "--json")
    run = kubeflow.runs[started["run_id"]]
    assert run.display_name.split("-", 2)[2].startswith("nightly")
    parameters = run.runtime_config.parameters
    assert parameters.keys() == {"storage_root", "spec_uri", "run_name", "seed"}
    assert (parameters["storage_root"], parameters["seed"], run.service_account) == (ROOT, 3, "runner")
    published = yaml.safe_load((kubeflow.s3 / parameters["spec_uri"].removeprefix("s3://")).read_text())
    assert published["ppo"]["steps"] == 7 and published["data"]["sft"][0]["uri"] == "s3://data/sft.jsonl"
    said("run", spec, "--json")
    assert len(kubeflow.versions) == 1, "the same code is not uploaded twice"


def test_profile_needs_no_spec_on_s3(kubeflow):
    started = said("run", "--profile", "smoke", "--json")
    assert kubeflow.runs[started["run_id"]].runtime_config.parameters == {"storage_root": ROOT, "profile": "smoke"}


@pytest.mark.parametrize(
    ("record", "code"),
    [
        ({"status": "done", "verdict": "PROMOTE"}, 0),
        ({"status": "done", "verdict": "HOLD"}, 3),
        ({"status": "failed", "failed_stage": "preflight", "error": "out of memory"}, 1),
    ],
)
def test_waiting_ends_with_the_exit_code_of_a_local_run(kubeflow, monkeypatch, record, code):
    create = kubeflow.server.RequestHandlerClass.create_run

    def create_run(handler):
        create(handler)
        run_id = list(kubeflow.runs)[-1]
        kubeflow.advance(run_id, lambda run: None, ends(kubeflow, **record))

    monkeypatch.setattr(
        "fake_kubeflow._ROUTES",
        [(m, p, create_run if f is create else f) for m, p, f in __import__("fake_kubeflow")._ROUTES],
    )
    found, output = call("run", "--profile", "smoke", "--wait", "--json")
    answer = json.loads(output)
    assert found == answer["exit_code"] == code
    assert answer["verdict"] == record.get("verdict")
    assert answer["record"]["status"] == record["status"]


def test_wait_in_words(kubeflow):
    run = kubeflow.add_run(parameters={"storage_root": ROOT})
    kubeflow.advance(run.run_id, lambda _: None, ends(kubeflow, status="done", verdict="REJECT"))
    assert call("wait", run.run_id) == (4, "succeeded: REJECT\n")


def test_a_registered_model_can_be_evaluated(kubeflow):
    options = ("--pipeline", "evaluation", "-p", "model=assistant@3", "--profile", "smoke")
    started = said("run", *options, "--json")
    (run,) = kubeflow.runs.values()
    assert run.run_id == started["run_id"]
    assert run.runtime_config.parameters == {"storage_root": ROOT, "profile": "smoke", "model": "assistant@3"}
    (pipeline,) = kubeflow.pipelines.values()
    assert pipeline.name == "evaluation"
    assert call("run", "--pipeline", "evaluation")[0] == 0, "by default the champion"


def test_uploaded_version_can_be_run_as_it_is(kubeflow):
    (uploaded,) = said("upload", "-p", "ppo_steps=9", "--json")
    assert uploaded["created"] and uploaded["link"].endswith(uploaded["version_id"])
    started = said("run", "--profile", "smoke", "--version", "newest", "--json")
    run = kubeflow.runs[started["run_id"]]
    assert run.pipeline_version_reference.pipeline_version_id == uploaded["version_id"]
    stored = kubeflow.versions[uploaded["version_id"]].pipeline_spec
    defaults = stored.get("pipeline_spec", stored)["root"]["inputDefinitions"]["parameters"]
    assert defaults["ppo_steps"]["defaultValue"] == 9
    assert defaults["storage_root"]["defaultValue"] == ROOT, "runs from the Kubeflow UI find their place"
    with pytest.raises(SpecError, match="did you mean ppo_steps"):
        call("run", "--profile", "smoke", "--version", "newest", "-p", "ppo_update=9")


def test_upload_all_twice_creates_once(kubeflow):
    first, second = said("upload", "--all", "--json"), said("upload", "--all", "--json")
    assert all(u["created"] for u in first) and not any(u["created"] for u in second)
    assert [u["version_id"] for u in first] == [u["version_id"] for u in second]


def test_compile_writes_ir_and_kubernetes_resources(kubeflow, tmp_path):
    resources = tmp_path / "resources.yaml"
    resources.write_text("resources:\n  defaults: {memory: 3Gi}\n")
    file = tmp_path / "pipeline.yaml"
    call("compile", "-o", file, "--resources", resources, "--image", "r.example.com/t@sha256:" + "2" * 64)
    text = file.read_text()
    assert "ingest_memory" in text and "r.example.com/t@sha256:" in text and "ghcr.io" not in text
    _, output = call("compile", "--format", "k8s")
    assert [d["kind"] for d in yaml.safe_load_all(output)] == ["Pipeline", "PipelineVersion"]
    resources.write_text("defaults: {memory: lots}\n")
    with pytest.raises(SpecError, match=r"defaults\.memory"):
        call("compile", "--resources", resources)


def test_what_pods_cannot_see_is_refused_before_anything_is_started(kubeflow, spec):
    spec.write_text(spec.read_text().replace("s3://data/sft.jsonl", "data/sft.jsonl").replace("tiny-random", "./model"))
    spec.write_text(spec.read_text() + "evaluation: {capability: {task_files: [own/tasks.jsonl]}}\n")
    with pytest.raises(SpecError, match=r"(?s)data\.sft\[0\]\.uri.*task_files.*model\.source.*copy the data to S3"):
        call("run", spec)
    assert not kubeflow.runs


def test_run_without_a_place_on_s3_is_refused(kubeflow, monkeypatch, spec):
    monkeypatch.delenv("TUNEGATE_ROOT")
    with pytest.raises(SpecError, match="--storage-root s3://bucket/prefix"):
        call("run", spec)
    with pytest.raises(SpecError, match="there is nothing to run"):
        call("run")


def test_runs_show_state_and_verdict(kubeflow):
    done = kubeflow.add_run(parameters={"storage_root": ROOT}, name="done")
    ends(kubeflow, status="done", verdict="HOLD")(done)
    kubeflow.add_run(name="going on")
    rows = {r["name"]: r for r in said("runs", "--json")}
    assert (rows["done"]["verdict"], rows["done"]["seconds"]) == ("HOLD", 1800.0)
    assert (rows["going on"]["state"], rows["going on"]["verdict"]) == ("RUNNING", None)
    _, output = call("runs")
    assert "HOLD" in output and "30 min 00 s" in output


def test_logs_come_from_the_archive_and_then_from_the_records(kubeflow):
    sft = task("sft", "FAILED", task_id="1")
    run = kubeflow.add_run(
        parameters={"storage_root": ROOT},
        tasks=[sft, task("executor", "FAILED", pod="run-x-impl-1", parent="1"), task("ppo", "FAILED", pod="gone")],
    )
    kubeflow.logs[run.run_id, "run-x-impl-1"] = "step 1\nnot a number\n"
    store = RunStore(ROOT, run.run_id)
    store.write_stage(StageRecord(stage="ppo", status="failed", started="2026-11-22T09:00:00Z", error="no memory"))
    _, output = call("logs", run.run_id)
    assert output.splitlines() == [
        "--- sft (run-x-impl-1)",
        "step 1",
        "not a number",
        f"--- ppo (record at {store.uri})",
        "failed: no memory",
    ]
    assert "sft" not in call("logs", run.run_id, "--stage", "ppo")[1]
    with pytest.raises(SpecError, match="no such stage"):
        call("logs", run.run_id, "--stage", "training")
    with pytest.raises(TunegateError, match="there are no logs"):
        call("logs", kubeflow.add_run().run_id)


def test_logs_come_from_the_pods_where_kubernetes_can_be_reached(kubeflow, tmp_path, monkeypatch):
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": kubeflow.url}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
    }
    file = tmp_path / "kubeconfig"
    file.write_text(json.dumps(config))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(file))
    run = kubeflow.add_run()
    node = "workflows.argoproj.io/node-name"

    def pod(name, path, run_label="pipeline/runid", **labels):
        labels = {**labels, run_label: run.run_id}
        return {
            "metadata": {"name": name, "annotations": {node: path}, "labels": labels},
            "status": {"phase": "Succeeded"},
        }

    kubeflow.kubernetes["/api/v1/namespaces/kubeflow/pods"] = {
        "items": [
            pod("a", "run-x.root.tune-and-gate.validate-data.executor(0)"),
            pod("b", "run-x.root.tune-and-gate.sft-driver"),
            pod("c", "anything", **{"app.kubernetes.io/component": "sft"}),
            pod("d", "", run_label="tunegate.io/run", **{"app.kubernetes.io/component": "ppo"}),
            pod("e", "anything", run_label="pipeline/another", **{"app.kubernetes.io/component": "sft"}),
        ]
    }
    for name in "abcde":
        kubeflow.kubernetes[f"/api/v1/namespaces/kubeflow/pods/{name}/log"] = f"log of {name}\n".encode()
    _, output = call("logs", run.run_id)
    assert output.splitlines() == [
        *("--- validate (a)", "log of a"),
        *("--- sft (c)", "log of c"),
        *("--- ppo (d)", "log of d"),
    ]
    containers = {
        name: q["container"]
        for _, path, q, *_ in kubeflow.requests
        for name in path.split("/")[-2:-1]
        if "container" in q
    }
    assert containers == {"a": "main", "c": "main", "d": "node"}
    assert kubeflow.calls("GET", "/pods$")[0][2]["labelSelector"] == f"pipeline/runid={run.run_id}"


def test_stop_and_retry(kubeflow):
    run = kubeflow.add_run()
    with pytest.raises(SpecError, match="only a failed or stopped run"):
        call("retry", run.run_id)
    call("stop", run.run_id)
    assert kubeflow.runs[run.run_id].state == "CANCELING"
    run.state = "FAILED"
    kubeflow.advance(run.run_id, lambda _: None, lambda _: None, ends(kubeflow, status="done", verdict="PROMOTE"))
    run.runtime_config.parameters = {"storage_root": ROOT}
    assert call("retry", run.run_id, "--wait", "--json")[0] == 0


def test_schedule_is_pinned_listed_and_deleted(kubeflow, spec):
    made = said("schedule", "weekly", spec, "--cron", "0 3 * * 1", "--json")
    stored = kubeflow.schedules[made["recurring_run_id"]]
    assert stored.trigger.cron_schedule.cron == "0 0 3 * * 1"
    assert stored.pipeline_version_reference.pipeline_version_id in kubeflow.versions
    assert stored.runtime_config.parameters["spec_uri"].startswith(f"{ROOT}/specs/")
    with pytest.raises(SpecError, match="tunegate cluster unschedule weekly"):
        call("schedule", "weekly", spec, "--every", "1d")
    assert said("schedules", "--json")[0]["when"] == "0 0 3 * * 1"
    call("unschedule", "weekly")
    assert call("schedules")[1].startswith("no schedules")


@pytest.mark.parametrize(
    "options",
    [[], ["--cron", "0 3 * * 1", "--every", "1d"], ["--cron", "daily"], ["--every", "soon"], ["--every", "0h"]],
)
def test_impossible_schedules_are_refused(kubeflow, options):
    with pytest.raises(SpecError, match=r"--cron|--every"):
        call("schedule", "x", "--profile", "smoke", *options)
    assert not kubeflow.schedules


def test_schedule_may_not_share_a_run_id(kubeflow):
    with pytest.raises(SpecError, match="cannot share an id"):
        call("schedule", "x", "--profile", "smoke", "--every", "1d", "-p", "run_id=fixed")


def test_intervals_are_read():
    assert [commands._interval(t) for t in ("90s", "5m", "12h", "7d")] == [90, 300, 43200, 604800]


def test_doctor_says_what_to_do_and_fails(kubeflow, monkeypatch):
    monkeypatch.delenv("TUNEGATE_ROOT")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    code, output = call("doctor", "--image", "127.0.0.1:1/t:1")
    assert code == 1
    assert "✘ S3: no storage root is named" in output and "fix: --storage-root" in output
    assert "✔ Kubeflow Pipelines" in output and "– Kubernetes: there is no kubeconfig here" in output
