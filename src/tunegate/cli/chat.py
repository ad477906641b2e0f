"""`chat`: talk to a model that was trained here."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunegate.cli.app import app, emit_json
from tunegate.cli.options import DEFAULT_ROOT, AsJson, Root
from tunegate.errors import ModelError

if TYPE_CHECKING:
    from tunegate.data.records import Messages


@app.command()
def chat(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_ALIAS",
            help="A model folder or s3:// prefix, a run (its last model), champion, candidate, or NAME@ALIAS.",
        ),
    ] = "candidate",
    message: Annotated[str | None, typer.Option("--message", "-m", help="Ask this one thing and leave.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 160,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Talk to a model."""
    from tunegate.training.ppo_config import SamplingSpec
    from tunegate.training.rollout import Generator

    with tempfile.TemporaryDirectory() as scratch:
        path = locate_model(model, root, Path(scratch))
        generator = Generator.load(path)
        sampling = SamplingSpec(max_new_tokens=max_tokens, temperature=temperature)
        history: Messages = []
        turn = 0
        while (text := message if message is not None else _ask()) is not None:
            history.append({"role": "user", "content": text})
            answer = generator.generate([history], sampling, seed=seed + turn)[0]
            history.append({"role": "assistant", "content": answer.text})
            turn += 1
            if as_json:
                emit_json({"model": str(path), "prompt": text, "answer": answer.text, "finished": answer.finished})
            else:
                typer.echo(answer.text if message is not None else f"\n{answer.text}\n")
            if message is not None:
                return


def _ask() -> str | None:
    """The next line of the person, or None at the end; `/exit` ends as well."""
    try:
        text = input("you> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
    return None if text.strip() in {"/exit", "/quit"} else text


def locate_model(name: str, root: str, scratch: Path) -> Path:
    """The folder of a model that is named by folder, run or registry alias.

    Args:
        name: As given by the person.
        root: Storage root with the runs and the local registry.
        scratch: Where a model is brought to that is not here.

    Raises:
        ModelError: Nothing goes by that name.
    """
    if (Path(name) / "config.json").is_file():
        return Path(name)
    from tunegate.cli.models import download_alias
    from tunegate.registry.names import ALIASES
    from tunegate.stages.fetch import model_of_run
    from tunegate.storage.stores import bring_tree

    uri = name if name.startswith("s3://") else model_of_run(root, name)
    if uri is not None and not uri.startswith("s3://"):
        return Path(uri)
    if uri is not None:
        bring_tree(uri, scratch / "model")
        return scratch / "model"
    found = download_alias(name, root, scratch)
    if found is None:
        raise ModelError(
            "there is no such model folder, run or alias",
            key="MODEL_OR_ALIAS",
            value=name,
            fix=f"a folder with config.json, a run of `tunegate runs`, {', '.join(ALIASES)}, or NAME@ALIAS",
        )
    return found
