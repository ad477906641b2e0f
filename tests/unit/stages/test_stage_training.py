"""A training stage whose pod is told to go: it leaves a checkpoint on S3, and the next pod goes on from there."""

from __future__ import annotations

import os
import shutil
import signal

import pytest
from safetensors.torch import load_file

from tunegate.config import build_spec
from tunegate.data import ingest, read_records
from tunegate.observer import NullObserver
from tunegate.stages import sft
from tunegate.stages.context import ResolvedSpec
from tunegate.stages.finish import _settle
from tunegate.storage.manifest import write_manifest
from tunegate.storage.runs import RunStore
from tunegate.training.checkpoint import CheckpointFolder
from tunegate.training.models import resolve_model


@pytest.fixture
def root(monkeypatch):
    """A storage root on S3."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    import boto3

    boto3.client("s3").create_bucket(Bucket="runs")
    yield "s3://runs/team"
    server.stop()


def seal(folder, kind):
    write_manifest(folder, kind=kind, parents={}, spec_digest="", seeds={})
    return folder


def test_a_pod_that_must_go_leaves_a_checkpoint_for_the_next(tmp_path, monkeypatch, root):
    spec = build_spec(
        {
            "storage": {"root": root},
            "tracking": {"uri": f"sqlite:///{tmp_path / 'mlflow.db'}", "live": False, "system_metrics": False},
            "model": {"source": "tiny-random", "precision": "fp32"},
            "data": {"sft": [{"uri": "starter:sft.jsonl", "cap": 24}], "preferences": []},
            "sft": {"epochs": 2, "batch_size": 4, "max_length": 96, "checkpoint_every": 2},
        }
    )
    dataset, base = tmp_path / "data", tmp_path / "base"
    ingest(spec.data, dataset, base_dir=tmp_path, seed=1, observer=NullObserver())
    texts = [m["content"] for c in read_records(dataset, "sft", "train") for m in c.messages]
    resolve_model(spec.model, base, texts=texts, seed=1)
    seal(dataset, "dataset")
    seal(base, "model")
    saves, save = [], CheckpointFolder.save

    def start(run_id: str, node: str, *, leave_at: int | None = None) -> dict:
        """The stage in a pod on a node with an empty disk; SIGTERM comes with the checkpoint of a step."""

        def saved(own, step, state):
            saves.append(step)
            if step == leave_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return save(own, step, state)

        monkeypatch.setattr(CheckpointFolder, "save", saved)
        monkeypatch.setenv("TUNEGATE_SCRATCH", str(tmp_path / node))
        place = tmp_path / node / run_id
        ResolvedSpec(spec, run_id).write(place / "spec")
        sft.run(spec=place / "spec", dataset=dataset, base_model=base, model=place / "model")
        return load_file(place / "model" / "model.safetensors")

    expected = start("straight", "node-1")
    run = RunStore(root, "broken")
    with pytest.raises(SystemExit) as ending:
        start("broken", "node-2", leave_at=4)
    assert ending.value.code == 75
    record = run.read_stage("sft")
    assert (record.status, record.exit_code) == ("interrupted", 75)
    assert "step 4" in record.error
    assert _settle("instruction-tuning", [record], "FAILED")["status"] == "interrupted"
    assert any(key.endswith("step-00000004/manifest.json") for key in run.store.keys("runs/broken/checkpoints/sft"))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    shutil.rmtree(tmp_path / "node-2")
    saves.clear()
    resumed = start("broken", "node-3")
    assert min(saves) == 6  # nothing up to step 4 was done twice
    assert run.read_stage("sft").status == "done"
    assert resumed.keys() == expected.keys() and all((resumed[name] == expected[name]).all() for name in expected)
    # The finished model replaces the checkpoints, here and there.
    assert list(run.store.keys("runs/broken/checkpoints")) == []
    assert not (tmp_path / "node-3/tunegate/runs/broken/checkpoints/sft").exists()
