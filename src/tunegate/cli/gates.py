"""`gates …`: what the gates need to be able to decide."""

from __future__ import annotations

import typer

from tunegate.cli.app import app, emit_json
from tunegate.cli.options import AsJson, Assignments, Profile, SpecFile

gates = typer.Typer(help="Look at the gates.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(gates, name="gates")


@gates.callback()
def _gates() -> None:
    pass


@gates.command()
def power(
    spec: SpecFile = None, profile: Profile = None, assignments: Assignments = None, as_json: AsJson = False
) -> None:
    """Show how many prompts each gate of a spec needs, and how many the spec asks for."""
    from dataclasses import asdict

    from tunegate.config import load_spec
    from tunegate.gates.power import sample_sizes
    from tunegate.stages.supply import gate_contradictions, read_supply

    resolved = load_spec(spec, profile=profile, assignments=assignments or [])
    sizes = sample_sizes(resolved.gates, resolved.evaluation, supply=read_supply(resolved))
    if as_json:
        emit_json([{**asdict(size), "enough": size.enough} for size in sizes])
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("gate", "limit", "needed", "planned", "", "assumed"):
        numeric = name in {"limit", "needed", "planned"}
        table.add_column(name, justify="right" if numeric else "left", no_wrap=name != "assumed")
    for size in sizes:
        needed = "never" if size.needed is None else str(size.needed)
        row = (
            size.gate,
            f"{size.limit:g}",
            needed,
            str(size.planned),
            size.unit.removesuffix(" prompts"),
            size.assumed,
        )
        table.add_row(*row, style=None if size.enough else "yellow")
    console = Console()
    console.print(table)
    few = sum(not size.enough for size in sizes)
    if few:
        told = "one gate has" if few == 1 else f"{few} gates have"
        console.print(f"{told} fewer prompts than such a candidate needs to pass in 9 of 10 cases", style="yellow")
    for warning in gate_contradictions(resolved):
        console.print(f"no candidate can pass: {warning}", style="red", highlight=False)
