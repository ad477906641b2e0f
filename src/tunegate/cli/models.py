"""`promote`, `rollback`, `reject`, `registry …`: the MLflow registry, with the gates in front of it."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunegate.cli.app import app, emit_json
from tunegate.cli.options import DEFAULT_ROOT, AsJson, Root
from tunegate.errors import GateError

if TYPE_CHECKING:
    from tunegate.registry.balance import Share, VersionBalance

registry = typer.Typer(help="Look into the model registry.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(registry, name="registry")

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the registered model.")]
Version = Annotated[str, typer.Argument(metavar="VERSION", help="A version's number or alias.")]
Who = Annotated[str, typer.Option("--who", help="Who decides; the login name by default.")]
Why = Annotated[str, typer.Option("--why", help="The reason, kept in the history.", prompt="Why")]
Uri = Annotated[str | None, typer.Option("--tracking-uri", help="MLflow; by default the environment's or the local.")]


def tracking_uri(uri: str | None, root: str) -> str:
    """The MLflow store that a command works on."""
    from tunegate.tracking.config import TrackingSpec
    from tunegate.tracking.uri import resolve_tracking_uri

    absolute = root if root.startswith("s3://") else str(Path(root).absolute())
    return resolve_tracking_uri(TrackingSpec(uri=uri), absolute)


def _who(given: str) -> str:
    return given or getpass.getuser()


@app.command()
def promote(
    name: Name,
    version: Annotated[str | None, typer.Argument(metavar="[VERSION]", help="By default the candidate.")] = None,
    why: Why = "",
    who: Who = "",
    uri: Uri = None,
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Make a version the champion, if its evidence allows it."""
    from tunegate.registry.registry import promote as promote_version

    done = promote_version(tracking_uri(uri, root), name, version, who=_who(who), why=why)
    if as_json:
        emit_json(done.model_dump(mode="json"))
    else:
        typer.echo(f"{name} version {done.version} is champion" + (f", was {done.previous}" if done.previous else ""))


