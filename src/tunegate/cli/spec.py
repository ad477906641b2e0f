"""`init`, `validate`, `plan`: everything about a spec before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunegate.cli.app import app, emit_json
from tunegate.cli.options import AsJson, Assignments, Profile, SpecFile
from tunegate.errors import SpecError


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="[FILE]", help="Where to write the spec.")] = Path("tune.yaml"),
    profile: Profile = "demo",
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write a commented spec to start from."""
    from tunegate.config import commented_spec, profile_mapping

    if path.exists() and not force:
        raise SpecError("the file exists already", key="FILE", value=str(path), fix="choose another name, or --force")
    path.write_text(commented_spec(profile_mapping(profile or "demo")))
    typer.echo(f"wrote {path}; next: tunegate validate {path} && tunegate plan {path} && tunegate run {path}")


@app.command()
def validate(
    spec: SpecFile = None, profile: Profile = None, assignments: Assignments = None, as_json: AsJson = False
) -> None:
    """Check a spec without starting anything: keys, values, combinations, that sources and model exist."""
    from tunegate.config import load_spec
    from tunegate.stages.checks import check_sources
    from tunegate.stages.supply import gate_contradictions

    resolved = load_spec(spec, profile=profile, assignments=assignments or [])
    check_sources(resolved)
    warnings = gate_contradictions(resolved)
    if as_json:
        content = {"valid": True, "digest": resolved.digest(), "warnings": warnings}
        emit_json(content | {"spec": resolved.model_dump(mode="json")})
        return
    typer.echo(f"valid: {spec or profile or 'defaults'} (digest {resolved.digest()[:12]})")
    if warnings:
        typer.echo("but no candidate can pass the gates as they are set:")
    for warning in warnings:
        typer.echo(f"- {warning}")


@app.command()
def plan(
    spec: SpecFile = None, profile: Profile = None, assignments: Assignments = None, as_json: AsJson = False
) -> None:
    """Show what would run: stages, sizes, estimated time, memory and cost."""
    from tunegate.config import load_spec
    from tunegate.stages.plan import make_plan

    resolved = load_spec(spec, profile=profile, assignments=assignments or [])
    made = make_plan(resolved)
    if as_json:
        emit_json(made.model_dump(mode="json"))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("stage", "what", "time", "memory", "cost"):
        table.add_column(column, justify="left" if column in {"stage", "what"} else "right")
    for stage in made.stages:
        table.add_row(
            stage.stage,
            stage.what,
            f"{stage.seconds:.0f} s",
            f"{stage.memory_bytes / 2**30:.1f} GiB",
            f"{stage.cost:.2f} {made.currency}" if made.hourly_price else "",
        )
    table.add_row(
        "total",
        "",
        f"{made.seconds / 60:.1f} min",
        f"{made.memory_bytes / 2**30:.1f} GiB",
        f"{made.cost:.2f} {made.currency}" if made.hourly_price else "",
        style="bold",
    )
    console = Console()
    console.print(table)
    for remark in made.remarks:
        console.print(f"- {remark}", style="dim", highlight=False)
    for warning in made.warnings:
        console.print(f"! no candidate can pass: {warning}", style="yellow", highlight=False)
