"""A whole run with its storage on S3: one machine is lost in the middle, another takes over; nothing else is shared."""

import os
import signal
import time

import boto3
import pytest
from moto.server import ThreadedMotoServer
from workspaces import make_workspace

from tunegate.storage.runs import RunStore

ROOT = "s3://team-models/smoke"
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """Two workspaces that share a bucket; MLflow is a file of each."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {**KEYS, "AWS_ENDPOINT_URL_S3": f"http://{host}:{port}"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="team-models")
        found = []
        for name in ("a", "b"):
            workspace = make_workspace(tmp_path_factory.mktemp(f"machine-{name}"))
            workspace.environment |= settings | {
                "MLFLOW_TRACKING_URI": f"sqlite:///{workspace.folder}/mlflow.db",
                "TUNEGATE_SCRATCH": str(workspace.folder / "scratch"),
                "TUNEGATE_ROOT": ROOT,
            }
            found.append(workspace)
        yield found
    server.stop()


@pytest.mark.slow
def test_another_machine_finishes_what_a_lost_one_began(machines):
    lost, other = machines
    process = lost.start("run", "--profile", "smoke", "--run-id", "shared", "--set", f"storage.root={ROOT}")
    store = RunStore(ROOT, "shared")
    until = time.monotonic() + 240
    while (sft := store.read_stage("sft")) is None or sft.status != "done":
        assert process.poll() is None and time.monotonic() < until, process.poll()
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    before = {record.stage: record for record in store.stages()}

    done = other.run("resume", "shared", "--json")
    assert done.code == 0, done.err + done.out
    stages = {stage["stage"]: stage for stage in done.json["stages"]}
    for name in ("ingest", "validate", "sft"):  # not made again: the very same artifacts
        made = {role: ref.digest for role, ref in before[name].outputs.items()}
        assert {role: ref["digest"] for role, ref in stages[name]["outputs"].items()} == made
        assert stages[name]["reused_from"] == "shared", name
    assert stages["ppo"]["reused_from"] is None
    uris = [ref["uri"] for stage in stages.values() for ref in stage["outputs"].values()]
    assert uris and all(uri.startswith(f"{ROOT}/artifacts/") for uri in uris)

    answer = lost.run("chat", "shared", "--message", "Hello", "--max-tokens", "4", "--json")
    assert answer.code == 0 and answer.json["prompt"] == "Hello", answer.err


@pytest.mark.slow
def test_a_new_run_on_another_machine_reuses_what_is_there(machines):
    _, other = machines
    reuse = ("--set", "storage.reuse=any", "--set", f"storage.root={ROOT}")
    again = other.run("run", "--profile", "smoke", "--run-id", "second", *reuse, "--json")
    assert again.code == 0, again.err + again.out
    taken = {stage["stage"]: stage["reused_from"] for stage in again.json["stages"]}
    assert {taken[name] for name in ("ingest", "validate", "sft", "reward", "ppo")} == {"shared"}
