"""What entitles a version to be promoted, and whether it still belongs to that version.

The chain: the version's tags are those that `registration.json` was written with; they name the digest of the model and
of `decision.json`; `decision.json` names the digest of the model that was judged; the model's `manifest.json` names the
digest of every file. A version is entitled only when every link holds at the moment of the promotion.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tunegate.errors import GateError, StorageError
from tunegate.registry import names
from tunegate.registry.session import Session, Version
from tunegate.storage.manifest import MANIFEST_NAME, digest_files, list_files, read_manifest


class GateFacts(BaseModel):
    """What the registry needs to know of one gate's result."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str
    verdict: str
    title: str = ""
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    limit: float | None = None
    unit: str = "plain"
    n: int | None = None


class DecisionFacts(BaseModel):
    """What the registry needs to know of a decision; other fields of `decision.json` pass through untouched."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    schema_version: int
    gates_version: int
    verdict: str
    reasons: list[str] = Field(default_factory=list)
    gates: list[GateFacts] = Field(default_factory=list)
    digests: dict[str, str] = Field(default_factory=dict)

    @property
    def model_digest(self) -> str:
        """Digest of the model that was judged."""
        return self.digests.get("candidate", "")

    @property
    def champion_digest(self) -> str:
        """Digest of the champion that it was compared with, empty when there was none."""
        return self.digests.get("champion", "")


def parse_decision(data: bytes, origin: str) -> DecisionFacts:
    """Read the bytes of a `decision.json`.

    Raises:
        GateError: They are not a decision.
    """
    try:
        return DecisionFacts.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise GateError(
            f"this is not a decision: {'.'.join(str(p) for p in first['loc'])}: {first['msg']}",
            key=origin,
            fix="run the decide stage again",
        ) from None


def digest_bytes(data: bytes) -> str:
    """The sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def file_of(path: Path, name: str) -> Path:
    """`path` itself, or the file `name` in it when it is a folder."""
    return path / name if path.is_dir() else path


def model_problems(folder: Path, digest: str) -> list[str]:
    """Compare a registered model's files with its manifest and the digest it is registered under.

    Args:
        folder: The version's artifacts: the model, and beside it the model card and the evidence folder.
        digest: The digest that the model must have.

    Returns:
        What is wrong, in sentences; empty when the files are exactly those that were registered.
    """
    try:
        manifest = read_manifest(folder)
    except StorageError as error:
        return [error.reason]
    expected = {entry.path: entry.sha256 for entry in manifest.files}
    actual = {entry.path: entry.sha256 for entry in list_files(folder) if not _is_ours(entry.path, expected)}
    problems = [f"{path} is missing" for path in sorted(expected.keys() - actual.keys())]
    problems += [f"{path} was added" for path in sorted(actual.keys() - expected.keys())]
    problems += [
        f"{path} was changed" for path in sorted(expected.keys() & actual.keys()) if expected[path] != actual[path]
    ]
    if manifest.digest != digest_files(manifest.files):
        problems.append(f"{MANIFEST_NAME} contradicts itself")
    if manifest.digest != digest:
        problems.append(f"the model's digest is {manifest.digest[:12]}…, the version is registered for {digest[:12]}…")
    return problems


def _is_ours(path: str, expected: Mapping[str, str]) -> bool:
    return path not in expected and (path == names.MODEL_CARD or path.startswith(f"{names.EVIDENCE_FOLDER}/"))


def evidence_problems(
    session: Session, version: Version, *, files: bool = True
) -> tuple[list[str], DecisionFacts | None]:
    """Check every link of the chain from a version to the evidence for it.

    Args:
        session: The registry.
        version: The version.
        files: Also hash the model's files (slow for large models on a remote store).

    Returns:
        What is wrong, in sentences, and the decision when it could be read.

    Raises:
        RegistryError: MLflow or the artifact store cannot be reached.
    """
    tags = version.tags
    missing = [t for t in (names.TAG_MODEL_DIGEST, names.TAG_DECISION_DIGEST, names.TAG_VERDICT) if not tags.get(t)]
    if missing:
        return [f"the version has no tag {tag}, so it did not come through the gates" for tag in missing], None
    with session.files(version) as folder:
        path = folder / names.EVIDENCE_FOLDER / names.DECISION_FILE
        if not path.is_file():
            return [f"{names.EVIDENCE_FOLDER}/{names.DECISION_FILE} is missing among the version's artifacts"], None
        data = path.read_bytes()
        problems: list[str] = []
        if digest_bytes(data) != tags[names.TAG_DECISION_DIGEST]:
            problems.append("decision.json is not the one that the version was registered with (its digest differs)")
        try:
            decision = parse_decision(data, version.uri)
        except GateError as error:
            return [*problems, error.reason], None
        problems += _decision_problems(decision, tags)
        problems += _tag_problems(folder, version)
        if (evaluation := tags.get(names.TAG_EVALUATION_DIGEST)) is not None:
            problems += _evaluation_problems(folder, evaluation)
        if files:
            problems += model_problems(folder, tags[names.TAG_MODEL_DIGEST])
    return problems, decision


def _decision_problems(decision: DecisionFacts, tags: Mapping[str, str]) -> list[str]:
    problems = []
    if decision.model_digest != tags[names.TAG_MODEL_DIGEST]:
        problems.append(
            f"the decision judged the model {decision.model_digest[:12] or 'without digest'}…, "
            f"the version is the model {tags[names.TAG_MODEL_DIGEST][:12]}…"
        )
    if decision.verdict != tags[names.TAG_VERDICT]:
        problems.append(f"the decision says {decision.verdict}, the version's tag says {tags[names.TAG_VERDICT]}")
    return problems


def _tag_problems(folder: Path, version: Version) -> list[str]:
    """Compare the version's tags, which anybody can edit in MLflow's UI, with those it was registered with."""
    path = folder / names.EVIDENCE_FOLDER / names.REGISTRATION_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        name, recorded = str(content["name"]), dict(content["tags"])
    except (OSError, ValueError, KeyError, TypeError):
        return [f"{names.EVIDENCE_FOLDER}/{names.REGISTRATION_FILE} is missing or cannot be read"]
    if name != version.name:
        return [f"these files were registered as {name}, not as {version.name}"]
    return [
        f"the tag {key} was changed after the registration, from {value!r} to {version.tags.get(key)!r}"
        for key, value in recorded.items()
        if version.tags.get(key) != value
    ]


def _evaluation_problems(folder: Path, digest: str) -> list[str]:
    path = folder / names.EVIDENCE_FOLDER / names.EVALUATION_FOLDER
    if not path.is_dir():
        return ["the evaluation is missing among the version's artifacts"]
    return [] if digest_files(list_files(path)) == digest else ["the evaluation's files were changed"]


def to_tag(value: Mapping[str, Any]) -> str:
    """A small mapping as the value of a tag (compact JSON; MLflow's column takes 5,000 characters)."""
    text = json.dumps({k: v for k, v in value.items() if v is not None}, ensure_ascii=False, separators=(",", ":"))
    return text if len(text) <= 5000 else json.dumps({**value, "why": str(value.get("why", ""))[:1000] + "…"})[:5000]
