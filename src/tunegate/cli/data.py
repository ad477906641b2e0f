"""`data …`: the data room by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from tunegate.cli.app import app, emit_json
from tunegate.cli.options import AsJson, Assignments, Profile, SpecFile
from tunegate.cluster.exit_codes import VERDICT_EXIT_CODES
from tunegate.errors import SpecError

if TYPE_CHECKING:
    from rich.table import Table

    from tunegate.config import TuneSpec
    from tunegate.data import IngestSummary, ValidationReport
    from tunegate.observer import Observer

data = typer.Typer(help="Mix, check and look at data by itself.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data, name="data")

Dataset = Annotated[Path, typer.Argument(metavar="DATASET", help="A folder that mix or validate wrote.")]


@data.command("mix")
def mix_data(
    spec: SpecFile = None,
    profile: Profile = None,
    assignments: Assignments = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the dataset.")] = Path("tunegate-data/raw"),
    as_json: AsJson = False,
) -> None:
    """Read, convert, split and mix the sources of a spec, and say what each of them gives."""
    resolved = _load(spec, profile, assignments)
    summary = _mix(resolved, out, _observer(as_json))
    if as_json:
        emit_json(summary.model_dump(mode="json"))
        return
    _print(_sources(summary))
    for kind, origin in summary.derived.items():
        rows = summary.rows[kind]
        typer.echo(f"{kind}: {rows.train} train, {rows.heldout} held out, derived from {origin}")
    typer.echo(f"dataset: {out}")


@data.command("validate")
def validate_data(
    spec: SpecFile = None,
    profile: Profile = None,
    assignments: Assignments = None,
    dataset: Annotated[
        Path | None, typer.Option("--dataset", help="Check this dataset folder instead of the spec's sources.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="Folder of the model, to count tokens with.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for clean data, quarantine and report.")] = Path(
        "tunegate-data"
    ),
    as_json: AsJson = False,
) -> None:
    """Mix and check the data of a spec; exit code 5 when it is INVALID."""
    from tunegate.data import validate

    resolved = _load(spec, profile, assignments)
    observer = _observer(as_json)
    if dataset is None:
        dataset = out / "raw"
        summary = _mix(resolved, dataset, observer)
        if not as_json:
            _print(_sources(summary))
    report = out / "report.html"
    result = validate(
        dataset,
        resolved.data,
        tokenizer=tokenizer,
        clean=out / "clean",
        quarantine=out / "quarantine",
        report=report,
        seed=resolved.stage_seed("validate"),
        observer=observer,
    )
    if as_json:
        emit_json(result.model_dump(mode="json"))
    else:
        _print(_checks(result))
        for kind, rows in result.rows.items():
            redacted = f", {rows.redacted} redacted" if rows.redacted else ""
            typer.echo(f"{kind}: {rows.clean} of {rows.rows_in} rows clean, {rows.quarantined} quarantined{redacted}")
        typer.echo(f"{result.verdict}: {'; '.join(result.reasons) or 'training may start'}\nreport: {report}")
    raise typer.Exit(VERDICT_EXIT_CODES[result.verdict])


@data.command("stats")
def data_stats(dataset: Dataset, as_json: AsJson = False) -> None:
    """Count the rows of a dataset by kind, source and split, with the lengths of their texts."""
    from tunegate.data.overview import dataset_stats

    stats = dataset_stats(dataset)
    if as_json:
        emit_json([s.model_dump(mode="json") for s in stats])
        return
    table = _table(
        "kind", "source", "rows", "train", "held out", "seen an epoch", "prompt chars", "response chars", "tags"
    )
    for s in stats:
        response = "" if s.response_characters is None else f"{s.response_characters:.0f}"
        tags = ", ".join(f"{tag} {n}" for tag, n in s.tags.items())
        counts = map(str, (s.rows, s.train, s.heldout, s.seen))
        table.add_row(s.kind, s.source, *counts, f"{s.prompt_characters:.0f}", response, tags)
    _print(table)


@data.command("inspect")
def inspect_data(
    dataset: Annotated[Path, typer.Argument(metavar="PATH", help="A dataset folder, or a quarantine.parquet.")],
    kind: Annotated[str, typer.Option("--kind", help="sft, preferences, ratings, prompts or evaluation.")] = "sft",
    source: Annotated[str | None, typer.Option("--source", help="Only rows of this source.")] = None,
    reason: Annotated[
        str | None, typer.Option("--reason", help="Of a quarantine: only rows with this check or code.")
    ] = None,
    rows: Annotated[int, typer.Option("-n", min=1, help="How many rows.")] = 3,
    seed: Annotated[int, typer.Option("--seed", help="Of the draw.")] = 0,
) -> None:
    """Show some rows of a dataset, drawn evenly, or of a quarantine, as JSON lines."""
    from tunegate.data.overview import sample_quarantine, sample_rows
    from tunegate.data.records import Kind

    if dataset.suffix == ".parquet":
        found = sample_quarantine(dataset, rows, source=source, reason=reason, seed=seed)
    elif kind not in get_args(Kind):
        raise SpecError("no such kind of record", key="--kind", value=kind, fix="one of " + ", ".join(get_args(Kind)))
    else:
        found = sample_rows(dataset, kind, rows, seed, source=source)  # type: ignore[arg-type]
    for row in found:
        shown = {name: value for name, value in row.items() if value is not None}
        typer.echo(json.dumps(shown, ensure_ascii=False, default=str))


def _load(spec: Path | None, profile: str | None, assignments: list[str] | None) -> TuneSpec:
    from tunegate.config import load_spec

    return load_spec(spec, profile=profile, assignments=assignments or [])


def _mix(resolved: TuneSpec, out: Path, observer: Observer) -> IngestSummary:
    from tunegate.data import ingest

    seed = resolved.stage_seed("ingest")
    return ingest(resolved.data, out, base_dir=Path.cwd(), seed=seed, observer=observer)


def _observer(as_json: bool) -> Observer:
    from tunegate.observer import NullObserver
    from tunegate.stages.observe import StageObserver

    return NullObserver() if as_json else StageObserver("data")


def _sources(summary: IngestSummary) -> Table:
    table = _table(
        "kind", "source", "read", "train", "held out", "quarantined", "left out", "epochs", "share", "reasons"
    )
    for s in summary.sources:
        counts = (s.rows_read, s.records.train, s.records.heldout, s.quarantined, s.left_out)
        reasons = ", ".join(f"{code} {n}" for code, n in s.reasons.items())
        share = f"{s.share:.1%}" if s.share else ""
        table.add_row(s.kind, s.name, *map(str, counts), f"{s.epochs:.2f}", share, reasons)
    return table


def _checks(report: ValidationReport) -> Table:
    table = _table("check", "result", "seen", "found", "codes and estimates")
    for check in report.checks:
        notes = [f"{code} {n}" for code, n in check.codes.items()]
        notes += [f"{k} {e.estimate:.3f} [{e.low:.3f}, {e.high:.3f}]" for k, e in check.estimates.items()]
        notes += [check.reason] if check.reason else []
        table.add_row(check.check, check.verdict, str(check.seen), str(check.flagged), "; ".join(notes))
    return table


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in {"kind", "source", "check"})
    return table


def _print(value: Any) -> None:
    from rich.console import Console

    Console().print(value)
