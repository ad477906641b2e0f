from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from tunegate.errors import StorageError
from tunegate.observer import RecordingObserver
from tunegate.storage.stores import open_store
from tunegate.training import checkpoint as module
from tunegate.training.checkpoint import CheckpointFolder, model_digest, rng_state, seed_everything, set_rng_state
from tunegate.training.mirror import Mirror


def state(value):
    return {"weights": torch.full((3,), float(value)), "nested": {"list": [1, 2.5, None], "name": "x"}}


def folder(tmp_path, **options):
    return CheckpointFolder(tmp_path / "c", fingerprint=options.pop("fingerprint", "f"), **options)


def test_round_trip_and_retention(tmp_path):
    own = folder(tmp_path, keep=2)
    assert own.latest() is None
    for step in (5, 10, 15):
        own.save(step, state(step))
    assert sorted(path.name for path in own.root.iterdir()) == ["step-00000010", "step-00000015"]
    found = folder(tmp_path).latest()
    assert found.step == 15 and torch.equal(found.state["weights"], torch.full((3,), 15.0))
    assert found.state["nested"] == {"list": [1, 2.5, None], "name": "x"}


@pytest.mark.parametrize("damage", ["truncate", "flip", "no manifest", "no state", "broken manifest"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, damage):
    own = folder(tmp_path)
    own.save(1, state(1))
    newest = own.save(2, state(2))
    file = newest / "state.pt"
    if damage == "truncate":
        file.write_bytes(file.read_bytes()[:-10])
    elif damage == "flip":
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(bytes(data))
    elif damage == "no state":
        file.unlink()
    elif damage == "no manifest":
        (newest / "manifest.json").unlink()
    else:
        (newest / "manifest.json").write_text('{"step": 2')
    observer = RecordingObserver()
    found = folder(tmp_path, observer=observer).latest()
    assert found.step == 1 and any("damaged" in note for note in observer.notes)
    own.save(2, state(3))
    assert folder(tmp_path).latest().state["weights"][0] == 3.0


def test_a_crash_while_writing_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    own = folder(tmp_path)
    own.save(1, state(1))

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "sha256_file", die)
    with pytest.raises(KeyboardInterrupt):
        own.save(2, state(2))
    monkeypatch.undo()
    assert len(list(own.root.iterdir())) == 2
    again = folder(tmp_path)
    assert again.latest().step == 1 and len(list(own.root.iterdir())) == 1


def test_a_full_disk_is_a_storage_error_and_keeps_the_older(tmp_path, monkeypatch):
    own = folder(tmp_path)
    own.save(1, state(1))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(StorageError, match="No space left"):
        own.save(2, state(2))
    assert [path.name for path in own.root.iterdir()] == ["step-00000001"]


def test_checkpoints_of_another_run_are_neither_used_nor_kept(tmp_path):
    folder(tmp_path, fingerprint="old").save(9, state(9))
    observer = RecordingObserver()
    own = folder(tmp_path, observer=observer)
    assert own.latest() is None and "other settings" in observer.notes[0]
    own.save(1, state(1))
    assert [path.name for path in own.root.iterdir()] == ["step-00000001"]


def test_random_state_continues_where_it_was():
    seed_everything(5)
    torch.rand(3)
    saved = rng_state()
    expected = (random.random(), np.random.rand(4).tolist(), torch.rand(4).tolist())
    seed_everything(6)
    set_rng_state(saved)
    assert (random.random(), np.random.rand(4).tolist(), torch.rand(4).tolist()) == expected


def test_model_digest_follows_the_files(tmp_path):
    (tmp_path / "a").write_text("1")
    first = model_digest(tmp_path)
    (tmp_path / "a").write_text("2")
    assert model_digest(tmp_path) != first
    (tmp_path / "manifest.json").write_text('{"digest": "abc"}')
    assert model_digest(tmp_path) == "abc"


# -- copies in a store --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bucket():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL_S3": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        import boto3

        boto3.client("s3").create_bucket(Bucket="runs")
        yield "s3://runs"
    server.stop()


@pytest.fixture(params=["folder", "s3"])
def mirror(request, tmp_path) -> Mirror:
    name = request.node.name.replace("[", "-").replace("]", "")
    root = f"{request.getfixturevalue('bucket')}/{name}" if request.param == "s3" else str(tmp_path / "store")
    return Mirror(open_store(root), "runs/r1/checkpoints/sft")


def pod(tmp_path, name, mirror, **options):
    """What a pod of its own sees: an empty disk and the store."""
    return CheckpointFolder(tmp_path / name, fingerprint=options.pop("fingerprint", "f"), mirror=mirror, **options)


def steps(mirror):
    return sorted({key.split("/")[-2] for key in mirror.store.keys(mirror.key) if key.endswith("manifest.json")})


def test_another_machine_goes_on_from_the_copy(tmp_path, mirror):
    first = pod(tmp_path, "a", mirror)
    for step in (1, 2, 3):
        first.save(step, state(step))
    assert steps(mirror) == ["step-00000002", "step-00000003"]
    second = pod(tmp_path, "b", mirror)
    found = second.latest()
    assert found.step == 3 and found.state["weights"][0] == 3.0
    assert found.path.parent == second.root
    second.save(4, state(4))
    assert steps(mirror) == ["step-00000003", "step-00000004"]
    mirror.clear()
    assert list(mirror.store.keys(mirror.key)) == []
    assert pod(tmp_path, "c", mirror).latest() is None


def test_a_damaged_copy_falls_back_and_a_damaged_file_is_fetched_again(tmp_path, mirror):
    own = pod(tmp_path, "a", mirror)
    own.save(1, state(1))
    newest = own.save(2, state(2))
    (newest / "state.pt").unlink()
    (newest / "state.pt").write_bytes(b"half")  # the disk's copy alone: the one in the store is whole
    assert pod(tmp_path, "a", mirror).latest().step == 2
    place = next(key for key in mirror.store.keys(mirror.key) if key.endswith("step-00000002/state.pt"))
    mirror.store.put(place, b"half")
    found = pod(tmp_path, "b", mirror).latest()
    assert found.step == 1


def test_copies_of_another_run_are_not_seen(tmp_path, mirror):
    pod(tmp_path, "a", mirror, fingerprint="f").save(1, state(1))
    assert pod(tmp_path, "b", mirror, fingerprint="g").latest() is None
    assert pod(tmp_path, "c", mirror, fingerprint="f").latest().step == 1


def test_an_outage_of_the_store_costs_the_copy_not_the_training(tmp_path, monkeypatch):
    mirror = Mirror(open_store(str(tmp_path / "store")), "k")
    observer = RecordingObserver()
    own = pod(tmp_path, "a", mirror, observer=observer)

    def down(*_args):
        raise StorageError("S3 said 503")

    monkeypatch.setattr(mirror.store, "put_tree", down)
    own.save(1, state(1))
    assert own.latest().step == 1
    assert any("was not copied" in note and "503" in note for note in observer.notes)
