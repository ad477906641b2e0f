"""How usefulness and safety moved over the versions of a registered model, read from the evidence of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from tunegate.errors import RegistryError
from tunegate.registry import names
from tunegate.registry.evidence import parse_decision
from tunegate.registry.session import RegisteredName, Session, Version

_EVALUATION_FILE = "evaluation.json"
BASE = "base"
"""Stands for the frozen base model among the versions' numbers."""


class Share(BaseModel):
    """A share with its two-sided interval."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    estimate: float
    low: float | None = None
    high: float | None = None
    n: int | None = None

    def turned(self) -> Share:
        """One minus the share."""
        low = None if self.high is None else 1 - self.high
        return Share(estimate=1 - self.estimate, low=low, high=None if self.low is None else 1 - self.low, n=self.n)


class BalancePoint(BaseModel):
    """Where one version stands."""

    model_config = ConfigDict(frozen=True)

    version: str
    """Its number, or `base`."""
    aliases: list[str] = []
    verdict: str = ""
    rejected: bool = False
    """A person rejected it."""
    useful: Share
    """Win rate against the base model, ties one half."""
    safe: Share
    """Harmful requests safely declined: one minus the violation rate, which counts incoherent answers."""
    over_refusal: float | None = None
    """Share of the harmless look-alikes that were declined."""
    parent: str | None = None
    """The version it was made from or measured against, or `base`."""
    link: Literal["made from", "measured against"] | None = None
    comparable: bool = True
    """It was asked the same prompts with the same decoding, against the same base model, as the newest version."""
    on_front: bool = False
    """No comparable version that was not rejected is at least as good in both and better in one (by the estimates)."""


class VersionBalance(BaseModel):
    """The balance over the versions of a model, oldest first."""

    model_config = ConfigDict(frozen=True)

    schema_version: Literal[1] = 1
    name: str
    confidence: float | None
    points: list[BalancePoint]
    left_out: dict[str, str]
    """Versions that are not shown, and why."""
    judges: int
    """How many different judges compared the answers; win rates by different judges compare less well."""


class _Figures(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    digest: str = ""
    prompts_digest: str = ""
    decoding_digest: str = ""
    metrics: dict[str, Share] = {}


class _Evaluation(BaseModel):
    """What is needed of `evaluation.json`, of whatever schema version."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    confidence: float | None = None
    models: dict[str, _Figures]
    digests: dict[str, str] = {}

    @property
    def conditions(self) -> tuple[str, str, str]:
        """What two evaluations must share for their shares to be comparable."""
        candidate = self.models["candidate"]
        return candidate.prompts_digest, candidate.decoding_digest, self.models["anchor"].digest


def balance(uri: str, name: str, *, last: int = 20) -> VersionBalance:
    """Read the balance of usefulness and safety over the versions of a model.

    Args:
        uri: MLflow tracking URI.
        name: The registered model.
        last: At most so many of the newest versions; a version with an alias is always among them.

    Returns:
        Points for the base model and every version whose evidence can be read.

    Raises:
        RegistryError: There is no such model, or MLflow cannot be reached.
    """
    session = Session(uri)
    model = session.model(name)
    held = set(model.aliases.values())
    versions = session.versions(name)
    chosen = [v for i, v in enumerate(versions) if i < last or v.number in held][::-1]
    left_out: dict[str, str] = {}
    read: list[tuple[Version, _Evaluation, str]] = []
    for version in chosen:
        try:
            evaluation, champion = _read(session, version)
            for role in ("candidate", "anchor"):
                _shares(evaluation, role)
        except RegistryError as error:
            left_out[str(version.number)] = error.reason
        else:
            read.append((version, evaluation, champion))
    newest = read[-1][1] if read else None
    points = [] if newest is None else [_base_point(newest)]
    numbers = {v.tags.get(names.TAG_MODEL_DIGEST, ""): str(v.number) for v in versions}
    points += [_point(model, v, e, champion, numbers, newest) for v, e, champion in read]
    return VersionBalance(
        name=name,
        confidence=newest.confidence if newest else None,
        points=_with_front(points),
        left_out=left_out,
        judges=len({e.digests.get("judge", "") for _, e, _ in read}),
    )