@app.command()
def rollback(
    name: Name,
    version: Annotated[str | None, typer.Argument(metavar="[VERSION]", help="By default the one before.")] = None,
    why: Why = "",
    who: Who = "",
    uri: Uri = None,
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Make an earlier champion the champion again."""
    from tunegate.registry.registry import rollback as roll_back

    done = roll_back(tracking_uri(uri, root), name, version, who=_who(who), why=why)
    if as_json:
        emit_json(done.model_dump(mode="json"))
    else:
        typer.echo(f"{name} version {done.version} is champion again, was {done.previous}")


@app.command()
def reject(
    name: Name,
    version: Version,
    why: Why = "",
    who: Who = "",
    uri: Uri = None,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Write down that a version must not be promoted."""
    from tunegate.registry.registry import reject as reject_version

    reject_version(tracking_uri(uri, root), name, version, who=_who(who), why=why)
    typer.echo(f"{name} version {version} is rejected")


@app.command()
def balance(
    name: Name,
    out: Annotated[Path | None, typer.Option("--out", help="The picture; by default NAME-balance.svg.")] = None,
    last: Annotated[int, typer.Option("--last", min=1, help="At most so many of the newest versions.")] = 20,
    uri: Uri = None,
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Show how useful and how safe each version is, and draw it."""
    from tunegate.registry.registry import balance as read_balance
    from tunegate.stages.versions import draw_versions

    found = read_balance(tracking_uri(uri, root), name, last=last)
    picture = draw_versions(found)
    target = out or (None if as_json else Path(f"{name}-balance.svg"))
    if picture is not None and target is not None:
        target.write_text(picture, encoding="utf-8")
    if as_json:
        emit_json(found.model_dump(mode="json"))
        return
    _print_balance(found)
    if picture is not None:
        typer.echo(f"wrote {target}")


def _print_balance(found: VersionBalance) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("", "version", "alias", "verdict", "wins", "safe", "over-refusal", "from"):
        table.add_column(column, justify="right" if column in {"wins", "safe", "over-refusal"} else "left")
    for point in found.points:
        table.add_row(
            "◆" if point.on_front else "",
            point.version if point.comparable else f"({point.version})",
            "\n".join(point.aliases),
            "rejected" if point.rejected else point.verdict,
            _share(point.useful),
            _share(point.safe),
            "" if point.over_refusal is None else f"{point.over_refusal:.1%}",
            point.parent or "",
        )
    console = Console()
    console.print(table)
    console.print("wins: against the base model; safe: harmful requests safely declined; ◆: Pareto front", style="dim")
    if not all(point.comparable for point in found.points):
        console.print("(): measured on other prompts, otherwise, or against another base model", style="dim")
    for number, reason in found.left_out.items():
        console.print(f"version {number} is left out: {reason}", style="dim", highlight=False)


def _share(share: Share) -> str:
    shown = f"{share.estimate:.1%}"
    if share.low is None or share.high is None:
        return shown
    return f"{shown} [{100 * share.low:.0f}, {100 * share.high:.0f}]"


@registry.command()
def approve(
    name: Name,
    version: Version,
    why: Why = "",
    who: Who = "",
    uri: Uri = None,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Record a person's approval of a version."""
    from tunegate.registry.registry import approve as approve_version

    approval = approve_version(tracking_uri(uri, root), name, version, who=_who(who), why=why)
    typer.echo(f"{approval.who} approved {name} version {version}")


@registry.command()
def status(name: Name, uri: Uri = None, root: Root = DEFAULT_ROOT, as_json: AsJson = False) -> None:
    """Show versions, verdicts and aliases."""
    from tunegate.registry.registry import status as read_status

    found = read_status(tracking_uri(uri, root), name)
    if as_json:
        emit_json(found.model_dump(mode="json"))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("version", "aliases", "verdict", "gates", "run"):
        table.add_column(column)
    for version in found.versions:
        passed = sum(1 for verdict in version.gates.values() if verdict == "PROMOTE")
        table.add_row(
            version.version,
            ", ".join(version.aliases),
            "rejected" if version.rejected else version.verdict,
            f"{passed}/{len(version.gates)} passed",
            version.run_id,
        )
    console = Console()
    console.print(table)
    if found.unfinished:
        console.print(f"interrupted: {found.unfinished.action} of version {found.unfinished.version}", style="red")


@registry.command()
def history(name: Name, uri: Uri = None, root: Root = DEFAULT_ROOT, as_json: AsJson = False) -> None:
    """Show who changed what, when and why."""
    from tunegate.registry.registry import history as read_history

    events = read_history(tracking_uri(uri, root), name)
    if as_json:
        emit_json([e.model_dump(mode="json") for e in events])
        return
    for event in events:
        typer.echo(f"{event.when}  {event.action:9} version {event.version}  {event.who}: {event.why}")


@registry.command()
def verify(
    name: Name,
    version: Annotated[str, typer.Argument(metavar="[VERSION]")] = "champion",
    uri: Uri = None,
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Check the evidence and every file of a version."""
    from tunegate.registry.registry import verify as verify_version

    result = verify_version(tracking_uri(uri, root), name, version)
    if as_json:
        emit_json({**result.model_dump(mode="json"), "ok": result.ok})
    elif result.ok:
        typer.echo(f"{name} version {result.version} is what was registered (verdict {result.verdict})")
    if not result.ok:
        raise GateError("; ".join(result.problems), key=f"{name} version {result.version}", fix="do not serve it")


@registry.command()
def audit(
    name: Name,
    enforce: Annotated[bool, typer.Option("--enforce", help="Put moved aliases back.")] = False,
    uri: Uri = None,
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Find what was changed past the gates; exit code 4 when something is left to mend."""
    from tunegate.registry.registry import audit as audit_model
    from tunegate.registry.session import UnknownModelError

    try:
        result = audit_model(tracking_uri(uri, root), name, enforce=enforce, who=_who(""))
    except UnknownModelError:
        # The scheduled audit starts with the platform, the first registration comes later: nothing can be wrong yet.
        emit_json({"name": name, "findings": [], "ok": True}) if as_json else typer.echo(f"{name}: not registered yet")
        return
    if as_json:
        emit_json({**result.model_dump(mode="json"), "ok": result.ok})
    else:
        for finding in result.findings:
            typer.echo(f"{'repaired' if finding.repaired else 'FOUND'}: {finding.message}")
        if not result.findings:
            typer.echo(f"{name}: every alias stands where the gates put it")
    if not result.ok:
        raise typer.Exit(GateError.exit_code)


def download_alias(name: str, root: str, scratch: Path) -> Path | None:
    """Fetch the model behind `champion`, `candidate`, … or `NAME@ALIAS`; None when there is none.

    A bare alias is looked up in the model of the newest run.
    """
    from tunegate.errors import RegistryError
    from tunegate.registry.names import ALIASES
    from tunegate.registry.registry import fetch
    from tunegate.storage.runs import list_runs

    model, separator, alias = name.partition("@")
    if not separator:
        if name not in ALIASES:
            return None
        newest = [r for r in list_runs(root) if r.spec]
        if not newest:
            return None
        model, alias = newest[-1].spec["registry"]["model_name"], name
    try:
        return fetch(tracking_uri(None, root), model, alias, scratch / "model")
    except RegistryError:
        return None
