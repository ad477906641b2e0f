"""A training stage on two nodes: its pod, a Kubernetes API, S3, and nodes that really run under torchrun."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from fake_kubernetes import FakeKubernetes, becomes, condition
from safetensors.torch import load_file

from tunegate.config import build_spec
from tunegate.data import ingest, read_records
from tunegate.errors import SpecError, StorageError, TrainingStoppedError, TunegateError
from tunegate.observer import NullObserver
from tunegate.stages import distributed, finish, nodes, sft
from tunegate.stages.context import ResolvedSpec
from tunegate.storage.manifest import write_manifest
from tunegate.storage.runs import RunRecord, RunStore, now
from tunegate.training.models import resolve_model
from tunegate.training.stopping import stop_on_sigterm
from tunegate.trainjob import client as trainjob_client
from tunegate.trainjob import follow as following

RESOURCES = {"stages": {"sft": {"nodes": 2}}, "image": "tunegate:1"}


@pytest.fixture(scope="module")
def moto():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def root(moto, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", moto)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    import boto3

    boto3.client("s3").create_bucket(Bucket="runs")
    return "s3://runs/team"


@pytest.fixture
def kubernetes(tmp_path, monkeypatch):
    fake = FakeKubernetes()
    monkeypatch.setattr(trainjob_client, "_SERVICE_ACCOUNT", tmp_path / "none")
    location = "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION"
    monkeypatch.setattr(location, str(fake.kubeconfig(tmp_path / "kubeconfig")))
    monkeypatch.setattr(following, "POLL_SECONDS", 0.05)
    monkeypatch.setenv("TUNEGATE_TRAINJOB", json.dumps(RESOURCES))
    yield fake
    fake.close()


LAYER = {
    "model": {"source": "tiny-random", "precision": "fp32"},
    "data": {"sft": [{"uri": "starter:sft.jsonl", "cap": 24}], "preferences": []},
    "sft": {"epochs": 1, "batch_size": 4, "max_length": 96},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Dataset and base model, as the stages before would make them."""
    folder = tmp_path_factory.mktemp("inputs")
    spec = build_spec(LAYER)
    ingest(spec.data, folder / "data", base_dir=folder, seed=1, observer=NullObserver())
    texts = [m["content"] for c in read_records(folder / "data", "sft", "train") for m in c.messages]
    resolve_model(spec.model, folder / "base", texts=texts, seed=1)
    for name, kind in (("data", "dataset"), ("base", "model")):
        write_manifest(folder / name, kind=kind, parents={}, spec_digest="", seeds={})
    return folder


class Case:
    """A small SFT stage."""

    def __init__(self, inputs, tmp_path, root):
        self.tmp_path = tmp_path
        tracking = {"uri": f"sqlite:///{tmp_path / 'mlflow.db'}", "live": False, "system_metrics": False}
        self.spec = build_spec({**LAYER, "storage": {"root": root}, "tracking": tracking})
        self.dataset, self.base = inputs / "data", inputs / "base"

    def run(self, run_id, attempt=1):
        place = self.tmp_path / f"{run_id}-{attempt}"
        ResolvedSpec(self.spec, run_id).write(place / "spec")
        sft.run(spec=place / "spec", dataset=self.dataset, base_model=self.base, model=place / "model")
        return load_file(place / "model" / "model.safetensors")


@pytest.fixture
def case(inputs, tmp_path, root):
    return Case(inputs, tmp_path, root)


class Nodes:
    """What Trainer would make of a TrainJob: torchrun, here with all processes on one machine."""

    def __init__(self, kubernetes, tmp_path, monkeypatch):
        self.kubernetes, self.tmp_path, self.outputs = kubernetes, tmp_path, []
        self.ranks = None
        kubernetes.on_create = lambda job: threading.Thread(target=self.work, args=[job], daemon=True).start()

    def work(self, job):
        trainer = job["spec"]["trainer"]
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={self.ranks or trainer['numNodes']}",
        ]
        environment = {
            **os.environ,
            **{e["name"]: e["value"] for e in trainer["env"] if "value" in e},
            "TUNEGATE_SCRATCH": str(self.tmp_path / "node-disk"),
            "OMP_NUM_THREADS": "1",
        }
        environment.pop("TUNEGATE_TRAINJOB")
        done = subprocess.run(
            [*command, *trainer["args"]], env=environment, capture_output=True, text=True, check=False
        )
        self.outputs.append(done.stdout + done.stderr)
        name = job["metadata"]["name"]
        self.kubernetes.add_pod(name, 0, exit_code=done.returncode, log=done.stderr)
        kind = "Failed" if done.returncode else "Complete"
        becomes(condition(kind, reason="FailedJobs" if done.returncode else "AllJobsCompleted"))(job)


