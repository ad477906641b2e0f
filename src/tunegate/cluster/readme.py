"""README pages of components and pipelines, made from their docstrings so that they cannot drift apart."""

from __future__ import annotations

from importlib import import_module, resources
from typing import Any

import yaml

COMPONENTS = (
    "preflight",
    "ingest",
    "validate_data",
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


def pipeline_readme() -> str:
    """The README of the `instruction-tuning` pipeline."""
    from tunegate.pipelines.instruction_tuning.pipeline import instruction_tuning

    spec = instruction_tuning.component_spec
    lines = [
        "# Instruction tuning",
        "",
        "<!-- Made from the docstring by `make compile`; edit pipeline.py. -->",
        "",
        "SFT, reward model and PPO, evaluated and gated; the model is registered only when it earned it.",
        "",
        "```mermaid",
        "flowchart LR",
        "  preflight --> ingest --> validate{data gate}",
        "  validate -->|PROMOTE| sft --> guard{safety after SFT}",
        "  guard -->|yes| reward{reward model gate}",
        "  reward -->|yes| ppo --> evaluate --> decide{gates}",
        "  decide -->|PROMOTE or HOLD| register -->|PROMOTE, when asked| promote",
        "  finish[finish: exit handler, always runs]",
        "```",
        "",
        "Run it here with `tunegate run SPEC.yaml`, or upload `pipeline.yaml` to Kubeflow Pipelines.",
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
