"""The plan of a run: what would be done, how long it would take, what memory, disk and money it needs.

Nothing is started or loaded. Rows of the sources are counted; the formulas of the training stages live beside the
trainers, in `tunegate.training.estimate`. Treat times as good to a factor of two.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from tunegate.config import TuneSpec
from tunegate.data.config import SourceSpec
from tunegate.stages.supply import gate_contradictions
from tunegate.training.estimate import (
    Estimate,
    Hardware,
    ModelSize,
    estimate_dpo,
    estimate_ppo,
    estimate_reward,
    estimate_sft,
)

_CHARACTERS_PER_TOKEN = 4.2
_TEXT_SHARE = 0.75  # of the bytes of a JSON line, the rest are keys and ids
_TASK_SECONDS = 3.0  # start of a task's process that loads no model
_LOAD_SECONDS = 6.0  # of one that does, a model
_TASK_BYTES = 600 * 2**20
_SWAPS_PER_TEMPLATE = 4
_OPTIONS_PER_TASK = 4
_OPTIONS_PER_QUESTION = 3
_QUESTION_TOKENS = 100
_TEMPLATES_PER_SET = 25  # as in BBQ


class PlannedStage(BaseModel):
    """One stage of the plan."""

    model_config = ConfigDict(extra="forbid")

    stage: str
    what: str
    seconds: float
    memory_bytes: int
    disk_bytes: int
    cost: float


class Plan(BaseModel):
    """What a run would do."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = 1
    stages: list[PlannedStage]
    seconds: float
    memory_bytes: int
    """Of the largest stage; they run one after the other."""
    disk_bytes: int
    cost: float
    currency: str
    hourly_price: float
    remarks: list[str]
    warnings: list[str] = []
    """Gates that no candidate can pass with these settings and sources."""


@dataclass(frozen=True)
class _Rows:
    count: int
    tokens: float
    """Tokens a row."""

    def part(self, share: float) -> int:
        """Rows of a split."""
        return round(self.count * share)


def make_plan(spec: TuneSpec, *, stages: Sequence[str] | None = None) -> Plan:
    """Estimate a run from its spec and the size of its sources.

    Args:
        spec: The run.
        stages: Only these are planned; None plans all.

    Returns:
        Stages with seconds, peak memory, disk and cost; remarks say what was assumed, warnings which gates no candidate
        can pass with these limits and prompts.
    """
    remarks: list[str] = []
    hardware = Hardware.here()
    remarks.append(
        f"times are for {hardware.name} {'with' if hardware.bf16 else 'without'} bf16 matrix instructions; "
        "a GPU is far faster"
    )
    size = ModelSize.of(spec.model)
    if size is None:
        remarks.append(
            f"the size of {spec.model.source} is not known before it is fetched; 1.1B parameters were assumed"
        )
        size = ModelSize(1_100_000_000, 22, 2048, 32_000)
    heldout = spec.data.heldout_fraction
    sft, pairs = _rows(spec.data.sft, remarks), _rows(spec.data.preferences, remarks)
    prompts = _rows(spec.data.evaluation, remarks)
    # A pair's line holds the prompt and two responses of about equal length, the prompt being half as long as one.
    sequence = pairs.tokens * 0.6
    trained = [
        estimate_sft(
            size,
            spec.sft,
            hardware,
            rows=sft.part(1 - heldout),
            mean_tokens=sft.tokens,
            heldout_rows=sft.part(heldout),
        ),
        estimate_reward(
            size,
            spec.reward,
            hardware,
            pairs=pairs.part(1 - heldout),
            ratings=0,
            mean_tokens=sequence,
            heldout_pairs=pairs.part(heldout),
        ),
        estimate_dpo(
            size,
            spec.dpo,
            hardware,
            pairs=pairs.part(1 - heldout),
            mean_tokens=sequence,
            mean_prompt_tokens=prompts.tokens,
            heldout_pairs=pairs.part(heldout),
            heldout_prompts=(sft.part(heldout) + pairs.part(heldout)),
        )
        if spec.last_stage == "dpo"
        else estimate_ppo(
            size,
            spec.rollouts,
            hardware,
            mean_prompt_tokens=prompts.tokens,
            heldout_prompts=(sft.part(heldout) + pairs.part(heldout)),
        ),
    ]
    processes = spec.distributed.processes
    if processes != "auto" and processes > 1:
        # Processes of one machine share its cores, but each has memory of its own.
        trained = [replace(each, memory_bytes=each.memory_bytes * processes) for each in trained]
        remarks.append(f"training in {processes} processes: their memory together, on a machine without GPUs")
    weights = size.parameters * 2
    planned = [
        (
            "ingest",
            f"{sft.count} conversations, {pairs.count} pairs, {prompts.count} prompts",
            Estimate(_LOAD_SECONDS, _TASK_BYTES + weights, weights),
        ),
        ("validate", "row and dataset checks, data gate", Estimate(_TASK_SECONDS, _TASK_BYTES, 0)),
        ("sft", f"{sft.part(1 - heldout)} conversations x {spec.sft.epochs} epochs, {spec.sft.method}", trained[0]),
        _guard(spec, size, hardware, prompts),
        (
            "reward",
            f"{pairs.part(1 - heldout)} pairs x {spec.reward.epochs} epochs, {spec.reward.trunk} trunk"
            + (", judge" if spec.reward.judge.enabled else ""),
            trained[1],
        ),
        (
            "ppo",
            _last_stage(spec, pairs.part(1 - heldout)),
            trained[2],
        ),
        _evaluation(spec, size, hardware, prompts, sft),
        ("decide", "gates, registration, report", Estimate(4 * _TASK_SECONDS, _TASK_BYTES, weights)),
    ]
    price = spec.cost.hourly_price
    listed = [
        PlannedStage(
            stage=stage,
            what=what,
            seconds=round(estimate.seconds, 1),
            memory_bytes=estimate.memory_bytes,
            disk_bytes=estimate.disk_bytes,
            cost=estimate.seconds / 3600 * price,
        )
        for stage, what, estimate in planned
        if stages is None or stage in stages
    ]
    return Plan(
        stages=listed,
        seconds=round(sum(s.seconds for s in listed), 1),
        memory_bytes=max(s.memory_bytes for s in listed),
        disk_bytes=sum(s.disk_bytes for s in listed),
        cost=sum(s.cost for s in listed),
        currency=spec.cost.currency,
        hourly_price=price,
        remarks=remarks,
        warnings=gate_contradictions(spec),
    )


