from __future__ import annotations

import json
from pathlib import Path

import mlflow.artifacts
import pytest
from registry_fixtures import NAME, make_artifacts, on_both_stores

from tunegate.errors import GateError, RegistryError, StorageError
from tunegate.registry.config import RegistrySpec
from tunegate.registry.registry import champion_model, fetch, promote, register, status
from tunegate.storage.manifest import verify
from tunegate.tracking.client import connect, ensure_experiment

CARD = "---\nlicense: apache-2.0\n---\n\n# A card\n\nMade by hand.\n\n## Use\n\nit\n\n## Limits\n\n- few\n"


def _register(uri, made, **changes):
    arguments = {
        "model": made.model,
        "decision": made.decision / "decision.json",
        "evaluation": made.evaluation,
        "run_id": "run-1",
        "mlflow_run_id": None,
        "lineage": {"base": "b" * 64},
        "model_card": "# A card\n",
        **changes,
    }
    return register(uri, RegistrySpec(model_name=NAME), **arguments)


@on_both_stores
def test_a_version_carries_its_files_evidence_tags_and_links(uri, tmp_path):
    made = make_artifacts(tmp_path / "made", "one")
    client = connect(uri)
    # A server says itself where artifacts go.
    experiment = ensure_experiment(client, "tests", None if uri.startswith("http") else str(tmp_path / "artifacts"))
    run_id = client.create_run(experiment).info.run_id
    registered = _register(
        uri,
        made,
        mlflow_run_id=run_id,
        report_run_id=run_id,
        model_card=CARD,
        params={"base_model": "tiny"},
        metrics={"win_rate (anchor)": 0.75, "nll": 2.0},
    )
    assert (registered.version, registered.alias, registered.verdict) == ("1", "candidate", "PROMOTE")

    local = Path(mlflow.artifacts.download_artifacts(f"models:/{NAME}@candidate", dst_path=str(tmp_path / "got")))
    assert sorted(p.relative_to(local).as_posix() for p in local.rglob("*") if p.is_file()) == [
        "README.md",
        "config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer/vocab.txt",
        "tunegate/decision.json",
        "tunegate/evaluation/evaluation.json",
        "tunegate/evaluation/manifest.json",
        "tunegate/registration.json",
    ]
    assert (local / "README.md").read_text() == CARD

    version = client.get_model_version(NAME, "1")
    assert version.run_id == run_id
    assert version.status == "READY"
    assert version.description.startswith(
        "**Gates: PROMOTE**\n\n- the gates say PROMOTE\n\nRead on: [report of the run](#/"
    )
    assert version.description.endswith("\n\nMade by hand.\n\n### Limits\n\n- few\n")
    model = f"#/experiments/{experiment}/models/{registered.model_id}/artifacts"
    run = f"#/experiments/{experiment}/runs/{run_id}/artifacts"
    assert f"[files and evidence]({model})" in version.description
    assert f"[model card]({run}/model_card.md)" in version.description
    assert f"[report of the run]({run}/report.html)" in version.description
    tags = version.tags
    assert tags["tunegate.model_digest"] == made.digest
    assert tags["tunegate.verdict"] == "PROMOTE"
    assert tags["tunegate.gate.harmlessness"] == "PROMOTE"
    assert tags["tunegate.parent.dataset"] == "d" * 64
    assert tags["tunegate.parent.base"] == "b" * 64
    assert tags["tunegate.spec_digest"] == "5" * 64
    assert tags["tunegate.run_id"] == "run-1"
    assert tags["tunegate.code_version"]
    assert tags["tunegate.model_id"] == registered.model_id

    logged = client.get_logged_model(registered.model_id)
    assert str(logged.status) == "READY"
    assert logged.source_run_id == run_id
    assert logged.params == {"base_model": "tiny"}
    assert {m.key: m.value for m in logged.metrics} == {"win_rate _anchor_": 0.75, "nll": 2.0}
    assert json.loads(logged.tags["mlflow.modelVersions"]) == [{"name": NAME, "version": 1}]
    outputs = client.get_run(run_id).outputs.model_outputs
    assert [o.model_id for o in outputs] == [registered.model_id]


