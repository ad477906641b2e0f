"""What lies below a storage root, what of it is garbage, and its removal.

A run is kept while it is young, among the newest, still running, or was promoted; everything that a kept run refers to
is kept. The rest is garbage: old runs, artifacts that no run refers to, artifacts and uploads that were begun and never
finished. Nothing younger than a grace period is touched, since it may belong to a stage that is at work.

Removal keeps readers safe: of an artifact the manifest goes first (without it nothing is read), of a run its record
goes last (an interrupted removal is found and finished by the next one).
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from pydantic import BaseModel, ConfigDict, Field

from tunegate.errors import StorageError
from tunegate.storage.manifest import MANIFEST_NAME
from tunegate.storage.runs import OutputRef, RunRecord, RunStore, list_runs
from tunegate.storage.stores import Entry, S3Store, Store, open_store

_RUNS, _ARTIFACTS = "runs", "artifacts"


class Retention(BaseModel):
    """What is kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keep_days: float = Field(default=30.0, ge=0)
    """Runs that began within so many days are kept."""

    keep_runs: int = Field(default=20, ge=0)
    """The newest runs, so many, are kept however old they are."""

    keep_promoted: bool = True
    """Runs that ended with PROMOTE are kept however old they are."""

    grace_hours: float = Field(default=24.0, ge=0)
    """Artifacts and uploads that no run refers to are kept for so long: a stage may be about to refer to them."""


class Holding(BaseModel):
    """Something that lies below a storage root."""

    model_config = ConfigDict(frozen=True)

    kind: str
    """`run`, `artifact`, `unfinished artifact` (no manifest) or `unfinished upload`."""
    key: str
    """Below the root; of an unfinished upload the object's."""
    size: int
    """Bytes."""
    files: int
    modified: datetime
    """When the youngest of its files was written."""
    why: str
    """Why it is kept, or why it is garbage."""
    garbage: bool
    upload_id: str = ""
    """Of an unfinished upload."""


def survey(root: str, retention: Retention | None = None, *, at: datetime | None = None) -> list[Holding]:
    """Everything that lies below a storage root, and what of it is garbage.

    Args:
        root: A folder or `s3://bucket/prefix`.
        retention: What is kept; by default the last 30 days, the newest 20 runs, and what was promoted.
        at: The time to judge by; now by default.

    Returns:
        Runs, oldest first; then artifacts; then unfinished uploads.

    Raises:
        StorageError: The root cannot be read.
    """
    retention = retention or Retention()
    at = at or datetime.now(UTC)
    store = open_store(root)
    records = list(list_runs(root))
    outputs = {record.run_id: _outputs(root, record.run_id) for record in records}
    kept = _kept_runs(records, outputs, retention, at, store)
    holdings = [
        _holding("run", f"{_RUNS}/{name}", entries, *_run_fate(name, kept, records))
        for name, entries in _grouped(store, _RUNS).items()
    ]
    used: dict[str, str] = {}
    for name in kept:
        for output in outputs[name]:
            used.setdefault(output.uri.rsplit("/", 1)[-1], name)
    youngest = at - timedelta(hours=retention.grace_hours)
    for name, entries in _grouped(store, _ARTIFACTS).items():
        whole = any(entry.key == f"{_ARTIFACTS}/{name}/{MANIFEST_NAME}" for entry in entries)
        kind = "artifact" if whole else "unfinished artifact"
        if whole and name in used:
            why, garbage = f"used by {used[name]}", False
        elif max(entry.modified for entry in entries) > youngest:
            why, garbage = "young", False
        else:
            why, garbage = "no run refers to it" if whole else "it was never finished", True
        holdings.append(_holding(kind, f"{_ARTIFACTS}/{name}", entries, why, garbage))
    order = {record.run_id: record.started for record in records}
    holdings.sort(key=lambda h: (h.kind != "run", order.get(h.key.removeprefix(f"{_RUNS}/"), ""), h.key))
    return holdings + _uploads(store, youngest)


