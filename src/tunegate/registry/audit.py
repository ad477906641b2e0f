"""Look: where the aliases stand, how they came there, whether they may stand there."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from tunegate.registry import names
from tunegate.registry.aliases import approvals_of, settle_unfinished
from tunegate.registry.evidence import evidence_problems
from tunegate.registry.ledger import Event, Ledger
from tunegate.registry.lock import WAIT_SECONDS, is_stale, locked, read_holder
from tunegate.registry.session import RegisteredName, Session, Version
from tunegate.registry.versions import download_model, find_version, newest_candidate


class VersionStatus(BaseModel):
    """One version at a glance."""

    model_config = ConfigDict(frozen=True)

    version: str
    aliases: list[str]
    verdict: str
    gates: dict[str, str]
    """Verdict of every gate."""
    model_digest: str
    run_id: str
    created_ms: int
    approvals: list[str]
    approvals_required: int
    rejected: str | None
    """Who rejected it, when and why, as JSON; None when nobody did."""
    rolled_back: str | None


class RegistryStatus(BaseModel):
    """A registered model at a glance."""

    model_config = ConfigDict(frozen=True)

    name: str
    aliases: dict[str, str]
    versions: list[VersionStatus]
    """Newest first."""
    unfinished: Event | None
    """A promotion or rollback that was interrupted; the next one, or `audit --enforce`, sees it through."""
    held_by: str | None
    """Who is changing the model at this moment."""


class Verification(BaseModel):
    """Whether a version is what it was registered as."""

    model_config = ConfigDict(frozen=True)

    name: str
    version: str
    verdict: str
    problems: list[str]

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return not self.problems


class Finding(BaseModel):
    """Something in the registry that the gates did not bring about."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["alias", "evidence", "history", "unfinished", "lock"]
    message: str
    alias: str | None = None
    found: str | None = None
    """Version the alias points to."""
    expected: str | None = None
    """Version it should point to by the ledger."""
    repaired: bool = False


class Audit(BaseModel):
    """The outcome of an audit."""

    model_config = ConfigDict(frozen=True)

    name: str
    findings: list[Finding]

    @property
    def ok(self) -> bool:
        """Nothing was found, or everything that was found is repaired."""
        return all(f.repaired for f in self.findings)


def status(uri: str, name: str) -> RegistryStatus:
    """Versions, verdicts, aliases, and whether a change is under way.

    Raises:
        RegistryError: There is no such model, or MLflow cannot be reached.
    """
    session = Session(uri)
    model = session.model(name)
    ledger, holder = Ledger.read(model), read_holder(session, name)
    return RegistryStatus(
        name=name,
        aliases={alias: str(number) for alias, number in sorted(model.aliases.items())},
        versions=[_status_of(v, model, ledger) for v in session.versions(name)],
        unfinished=ledger.unfinished,
        held_by=None if holder is None else f"{holder.get('who')} ({holder.get('what')})",
    )


def history(uri: str, name: str) -> list[Event]:
    """Every promotion, rollback, rejection, approval and enforcement, oldest first.

    Raises:
        RegistryError: There is no such model, or MLflow cannot be reached.
    """
    return Ledger.read(Session(uri).model(name)).events


def verify(uri: str, name: str, which: str | int = names.CHAMPION) -> Verification:
    """Check the evidence and every file of a version.

    Raises:
        RegistryError: There is no such version, or MLflow cannot be reached.
    """
    session = Session(uri)
    version = find_version(session, name, which)
    problems, decision = evidence_problems(session, version)
    return Verification(
        name=name,
        version=str(version.number),
        verdict=decision.verdict if decision else version.tags.get(names.TAG_VERDICT, ""),
        problems=problems,
    )


def audit(
    uri: str, name: str, *, enforce: bool = False, who: str = "", files: bool = True, wait: float = WAIT_SECONDS
) -> Audit:
    """Find what was changed past the gates: aliases moved by hand, edited history, changed files or evidence.

    Args:
        uri: MLflow tracking URI.
        name: The registered model.
        enforce: Put aliases back to where the ledger says, and see interrupted changes through. Changed files and
            edited history are reported only: they need a person.
        who: Who audits; needed with `enforce`.
        files: Also hash the files of the champion and the previous champion.
        wait: How long to wait for somebody else who is changing the model, in seconds.

    Raises:
        RegistryError: There is no such model, or MLflow cannot be reached.
    """
    session = Session(uri)
    if enforce:
        with locked(session, name, who=who or "audit", what="auditing", wait=wait):
            return Audit(name=name, findings=_findings(session, name, enforce=True, who=who or "audit", files=files))
    return Audit(name=name, findings=_findings(session, name, enforce=False, who=who, files=files))


