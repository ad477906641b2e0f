"""`storage.root` on S3: what one machine published, another one takes over; secrets stay where they are."""

import json
import logging
from pathlib import Path

import boto3
import pytest
from faulty_s3 import fails

from tunegate.config import build_spec
from tunegate.errors import SpecError, StorageUnavailableError
from tunegate.stages.context import Outcome, Output, ResolvedSpec, run_stage
from tunegate.storage.manifest import read_manifest, write_manifest
from tunegate.storage.retention import Retention, collect, survey
from tunegate.storage.runs import RunRecord, RunStore, now

KEY_ID, SECRET, TOKEN = "AKIATESTKEY234567QRS", "hush/Secret+Access0Key1234567890abcdefgh", "IQoJtokenTOKENtoken42"


class Machine:
    """A working folder with a stage that counts how often it really ran; nothing but the bucket is shared."""

    def __init__(self, folder: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, *, run_id="run-1", reuse="run"):
        self.folder = folder
        self.root = f"s3://{bucket}/team"
        monkeypatch.setenv("TUNEGATE_SCRATCH", str(folder / "scratch"))
        self.spec = build_spec(
            {
                "storage": {"root": self.root, "reuse": reuse},
                "tracking": {"uri": f"sqlite:///{folder}/mlflow.db", "live": False, "system_metrics": False},
            }
        )
        self.run = RunStore(self.root, run_id)
        self.spec_path = folder / "spec"
        ResolvedSpec(self.spec, run_id).write(self.spec_path)
        self.ran = 0

    def stage(self, name="sft", inputs=None):
        output = self.folder / f"{name}-{self.ran}"

        def body(context):
            self.ran += 1
            (output / "weights.bin").write_bytes(b"w" * 100_000)
            (output / "config.json").write_text(json.dumps({"stage": name}))
            return Outcome(summary="good", figures={"x": 1.0}, files={f"{name}.json": b"{}"})

        record = run_stage(
            name,
            self.spec_path,
            inputs=inputs or {},
            outputs={"model": Output(output, "model")},
            sections=("sft",),
            body=body,
        )
        return record, output


def test_another_machine_resumes_a_run(bucket, tmp_path, monkeypatch):
    first = Machine(tmp_path / "a", bucket, monkeypatch)
    made, output = first.stage()
    digest = read_manifest(output).digest
    assert made.outputs["model"].uri == f"{first.root}/artifacts/{digest}"
    second = Machine(tmp_path / "b", bucket, monkeypatch)
    taken, there = second.stage()
    assert second.ran == 0 and taken.reused_from == "run-1"
    assert read_manifest(there).digest == digest and (there / "weights.bin").stat().st_size == 100_000
    _, after = second.stage("reward", inputs={"policy": there})
    assert second.ran == 1 and read_manifest(after).parents == {"policy": digest}
    assert {record.stage for record in first.run.stages()} == {"sft", "reward"}


def test_another_run_on_another_machine_reuses_when_it_may(bucket, tmp_path, monkeypatch):
    Machine(tmp_path / "a", bucket, monkeypatch).run.write_run(
        RunRecord(run_id="run-1", name="n", pipeline="p", status="done", started=now())
    )
    Machine(tmp_path / "a", bucket, monkeypatch).stage()
    own = Machine(tmp_path / "b", bucket, monkeypatch, run_id="run-2")
    own.stage()
    assert own.ran == 1
    shared = Machine(tmp_path / "c", bucket, monkeypatch, run_id="run-3", reuse="any")
    record, _ = shared.stage()
    assert shared.ran == 0 and record.reused_from == "run-1"
    assert shared.run.read_file("sft.json") == b"{}"


def test_what_was_collected_is_made_again(bucket, tmp_path, monkeypatch):
    first = Machine(tmp_path / "a", bucket, monkeypatch)
    made, _ = first.stage()
    held = survey(first.root, Retention(keep_runs=0, keep_days=0, grace_hours=0))
    collect(first.root, held)
    second = Machine(tmp_path / "b", bucket, monkeypatch)
    again, _ = second.stage()
    assert second.ran == 1 and again.outputs["model"].digest == made.outputs["model"].digest


