"""What is garbage, and that its removal never takes what somebody needs."""

import json
from datetime import UTC, datetime, timedelta

import boto3
import pytest
from faulty_s3 import fails, hangs_up
from typer.testing import CliRunner

from tunegate.errors import StorageError, StorageUnavailableError
from tunegate.storage.manifest import write_manifest
from tunegate.storage.retention import Retention, collect, survey
from tunegate.storage.runs import OutputRef, RunRecord, RunStore, StageRecord, list_runs
from tunegate.storage.stores import S3Store, open_store
from tunegate.storage.transfer import Bucket

NOW = datetime.now(UTC)
LATER = NOW + timedelta(days=3)  # the files' own ages are those of the test run


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    return f"s3://{request.getfixturevalue('bucket')}/p" if request.param == "s3" else str(tmp_path / "store")


def artifact(folder, content):
    folder.mkdir(parents=True)
    (folder / "weights").write_text(content)
    return write_manifest(folder, kind="model", parents={}, spec_digest="", seeds={}).digest


def make_run(root, tmp_path, name, *, days, status="done", verdict="HOLD", content=None, uri=None):
    run = RunStore(root, name)
    started = (LATER - timedelta(days=days)).isoformat(timespec="milliseconds")
    run.write_run(RunRecord(run_id=name, name=name, pipeline="p", status=status, verdict=verdict, started=started))
    outputs = {}
    if content is not None:
        digest = artifact(tmp_path / "made" / name, content)
        uri = open_store(root).put_tree(f"artifacts/{digest}", tmp_path / "made" / name)
    if uri is not None:
        outputs["model"] = OutputRef(uri=uri, digest=uri.rsplit("/", 1)[-1], kind="model")
    run.write_stage(StageRecord(stage="sft", status="done", started=started, outputs=outputs))
    return uri


def fates(root, **retention):
    held = survey(root, Retention(**{"keep_days": 30, "keep_runs": 0, **retention}), at=LATER)
    return {(h.kind, h.key.split("/")[-1]): (h.garbage, h.why) for h in held}


def test_runs_are_kept_by_age_number_state_and_verdict(root, tmp_path):
    make_run(root, tmp_path, "young", days=29)
    make_run(root, tmp_path, "old", days=31)
    make_run(root, tmp_path, "promoted", days=100, verdict="PROMOTE")
    make_run(root, tmp_path, "working", days=100, status="running", verdict=None)
    garbage = {name: fate[0] for (_, name), fate in fates(root).items()}
    assert garbage == {"young": False, "old": True, "promoted": False, "working": False}
    assert fates(root, keep_runs=2)["run", "old"] == (False, "among the newest 2")
    assert fates(root, keep_promoted=False)["run", "promoted"] == (True, "old")
    assert fates(root, keep_days=32)["run", "old"] == (False, "young")


def test_artifacts_live_as_long_as_a_run_that_refers_to_them(root, tmp_path):
    used = make_run(root, tmp_path, "young", days=1, content="shared")
    make_run(root, tmp_path, "also-old", days=90, uri=used)
    gone = make_run(root, tmp_path, "old", days=90, content="lonely")
    held = survey(root, Retention(keep_days=30, keep_runs=0), at=LATER)
    garbage = {h.key for h in held if h.garbage}
    assert garbage == {"runs/old", "runs/also-old", f"artifacts/{gone.rsplit('/', 1)[-1]}"}
    assert sum(h.size for h in held if h.key.startswith("artifacts")) > len("shared") + len("lonely")
    collect(root, held)
    assert [r.run_id for r in list_runs(root)] == ["young"]
    store = open_store(root)
    assert {key.split("/")[1] for key in store.keys("artifacts/")} == {used.rsplit("/", 1)[-1]}
    store.get_tree(f"artifacts/{used.rsplit('/', 1)[-1]}", tmp_path / "back")
    assert not any(h.garbage for h in survey(root, Retention(keep_days=30, keep_runs=0), at=LATER))


def test_what_is_young_may_belong_to_a_stage_at_work(root, tmp_path):
    digest = artifact(tmp_path / "made", "just now")
    store = open_store(root)
    store.put_tree(f"artifacts/{digest}", tmp_path / "made")
    store.put("artifacts/half/weights", b"...")
    assert fates(root, grace_hours=24 * 4)["artifact", digest] == (False, "young")
    assert fates(root, grace_hours=24 * 4)["unfinished artifact", "half"] == (False, "young")
    assert fates(root)["artifact", digest] == (True, "no run refers to it")
    assert fates(root)["unfinished artifact", "half"] == (True, "it was never finished")


