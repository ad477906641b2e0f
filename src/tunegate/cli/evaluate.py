"""`evaluate`: measure a model that exists and say what the gates make of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunegate.cli.app import app
from tunegate.cli.options import DEFAULT_ROOT, AsJson, Assignments, Profile, Root
from tunegate.cli.runs import ImageName, RunnerName, Verbose, run_pipeline
from tunegate.errors import SpecError

if TYPE_CHECKING:
    from tunegate.config import TuneSpec


@app.command()
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A folder, s3:// prefix, known name or Hub id, a run, NAME@VERSION, NAME@ALIAS, or champion.",
        ),
    ],
    spec: Annotated[
        Path | None,
        typer.Argument(metavar="[SPEC.yaml]", help="Says prompts and gates; by default that of the model's own run."),
    ] = None,
    against: Annotated[
        str,
        typer.Option(
            "--against", help="Compare with this model, not the registered champion; none: the base model alone."
        ),
    ] = "",
    reward: Annotated[
        str, typer.Option("--reward", help="The reward model that PPO trained on; by default that of the model's run.")
    ] = "",
    judge: Annotated[
        str, typer.Option("--judge", help="The reward model that compares answers; by default that of the model's run.")
    ] = "",
    profile: Profile = None,
    assignments: Assignments = None,
    root: Root = DEFAULT_ROOT,
    run_id: Annotated[str | None, typer.Option("--run-id", help="Id of the run; made up when not given.")] = None,
    runner: RunnerName = "subprocess",
    image: ImageName = None,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate a model and apply the gates; trains, registers and promotes nothing."""
    from tunegate.stages.checks import check_sources
    from tunegate.stages.preflight import NEEDED_DATA, new_run_id

    resolved = _spec_of(model, spec, profile, assignments or [], root)
    check_sources(resolved, needed=NEEDED_DATA["evaluation"])
    given = {"model": model, "against": against, "reward": reward, "judge": judge}
    run_pipeline(
        resolved,
        run_id or new_run_id(resolved.name),
        runner,
        image,
        verbose,
        as_json,
        resume=False,
        pipeline="evaluation",
        parameters={name: _absolute(value) for name, value in given.items() if value},
    )


def _spec_of(model: str, file: Path | None, profile: str | None, assignments: list[str], root: str) -> TuneSpec:
    """The spec as given, or that of the run that made the model, under a name of its own.

    Raises:
        SpecError: None was given, and the model comes from no run that is known here.
    """
    from tunegate.config import build_spec, load_spec, parse_assignments, resolve_paths
    from tunegate.storage.runs import list_runs

    here = {"storage": {"root": root}}
    if file is not None or profile is not None:
        given = here if root != DEFAULT_ROOT else {}
        found = load_spec(file, profile=profile, assignments=assignments, overrides=given)
    else:
        name = model.partition("@")[0]
        made = [
            record
            for record in list_runs(root)
            if record.spec and name in (record.run_id, record.spec["registry"]["model_name"])
        ]
        if not made:
            raise SpecError(
                "there is no spec that says which prompts to ask",
                key="SPEC",
                value=model,
                fix=f"give a spec file or --profile; without one, a run of {root} or a model that one registered",
            )
        layer = {key: value for key, value in made[-1].spec.items() if key != "name"}
        found = resolve_paths(build_spec(layer, parse_assignments(assignments), here), Path.cwd())
    label = Path(model.partition("@")[0]).name or model
    return found.model_copy(update={"name": f"evaluation of {label}"[:80]})


def _absolute(value: str) -> str:
    return str(Path(value).absolute()) if Path(value).exists() else value
