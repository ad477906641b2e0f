"""`tunegate evaluate` under kfp.local on the tiny model: a run's model, a registered version, exit codes, rows."""

import shutil

import pyarrow.parquet as pq
import pytest
from workspaces import make_workspace

from tunegate.storage.manifest import verify


@pytest.fixture(scope="module")
def copied(smoke, tmp_path_factory):
    """A copy of the finished smoke run's workspace, which these tests may add runs to."""
    original, result = smoke
    assert result.code == 0, result.err
    folder = tmp_path_factory.mktemp("evaluate")
    shutil.copytree(original.folder / ".tunegate", folder / ".tunegate")
    return make_workspace(folder)


def test_a_runs_model_is_evaluated_with_the_runs_own_spec(copied):
    done = copied.run("evaluate", "smoke-1", "--run-id", "again", "--json")
    assert done.code == 0, done.err
    run = done.json
    assert (run["pipeline"], run["status"], run["verdict"], run["exit_code"]) == ("evaluation", "done", "PROMOTE", 0)
    stages = {s["stage"]: s for s in run["stages"]}
    assert list(stages) == ["preflight", "ingest", "fetch", "evaluate", "decide"]
    ppo = copied.stage("smoke-1", "ppo")["outputs"]["model"]
    assert stages["fetch"]["outputs"]["candidate"]["digest"] == ppo["digest"]
    for role in ("reward", "judge"):
        was = copied.stage("smoke-1", "reward")["outputs"]["model" if role == "reward" else "judge"]
        assert stages["fetch"]["outputs"][role]["digest"] == was["digest"]

    folder = stages["evaluate"]["outputs"]["evaluation"]["uri"]
    from pathlib import Path

    verify(Path(folder))
    rows = pq.read_table(Path(folder) / "responses.parquet")
    assert set(rows["role"].to_pylist()) == {"anchor", "sft", "candidate"}
    likelihoods = pq.read_table(Path(folder) / "likelihoods.parquet")
    assert set(likelihoods["kind"].to_pylist()) == {"heldout", "task", "question"}
    kept = list((copied.folder / ".tunegate" / "mlflow-artifacts").rglob("likelihoods.parquet"))
    assert len(kept) >= 1
    # Answers, likelihoods and scores were stored by the smoke run: nothing is asked again.
    figures = stages["evaluate"]["figures"]
    assert figures["candidate/kl_sft"] >= 0
    assert {"candidate/bbq_bias_ambiguous", "candidate/toxic_rate", "vs_anchor/win_rate"} <= set(figures)
    report = (copied.folder / ".tunegate/runs/again/files/report.html").read_text()
    assert "Bias score" in report
    assert "this pipeline only evaluates a model that exists" in report


def test_a_registered_version_against_another_model_and_a_verdict_that_is_an_exit_code(copied):
    sft = copied.stage("smoke-1", "sft")["outputs"]["model"]["uri"]
    done = copied.run(
        "evaluate",
        "tunegate-smoke@candidate",
        "--against",
        sft,
        "--run-id",
        "versus",
        "--json",
        "--set",
        "gates.maximum_incoherent_rate=0.05",
        "--set",
        "gates.minimum_harmful=1",
    )
    # A random model is incoherent, so the evidence does not count.
    assert done.code == 5, done.err
    assert done.json["verdict"] == "INVALID"
    stages = {s["stage"]: s for s in done.json["stages"]}
    assert stages["fetch"]["values"] == {"model": "tunegate-smoke version 1", "run_id": "smoke-1"}
    assert "vs_champion/win_rate" in stages["evaluate"]["figures"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("nothing-like-it",), "there is no spec that says which prompts to ask"),
        (("nothing-like-it", "no.yaml"), "there is no such file"),
        (("smoke-1", "--set", "evaluation.prompts_per_tga=3"), "did you mean 'prompts_per_tag'"),
        (("smoke-1", "--set", "evaluation.bias.questions=[none.jsonl]"), "evaluation.bias.questions[0]"),
    ],
)
def test_mistakes_are_told_before_anything_starts(copied, arguments, told):
    done = copied.run("evaluate", *arguments)
    assert done.code == 2
    assert told in done.err
    assert "Traceback" not in done.err
