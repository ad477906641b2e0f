"""From a run's records to the facts that the report shows. Only this package knows the files; all are optional."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from tunegate.report import wording
from tunegate.report.facts import Cost, Facts, Lineage, LineageNode, Panel, Registration
from tunegate.report.reading_curves import read_panels
from tunegate.report.reading_data import read_data
from tunegate.report.reading_effects import read_effects, read_remarks, read_reward
from tunegate.report.reading_gates import read_gates
from tunegate.report.reading_models import read_evaluation_facts, read_examples
from tunegate.report.reading_versions import read_versions
from tunegate.report.tolerant import first, load, mapping, mappings, real, string, strings
from tunegate.storage.runs import RunStore, StageRecord

_CURVE_STAGES = ("sft", "reward", "ppo")
_SECRET = re.compile(r"password|passwd|secret|token$|api_?key|credential", re.IGNORECASE)
_HIDDEN = "(hidden)"


def read_facts(run: RunStore) -> Facts:
    """Read everything that the report can show.

    Args:
        run: A run at any point of its life, or one that never began.

    Returns:
        The facts; what is missing is empty.
    """
    record = run.read_run()
    stages = sorted((s for s in run.stages() if s.stage != "finish"), key=_order)
    spec = without_secrets(record.spec) if record else {}
    evaluation = load(run, "evaluation.json")
    decision = load(run, "decision.json")
    sft, reward, ppo = (load(run, f"{name}.json") for name in ("sft", "reward", "ppo"))
    data = read_data(load(run, "validation.json"), load(run, "ingest.json"))
    plan = load(run, "plan.json")
    registration = _registration(stages)
    gates = read_gates(decision, [load(run, f"gate-{name}.json") for name in ("data", "sft", "reward")], stages)
    curves: dict[str, list[Panel]] = {}
    more: dict[str, list[Panel]] = {}
    for stage in dict.fromkeys((*_CURVE_STAGES, *(s.stage for s in stages))):
        main, rest = read_panels(stage, run.read_metrics(stage), spec)
        if main:
            curves[stage] = main
        if rest:
            more[stage] = rest
    from_evaluation = read_evaluation_facts(evaluation, spec, record.pipeline if record else "")
    if not from_evaluation["samples"]:
        from_evaluation["samples"] = read_examples(ppo)
    return Facts(
        run_id=run.run_id,
        run=record,
        stages=stages,
        outcome=wording.outcome(
            record,
            stages,
            gates,
            string(decision.get("verdict")),
            strings(decision.get("reasons")),
            data.reasons if data else [],
            registration,
        ),
        gates=gates,
        effects=read_effects(sft, reward, load(run, "judge.json"), ppo, spec),
        **from_evaluation,
        curves=curves,
        more_curves=more,
        remarks={name: read_remarks(name, result) for name, result in (("sft", sft), ("reward", reward), ("ppo", ppo))},
        reward=read_reward(reward),
        data=data,
        lineage=_lineage(load(run, "lineage.json"), stages, registration),
        cost=_cost(load(run, "cost.json"), plan),
        planned_seconds=_planned_seconds(plan),
        registration=registration,
        versions=read_versions(load(run, "balance.json"), registration),
        host={k: v for k, v in (record.host if record else {}).items() if v},
        spec=spec,
        report_uri=without_password(run.uri),
    )


def _order(stage: StageRecord) -> tuple[int, str]:
    """The pipeline's order for the stages that it has, then by start."""
    known = wording.STAGE_ORDER
    return (known.index(stage.stage) if stage.stage in known else len(known), stage.started)