@on_both_stores
def test_registering_again_after_a_crash_finds_the_version(uri, tmp_path):
    made = make_artifacts(tmp_path / "made", "one")
    first = _register(uri, made)
    again = _register(uri, made)
    assert again == first.model_copy(update={"existed": True})
    assert len(status(uri, NAME).versions) == 1
    assert _register(uri, made, run_id="run-2").version == "2"


def test_a_run_that_mlflow_does_not_know_yet_is_no_obstacle(uri, tmp_path):
    made = make_artifacts(tmp_path / "made", "one")
    _register(uri, made, mlflow_run_id="local-0123")
    assert not connect(uri).get_model_version(NAME, "1").run_id


def test_a_decision_about_another_model_is_refused(uri, tmp_path):
    one, two = make_artifacts(tmp_path / "1", "one"), make_artifacts(tmp_path / "2", "two")
    with pytest.raises(GateError, match="decision is about the model"):
        _register(uri, one, decision=two.decision)
    with pytest.raises(RegistryError, match="no registered model"):
        status(uri, NAME)


def test_an_evaluation_that_the_decision_does_not_rest_on_is_refused(uri, tmp_path):
    one, two = make_artifacts(tmp_path / "1", "one"), make_artifacts(tmp_path / "2", "two")
    with pytest.raises(GateError, match="rests on the evaluation"):
        _register(uri, one, evaluation=two.evaluation)


def test_a_model_that_was_changed_after_training_is_refused(uri, tmp_path):
    made = make_artifacts(tmp_path / "made", "one")
    (made.model / "model.safetensors").write_bytes(b"something else")
    with pytest.raises(StorageError, match="was changed after it was made"):
        _register(uri, made)


def test_something_that_is_not_a_decision_is_refused(uri, tmp_path):
    made = make_artifacts(tmp_path / "made", "one")
    (made.decision / "decision.json").write_text('{"verdict": "PROMOTE"}')
    with pytest.raises(GateError, match="not a decision: schema_version"):
        _register(uri, made)


def test_the_models_own_readme_is_kept(uri, tmp_path):
    from tunegate.storage.manifest import write_manifest

    made = make_artifacts(tmp_path / "made", "one")
    (made.model / "README.md").write_text("the base model's card")
    manifest = write_manifest(made.model, kind="model", parents={}, spec_digest="5" * 64, seeds={})
    decision = json.loads((made.decision / "decision.json").read_text())
    decision["digests"]["candidate"] = manifest.digest
    (made.decision / "decision.json").write_text(json.dumps(decision))
    _register(uri, made)
    out = fetch(uri, NAME, "1", tmp_path / "out")
    assert verify(out).digest == manifest.digest
    assert (out / "README.md").read_text() == "the base model's card"


@on_both_stores
def test_the_champion_comes_back_as_the_artifact_that_was_registered(uri, add, tmp_path):
    assert champion_model(uri, NAME, tmp_path / "none") is None
    add(uri, "one")
    assert champion_model(uri, NAME, tmp_path / "none") is None
    promote(uri, NAME, who="ann", why="first")
    out = champion_model(uri, NAME, tmp_path / "champion")
    assert out == tmp_path / "champion"
    original = tmp_path / "made" / "one" / "model"
    assert verify(out).digest == verify(original).digest


def test_a_long_card_fits_the_description(uri, tmp_path):
    made = make_artifacts(tmp_path / "made", "one")
    _register(uri, made, model_card="# Card\n" + "a line of the card\n" * 1000)
    description = connect(uri).get_model_version(NAME, "1").description
    assert len(description) <= 5000
    assert description.endswith("(more in the artifact README.md)")
    assert "report of the run" not in description  # no run, no link


def test_what_mlflow_says_comes_out_as_one_error_that_names_the_server(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    made = make_artifacts(tmp_path / "made", "one")
    with pytest.raises(RegistryError, match=r"http://127\.0\.0\.1:9.*MLflow did not let us"):
        _register("http://127.0.0.1:9", made)
