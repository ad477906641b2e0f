"""The smoke profile end to end under kfp.local: every stage, the records, MLflow, the registry, the commands."""

import json
import sqlite3

import pytest

STAGES = ["preflight", "ingest", "validate", "sft", "guard", "reward", "ppo", "evaluate", "decide", "register"]


def test_it_ends_as_documented(smoke):
    _, result = smoke
    assert result.code == 0, result.err + result.out
    run = result.json
    assert run["exit_code"] == 0
    assert run["status"] == "done"
    assert run["verdict"] == "PROMOTE"
    assert [s["stage"] for s in run["stages"]] == STAGES
    assert all(s["status"] == "done" for s in run["stages"])


def test_every_artifact_is_sealed_and_whole(smoke):
    from pathlib import Path

    from tunegate.storage.manifest import verify

    _, result = smoke
    outputs = {f"{s['stage']}.{role}": ref for s in result.json["stages"] for role, ref in s["outputs"].items()}
    assert set(outputs) >= {
        "ingest.dataset",
        "ingest.base_model",
        "validate.clean",
        "validate.quarantine",
        "sft.model",
        "reward.model",
        "reward.judge",
        "ppo.model",
        "evaluate.evaluation",
        "decide.decision",
    }
    for name, ref in outputs.items():
        assert verify(Path(ref["uri"])).digest == ref["digest"], name


def test_lineage_is_unbroken(smoke):
    from pathlib import Path

    from tunegate.storage.manifest import read_manifest

    _, result = smoke
    refs = {f"{s['stage']}.{role}": ref for s in result.json["stages"] for role, ref in s["outputs"].items()}
    made = {ref["digest"] for ref in refs.values()}
    for name, ref in refs.items():
        parents = read_manifest(Path(ref["uri"])).parents
        assert set(parents.values()) <= made, name
    assert read_manifest(Path(refs["ppo.model"]["uri"])).parents["sft_model"] == refs["sft.model"]["digest"]


def test_the_candidate_is_a_plain_hugging_face_folder(smoke):
    from pathlib import Path

    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, result = smoke
    uri = next(s for s in result.json["stages"] if s["stage"] == "ppo")["outputs"]["model"]["uri"]
    model = AutoModelForCausalLM.from_pretrained(uri)
    tokenizer = AutoTokenizer.from_pretrained(uri)
    assert list(Path(uri).glob("*.safetensors"))
    assert not list(Path(uri).glob("*.bin"))
    assert model.get_input_embeddings().weight.shape[0] >= len(tokenizer)
    assert tokenizer.chat_template


def test_mlflow_has_a_parent_run_and_a_nested_run_a_stage(smoke):
    workspace, result = smoke
    run = result.json
    database = sqlite3.connect(workspace.folder / ".tunegate" / "mlflow.db")
    rows = database.execute(
        "select r.run_uuid, r.name, r.status, t.value from runs r left join tags t"
        " on t.run_uuid = r.run_uuid and t.key = 'mlflow.parentRunId'"
    ).fetchall()
    parents = [r for r in rows if r[3] is None]
    assert [(p[0], p[2]) for p in parents] == [(run["mlflow_run_id"], "FINISHED")]
    nested = {r[1]: r for r in rows if r[3] == run["mlflow_run_id"]}
    assert set(nested) == set(STAGES) - {"preflight"}
    assert all(r[2] == "FINISHED" for r in nested.values())
    keys = {
        k
        for (k,) in database.execute(
            "select distinct key from metrics where run_uuid = ?", (nested["sft"][0],)
        ).fetchall()
    }
    assert {"sft/loss", "sft/heldout_nll"} <= keys
    steps = database.execute(
        "select count(distinct step) from metrics where key = 'sft/loss' and run_uuid = ?", (nested["sft"][0],)
    ).fetchone()[0]
    assert steps > 3
    inputs = database.execute("select count(*) from inputs").fetchone()[0]
    assert inputs >= 4


def test_the_report_is_one_file_with_the_verdict(smoke):
    workspace, _ = smoke
    html = (workspace.folder / ".tunegate/runs/smoke-1/files/report.html").read_text()
    assert "PROMOTE" in html
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert "<script src" not in html
    artifacts = list((workspace.folder / ".tunegate" / "mlflow-artifacts").rglob("report.html"))
    assert any(a.read_text() == html for a in artifacts)


def test_the_version_is_registered_with_its_evidence(smoke):
    workspace, result = smoke
    status = workspace.run("registry", "status", "tunegate-smoke", "--json").json
    (version,) = status["versions"]
    assert version["aliases"] == ["candidate"]
    assert version["verdict"] == "PROMOTE"
    ppo = next(s for s in result.json["stages"] if s["stage"] == "ppo")
    assert version["model_digest"] == ppo["outputs"]["model"]["digest"]
    assert workspace.run("registry", "verify", "tunegate-smoke", "candidate").code == 0


def test_runs_and_show(smoke):
    workspace, _ = smoke
    assert "smoke-1" in workspace.run("runs").out
    assert [r["run_id"] for r in workspace.run("runs", "--json").json] == ["smoke-1"]
    shown = workspace.run("show", "last").out
    assert "PROMOTE" in shown
    assert "report.html" in shown
    assert workspace.run("show", "smoke", "--json").json["run_id"] == "smoke-1"
    missing = workspace.run("show", "nothing-like-it")
    assert missing.code == 2
    assert "there is no such run" in missing.err


def test_chat_by_run_alias_and_folder(smoke):
    workspace, result = smoke
    uri = next(s for s in result.json["stages"] if s["stage"] == "ppo")["outputs"]["model"]["uri"]
    answers = [
        workspace.run("chat", name, "-m", "How do I boil an egg?", "--max-tokens", "8", "--json").json["answer"]
        for name in ("smoke-1", "candidate", "tunegate-smoke@candidate", uri)
    ]
    assert len(set(answers)) == 1
    talk = workspace.run("chat", "smoke-1", "--max-tokens", "4", input="Hello\nAnd again\n")
    assert talk.code == 0
    nobody = workspace.run("chat", "nobody", "-m", "x")
    assert nobody.code == 2
    assert "no such model folder, run or alias" in nobody.err


def test_a_run_id_is_used_once(smoke):
    workspace, _ = smoke
    again = workspace.run("run", "--profile", "smoke", "--run-id", "smoke-1")
    assert again.code == 2
    assert "exists already" in again.err


def test_resume_of_a_finished_run_takes_every_stage_over(smoke):
    workspace, result = smoke
    before = {s["stage"]: s["ended"] for s in result.json["stages"] if s["stage"] != "preflight"}
    again = workspace.run("resume", "smoke-1", "--json")
    assert again.code == 0, again.err
    stages = {s["stage"]: s for s in again.json["stages"]}
    assert {name: stages[name]["ended"] for name in before} == before
    assert all(stages[name]["reused_from"] == "smoke-1" for name in before)


@pytest.mark.parametrize("name", ["plan.json", "validation.json", "sft.json", "reward.json", "ppo.json", "cost.json"])
def test_the_records_have_a_schema_version(smoke, name):
    workspace, _ = smoke
    content = json.loads((workspace.folder / ".tunegate/runs/smoke-1/files" / name).read_text())
    assert content["schema_version"] == 1
