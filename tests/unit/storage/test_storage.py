"""Manifests, stores and run records; the S3 store against a server that speaks S3 over HTTP."""

import json
import os
from pathlib import Path

import pytest

from tunegate.errors import StorageError
from tunegate.storage.manifest import MANIFEST_NAME, read_manifest, verify, write_manifest
from tunegate.storage.runs import RunRecord, RunStore, StageRecord, list_runs, now
from tunegate.storage.stores import LocalStore, S3Store, open_store


@pytest.fixture
def artifact(tmp_path):
    folder = tmp_path / "artifact"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("alpha")
    (folder / "sub" / "b.bin").write_bytes(bytes(range(256)))
    return folder


def seal(folder):
    return write_manifest(folder, kind="model", parents={"dataset": "d" * 64}, spec_digest="s", seeds={"run": 1})


def test_manifest_lists_every_file_and_survives_verification(artifact):
    written = seal(artifact)
    assert [f.path for f in written.files] == ["a.txt", "sub/b.bin"]
    assert [f.size for f in written.files] == [5, 256]
    assert verify(artifact) == written == read_manifest(artifact)


def test_digest_depends_on_content_only(artifact, tmp_path):
    first = seal(artifact).digest
    os.utime(artifact / "a.txt", (0, 0))
    again = write_manifest(artifact, kind="other", parents={}, spec_digest="x", seeds={}).digest
    assert first == again
    (artifact / "a.txt").write_text("alphb")
    assert seal(artifact).digest != first


@pytest.mark.parametrize(
    ("tamper", "told"),
    [
        (lambda f: (f / "a.txt").write_text("ALPHA"), "a.txt has sha256"),
        (lambda f: (f / "a.txt").unlink(), "a.txt is missing"),
        (lambda f: (f / "c.txt").write_text("new"), "c.txt was added"),
    ],
)
def test_verify_names_what_changed(artifact, tamper, told):
    seal(artifact)
    tamper(artifact)
    with pytest.raises(StorageError, match=told):
        verify(artifact)


def test_verify_catches_a_forged_digest(artifact):
    seal(artifact)
    path = artifact / MANIFEST_NAME
    content = json.loads(path.read_text())
    content["digest"] = "0" * 64
    path.write_text(json.dumps(content))
    with pytest.raises(StorageError, match="does not match its own file list"):
        verify(artifact)


def test_an_empty_folder_is_not_an_artifact(tmp_path):
    with pytest.raises(StorageError, match="no files"):
        seal(tmp_path)


def test_a_folder_without_manifest_is_refused(artifact):
    with pytest.raises(StorageError, match=r"no manifest\.json"):
        verify(artifact)


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path):
    if request.param == "local":
        return LocalStore(tmp_path / "store")
    name = request.getfixturevalue("bucket")
    return S3Store(f"s3://{name}/some/prefix")


def test_store_round_trip(store):
    assert store.get("runs/x/run.json") is None
    store.put("runs/x/run.json", b"1")
    store.put("runs/x/run.json", b"2")
    store.put("runs/y/run.json", b"3")
    assert store.get("runs/x/run.json") == b"2"
    assert list(store.keys("runs/x")) == ["runs/x/run.json"]
    assert list(store.keys("runs")) == ["runs/x/run.json", "runs/y/run.json"]


def test_store_publishes_trees_whole(store, artifact, tmp_path):
    digest = seal(artifact).digest
    store.put_tree(f"artifacts/{digest}", artifact)
    store.put_tree(f"artifacts/{digest}", artifact)
    store.get_tree(f"artifacts/{digest}", tmp_path / "back")
    assert verify(tmp_path / "back").digest == digest


def test_s3_tree_without_manifest_is_not_read(bucket, artifact, tmp_path):
    store = S3Store(f"s3://{bucket}/p")
    store.put("artifacts/half/a.txt", b"alpha")
    with pytest.raises(StorageError, match="not published whole"):
        store.get_tree("artifacts/half", tmp_path / "back")


def test_s3_missing_bucket_is_one_clear_error(bucket):
    with pytest.raises(StorageError, match="NoSuchBucket"):
        S3Store("s3://no-such-bucket-anywhere/p").put("a", b"1")


def test_local_store_that_cannot_be_written_says_so():
    with pytest.raises(StorageError, match="cannot write"):
        LocalStore(Path("/proc/tunegate")).put("a/b", b"1")


def test_open_store_chooses_by_uri(tmp_path):
    assert isinstance(open_store(str(tmp_path)), LocalStore)
    assert isinstance(open_store("s3://b/p"), S3Store)
    with pytest.raises(StorageError, match="needs a bucket"):
        open_store("s3://")


def record(run_id, started):
    return RunRecord(run_id=run_id, name="n", pipeline="p", status="running", started=started)


def test_run_store_keeps_records_curves_and_files(tmp_path):
    run = RunStore(str(tmp_path), "run-1")
    assert run.read_run() is None
    run.write_run(record("run-1", now()))
    run.update_run(status="done", verdict="PROMOTE")
    assert run.read_run().verdict == "PROMOTE"
    run.write_stage(StageRecord(stage="sft", status="running", started="2026-01-02"))
    run.write_stage(StageRecord(stage="ingest", status="done", started="2026-01-01"))
    assert [s.stage for s in run.stages()] == ["ingest", "sft"]
    run.write_metrics("sft", [{"step": 1.0, "loss": 2.5}])
    assert run.read_metrics("sft") == [{"step": 1.0, "loss": 2.5}]
    assert run.read_metrics("ppo") == []
    run.write_file("report.html", b"<p>")
    assert run.read_file("report.html") == b"<p>"


def test_runs_are_listed_oldest_first(tmp_path):
    for name, started in (("b", "2026-01-02"), ("a", "2026-01-01"), ("c", "2026-01-03")):
        RunStore(str(tmp_path), name).write_run(record(name, started))
    assert [r.run_id for r in list_runs(str(tmp_path))] == ["a", "b", "c"]


@pytest.mark.parametrize("bad", ["", "../up", "a/b", "-x", "a b"])
def test_run_ids_that_are_not_plain_are_refused(tmp_path, bad):
    with pytest.raises(StorageError, match="run id"):
        RunStore(str(tmp_path), bad)


def test_updating_a_run_that_was_never_started_is_refused(tmp_path):
    with pytest.raises(StorageError, match="no such run"):
        RunStore(str(tmp_path), "ghost").update_run(status="done")
