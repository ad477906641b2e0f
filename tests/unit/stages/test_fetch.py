"""Fetch: what a name stands for, and which reward models belong to it."""

from types import SimpleNamespace

import pytest

from tunegate.config import build_spec
from tunegate.errors import ModelError
from tunegate.observer import NullObserver
from tunegate.registry import names, versions
from tunegate.stages import fetch
from tunegate.stages.context import absent
from tunegate.storage.manifest import digest_files, list_files, write_manifest
from tunegate.storage.runs import OutputRef, RunRecord, RunStore, StageRecord, now


def artifact(folder, content="weights"):
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text(content)
    (folder / "config.json").write_text("{}")
    return folder, write_manifest(folder, kind="model", parents={}, spec_digest="s", seeds={}).digest


@pytest.fixture
def place(tmp_path):
    """A storage root with one finished run, and a context of another one."""
    root = tmp_path / "root"
    store = RunStore(str(root), "trained")
    store.write_run(RunRecord(run_id="trained", name="x", pipeline="instruction-tuning", status="done", started=now()))
    for stage, outputs in (("sft", ("model",)), ("ppo", ("model",)), ("reward", ("model", "judge"))):
        refs = {}
        for output in outputs:
            folder, digest = artifact(root / "runs" / "trained" / f"{stage}-{output}", f"{stage} {output}")
            refs[output] = OutputRef(uri=str(folder), digest=digest, kind="model")
        store.write_stage(StageRecord(stage=stage, status="done", started=now(), outputs=refs))
    spec = build_spec({"storage": {"root": str(root)}, "registry": {"model_name": "house"}})
    return SimpleNamespace(
        spec=spec,
        run=RunStore(str(root), "looking"),
        observer=NullObserver(),
        tracking_uri="sqlite:///nowhere.db",
        root=root,
    )


def content(folder):
    return (folder / "model.safetensors").read_text()


def test_a_run_stands_for_its_last_model(place, tmp_path):
    found = fetch.bring("trained", tmp_path / "out", place)
    assert found == fetch.Fetched("model of run trained", "trained")
    assert content(tmp_path / "out") == "ppo model"


def test_an_artifact_is_brought_unchanged_and_its_source_is_left_alone(place, tmp_path):
    folder, digest = artifact(tmp_path / "mine")
    before = (folder / "manifest.json").read_text()
    found = fetch.bring(str(folder), tmp_path / "out", place)
    assert found.run_id is None
    assert digest_files(list_files(tmp_path / "out")) == digest
    write_manifest(tmp_path / "out", kind="model", parents={"a": "b"}, spec_digest="t", seeds={})
    assert (folder / "manifest.json").read_text() == before


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("house@3", ("house", "3")),
        ("other@champion", ("other", "champion")),
        ("champion", ("house", "champion")),
        ("candidate", ("house", "candidate")),
    ],
)
def test_registered_versions_go_by_number_or_alias(place, tmp_path, monkeypatch, name, asked):
    seen = []

    def download(uri, model, which, out):
        seen.append((model, which))
        artifact(out, "registered")
        return SimpleNamespace(number=3, tags={names.TAG_RUN_ID: "trained"})

    monkeypatch.setattr(versions, "download_model", download)
    found = fetch.bring(name, tmp_path / "out", place)
    assert seen == [asked]
    assert found == fetch.Fetched(f"{asked[0]} version 3", "trained")


def test_what_nothing_goes_by_is_an_error(place, tmp_path):
    with pytest.raises(ModelError):
        fetch.bring("./nothing-here", tmp_path / "out", place)
    with pytest.raises(ModelError, match="no model to evaluate"):
        fetch.bring("", tmp_path / "out", place)


def companion(place, tmp_path, role, given, run_id="trained"):
    out = tmp_path / role
    out.mkdir()
    return fetch._companion(role, given, fetch.Fetched("m", run_id), out, place), out


def test_reward_models_come_from_the_models_own_run(place, tmp_path):
    for role, expected in (("reward", "reward model"), ("judge", "reward judge"), ("sft_model", "sft model")):
        title, out = companion(place, tmp_path, role, "")
        assert title == "of run trained"
        assert content(out) == expected


def test_reward_models_can_be_named_or_left_out(place, tmp_path):
    folder, _ = artifact(tmp_path / "own", "own judge")
    title, out = companion(place, tmp_path, "judge", str(folder))
    assert (title, content(out)) == (str(folder), "own judge")
    title, out = companion(place, tmp_path, "reward", "none")
    assert title == "" and absent(out)
    title, out = companion(place, tmp_path, "sft_model", "", run_id=None)
    assert title == "" and absent(out)


def test_a_named_reward_model_must_exist(place, tmp_path):
    with pytest.raises(ModelError, match="no such reward model"):
        companion(place, tmp_path, "judge", "/no/such/folder")


def test_another_run_can_lend_its_judge(place, tmp_path):
    title, out = companion(place, tmp_path, "judge", "trained", run_id=None)
    assert (title, content(out)) == ("of run trained", "reward judge")