def fetch(uri: str, name: str, which: str, out: Path) -> Path:
    """Download a version, given by number or alias, as a plain model folder; its digest is checked.

    Raises:
        RegistryError: There is no such version, or MLflow cannot be reached.
        GateError: The files are not those that were registered.
    """
    download_model(uri, name, which, out)
    return out


def _findings(session: Session, name: str, *, enforce: bool, who: str, files: bool) -> list[Finding]:
    model = session.model(name)
    ledger = Ledger.read(model)
    findings = [Finding(kind="history", message=problem) for problem in ledger.problems()]
    if (event := ledger.unfinished) is not None:
        message = f"the {event.action} of version {event.version} by {event.who} was interrupted"
        if enforce:
            settled = settle_unfinished(session, model, ledger)
            message += f"; it is {settled.state} now" if settled else ""
            model = session.model(name)
        findings.append(Finding(kind="unfinished", message=message, repaired=enforce))
    if not enforce and (holder := read_holder(session, name)) is not None and is_stale(holder):
        findings.append(Finding(kind="lock", message=f"a lock was left behind by {holder.get('who')}"))
    versions = session.versions(name)
    findings += [
        Finding(kind="history", message=f"version {v.number} was rejected by {event.who}, but its tag is gone")
        for v in versions
        if (event := ledger.rejection(v.number)) is not None and names.TAG_REJECTED not in v.tags
    ]
    expected = {
        names.CHAMPION: ledger.champion,
        names.PREVIOUS_CHAMPION: ledger.previous_champion,
        names.CANDIDATE: newest_candidate(versions),
    }
    for alias, should in expected.items():
        if model.aliases.get(alias) != should:
            findings.append(_misplaced(session, model, ledger, alias, should, enforce=enforce, who=who))
    for alias in (names.CHAMPION, names.PREVIOUS_CHAMPION):
        number = expected[alias]
        version = next((v for v in versions if v.number == number), None)
        if number is not None and version is None:
            findings.append(Finding(kind="evidence", alias=alias, message=f"version {number}, {alias}, was deleted"))
        elif version is not None:
            problems, _ = evidence_problems(session, version, files=files)
            findings += [
                Finding(
                    kind="evidence", alias=alias, found=str(number), message=f"version {number}, {alias}: {problem}"
                )
                for problem in problems
            ]
    return findings


def _misplaced(
    session: Session, model: RegisteredName, ledger: Ledger, alias: str, should: int | None, *, enforce: bool, who: str
) -> Finding:
    found = model.aliases.get(alias)
    here = "is not set" if found is None else f"points to version {found}"
    there = "should not be set" if should is None else f"should point to version {should}"
    if enforce:
        why = f"{alias} {here}, {there}"
        ledger.begin(session, model.name, "enforce", should, who=who, why=why, state="done")
        session.set_alias(model.name, alias, should)
    return Finding(
        kind="alias",
        alias=alias,
        found=None if found is None else str(found),
        expected=None if should is None else str(should),
        message=f"{alias} {here}, by the history it {there}" + ("; put back" if enforce else ""),
        repaired=enforce,
    )


def _status_of(version: Version, model: RegisteredName, ledger: Ledger) -> VersionStatus:
    tags = version.tags
    return VersionStatus(
        version=str(version.number),
        aliases=sorted(alias for alias, number in model.aliases.items() if number == version.number),
        verdict=tags.get(names.TAG_VERDICT, ""),
        gates={k.removeprefix(names.TAG_GATE): v for k, v in sorted(tags.items()) if k.startswith(names.TAG_GATE)},
        model_digest=tags.get(names.TAG_MODEL_DIGEST, ""),
        run_id=tags.get(names.TAG_RUN_ID, ""),
        created_ms=version.created_ms,
        approvals=[event.who for event in approvals_of(ledger, version)],
        approvals_required=int(tags.get(names.TAG_APPROVALS_REQUIRED, "0") or 0),
        rejected=tags.get(names.TAG_REJECTED),
        rolled_back=tags.get(names.TAG_ROLLED_BACK),
    )