def test_a_stutter_of_s3_does_not_make_a_stage_run_again(s3, bucket, tmp_path, monkeypatch):
    Machine(tmp_path / "a", bucket, monkeypatch).stage()
    second = Machine(tmp_path / "b", bucket, monkeypatch)
    s3.faults.append(fails("503 Slow Down", "SlowDown", when=lambda r: "weights.bin" in r.path))
    with pytest.raises(StorageUnavailableError, match="throttling"):
        second.stage()
    assert second.ran == 0
    s3.faults.clear()
    record, _ = second.stage()
    assert second.ran == 0 and record.reused_from == "run-1"


def test_a_stage_whose_artifact_was_half_published_runs_again(bucket, tmp_path, monkeypatch):
    made, _ = Machine(tmp_path / "a", bucket, monkeypatch).stage()
    key = made.outputs["model"].uri.removeprefix(f"s3://{bucket}/")
    boto3.client("s3").delete_object(Bucket=bucket, Key=f"{key}/manifest.json")
    second = Machine(tmp_path / "b", bucket, monkeypatch)
    record, _ = second.stage()
    assert second.ran == 1 and record.status == "done"
    assert boto3.client("s3").head_object(Bucket=bucket, Key=f"{key}/manifest.json")


def test_credentials_are_in_no_log_no_record_and_no_artifact(s3, bucket, tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    caplog.set_level(logging.INFO)
    machine = Machine(tmp_path / "a", bucket, monkeypatch)
    machine.stage()
    folder = tmp_path / "artifact"
    folder.mkdir()
    (folder / "x").write_text("x")
    write_manifest(folder, kind="model", parents={}, spec_digest="", seeds={})
    s3.faults.append(fails("403 Forbidden", "SignatureDoesNotMatch", when=lambda r: r.method == "PUT"))
    with pytest.raises(StorageUnavailableError) as caught:
        machine.run.store.put_tree("artifacts/x", folder)
    with pytest.raises(StorageUnavailableError):
        machine.stage("reward")
    s3.faults.clear()
    client = boto3.client("s3")
    texts = {"log": caplog.text, "output": "".join(capfd.readouterr()), "error": str(caught.value)}
    for path in tmp_path.rglob("*"):
        if path.is_file():
            texts[str(path)] = path.read_bytes().decode("latin-1")
    for entry in client.list_objects_v2(Bucket=bucket)["Contents"]:
        texts[entry["Key"]] = client.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read().decode("latin-1")
    assert any("weights.bin" in name for name in texts) and any("stages/sft.json" in name for name in texts)
    for name, text in texts.items():
        for secret in (KEY_ID, SECRET, TOKEN):
            assert secret not in text, name


def test_the_docker_runner_writes_no_credentials(tmp_path, monkeypatch):
    from tunegate.cluster.local import _prepare

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    spec = build_spec({"storage": {"root": str(tmp_path)}})
    _prepare(spec, "run-1", tmp_path / "run", "docker", None, "instruction-tuning", {})
    for path in (tmp_path / "run").iterdir():
        assert SECRET not in path.read_text(), path.name


@pytest.mark.parametrize(
    "layer",
    [
        {"storage": {"root": f"s3://{KEY_ID}:hush@bucket/p"}},
        {"data": {"sft": [f"s3://{KEY_ID}:hush@bucket/a.jsonl"]}},
        {"data": {"sft": [{"uri": f"https://{KEY_ID}:hush@host/a.jsonl", "name": "a"}]}},
    ],
)
def test_a_spec_with_credentials_is_refused_without_repeating_them(layer):
    with pytest.raises(SpecError, match="credentials") as caught:
        build_spec(layer)
    assert "hush" not in str(caught.value) and KEY_ID not in str(caught.value)


def test_the_record_on_s3_is_enough_to_resume(bucket, tmp_path, monkeypatch):
    from tunegate.cli.runs import _spec_of

    machine = Machine(tmp_path / "a", bucket, monkeypatch)
    record = RunRecord(run_id="run-1", name="n", pipeline="p", status="failed", started=now())
    machine.run.write_run(record)
    with pytest.raises(SpecError, match="no spec"):
        _spec_of(machine.root, "run-1")
    machine.run.write_run(record.model_copy(update={"spec": machine.spec.model_dump(mode="json")}))
    assert _spec_of(machine.root, "run-1") == machine.spec
