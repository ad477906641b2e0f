"""README pages of components and pipelines, made from their docstrings so that they cannot drift apart."""

from __future__ import annotations

from importlib import import_module, resources
from typing import Any, NamedTuple

import yaml

COMPONENTS = (
    "preflight",
    "ingest",
    "validate_data",
    "fetch_model",
    "sft",
    "guard",
    "reward_model",
    "ppo",
    "evaluate",
    "decide",
    "register",
    "promote",
    "finish",
)


class _Pipeline(NamedTuple):
    """What the README of a pipeline says besides its parameters."""

    title: str
    summary: str
    edges: tuple[str, ...]
    command: str


_PIPELINES = {
    "instruction_tuning": _Pipeline(
        "Instruction tuning",
        "SFT, reward model and PPO, evaluated and gated; the model is registered only when it earned it.",
        (
            "preflight --> ingest --> validate{data gate}",
            "validate -->|PROMOTE| sft --> guard{safety after SFT}",
            "guard -->|yes| reward{reward model gate}",
            "reward -->|yes| ppo --> evaluate --> decide{gates}",
            "decide -->|PROMOTE or HOLD| register -->|PROMOTE, when asked| promote",
        ),
        "tunegate run SPEC.yaml",
    ),
    "evaluation": _Pipeline(
        "Evaluation",
        "A model that exists (a folder, a run's, a registered version) is measured beside base model and champion, and "
        "the gates say what they make of it. Nothing is trained, registered or promoted. Start it by hand, or on a "
        "schedule to see whether the champion still holds.",
        ("preflight --> ingest --> fetch[fetch model] --> evaluate --> decide{gates}",),
        "tunegate evaluate MODEL",
    ),
}


def component_spec(name: str) -> Any:
    """The KFP component spec of a component, by its folder's name."""
    return getattr(import_module(f"tunegate.components.{name}.component"), name).component_spec


def component_metadata(name: str) -> dict[str, Any]:
    """The content of a component's `metadata.yaml`."""
    text = (resources.files("tunegate.components") / name / "metadata.yaml").read_text()
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def component_readme(name: str) -> str:
    """The README of a component."""
    spec, metadata = component_spec(name), component_metadata(name)
    lines = [
        f"# {metadata['title']}",
        "",
        "<!-- Made from the docstring by `make compile`; edit component.py. -->",
        "",
        spec.description.strip(),
        "",
        f"Calls `{metadata['library_call']}`. Accelerator: {metadata['accelerator']}.",
        "",
    ]
    inputs = [
        (key, _type(value), _default(value), value.description or "") for key, value in (spec.inputs or {}).items()
    ]
    said = _said_in_docstring(name)
    outputs = [
        (key, _type(value), value.description or said.get(key, "")) for key, value in (spec.outputs or {}).items()
    ]
    if inputs:
        lines += ["## Inputs", "", "| name | type | default | meaning |", "|---|---|---|---|"]
        lines += [f"| `{n}` | {t} | {d} | {_cell(text)} |" for n, t, d, text in inputs]
        lines.append("")
    if outputs:
        lines += ["## Outputs", "", "| name | type | meaning |", "|---|---|---|"]
        lines += [f"| `{n}` | {t} | {_cell(text)} |" for n, t, text in outputs]
        lines.append("")
    return "\n".join(lines)


def _said_in_docstring(name: str) -> dict[str, str]:
    """What the docstring says of each argument; KFP keeps this for inputs but not for output artifacts."""
    from docstring_parser import parse

    function = getattr(import_module(f"tunegate.components.{name}.component"), name).python_func
    parsed = parse(function.__doc__ or "")
    said = {p.arg_name: p.description or "" for p in parsed.params}
    if parsed.returns is not None:
        said["Output"] = parsed.returns.description or ""
    return said


def pipeline_readme(name: str) -> str:
    """The README of a pipeline, by its folder's name."""
    spec = getattr(import_module(f"tunegate.pipelines.{name}.pipeline"), name).component_spec
    about = _PIPELINES[name]
    lines = [
        f"# {about.title}",
        "",
        "<!-- Made from the docstring by `make compile`; edit pipeline.py. -->",
        "",
        about.summary,
        "",
        "```mermaid",
        "flowchart LR",
        *(f"  {edge}" for edge in about.edges),
        "  finish[finish: exit handler, always runs]",
        "```",
        "",
        f"Run it here with `{about.command}`, or upload `pipeline.yaml` to Kubeflow Pipelines.",
        "",
        "## Parameters",
        "",
        "Empty strings and zeros mean “as the spec says”. A later layer wins: profile, spec, parameters, overrides.",
        "",
        "| name | type | default | meaning |",
        "|---|---|---|---|",
    ]
    for key, value in spec.inputs.items():
        lines.append(f"| `{key}` | {_type(value)} | {_default(value)} | {_cell(value.description or '')} |")
    return "\n".join([*lines, ""])


def _type(value: Any) -> str:
    return str(value.type).removeprefix("system.").split("@")[0]


def _default(value: Any) -> str:
    if value.default is None:
        return ""
    return f"`{value.default!r}`" if value.default not in ("", {}, 0, 0.0, False) else "–"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
