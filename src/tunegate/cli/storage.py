"""`storage …`: what lies below a storage root, and the removal of what nobody needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tunegate.cli.app import app, emit_json
from tunegate.cli.options import DEFAULT_ROOT, AsJson, Root

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tunegate.storage.retention import Holding

storage = typer.Typer(help="Look at and tidy up a storage root.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(storage, name="storage")


@storage.command("list")
def list_storage(root: Root = DEFAULT_ROOT, as_json: AsJson = False) -> None:
    """List runs and artifacts with their sizes and ages, and whether gc would keep them."""
    from tunegate.storage.retention import survey

    holdings = survey(root)
    if as_json:
        emit_json([holding.model_dump(mode="json") for holding in holdings])
    elif not holdings:
        typer.echo(f"there is nothing in {root}")
    else:
        _show(holdings)


@storage.command("gc")
def collect_garbage(
    root: Root = DEFAULT_ROOT,
    keep_days: Annotated[float, typer.Option(min=0, help="Keep runs that began within so many days.")] = 30.0,
    keep_runs: Annotated[int, typer.Option(min=0, help="Keep the newest runs, so many.")] = 20,
    keep_promoted: Annotated[bool, typer.Option(help="Keep runs that ended with PROMOTE.")] = True,
    grace_hours: Annotated[
        float, typer.Option(min=0, help="Keep artifacts that no run refers to for so many hours.")
    ] = 24.0,
    dry_run: Annotated[bool, typer.Option("--dry-run/--delete", help="Only show what would go, or remove it.")] = True,
    as_json: AsJson = False,
) -> None:
    """Find runs, artifacts and uploads that nobody needs any more; remove them with --delete."""
    from tunegate.storage.retention import Retention, collect, survey

    retention = Retention(
        keep_days=keep_days, keep_runs=keep_runs, keep_promoted=keep_promoted, grace_hours=grace_hours
    )
    garbage = [holding for holding in survey(root, retention) if holding.garbage]
    if not dry_run:
        collect(root, garbage)
    if as_json:
        emit_json({"deleted": not dry_run, "garbage": [holding.model_dump(mode="json") for holding in garbage]})
        return
    if garbage:
        _show(garbage)
    size = _bytes(sum(holding.size for holding in garbage))
    if dry_run:
        typer.echo(f"{len(garbage)} to remove, {size}" + ("; --delete removes them" if garbage else ""))
    else:
        typer.echo(f"removed {len(garbage)}, {size}")


def _show(holdings: Sequence[Holding]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("what", "where", "size", "written", "kept because / garbage because"):
        table.add_column(column, overflow="fold")
    for h in holdings:
        fate = f"garbage: {h.why}" if h.garbage else h.why
        table.add_row(h.kind, h.key, _bytes(h.size), f"{h.modified:%Y-%m-%d %H:%M}", fate)
    Console().print(table)


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
