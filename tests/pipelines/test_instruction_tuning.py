"""The compiled pipeline: up to date, and shaped as the documentation says."""

from pathlib import Path

import pytest
import yaml

from tunegate.cluster import build
from tunegate.stages.preflight import PARAMETERS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def compiled():
    return yaml.safe_load((ROOT / "pipelines/instruction_tuning/pipeline.yaml").read_text().split("\n---\n")[0])


@pytest.mark.parametrize("name", list(build.GENERATED))
def test_generated_files_are_up_to_date(name):
    path = ROOT / name
    assert path.exists(), f"{name} is missing; run: make compile"
    assert path.read_text() == build.GENERATED[name](), f"{name} is out of date; run: make compile"


def test_check_mode_reports_a_stale_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "GENERATED", {"a.txt": lambda: "new"})
    assert build.main(["--check"]) == 1
    assert "a.txt" in capsys.readouterr().err
    assert build.main([]) == 0
    assert (tmp_path / "a.txt").read_text() == "new"
    assert build.main(["--check"]) == 0


def test_every_flat_parameter_reaches_preflight(compiled):
    inputs = compiled["root"]["inputDefinitions"]["parameters"]
    preflight = compiled["components"]["comp-preflight"]["inputDefinitions"]["parameters"]
    assert set(PARAMETERS) <= set(inputs)
    assert set(PARAMETERS) <= set(preflight)


def test_parameters_have_types_and_defaults(compiled):
    for name, value in compiled["root"]["inputDefinitions"]["parameters"].items():
        assert "defaultValue" in value or value.get("isOptional"), name
        assert value["description"], name


def test_the_exit_handler_runs_whatever_happens(compiled):
    task = compiled["root"]["dag"]["tasks"]["finish"]
    assert task["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"


def test_branches_are_on_fixed_words_only(compiled):
    conditions = [
        task["triggerPolicy"]["condition"]
        for component in compiled["components"].values()
        for task in component.get("dag", {}).get("tasks", {}).values()
        if "condition" in task.get("triggerPolicy", {})
    ]
    assert len(conditions) == 5
    assert all(c.endswith(("== 'PROMOTE'", "== 'yes'", "!= 'stop'", "== 'promote'")) for c in conditions)


def test_branches_are_on_outputs_that_the_local_runner_can_resolve(compiled):
    """kfp.local 2.17 resolves `pipelinechannel--TASK-Output` in conditions, and no other output's name."""
    for component in compiled["components"].values():
        for task in component.get("dag", {}).get("tasks", {}).values():
            condition = task.get("triggerPolicy", {}).get("condition", "")
            if condition:
                assert "-Output']" in condition, condition


def test_tasks_that_act_on_the_outside_are_never_cached(compiled):
    tasks = {
        name: task
        for component in [compiled["root"], *compiled["components"].values()]
        for name, task in component.get("dag", {}).get("tasks", {}).items()
    }
    for name in ("preflight", "register", "promote", "finish"):
        assert not tasks[name].get("cachingOptions", {}).get("enableCache"), name
    assert tasks["sft"]["cachingOptions"]["enableCache"]