@pytest.fixture
def node_processes(kubernetes, tmp_path, monkeypatch):
    return Nodes(kubernetes, tmp_path, monkeypatch)


@pytest.mark.slow
def test_two_nodes_train_the_model_that_one_trains(case, node_processes, kubernetes, monkeypatch):
    trained = case.run("spread")
    store = RunStore(case.spec.storage.root, "spread")
    record = store.read_stage("sft")
    assert record.status == "done", node_processes.outputs
    assert record.figures["train/steps"] > 0
    assert any("loss" in name for row in store.read_metrics("sft") for name in row), "rank 0's curve is the stage's"
    assert json.loads(store.read_file("sft.json"))["steps"] == record.figures["train/steps"]
    assert record.outputs["model"].uri == f"{case.spec.storage.root}/artifacts/{record.outputs['model'].digest}"
    assert list(store.store.keys("runs/spread/checkpoints")) == [], "the finished model replaces the checkpoints"
    (job,) = kubernetes.jobs.values()
    assert job["metadata"]["labels"]["tunegate.io/run"] == "spread"
    assert sorted(node_processes.outputs[0].split()).count("sft:") > 0, "rank 0 says how far it is"

    monkeypatch.delenv("TUNEGATE_TRAINJOB")
    alone = case.run("alone")
    assert alone.keys() == trained.keys()
    for name, weights in alone.items():
        assert (weights - trained[name]).abs().max() < 1e-4, name

    monkeypatch.setenv("TUNEGATE_TRAINJOB", json.dumps(RESOURCES))
    store.write_run(RunRecord(run_id="spread", name="n", pipeline="p", status="running", started=now()))
    finish.close_run(store, state="SUCCEEDED")
    assert kubernetes.jobs == {}, "the exit handler leaves no TrainJob behind"