def _read(session: Session, version: Version) -> tuple[_Evaluation, str]:
    """A version's evaluation, and the digest of the champion it was compared with (empty when there was none)."""
    if names.TAG_EVALUATION_DIGEST not in version.tags:
        raise RegistryError("it was registered without an evaluation", key=version.uri)
    evaluation = f"{names.EVIDENCE_FOLDER}/{names.EVALUATION_FOLDER}/{_EVALUATION_FILE}"
    with session.files(version, evaluation) as path:
        content = _content(path, version)
    with session.files(version, f"{names.EVIDENCE_FOLDER}/{names.DECISION_FILE}") as path:
        return content, parse_decision(path.read_bytes(), version.uri).champion_digest


def _content(path: Path, version: Version) -> _Evaluation:
    try:
        found = _Evaluation.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        raise RegistryError(
            f"its evaluation cannot be read: {'.'.join(map(str, first['loc']))}: {first['msg']}", key=version.uri
        ) from None
    if missing := {"candidate", "anchor"} - found.models.keys():
        raise RegistryError(f"its evaluation has no {' and no '.join(sorted(missing))}", key=version.uri)
    return found


def _shares(evaluation: _Evaluation, role: str) -> tuple[Share, Share, float | None]:
    """Usefulness, safety and over-refusal of one model."""
    metrics = evaluation.models[role].metrics
    useful = Share(estimate=0.5) if role == "anchor" else metrics.get("win_rate_anchor")
    unsafe = metrics.get("unsafe_rate")
    if useful is None or unsafe is None:
        what = "win rate against the base model" if useful is None else "violation rate"
        raise RegistryError(f"its evaluation has no {what}")
    refused = metrics.get("over_refusal_rate")
    return useful, unsafe.turned(), None if refused is None else refused.estimate


def _base_point(evaluation: _Evaluation) -> BalancePoint:
    """The base model as the newest version's evaluation measured it; it draws with itself by definition."""
    useful, safe, refused = _shares(evaluation, "anchor")
    return BalancePoint(version=BASE, useful=useful, safe=safe, over_refusal=refused)


def _point(
    model: RegisteredName,
    version: Version,
    evaluation: _Evaluation,
    champion: str,
    numbers: Mapping[str, str],
    newest: _Evaluation | None,
) -> BalancePoint:
    useful, safe, refused = _shares(evaluation, "candidate")
    tags = version.tags
    parents = [numbers[d] for k, d in tags.items() if k.startswith(names.TAG_PARENT) and d in numbers]
    parents = [number for number in parents if number != str(version.number)]
    link: Literal["made from", "measured against"] = "made from" if parents else "measured against"
    return BalancePoint(
        version=str(version.number),
        aliases=sorted(alias for alias, number in model.aliases.items() if number == version.number),
        verdict=tags.get(names.TAG_VERDICT, ""),
        rejected=names.TAG_REJECTED in tags,
        useful=useful,
        safe=safe,
        over_refusal=refused,
        parent=parents[0] if parents else numbers.get(champion, BASE),
        link=link,
        comparable=newest is not None and evaluation.conditions == newest.conditions,
    )


def _with_front(points: Sequence[BalancePoint]) -> list[BalancePoint]:
    """Mark the points that no other dominates."""
    rivals = [p for p in points if p.comparable and not p.rejected]

    def dominated(point: BalancePoint) -> bool:
        mine = point.useful.estimate, point.safe.estimate
        return any(
            other.useful.estimate >= mine[0]
            and other.safe.estimate >= mine[1]
            and (other.useful.estimate, other.safe.estimate) != mine
            for other in rivals
        )

    return [p.model_copy(update={"on_front": p in rivals and not dominated(p)}) for p in points]
