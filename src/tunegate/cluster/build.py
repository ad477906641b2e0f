"""Writes what is generated and committed: the compiled pipelines, READMEs of components, the spec's JSON schema.

`python -m tunegate.cluster.build` writes; with `--check` it only compares and exits 1 on a difference.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

from tunegate.cluster.readme import COMPONENTS, component_readme, pipeline_readme

ROOT = Path(__file__).resolve().parents[3]


PIPELINES = ("instruction_tuning", "evaluation")


def compile_pipeline(name: str) -> str:
    """A pipeline as IR YAML, by its folder's name."""
    from kfp import compiler

    pipeline = getattr(import_module(f"tunegate.pipelines.{name}.pipeline"), name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(pipeline, str(path))
        return path.read_text()


def _schema() -> str:
    from tunegate.config import spec_schema

    return spec_schema()


GENERATED: dict[str, Callable[[], str]] = {
    **{f"pipelines/{name}/pipeline.yaml": partial(compile_pipeline, name) for name in PIPELINES},
    **{f"pipelines/{name}/README.md": partial(pipeline_readme, name) for name in PIPELINES},
    "docs/spec.schema.json": _schema,
    **{f"components/{name}/README.md": partial(component_readme, name) for name in COMPONENTS},
}


def main(arguments: list[str]) -> int:
    """Write or check every generated file; the exit status."""
    stale = []
    for name, make in GENERATED.items():
        path, text = ROOT / name, make()
        if path.exists() and path.read_text() == text:
            continue
        stale.append(name)
        if "--check" not in arguments:
            path.write_text(text)
            print(f"wrote {name}")
    if "--check" in arguments and stale:
        print(f"out of date: {', '.join(stale)}; run: make compile", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