def without_secrets(value: Any) -> Any:
    """A copy of a spec in which values under telling keys, and passwords inside URLs, are hidden."""
    if isinstance(value, Mapping):
        return {
            k: _HIDDEN if isinstance(v, str) and v and _SECRET.search(str(k)) else without_secrets(v)
            for k, v in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [without_secrets(v) for v in value]
    return without_password(value) if isinstance(value, str) else value


def without_password(uri: str) -> str:
    """A URL without user and password: `https://me:secret@host/x` becomes `https://host/x`."""
    if "://" not in uri or "@" not in uri:
        return uri
    try:
        parts = urlsplit(uri)
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    except ValueError:
        return _HIDDEN


def _registration(stages: list[StageRecord]) -> Registration | None:
    """Name, version and aliases from what the register and promote stages noted down."""
    values: dict[str, str] = {}
    aliases: list[str] = []
    for stage in stages:
        if stage.stage in {"register", "promote"} and stage.status == "done":
            values.update({k: v for k, v in stage.values.items() if v})
            aliases += [
                a
                for part in (stage.values.get("alias"), stage.values.get("aliases"))
                if part
                for a in re.split(r"[,\s]+", part)
                if a
            ]
    name = first(values, "model_name", "model", "registered_model", "name")
    version = first(values, "version", "model_version")
    if not name or not version:
        return None
    return Registration(str(name), str(version), list(dict.fromkeys(aliases)))


def _lineage(
    content: Mapping[str, Any], stages: Sequence[StageRecord], registration: Registration | None
) -> Lineage | None:
    nodes = [
        LineageNode(string(n.get("name")), string(n.get("kind")), string(n.get("digest")))
        for n in mappings(content.get("nodes"))
        if n.get("name")
    ]
    edges = [(str(e[0]), str(e[1])) for e in content.get("edges") or [] if isinstance(e, (list, tuple)) and len(e) == 2]
    if nodes:
        return Lineage(nodes, edges)
    return _derived_lineage(stages, registration)


#: Name and colour of what the stages of the pipelines make.
_ARTIFACTS: dict[tuple[str, str], tuple[str, str]] = {
    ("ingest", "dataset"): ("Dataset", "other"),
    ("ingest", "base_model"): ("Base model", "anchor"),
    ("fetch", "candidate"): ("Evaluated model", "candidate"),
    ("fetch", "sft_model"): ("SFT model", "sft"),
    ("fetch", "reward"): ("Reward model", "reward"),
    ("fetch", "judge"): ("Judge", "reward"),
    ("validate", "clean"): ("Clean data", "other"),
    ("validate", "quarantine"): ("Quarantine", "other"),
    ("sft", "model"): ("SFT model", "sft"),
    ("guard", "evaluation"): ("Check after SFT", "other"),
    ("reward", "model"): ("Reward model", "reward"),
    ("reward", "judge"): ("Judge", "reward"),
    ("ppo", "model"): ("PPO model", "candidate"),
    ("evaluate", "evaluation"): ("Evaluation", "other"),
    ("decide", "decision"): ("Decision", "other"),
}
#: What each of its stages reads.
_INPUTS: dict[str, tuple[str, ...]] = {
    "validate": ("Dataset", "Base model"),
    "sft": ("Base model", "Clean data"),
    "guard": ("Base model", "SFT model", "Clean data"),
    "reward": ("SFT model", "Clean data"),
    "ppo": ("SFT model", "Reward model", "Judge", "Clean data"),
    "evaluate": (
        "Base model",
        "SFT model",
        "PPO model",
        "Evaluated model",
        "Reward model",
        "Judge",
        "Clean data",
        "Dataset",
    ),
    "decide": ("Evaluation", "PPO model", "Evaluated model"),
}


def _derived_lineage(stages: Sequence[StageRecord], registration: Registration | None) -> Lineage | None:
    """The graph that follows from the stages' outputs when no `lineage.json` was written."""
    nodes: list[LineageNode] = []
    edges: list[tuple[str, str]] = []
    for stage in stages:
        for output, ref in stage.outputs.items():
            name, role = _ARTIFACTS.get((stage.stage, output), (f"{stage.stage}.{output}", "other"))
            nodes.append(LineageNode(name, ref.kind, ref.digest, role))
            edges += [(source, name) for source in _INPUTS.get(stage.stage, ())]
    names = {node.name for node in nodes}
    if registration and "PPO model" in names:
        name = f"Version {registration.version}"
        nodes.append(LineageNode(name, "registered", "", "candidate"))
        edges += [("PPO model", name), ("Decision", name)]
    if "Clean data" in names:  # only without a data gate is the dataset itself what is evaluated on
        edges = [edge for edge in edges if edge != ("Dataset", "Evaluation")]
    edges = [edge for edge in edges if edge[0] in names]
    return Lineage(nodes, edges) if len(nodes) > 1 else None


def _cost(content: Mapping[str, Any], plan: Mapping[str, Any]) -> Cost | None:
    if not content:
        return None
    per_stage = {k: n for k, v in mapping(content.get("per_stage")).items() if (n := real(v)) is not None}
    total = real(content.get("total"))
    return Cost(
        currency=string(content.get("currency")),
        total=sum(per_stage.values()) if total is None and per_stage else total,
        hourly_price=real(content.get("hourly_price")),
        per_stage=per_stage,
        planned=real(first(plan, "cost", "total_cost")),
    )


def _planned_seconds(plan: Mapping[str, Any]) -> dict[str, float]:
    """Seconds by stage from `plan.json`, whose stages are a list of records or a mapping."""
    content = plan.get("stages")
    rows = mappings(content) or [{"stage": k, **mapping(v)} for k, v in mapping(content).items()]
    found = {string(first(r, "stage", "name")): real(first(r, "seconds", "estimated_seconds")) for r in rows}
    return {stage: value for stage, value in found.items() if stage and value is not None}