def test_a_run_that_another_one_points_into_is_kept(tmp_path):
    root = str(tmp_path / "store")
    make_run(root, tmp_path, "origin", days=200, uri=f"{tmp_path}/store/runs/origin/artifacts/sft/model")
    make_run(root, tmp_path, "middle", days=100, uri=f"{tmp_path}/store/runs/origin/artifacts/sft/model")
    make_run(root, tmp_path, "young", days=1, uri=f"{tmp_path}/store/runs/middle/artifacts/sft/model")
    fate = fates(root)
    assert fate["run", "origin"] == (False, "used by middle") and fate["run", "middle"] == (False, "used by young")


def test_a_folder_without_a_record_is_left_alone(tmp_path):
    (tmp_path / "runs" / "what").mkdir(parents=True)
    (tmp_path / "runs" / "what" / "notes.txt").write_text("mine")
    assert fates(str(tmp_path)) == {("run", "what"): (False, "it has no record, so it is not known what it is")}


def test_records_that_cannot_be_read_stop_the_removal(tmp_path):
    root = str(tmp_path)
    make_run(root, tmp_path, "run-1", days=90)
    (tmp_path / "runs" / "run-1" / "stages" / "sft.json").write_text("{broken")
    with pytest.raises(StorageError, match="what it refers to is not known"):
        survey(root)


def test_an_unfinished_upload_is_aborted(s3, bucket, tmp_path):
    (tmp_path / "file").write_bytes(b"x" * (11 * 2**20))
    s3.faults.append(hangs_up(when=lambda r: r.is_part(3)))
    store = S3Store(f"s3://{bucket}/p", part_bytes=5 * 2**20)
    with pytest.raises(StorageUnavailableError):
        store.bucket.upload(tmp_path / "file", "p/artifacts/a/file", sha256=_sha(tmp_path / "file"))
    s3.faults.clear()
    held = survey(store.uri, at=LATER)
    assert [(h.kind, h.key, h.garbage) for h in held] == [("unfinished upload", "artifacts/a/file", True)]
    collect(store.uri, held)
    assert Bucket(bucket).unfinished("") == []


def test_an_interrupted_removal_is_found_and_finished(s3, bucket, tmp_path):
    root = f"s3://{bucket}/p"
    make_run(root, tmp_path, "old", days=90, content="x")
    s3.faults.append(fails("403 Forbidden", "AccessDenied", when=lambda r: "delete" in r.query, times=1))
    with pytest.raises(StorageUnavailableError, match="denied"):
        collect(root, survey(root, Retention(keep_runs=0), at=LATER))
    collect(root, survey(root, Retention(keep_runs=0), at=LATER))
    assert boto3.client("s3").list_objects_v2(Bucket=bucket)["KeyCount"] == 0


def test_the_command_shows_first_and_deletes_when_told(tmp_path, monkeypatch):
    from tunegate.cli import storage  # noqa: F401  (registers its commands)
    from tunegate.cli.app import app

    root = str(tmp_path / "store")
    make_run(root, tmp_path, "old", days=90)
    make_run(root, tmp_path, "new", days=3)
    runner = CliRunner()
    arguments = ["storage", "gc", "--root", root, "--keep-runs", "0"]
    shown = runner.invoke(app, arguments)
    assert shown.exit_code == 0 and "1 to remove" in shown.stdout and "runs/old" in shown.stdout
    assert "runs/new" not in shown.stdout
    assert [r.run_id for r in list_runs(root)] == ["old", "new"]
    done = json.loads(runner.invoke(app, [*arguments, "--delete", "--json"]).stdout)
    assert done["deleted"] and [g["key"] for g in done["garbage"]] == ["runs/old"]
    assert [r.run_id for r in list_runs(root)] == ["new"]
    listed = json.loads(runner.invoke(app, ["storage", "list", "--root", root, "--json"]).stdout)
    assert [(h["kind"], h["key"], h["garbage"]) for h in listed] == [("run", "runs/new", False)]


def test_the_command_line_knows_the_command():
    import subprocess
    import sys

    shown = subprocess.run(
        [sys.executable, "-c", "from tunegate.cli import main; main()", "storage", "--help"],
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0 and "gc" in shown.stdout


def _sha(path):
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()
