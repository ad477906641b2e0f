"""The model card of a registered version, in the format of the Hugging Face Hub, from plain facts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml


def model_card(facts: Mapping[str, Any]) -> str:
    """Write a model card.

    Every part is optional: what is not known is said to be unknown where its absence matters (licence, data,
    evaluation) and left out elsewhere.

    Args:
        facts: Plain values under these keys:

            - `name`, `run_id`, `created`, `code_version`, `summary`: text.
            - `methods`: how it was trained, as the Hub's tags: `sft`, `ppo`, …
            - `base_model`, `base_license`, `license`, `language`: text.
            - `verdict`: the gates' verdict; `reasons`: a list of sentences.
            - `data`: a list of mappings, one a dataset: `name`, `source`, `records`, `license`, `digest`, `notes`.
            - `training`: a list of mappings, one a stage: `stage`, `method`, `figures` (a mapping of numbers),
              `settings` (a mapping).
            - `evaluation`: a list of mappings, one a measure: `name`, `estimate`, `low`, `high`, `n`, `limit`,
              `unit`, `verdict`, `reason`; `low` and `high` are the ends of the interval at `confidence`.
            - `measures`: the same without limit and verdict, for everything that was measured.
            - `confidence`: level of the intervals, e.g. 0.95.
            - `limits`: a list of sentences on what the model is not good for.
            - `lineage`: a mapping of role to digest.

    Returns:
        Markdown with a YAML header that the Hub understands.
    """
    parts = [_header(facts), f"# {facts.get('name', 'Model')}", _intro(facts)]
    parts += [_section("Gates", _gates(facts)), _section("Data", _data(facts.get("data") or []))]
    parts += [_section("Training", _training(facts.get("training") or []))]
    parts += [_section("Evaluation", _evaluation(facts)), _section("Limits", _limits(facts.get("limits") or []))]
    parts += [_section("Licence", _licence(facts)), _section("Lineage", _lineage(facts.get("lineage") or {}))]
    parts += [_section("Use", _use(facts))]
    return "\n\n".join(part for part in parts if part).rstrip() + "\n"


def _header(facts: Mapping[str, Any]) -> str:
    content: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if facts.get("license"):
        content["license"] = facts["license"]
    if facts.get("language"):
        content["language"] = facts["language"]
    if facts.get("base_model"):
        content["base_model"] = facts["base_model"]
    content["tags"] = ["tunegate", *(facts.get("methods") or ("sft", "ppo"))]
    return f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True).rstrip()}\n---"


def _intro(facts: Mapping[str, Any]) -> str:
    text = str(facts.get("summary") or "")
    if not text:
        base = facts.get("base_model")
        text = "An instruction-tuned language model" + (f" made from `{base}`" if base else "")
        text += " by supervised fine-tuning, a reward model and PPO."
    known = {"Run": facts.get("run_id"), "Made": facts.get("created"), "Tunegate": facts.get("code_version")}
    line = ", ".join(f"{label} `{value}`" for label, value in known.items() if value)
    return f"{text}\n\n{line}" if line else text


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _gates(facts: Mapping[str, Any]) -> str:
    if not facts.get("verdict"):
        return ""
    lines = [f"Verdict: **{facts['verdict']}**"]
    lines += [f"- {reason}" for reason in facts.get("reasons") or []]
    return lines[0] + ("\n\n" + "\n".join(lines[1:]) if len(lines) > 1 else "")


def _data(datasets: Sequence[Mapping[str, Any]]) -> str:
    if not datasets:
        return "Unknown: no record of the training data was kept with this version."
    columns = ("name", "source", "records", "license", "digest", "notes")
    return _table(
        ("Dataset", "Source", "Records", "Licence", "Digest", "Notes"),
        ([_cell(d.get(c)) for c in columns] for d in datasets),
    )


def _training(stages: Sequence[Mapping[str, Any]]) -> str:
    blocks = []
    for stage in stages:
        figures = {**(stage.get("settings") or {}), **(stage.get("figures") or {})}
        method = f": {stage['method']}" if stage.get("method") else ""
        rows = ([f"`{key}`", _cell(value)] for key, value in figures.items())
        blocks.append(f"### {stage.get('stage', 'Stage')}{method}\n\n{_table(('Setting or figure', 'Value'), rows)}")
    return "\n\n".join(blocks)


def _evaluation(facts: Mapping[str, Any]) -> str:
    measures = facts.get("evaluation") or []
    if not measures:
        return "None: this version was registered without an evaluation."
    level = facts.get("confidence")
    head = f"Intervals at {100 * float(level):g}% confidence.\n\n" if level else ""
    rows = (
        [*_measure(m), _number(m.get("limit"), unit=m.get("unit")), _cell(m.get("verdict")), _cell(m.get("reason"))]
        for m in measures
    )
    gates = _table(("Measure", "Estimate", "Interval", "n", "Limit", "Verdict", "Reason"), rows)
    everything = facts.get("measures") or []
    if not everything:
        return head + gates
    rest = _table(("Measure", "Estimate", "Interval", "n"), (_measure(m) for m in everything))
    return f"{head}{gates}\n\n### Everything that was measured\n\n{rest}"


def _measure(m: Mapping[str, Any]) -> list[str]:
    return [_cell(m.get("name")), _number(m.get("estimate"), unit=m.get("unit")), _interval(m), _cell(m.get("n"))]


def _limits(limits: Sequence[str]) -> str:
    given = [f"- {limit}" for limit in limits]
    given.append("- The evaluation covers the prompts that it names, in their languages; nothing is known beyond them.")
    given.append("- The reward model and the judges stand in for people and share their raters' and makers' biases.")
    return "\n".join(given)


def _licence(facts: Mapping[str, Any]) -> str:
    lines = [f"This model: {facts.get('license') or 'not stated; ask those who made it before using it elsewhere'}."]
    if facts.get("base_model"):
        lines.append(f"Base model `{facts['base_model']}`: {facts.get('base_license') or 'licence unknown'}.")
    return "\n".join(lines)


def _lineage(lineage: Mapping[str, str]) -> str:
    return (
        _table(("Made from", "Digest (sha256)"), ([role, f"`{digest}`"] for role, digest in lineage.items()))
        if lineage
        else ""
    )


def _use(facts: Mapping[str, Any]) -> str:
    if not facts.get("name"):
        return ""
    return (
        "```python\nimport mlflow.artifacts\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'path = mlflow.artifacts.download_artifacts("models:/{facts["name"]}@champion")\n'
        "tokenizer = AutoTokenizer.from_pretrained(path)\nmodel = AutoModelForCausalLM.from_pretrained(path)\n```"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def _interval(measure: Mapping[str, Any]) -> str:
    low, high = measure.get("low"), measure.get("high")
    if low is None and high is None:
        return "–"
    unit = measure.get("unit")
    return f"{_number(low, '−∞', unit=unit)} to {_number(high, '∞', unit=unit)}"


def _number(value: Any, missing: str = "–", *, unit: Any = None) -> str:
    if value is None:
        return missing
    number = float(value)
    if math.isinf(number):
        return "∞" if number > 0 else "−∞"
    return f"{100 * number:.1f}%" if unit == "share" else f"{number:.4g}"


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    # A bar or a line break would end the table's cell.
    return " ".join(str(value).replace("|", "\\|").split())
