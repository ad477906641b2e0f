"""`sft`, `reward`, `ppo`: one training stage by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunegate.cli.app import app, emit_json
from tunegate.cli.options import AsJson, Assignments, Profile, SpecFile
from tunegate.errors import SpecError

RunId = Annotated[
    str | None, typer.Option("--run-id", help="Id of the run; given again, the stage goes on where it was.")
]
Dataset = Annotated[
    Path | None, typer.Option("--dataset", help="Folder of clean data; by default the spec's sources, checked.")
]
Model = Annotated[
    Path | None, typer.Option("--model", help="Folder of the model to start from; by default the spec's base model.")
]
Out = Annotated[Path | None, typer.Option("--out", help="Folder for the result; by default one of the run's.")]


@app.command()
def sft(
    spec: SpecFile = None,
    profile: Profile = None,
    assignments: Assignments = None,
    dataset: Dataset = None,
    model: Model = None,
    out: Out = None,
    run_id: RunId = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model on the conversations of a spec."""
    _train("sft", spec, profile, assignments, run_id, out, as_json, dataset=dataset, model=model)


@app.command()
def reward(
    spec: SpecFile = None,
    profile: Profile = None,
    assignments: Assignments = None,
    dataset: Dataset = None,
    model: Model = None,
    out: Out = None,
    run_id: RunId = None,
    as_json: AsJson = False,
) -> None:
    """Train a reward model, and its judge, on the preferences and ratings of a spec."""
    _train("reward", spec, profile, assignments, run_id, out, as_json, dataset=dataset, model=model)


@app.command()
def ppo(
    spec: SpecFile = None,
    profile: Profile = None,
    assignments: Assignments = None,
    dataset: Dataset = None,
    model: Model = None,
    reward_model: Annotated[Path | None, typer.Option("--reward", help="Folder of the reward model.")] = None,
    judge: Annotated[
        Path | None, typer.Option("--judge", help="Folder of a reward model that is only watched.")
    ] = None,
    out: Out = None,
    run_id: RunId = None,
    as_json: AsJson = False,
) -> None:
    """Optimise a policy by what the spec's last_stage names: ppo, grpo, rloo or dpo."""
    _train(
        "ppo", spec, profile, assignments, run_id, out, as_json,
        dataset=dataset, model=model, reward=reward_model, judge=judge,
    )  # fmt: skip


def _train(
    stage: str,
    spec: Path | None,
    profile: str | None,
    assignments: list[str] | None,
    run_id: str | None,
    out: Path | None,
    as_json: bool,
    **given: Path | None,
) -> None:
    from tunegate.config import load_spec
    from tunegate.stages.alone import Inputs, run_alone
    from tunegate.stages.checks import check_sources
    from tunegate.stages.preflight import new_run_id
    from tunegate.storage.stores import link_tree

    if spec is None and profile is None:
        raise SpecError("there is nothing to train", key="SPEC", fix="give a spec file or --profile smoke|demo")
    resolved = load_spec(spec, profile=profile, assignments=assignments or [])
    if given["dataset"] is None:
        check_sources(resolved, needed=("sft",) if stage == "sft" else ())
    if out is not None and out.exists() and any(out.iterdir()):
        raise SpecError("the folder is not empty", key="--out", value=str(out), fix="give another one")
    name = run_id or new_run_id(f"{resolved.name}-{stage}")
    finished = run_alone(stage, resolved, name, Inputs(**given))  # type: ignore[arg-type]  # one of the three
    model = finished.model
    if out is not None:
        link_tree(model, out)
        model = out
    if as_json:
        content = finished.record.model_dump(mode="json")
        emit_json(content | {"run_id": name, "model": str(model), "judge": finished.judge and str(finished.judge)})
        return
    typer.echo(f"{finished.record.summary}\nmodel: {model}")
    if finished.judge is not None:
        typer.echo(f"judge: {finished.judge}")
    if finished.record.verdict is not None:
        typer.echo(f"gate: {finished.record.verdict}")
