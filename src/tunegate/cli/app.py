"""The command tree and what surrounds every command: errors, exit codes, JSON."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from tunegate import __version__
from tunegate.errors import TunegateError

EXIT_CODES = """
Exit codes: 0 promoted, or registered as asked; 1 a crash; 2 bad input; 3 a gate said HOLD; 4 REJECT; 5 INVALID;
75 training stopped with a checkpoint, try again; 130 interrupted (tunegate resume RUN goes on).
"""

app = typer.Typer(
    name="tunegate",
    help="Instruction tuning with gates: SFT, reward model, PPO, and promotion only when it was earned.",
    epilog=EXIT_CODES.strip(),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"tunegate {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = (
        False
    ),
) -> None:
    pass


def emit_json(value: Any) -> None:
    """Print one JSON document to standard output."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def run_app() -> None:
    """Run the command line; a foreseen failure is one readable message and its exit code."""
    from tunegate.cli import (  # noqa: F401  (they register their commands)
        chat,
        cluster,
        data,
        evaluate,
        gates,
        models,
        runs,
        spec,
        storage,
        train,
    )

    try:
        app()
    except TunegateError as error:
        if "--json" in sys.argv:
            emit_json({"error": {"kind": type(error).__name__, "message": str(error), "key": error.key}})
        else:
            typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
