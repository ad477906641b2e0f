"""`run`, `resume`, `runs`, `show`, `ui`: start runs and look at them."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from tunegate.cli.app import app, emit_json
from tunegate.cli.options import DEFAULT_ROOT, AsJson, Assignments, Profile, Root, SpecFile
from tunegate.errors import SpecError, TunegateError

if TYPE_CHECKING:
    from tunegate.cluster.local import LocalRun
    from tunegate.config import TuneSpec

RunnerName = Annotated[str, typer.Option("--runner", help="Where the tasks run: subprocess (here) or docker.")]
ImageName = Annotated[str | None, typer.Option("--image", help="Image for --runner docker.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show the pipeline's own log.")]


@app.command()
def run(
    spec: SpecFile = None,
    profile: Profile = None,
    assignments: Assignments = None,
    run_id: Annotated[str | None, typer.Option("--run-id", help="Id of the run; made up when not given.")] = None,
    runner: RunnerName = "subprocess",
    image: ImageName = None,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Run the whole pipeline on this machine: data, SFT, reward model, PPO, evaluation, gates, registration."""
    from tunegate.config import load_spec
    from tunegate.stages.checks import check_sources
    from tunegate.stages.preflight import new_run_id

    if spec is None and profile is None:
        raise SpecError("there is nothing to run", key="SPEC", fix="give a spec file or --profile smoke|demo")
    resolved = load_spec(spec, profile=profile, assignments=assignments or [])
    check_sources(resolved)
    run_pipeline(resolved, run_id or new_run_id(resolved.name), runner, image, verbose, as_json, resume=False)