def collect(root: str, holdings: Iterable[Holding]) -> None:
    """Remove the garbage among some holdings.

    Args:
        root: Where they were surveyed.
        holdings: What `survey` returned; what is no garbage is left alone.

    Raises:
        StorageError: Something cannot be removed; what was removed before stays removed, and the rest is found again.
    """
    from tunegate.storage.transfer import UnfinishedUpload

    store = open_store(root)
    for holding in holdings:
        if not holding.garbage:
            continue
        if holding.kind == "unfinished upload":
            assert isinstance(store, S3Store)  # only they have uploads
            store.bucket.abort(UnfinishedUpload(store.key(holding.key), holding.upload_id, holding.modified))
        elif holding.kind == "run":
            store.remove(holding.key, last="run.json")
        else:
            store.remove(holding.key)


def _outputs(root: str, run_id: str) -> list[OutputRef]:
    try:
        return [ref for stage in RunStore(root, run_id).stages() for ref in stage.outputs.values()]
    except ValueError as error:
        raise StorageError(
            f"the run's records cannot be read, so what it refers to is not known: {error}",
            key=f"{_RUNS}/{run_id}",
            fix="remove the run by hand if it is of no use",
        ) from error


def _kept_runs(
    records: list[RunRecord], outputs: dict[str, list[OutputRef]], retention: Retention, at: datetime, store: Store
) -> dict[str, str]:
    """The runs that are kept, with the reason."""
    newest = sorted(records, key=lambda record: record.started, reverse=True)
    oldest = at - timedelta(days=retention.keep_days)
    kept: dict[str, str] = {}
    for place, record in enumerate(newest):
        if datetime.fromisoformat(record.started) > oldest:
            kept[record.run_id] = "young"
        elif place < retention.keep_runs:
            kept[record.run_id] = f"among the newest {retention.keep_runs}"
        elif record.status == "running":
            kept[record.run_id] = "running"
        elif retention.keep_promoted and record.verdict == "PROMOTE":
            kept[record.run_id] = "promoted"
    # On a disk an artifact lies in the folder of the run that made it, and a run that took it over points there.
    waiting = list(kept)
    while waiting:
        user = waiting.pop()
        for ref in outputs[user]:
            owner = ref.uri.removeprefix(f"{store.uri}/{_RUNS}/").split("/", 1)[0]
            if owner in outputs and owner not in kept:
                kept[owner] = f"used by {user}"
                waiting.append(owner)
    return kept


def _run_fate(name: str, kept: dict[str, str], records: list[RunRecord]) -> tuple[str, bool]:
    if name in kept:
        return kept[name], False
    if all(record.run_id != name for record in records):
        return "it has no record, so it is not known what it is", False
    return "old", True


def _grouped(store: Store, base: str) -> dict[str, list[Entry]]:
    """The files below `base`, by the name that follows it."""
    groups: dict[str, list[Entry]] = {}
    for entry in store.entries(f"{base}/"):
        parts = entry.key.split("/", 2)
        if len(parts) == 3 and parts[0] == base:
            groups.setdefault(parts[1], []).append(entry)
    return groups


def _holding(kind: str, key: str, entries: list[Entry], why: str, garbage: bool) -> Holding:
    return Holding(
        kind=kind,
        key=key,
        size=sum(entry.size for entry in entries),
        files=len(entries),
        modified=max(entry.modified for entry in entries),
        why=why,
        garbage=garbage,
    )


def _uploads(store: Store, youngest: datetime) -> list[Holding]:
    if not isinstance(store, S3Store):
        return []
    skip = len(store.key("x")) - 1
    found = []
    for upload in store.bucket.unfinished(store.key("")):
        old = upload.started <= youngest
        why = "it was never finished" if old else "young"
        found.append(
            Holding(
                kind="unfinished upload",
                key=upload.key[skip:],
                size=0,
                files=0,
                modified=upload.started,
                why=why,
                garbage=old,
                upload_id=upload.upload_id,
            )
        )
    return found
