"""The compiled evaluation pipeline is shaped as the documentation says; that it is up to date is checked for all."""

from pathlib import Path

import pytest
import yaml

from tunegate.stages.preflight import NEEDED_DATA, PARAMETERS, PLANNED_STAGES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def compiled():
    return yaml.safe_load((ROOT / "pipelines/evaluation/pipeline.yaml").read_text().split("\n---\n")[0])


def tasks_of(compiled):
    return {
        name: task
        for component in [compiled["root"], *compiled["components"].values()]
        for name, task in component.get("dag", {}).get("tasks", {}).items()
    }


def test_it_measures_and_decides_and_does_nothing_else(compiled):
    assert set(tasks_of(compiled)) == {
        "exit-handler-1",
        "preflight",
        "ingest",
        "fetch-model",
        "evaluate",
        "decide",
        "finish",
    }


def test_preflight_knows_the_pipeline(compiled):
    assert compiled["pipelineInfo"]["name"] == "evaluation"
    given = tasks_of(compiled)["preflight"]["inputs"]["parameters"]
    assert given["pipeline"]["runtimeValue"]["constant"] == "evaluation"
    assert "evaluation" in NEEDED_DATA and "evaluation" in PLANNED_STAGES
    for name in PARAMETERS:
        in_pipeline = name in compiled["root"]["inputDefinitions"]["parameters"]
        assert in_pipeline == ("componentInputParameter" in given.get(name, {})), name


def test_parameters_have_defaults_and_descriptions(compiled):
    parameters = compiled["root"]["inputDefinitions"]["parameters"]
    assert parameters["model"]["defaultValue"] == "champion"
    for name, value in parameters.items():
        assert "defaultValue" in value or value.get("isOptional"), name
        assert value["description"], name


def test_what_depends_on_the_registry_is_never_cached(compiled):
    tasks = tasks_of(compiled)
    for name in ("preflight", "fetch-model", "evaluate", "finish"):
        assert not tasks[name].get("cachingOptions", {}).get("enableCache"), name
    assert tasks["ingest"]["cachingOptions"]["enableCache"]


def test_the_exit_handler_runs_whatever_happens(compiled):
    assert tasks_of(compiled)["finish"]["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"


def test_it_compiles_for_a_cluster():
    from tunegate.cluster.compilation import compile_pipeline, pipeline_names

    assert "evaluation" in pipeline_names()
    made = compile_pipeline("evaluation", defaults={"storage_root": "s3://bucket/tunegate", "model": "house@champion"})
    assert made.parameters["against"] == "STRING"
    assert made.version.startswith("evaluation-")