@pytest.mark.slow
def test_every_node_fetches_the_checkpoint_that_it_goes_on_from(tmp_path):
    """Two ranks with a disk each: what the first finds in the store, the second reads as well."""
    script = """
import os, sys
from pathlib import Path
from torch import distributed
from tunegate.storage.stores import open_store
from tunegate.training.checkpoint import CheckpointFolder
from tunegate.training.mirror import Mirror

rank = int(os.environ["RANK"])
os.environ["LOCAL_RANK"] = "0"
distributed.init_process_group("gloo")
mirror = Mirror(open_store(sys.argv[1] + "/store"), "checkpoints")
def folder(name):
    return CheckpointFolder(Path(sys.argv[1]) / name / str(rank), fingerprint="f" * 64, mirror=mirror)
assert folder("first").latest() is None
if rank == 0:
    folder("first").save(7, {"x": 1})
distributed.barrier()
assert folder("second").latest().step == 7
unshared = CheckpointFolder(Path(sys.argv[1]) / "third" / str(rank), fingerprint="f" * 64)
if rank == 0:
    unshared.save(9, {"x": 1})
distributed.barrier()
try:
    unshared.latest()
except Exception as error:
    print(type(error).__name__, flush=True)
distributed.barrier()
distributed.destroy_process_group()
"""
    (tmp_path / "two.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(tmp_path / "two.py"), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("StorageError") == 2, "both ranks, or one would wait for ever"


@pytest.mark.slow
def test_what_a_rank_gives_up_with_is_the_stage_s_error(case, node_processes, kubernetes, tmp_path):
    node_processes.ranks = 1  # one is enough to fail
    case.base = tmp_path / "not-a-model"
    case.base.mkdir()
    (case.base / "config.json").write_text("{}")
    write_manifest(case.base, kind="model", parents={}, spec_digest="", seeds={})
    with pytest.raises(TunegateError) as caught:
        case.run("broken")
    record = RunStore(case.spec.storage.root, "broken").read_stage("sft")
    assert record.status == "failed" and record.error == str(caught.value)
    assert caught.value.__cause__ is not None and "node 0" in str(caught.value.__cause__)
    assert list(kubernetes.jobs), "it stays for a look until the exit handler or a retry deletes it"


def outcome(case, run_id, name, **content):
    """Put what rank 0 would leave on S3."""
    store = RunStore(case.spec.storage.root, run_id)
    nodes.write_file(store, f"distributed/{name}", *content.popitem())


def test_a_rank_s_words_win_over_kubernetes_own(case, kubernetes):
    def failed(exit_code):
        def apply(job):
            content = nodes.Failure(rank=1, reason="the loss is not a number", key="sft", fix="a", exit_code=exit_code)
            outcome(case, "told", job["metadata"]["name"], **{nodes.ERROR_FILE: content})
            becomes(condition("Failed", reason="FailedJobs"))(job)

        return apply

    kubernetes.script.append(failed(4))
    with pytest.raises(TunegateError, match="the loss is not a number") as caught:
        case.run("told")
    assert caught.value.exit_code == 4
    assert RunStore(case.spec.storage.root, "told").read_stage("sft").exit_code == 4
    # The retry makes the job anew, without what the first has left; this time the nodes were told to go.
    kubernetes.script.extend([lambda job: None, failed(TrainingStoppedError.exit_code)])
    with pytest.raises(SystemExit) as stopped:
        case.run("told", attempt=2)
    assert stopped.value.code == 75
    assert len(kubernetes.calls("POST")) == 2


def test_a_complete_job_without_an_outcome_is_an_error(case, kubernetes):
    kubernetes.script.append(becomes(condition("Complete")))
    with pytest.raises(TunegateError, match="there is no outcome"):
        case.run("empty")


def test_a_pod_that_is_told_to_go_takes_its_job_along(case, kubernetes):
    kubernetes.script.append(lambda job: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped:
        case.run("stopped")
    assert stopped.value.code == 128 + signal.SIGTERM
    assert kubernetes.jobs == {}
    assert RunStore(case.spec.storage.root, "stopped").read_stage("sft").status == "interrupted"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_stage_s_pod_shows_its_nodes_that_it_is_there(case, kubernetes, monkeypatch):
    monkeypatch.setattr(nodes, "_BEAT_SECONDS", 0.01)
    store, signs = RunStore(case.spec.storage.root, "shown"), set()

    def look(job):
        folder = f"distributed/{job['metadata']['name']}"
        end = time.monotonic() + 20
        while len(signs) < 3 and time.monotonic() < end:
            signs.add(nodes.read_file(store, folder, nodes.SIGN_OF_LIFE))
        becomes(condition("Complete"))(job)

    kubernetes.script.append(look)
    with pytest.raises(TunegateError, match="there is no outcome"):
        case.run("shown")
    assert len(signs) >= 3
    assert not [t for t in threading.enumerate() if t.name == "sign-of-life"]


@pytest.mark.parametrize(
    ("rank", "signs", "stopped"),
    [
        (0, itertools.repeat(b"same"), True),
        (0, itertools.repeat(None), True),
        (0, map(str, itertools.count()), False),
        (0, itertools.cycle([b"same", b"same", StorageError("S3 is away", key="s3://runs")]), False),
        (1, itertools.repeat(b"same"), False),
    ],
)
def test_nodes_that_nobody_follows_stop(monkeypatch, tmp_path, capsys, rank, signs, stopped):
    def read(*_):
        sign = next(signs)
        if isinstance(sign, Exception):
            raise sign
        return sign

    monkeypatch.setattr(distributed, "read_file", read)
    monkeypatch.setattr(distributed, "_LOOK_SECONDS", 0.02)
    monkeypatch.setattr(distributed, "_FORGOTTEN_SECONDS", 0.2)
    place = distributed._Rank(rank, rank, 2)
    run = RunStore(str(tmp_path), "r")
    with stop_on_sigterm() as asked, distributed._stopping_when_forgotten(run, "folder", place):
        end = time.monotonic() + (20 if stopped else 1)
        while not asked() and time.monotonic() < end:
            time.sleep(0.01)
        assert asked() is stopped
    assert ("no sign of life" in capsys.readouterr().err) is stopped


def test_storage_that_nodes_do_not_share_is_refused(inputs, tmp_path, kubernetes):
    case = Case(inputs, tmp_path, str(tmp_path / "disk"))
    with pytest.raises(SpecError, match="share no disk"):
        case.run("here")
    assert kubernetes.requests == []


def test_the_exit_handler_never_fails_for_a_trainjob(kubernetes, monkeypatch):
    notes = []
    kubernetes.fail(403)
    nodes.delete_train_jobs("any", notes.append)
    assert "TrainJobs may be left over" in notes[0]
    monkeypatch.delenv("TUNEGATE_TRAINJOB")
    kubernetes.requests.clear()
    nodes.delete_train_jobs("any", notes.append)
    assert kubernetes.requests == [] and len(notes) == 1