@app.command()
def resume(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="Id of an interrupted or failed run, or its beginning.")],
    root: Root = DEFAULT_ROOT,
    runner: RunnerName = "subprocess",
    image: ImageName = None,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Go on with a run where it was: finished stages are taken over, the rest is run."""
    found = find_run(root, run_id)
    run_pipeline(_spec_of(root, found), found, runner, image, verbose, as_json, resume=True)


def _spec_of(root: str, run_id: str) -> TuneSpec:
    """The spec that a run was started with: from its folder here, else (another machine's run) from its record.

    Raises:
        SpecError: The run failed before its spec was resolved.
    """
    from tunegate.config import build_spec, load_spec
    from tunegate.storage.runs import RunStore

    file = Path(root).absolute() / "runs" / run_id / "spec.yaml"
    if not root.startswith("s3://") and file.is_file():
        return load_spec(file)
    record = RunStore(root, run_id).read_run()
    if record is None or not record.spec:
        raise SpecError(
            "the run's record has no spec", key="RUN", value=run_id, fix="start a new run with tunegate run SPEC"
        )
    return build_spec(record.spec, {"storage": {"root": root}}, origin=f"the record of {run_id}")


def run_pipeline(
    spec: TuneSpec,
    run_id: str,
    runner: str,
    image: str | None,
    verbose: bool,
    as_json: bool,
    *,
    resume: bool,
    pipeline: str = "instruction-tuning",
    parameters: Mapping[str, str] | None = None,
) -> NoReturn:
    """Run a pipeline to its end, show it, and leave with the documented exit code."""
    from tunegate.cli.progress import choose_view
    from tunegate.cluster.exit_codes import INTERRUPTED_EXIT_CODE
    from tunegate.cluster.local import run_folder, start

    if runner not in {"subprocess", "docker"}:
        raise SpecError("there is no such runner", key="--runner", value=runner, fix="subprocess or docker")
    log = run_folder(spec, run_id) / "pipeline.log"
    if not as_json:
        typer.secho(f"run {run_id}", bold=True, err=True)
    view = choose_view(verbose=verbose, quiet=as_json, log_path=str(log), pipeline=pipeline)
    try:
        with view:
            outcome = start(
                spec,
                run_id,
                watcher=view,
                runner=runner,  # type: ignore[arg-type]
                image=image,
                resume=resume,
                pipeline=pipeline,
                parameters=parameters,
            )
    except KeyboardInterrupt:
        typer.secho(f"interrupted; go on with: tunegate resume {run_id}", err=True)
        raise typer.Exit(INTERRUPTED_EXIT_CODE) from None
    if as_json:
        emit_json(describe_run(outcome.store, outcome.exit_code))
    else:
        _print_outcome(outcome)
    raise typer.Exit(outcome.exit_code)


def _print_outcome(outcome: LocalRun) -> None:
    from rich.console import Console

    from tunegate.report.terminal import render_summary

    Console().print(render_summary(outcome.store))
    if outcome.record.status != "done":
        typer.secho(f"{outcome.record.failed_stage or 'the pipeline'} {outcome.record.status}:", fg="red", err=True)
        typer.secho(f"  {outcome.record.error}", fg="red", err=True)
        typer.echo(f"log: {outcome.log}\ngo on with: tunegate resume {outcome.record.run_id}", err=True)


def find_run(root: str, run_id: str) -> str:
    """The id of the run that `run_id` names: exact, a unique beginning, or `last`.

    Raises:
        SpecError: No run or several runs match.
    """
    from tunegate.storage.runs import list_runs

    ids = [r.run_id for r in list_runs(root)]
    if run_id in ids:
        return run_id
    if run_id == "last" and ids:
        return ids[-1]
    matches = [i for i in ids if i.startswith(run_id)]
    if len(matches) == 1:
        return matches[0]
    reason = "several runs start so" if matches else "there is no such run"
    raise SpecError(reason, key="RUN", value=run_id, fix=f"one of {', '.join((matches or ids)[-5:]) or '(none yet)'}")


def describe_run(store: Any, exit_code: int | None = None) -> dict[str, Any]:
    """A run as plain data, for `--json`."""
    record = store.read_run()
    if record is None:
        raise TunegateError("the run has no record", key=store.uri)
    content: dict[str, Any] = record.model_dump(mode="json", exclude={"spec"})
    content["stages"] = [s.model_dump(mode="json") for s in store.stages()]
    content["uri"] = store.uri
    content["report"] = f"{store.uri}/files/report.html"
    if exit_code is not None:
        content["exit_code"] = exit_code
    return content


@app.command()
def runs(root: Root = DEFAULT_ROOT, as_json: AsJson = False) -> None:
    """List the runs."""
    from tunegate.storage.runs import list_runs

    records = list(list_runs(root))
    if as_json:
        emit_json([r.model_dump(mode="json", exclude={"spec"}) for r in records])
        return
    if not records:
        typer.echo(f"no runs in {root}; start one with: tunegate run --profile smoke")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("run", "name", "started", "status", "verdict"):
        table.add_column(column)
    for record in records:
        table.add_row(record.run_id, record.name, record.started[:19], record.status, record.verdict or "")
    Console().print(table)


@app.command()
def show(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="Id of a run, its beginning, or last.")] = "last",
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Show a run: stages, key figures, gates, registered version, report."""
    from tunegate.storage.runs import RunStore

    store = RunStore(root, find_run(root, run_id))
    if as_json:
        emit_json(describe_run(store))
        return
    from rich.console import Console

    from tunegate.report.terminal import render_summary

    Console().print(render_summary(store))


@app.command()
def ui(
    root: Root = DEFAULT_ROOT,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 5000,
) -> None:
    """Open MLflow on the local store."""
    from tunegate.tracking.config import TrackingSpec
    from tunegate.tracking.uri import resolve_tracking_uri

    uri = resolve_tracking_uri(TrackingSpec(), str(Path(root).absolute()))
    if uri.startswith("http"):
        typer.echo(f"MLflow runs at {uri}")
        return
    typer.echo(f"MLflow on {uri}: http://{host}:{port} (Ctrl-C ends it)", err=True)
    artifacts = Path(root).absolute() / "mlflow-artifacts"
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri]
    command += ["--default-artifact-root", str(artifacts), "--host", host, "--port", str(port)]
    os.execv(sys.executable, command)