def _last_stage(spec: TuneSpec, pairs: int) -> str:
    """What the third stage does, in a few words."""
    if spec.last_stage == "dpo":
        return f"DPO: {pairs} pairs x {spec.dpo.epochs} epochs, {spec.dpo.method}"
    ppo = spec.rollouts
    responses = f" x {ppo.group_size} responses" if ppo.grouped else ""
    head = f"{spec.last_stage.upper()}: " if ppo.grouped else ""
    return f"{head}{ppo.steps} steps x {ppo.prompts_per_update} prompts{responses} x {ppo.epochs} epochs, {ppo.method}"


def _evaluation(
    spec: TuneSpec, size: ModelSize, hardware: Hardware, prompts: _Rows, sft: _Rows
) -> tuple[str, str, Estimate]:
    """Generation of every model's answers, their scores, likelihoods and swaps."""
    evaluation = spec.evaluation
    asked = min(prompts.count, sum(evaluation.cap(tag) for tag in ("harmful", "lookalike", "everyday")))
    attacked = min(evaluation.attacks.prompts, evaluation.cap("harmful"), prompts.count)
    asked += len(evaluation.attacks.names) * attacked
    models = 2 + evaluation.sft_share
    response = 0.6 * evaluation.decoding.max_new_tokens
    swaps = len(evaluation.bias.categories) * evaluation.bias.templates * _SWAPS_PER_TEMPLATE
    generated = models * asked * response + 2 * swaps * evaluation.bias.max_new_tokens
    generated += evaluation.sanity.kl_prompts * response
    scored = 2 * models * asked * (prompts.tokens + response)
    likelihood = min(evaluation.capability.conversations, sft.part(spec.data.heldout_fraction))
    likelihood += _OPTIONS_PER_TASK * evaluation.capability.tasks
    scored += 3 * likelihood * sft.tokens
    questions = min(
        sum(_measure(SourceSpec(uri=uri), [])[0] for uri in evaluation.bias.questions),
        _TEMPLATES_PER_SET * len(evaluation.bias.questions) * evaluation.bias.questions_per_template,
    )
    scored += models * questions * _OPTIONS_PER_QUESTION * _QUESTION_TOKENS
    seconds = 4 * _LOAD_SECONDS + scored * 2 * size.parameters / hardware.training_flops
    seconds += generated * size.parameters * 2 / hardware.generated_bytes
    what = f"{asked} prompts on base, SFT and candidate"
    return ("evaluate", what, Estimate(seconds, 2 * _TASK_BYTES + 2 * size.parameters * 2, 0))


def _guard(spec: TuneSpec, size: ModelSize, hardware: Hardware, prompts: _Rows) -> tuple[str, str, Estimate]:
    """Short answers of base and SFT model to a few prompts."""
    section = spec.gates.after_sft
    if not section.enabled:
        return ("guard", "switched off", Estimate(_TASK_SECONDS, _TASK_BYTES, 0))
    asked = min(prompts.count, 2 * section.prompts)
    shorter = min(section.max_new_tokens, spec.evaluation.decoding.max_new_tokens)
    seconds = 2 * _LOAD_SECONDS + 2 * asked * 0.6 * shorter * size.parameters * 2 / hardware.generated_bytes
    return ("guard", f"{asked} prompts on base and SFT", Estimate(seconds, _TASK_BYTES + 2 * size.parameters * 2, 0))


def _rows(sources: list[SourceSpec], remarks: list[str]) -> _Rows:
    """Rows and tokens of JSON-lines sources, counted; other forms are estimated from their size."""
    count, size = 0, 0
    for source in sources:
        found = _measure(source, remarks)
        taken = min(found[0], source.cap or found[0])
        count += taken
        size += int(found[1] * taken / max(found[0], 1))
    tokens = size * _TEXT_SHARE / _CHARACTERS_PER_TOKEN / max(count, 1)
    return _Rows(count, tokens)


def _measure(source: SourceSpec, remarks: list[str]) -> tuple[int, int]:
    """Rows and bytes of a source."""
    if source.uri.startswith("starter:"):
        data = (resources.files("tunegate.starter") / source.uri.removeprefix("starter:")).read_bytes()
        return data.count(b"\n"), len(data)
    path = Path(source.uri)
    if not path.is_file():
        remarks.append(f"{source.uri} was not counted; 10,000 rows of 600 bytes were assumed")
        return 10_000, 6_000_000
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        rows = size = 0
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            for line in stream:
                rows += 1
                size += len(line)
        return rows, size
    size = path.stat().st_size
    remarks.append(f"{source.uri} was not counted; rows of 600 bytes were assumed")
    return max(1, size // 600), size
