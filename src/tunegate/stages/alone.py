"""One training stage by itself: with the records, checkpoints and MLflow run that it has in a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tunegate import __version__
from tunegate.config import TuneSpec
from tunegate.data import read_records
from tunegate.errors import DataError, SpecError
from tunegate.stages import ingest, ppo, reward, sft, validate
from tunegate.stages.context import ResolvedSpec, mark_absent, scratch
from tunegate.stages.finish import close_run
from tunegate.stages.observe import StageObserver
from tunegate.storage.manifest import MANIFEST_NAME, verify, write_manifest
from tunegate.storage.runs import RunRecord, RunStore, StageRecord, now
from tunegate.storage.stores import link_tree

TrainingStage = Literal["sft", "reward", "ppo"]


@dataclass(frozen=True)
class Inputs:
    """What a stage starts from; folders that are not given are made, or do without.

    Attributes:
        dataset: Clean data, e.g. from `tunegate data validate`; unset ingests and checks the spec's sources.
        model: The model to start from; unset means the spec's base model.
        reward: The reward model, for `ppo`.
        judge: The judge, for `ppo`.
    """

    dataset: Path | None = None
    model: Path | None = None
    reward: Path | None = None
    judge: Path | None = None


@dataclass(frozen=True)
class Finished:
    """A stage that has run.

    Attributes:
        record: Its record.
        model: The folder that it made.
        judge: Folder of the judge, after `reward`, if there is one.
    """

    record: StageRecord
    model: Path
    judge: Path | None = None


def run_alone(stage: TrainingStage, spec: TuneSpec, run_id: str, inputs: Inputs) -> Finished:
    """Run one stage to its end; called again with the same run id it goes on where it was.

    Args:
        stage: Which.
        spec: The resolved spec.
        run_id: Id of the run.
        inputs: What to start from.

    Raises:
        SpecError: Something that the stage needs was not given.
        DataError: The data gate said INVALID.
        SystemExit: With status 75 after SIGTERM, with a checkpoint written.
    """
    if stage == "ppo" and inputs.reward is None and spec.rollouts.reward_function is None and spec.last_stage != "dpo":
        raise SpecError(
            f"{spec.last_stage} needs a reward",
            key="--reward",
            fix="give the folder of a reward model (tunegate reward makes one), or set ppo.reward_function",
        )
    store = RunStore(spec.storage.root, run_id)
    if store.read_run() is None:
        store.write_run(
            RunRecord(
                run_id=run_id,
                name=spec.name,
                pipeline=f"stage {stage}",
                status="running",
                started=now(),
                spec=spec.model_dump(mode="json"),
                spec_digest=spec.digest(),
                code_version=__version__,
            )
        )
    else:
        store.update_run(status="running", ended=None, error=None, failed_stage=None, verdict=None)
    state = "FAILED"
    try:
        finished = _run(stage, spec, run_id, inputs, store)
        state = "SUCCEEDED"
    finally:
        close_run(store, state=state)
        store.update_run(verdict=None)  # one stage's gate is no word on whether a model may be promoted
    return finished


def _run(stage: TrainingStage, spec: TuneSpec, run_id: str, inputs: Inputs, store: RunStore) -> Finished:
    folder = scratch(spec, run_id).absolute() / "artifacts"
    spec_path = folder / "spec"
    ResolvedSpec(spec, run_id).write(spec_path)
    data, base = _data_and_base(spec, spec_path, folder, inputs)
    start = base if inputs.model is None else _artifact(inputs.model, folder / "start", "model")
    model, judge = folder / f"{stage}-model", folder / "judge"
    if stage == "sft":
        sft.run(spec=spec_path, dataset=data, base_model=start, model=model)
    elif stage == "reward":
        reward.run(spec=spec_path, dataset=data, sft_model=start, model=model, judge=judge)
    else:
        ppo.run(
            spec=spec_path,
            dataset=data,
            sft_model=start,
            reward=_optional(inputs.reward, folder / "given-reward", "no reward model was given"),
            judge=_optional(inputs.judge, folder / "given-judge", "no judge was given"),
            model=model,
        )
    record = store.read_stage(stage)
    assert record is not None  # the stage has written it
    return Finished(record, model, judge if stage == "reward" and spec.reward.judge.enabled else None)


def _data_and_base(spec: TuneSpec, spec_path: Path, folder: Path, inputs: Inputs) -> tuple[Path, Path]:
    """Clean data and the base model."""
    base = folder / "base"
    if inputs.dataset is not None:
        data = _artifact(inputs.dataset, folder / "given-data", "dataset")
        if inputs.model is None and not (base / MANIFEST_NAME).is_file():
            _sealed(base, "model", lambda: _resolve(spec, data, base))
        return data, base
    raw, clean, quarantine = folder / "raw", folder / "clean", folder / "quarantine"
    ingest.run(spec=spec_path, dataset=raw, base_model=base)
    verdict = validate.run(
        spec=spec_path,
        dataset=raw,
        base_model=base,
        clean=clean,
        quarantine=quarantine,
        report=folder / "data-report.html",
    )
    if verdict != "PROMOTE":
        raise DataError(
            f"the data gate said {verdict}",
            key="data",
            fix=f"read {folder / 'data-report.html'}, mend the sources, or give clean data with --dataset",
        )
    return clean, base


def _resolve(spec: TuneSpec, data: Path, out: Path) -> None:
    from tunegate.training.models import resolve_model

    texts = [message["content"] for row in read_records(data, "sft", "train") for message in row.messages]
    observer = StageObserver("model")
    resolve_model(spec.model, out, texts=texts, seed=spec.stage_seed("ingest"), observer=observer)


def _artifact(given: Path, copy: Path, kind: str) -> Path:
    """A folder as an artifact: itself if it is sealed, else a sealed copy (hard links where that goes)."""
    if (given / MANIFEST_NAME).is_file():
        verify(given)
        return given
    if not (copy / MANIFEST_NAME).is_file():
        if not given.is_dir():
            raise SpecError("there is no such folder", key=kind, value=str(given), fix="check the path")
        _sealed(copy, kind, lambda: link_tree(given, copy))
    return copy


def _optional(given: Path | None, copy: Path, reason: str) -> Path:
    if given is not None:
        return _artifact(given, copy, "reward_model")
    if not (copy / MANIFEST_NAME).is_file():
        copy.mkdir(parents=True, exist_ok=True)
        _sealed(copy, "reward_model", lambda: mark_absent(copy, reason))
    return copy


def _sealed(folder: Path, kind: str, make: Callable[[], None]) -> None:
    make()
    write_manifest(folder, kind=kind, parents={}, spec_digest="", seeds={})
