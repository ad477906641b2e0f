"""Move the alias `champion`: only with evidence, one at a time, with who, when and why written down."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from tunegate.errors import GateError, RegistryError
from tunegate.gates.results import GATES_VERSION
from tunegate.registry import names
from tunegate.registry.evidence import DecisionFacts, evidence_problems, to_tag
from tunegate.registry.ledger import Action, Event, Ledger
from tunegate.registry.lock import WAIT_SECONDS, Held, locked
from tunegate.registry.session import RegisteredName, Session, Version
from tunegate.registry.versions import find_version, newest_candidate
from tunegate.storage.runs import now


class Promotion(BaseModel):
    """What a promotion or rollback did."""

    model_config = ConfigDict(frozen=True)

    name: str
    version: str
    """The champion now."""
    previous: str | None
    """The champion before, None for the first one."""
    changed: bool
    """False when the version was champion already."""
    verdict: str
    approvals: list[str]
    """Who approved the version."""
    who: str
    when: str
    why: str


class Approval(BaseModel):
    """A person's approval of a version; it holds for exactly this model and this evidence."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    who: str
    when: str
    why: str
    model_digest: str
    decision_digest: str


@dataclass
class _Desk:
    """What a change works with while it holds the lock."""

    session: Session
    model: RegisteredName
    ledger: Ledger
    held: Held


def promote(
    uri: str, name: str, version: str | int | None = None, *, who: str, why: str, wait: float = WAIT_SECONDS
) -> Promotion:
    """Make a version the champion, if its evidence allows it.

    Before anything moves it is checked that the decision among the version's artifacts is the one that it was
    registered with, that it judged this very model, that every file of the model has the digest it was registered
    with, that the verdict is PROMOTE (or HOLD with the approvals that the spec asks for), that it was compared with the
    present champion, that the gates have not changed since, and that nobody rejected the version. The old champion
    becomes `previous_champion`. Promoting the champion again changes nothing.

    Args:
        uri: MLflow tracking URI.
        name: The registered model.
        version: A version number or alias; None takes the alias `candidate`.
        who: Who promotes.
        why: The reason, kept in the history.
        wait: How long to wait for somebody else who is changing the model, in seconds.

    Raises:
        GateError: The evidence is missing, does not match, or does not say PROMOTE; nothing was moved.
        RegistryError: Another promotion was faster, or MLflow cannot be reached; the message says what was moved.
    """
    _need(who, why)
    session = Session(uri)
    model = session.model(name)
    target = _choose(session, model, version)
    seen = Ledger.read(model)
    if _is_settled(model, seen, target.number):
        return _promotion(seen, target, seen.previous_champion, who=who, why=why, changed=False)
    # Hashing the files can take minutes, so it happens before the lock; what counts is looked at again under it.
    decision = check_entitled(session, target, seen)
    with _changing(session, name, who=who, what=f"promoting version {target.number}", wait=wait) as desk:
        if _is_settled(desk.model, desk.ledger, target.number):
            return _promotion(desk.ledger, target, desk.ledger.previous_champion, who=who, why=why, changed=False)
        if desk.ledger.champion != seen.champion:
            raise RegistryError(
                f"while version {target.number} was being checked, version {desk.ledger.champion} became champion; "
                "nothing was moved",
                key=name,
                fix="evaluate against the new champion, then promote again",
            )
        again = session.version(name, target.number)
        if _what_counts(again.tags) != _what_counts(target.tags):
            raise RegistryError(
                "the version's tags changed while it was being checked; nothing was moved",
                key=again.uri,
                fix="run the same command again",
            )
        line = [v for v in desk.ledger.reign() if v != again.number]
        before = line[-1] if line else None
        _move(desk, "promote", again, before, who=who, why=why)
        # The promotion is complete and in the history; these tags only tell people who look at the version's page.
        with suppress(RegistryError):
            session.tag_version(again, names.TAG_PROMOTED, to_tag({"who": who, "when": now(), "why": why}))
            session.untag_version(again, names.TAG_ROLLED_BACK)
        return _promotion(desk.ledger, again, before, who=who, why=why, changed=True, verdict=decision.verdict)


def rollback(
    uri: str, name: str, version: str | int | None = None, *, who: str, why: str, wait: float = WAIT_SECONDS
) -> Promotion:
    """Make an earlier champion the champion again.

    The line of champions becomes what it was then, so rolling back twice goes two champions back, not to and fro.

    Args:
        uri: MLflow tracking URI.
        name: The registered model.
        version: The version to go back to; None takes the champion before the present one.
        who: Who rolls back.
        why: The reason, kept in the history and on the version that was rolled back.
        wait: How long to wait for somebody else who is changing the model, in seconds.

    Raises:
        GateError: The earlier champion's files or evidence were changed since.
        RegistryError: There is no earlier champion, or MLflow cannot be reached.
    """
    _need(who, why)
    session = Session(uri)
    session.model(name)
    with _changing(session, name, who=who, what="rolling back", wait=wait) as desk:
        line = desk.ledger.reign()
        if len(line) < 2 and version is None:
            raise RegistryError(
                "there is no earlier champion to go back to",
                key=name,
                value=f"champion: {line[-1] if line else 'none'}",
                fix="promote another version with: tunegate promote",
            )
        target = session.version(name, line[-2]) if version is None else find_version(session, name, version)
        if target.number not in line[:-1]:
            raise RegistryError(
                "a rollback goes to a version that was champion before the present one",
                key=name,
                value=target.number,
                fix=f"one of: {', '.join(map(str, line[:-1])) or 'none'}; for any other use: tunegate promote",
            )
        problems, decision = evidence_problems(session, target)
        if problems or decision is None:
            raise _not_entitled(target, problems)
        current = session.version(name, line[-1])
        line = line[: line.index(target.number) + 1]
        _move(desk, "rollback", target, line[-2] if len(line) > 1 else None, who=who, why=why)
        session.tag_version(current, names.TAG_ROLLED_BACK, to_tag({"who": who, "when": now(), "why": why}))
        return _promotion(desk.ledger, target, current.number, who=who, why=why, changed=True, verdict=decision.verdict)


def reject(uri: str, name: str, version: str | int, *, who: str, why: str, wait: float = WAIT_SECONDS) -> Version:
    """Write down that a version must not be promoted, and take the alias `candidate` from it.

    Raises:
        RegistryError: The version is the champion, or MLflow cannot be reached.
    """
    _need(who, why)
    session = Session(uri)
    with _changing(session, name, who=who, what=f"rejecting version {version}", wait=wait) as desk:
        target = find_version(session, name, version)
        if target.number == desk.ledger.champion or target.number == desk.model.aliases.get(names.CHAMPION):
            raise RegistryError(
                "the champion cannot be rejected while it is in use",
                key=target.uri,
                fix="go back first: tunegate rollback",
            )
        session.tag_version(target, names.TAG_REJECTED, to_tag({"who": who, "when": now(), "why": why}))
        desk.ledger.begin(session, name, "reject", target.number, who=who, why=why, state="done")
        _place_candidate(desk)
        _place_previous(desk)
        return session.version(name, target.number)


def approve(uri: str, name: str, version: str | int, *, who: str, why: str, wait: float = WAIT_SECONDS) -> Approval:
    """Record a person's approval of a version; it counts only for the model and evidence as they are now.

    Raises:
        GateError: The evidence does not match the version, says REJECT or INVALID, or the version was rejected.
        RegistryError: MLflow cannot be reached.
    """
    _need(who, why)
    session = Session(uri)
    with _changing(session, name, who=who, what=f"approving version {version}", wait=wait) as desk:
        target = find_version(session, name, version)
        problems, decision = evidence_problems(session, target, files=False)
        if problems or decision is None:
            raise _not_entitled(target, problems)
        _refuse_rejected(target, desk.ledger)
        if decision.verdict not in ("PROMOTE", "HOLD"):
            raise _wrong_verdict(target, decision)
        approval = Approval(
            who=who,
            when=now(),
            why=why,
            model_digest=target.tags[names.TAG_MODEL_DIGEST],
            decision_digest=target.tags[names.TAG_DECISION_DIGEST],
        )
        session.tag_version(target, f"{names.TAG_APPROVAL}{_slug(who)}", to_tag(approval.model_dump()))
        digests = {"model_digest": approval.model_digest, "decision_digest": approval.decision_digest}
        desk.ledger.begin(session, name, "approve", target.number, who=who, why=why, state="done", **digests)
        return approval


def approvals_of(ledger: Ledger, version: Version) -> list[Event]:
    """The approvals of a version as it is now, one a person.

    They are read from the history, not from the tags: a tag that somebody wrote in MLflow's UI is no approval.
    """
    digests = {
        "model_digest": version.tags.get(names.TAG_MODEL_DIGEST, ""),
        "decision_digest": version.tags.get(names.TAG_DECISION_DIGEST, ""),
    }
    return ledger.approvals(version.number, **digests)


def check_entitled(session: Session, version: Version, ledger: Ledger) -> DecisionFacts:
    """Check everything that a promotion needs, the files included.

    Args:
        session: The registry.
        version: The version that asks for promotion.
        ledger: Knows the present champion, with which the evidence must compare, and the approvals.

    Returns:
        The decision.

    Raises:
        GateError: The version is not entitled; the message names every reason.
        RegistryError: MLflow cannot be reached.
    """
    _refuse_rejected(version, ledger)
    problems, decision = evidence_problems(session, version)
    if problems or decision is None:
        raise _not_entitled(version, problems)
    if decision.gates_version < GATES_VERSION:
        raise GateError(
            f"the evidence was made by gates of version {decision.gates_version}, the present ones are {GATES_VERSION}",
            key=version.uri,
            fix="evaluate and decide again with this version of Tunegate",
        )
    if ledger.champion is not None and ledger.champion != version.number:
        _check_compared(version, decision, session.version(version.name, ledger.champion))
    required = int(version.tags.get(names.TAG_APPROVALS_REQUIRED, "0") or 0)
    approvals = approvals_of(ledger, version)
    if decision.verdict == "HOLD" and required == 0:
        raise _wrong_verdict(version, decision)
    if decision.verdict not in ("PROMOTE", "HOLD"):
        raise _wrong_verdict(version, decision)
    if len(approvals) < required:
        have = ", ".join(a.who for a in approvals) or "nobody yet"
        raise GateError(
            f"the spec asks for {required} approvals, it has {len(approvals)} ({have})",
            key=version.uri,
            fix=f"another person runs: tunegate registry approve {version.name} {version.number} --why …",
        )
    return decision


def _check_compared(version: Version, decision: DecisionFacts, champion: Version) -> None:
    """A candidate that beat an older champion has not been shown to be as good as the present one."""
    present = champion.tags.get(names.TAG_MODEL_DIGEST, "")
    if decision.champion_digest == present:
        return
    against = f"the model {decision.champion_digest[:12]}…" if decision.champion_digest else "no champion"
    raise GateError(
        f"the evidence compares the version with {against}, but version {champion.number} "
        f"({present[:12]}…) is champion now",
        key=version.uri,
        fix="evaluate and decide against the present champion, then promote",
    )


def _choose(session: Session, model: RegisteredName, which: str | int | None) -> Version:
    if which is not None:
        return find_version(session, model.name, which)
    if names.CANDIDATE not in model.aliases:
        raise RegistryError(
            "no version is waiting for a decision (there is no alias candidate)",
            key=model.name,
            fix="name a version: tunegate promote NAME VERSION",
        )
    version = session.version(model.name, model.aliases[names.CANDIDATE])
    if names.TAG_ROLLED_BACK in version.tags:
        raise RegistryError(
            "the candidate was champion and was rolled back",
            key=version.uri,
            value=_why_of(version.tags[names.TAG_ROLLED_BACK]),
            fix=f"if it is meant all the same, name it: tunegate promote {model.name} {version.number}",
        )
    return version


def _is_settled(model: RegisteredName, ledger: Ledger, number: int) -> bool:
    return model.aliases.get(names.CHAMPION) == number == ledger.champion and ledger.unfinished is None


@contextmanager
def _changing(session: Session, name: str, *, who: str, what: str, wait: float) -> Iterator[_Desk]:
    """Hold the lock, read the model anew, and settle what an interrupted change left behind."""
    with locked(session, name, who=who, what=what, wait=wait) as held:
        model = session.model(name)
        ledger = Ledger.read(model)
        if settle_unfinished(session, model, ledger) is not None:
            model = session.model(name)
        yield _Desk(session, model, ledger, held)


def settle_unfinished(session: Session, model: RegisteredName, ledger: Ledger) -> Event | None:
    """See an interrupted change through, or write down that it did not happen; the caller holds the lock.

    The alias `champion` decides: it is moved by one request, after all checks and after the event was written.
    """
    event = ledger.unfinished
    if event is None:
        return None
    happened = model.aliases.get(names.CHAMPION) == event.version
    settled = ledger.settle(session, model.name, "done" if happened else "abandoned")
    if happened:
        _set(session, model, names.PREVIOUS_CHAMPION, ledger.previous_champion)
    return settled


def _move(desk: _Desk, action: Action, target: Version, previous: int | None, *, who: str, why: str) -> None:
    session, name = desk.session, desk.model.name
    desk.ledger.begin(
        session,
        name,
        action,
        target.number,
        who=who,
        why=why,
        decision_digest=target.tags[names.TAG_DECISION_DIGEST],
        model_digest=target.tags[names.TAG_MODEL_DIGEST],
    )
    desk.held.check()
    step = "before the alias champion was moved; nothing changed"
    try:
        step = "while the alias champion was being moved; `tunegate registry status` tells whether it was"
        session.set_alias(name, names.CHAMPION, target.number)
        step = f"after version {target.number} had become champion; the next command completes the records"
        _set(session, desk.model, names.PREVIOUS_CHAMPION, previous)
        desk.ledger.settle(session, name, "done")
    except RegistryError as error:
        raise RegistryError(
            f"the {action} was interrupted {step} ({error.reason})",
            key=target.uri,
            fix="run the same command again when MLflow is back: it completes what was begun",
        ) from error


def _set(session: Session, model: RegisteredName, alias: str, number: int | None) -> None:
    if model.aliases.get(alias) == number:
        return
    session.set_alias(model.name, alias, number)


def _place_candidate(desk: _Desk) -> None:
    _set(desk.session, desk.model, names.CANDIDATE, newest_candidate(desk.session.versions(desk.model.name)))


def _place_previous(desk: _Desk) -> None:
    _set(desk.session, desk.model, names.PREVIOUS_CHAMPION, desk.ledger.previous_champion)


def _promotion(
    ledger: Ledger,
    version: Version,
    previous: int | None,
    *,
    who: str,
    why: str,
    changed: bool,
    verdict: str | None = None,
) -> Promotion:
    return Promotion(
        name=version.name,
        version=str(version.number),
        previous=None if previous is None else str(previous),
        changed=changed,
        verdict=verdict or version.tags.get(names.TAG_VERDICT, ""),
        approvals=[event.who for event in approvals_of(ledger, version)],
        who=who,
        when=now(),
        why=why,
    )


def _what_counts(tags: Mapping[str, str]) -> dict[str, str]:
    return {k: v for k, v in tags.items() if k.startswith("tunegate.")}


def _refuse_rejected(version: Version, ledger: Ledger) -> None:
    event = ledger.rejection(version.number)
    if names.TAG_REJECTED in version.tags or event is not None:
        why = f"{event.why} ({event.who}, {event.when})" if event else _why_of(version.tags[names.TAG_REJECTED])
        raise GateError(
            f"the version was rejected: {why}",
            key=version.uri,
            fix="promote another version, or train and register again",
        )


def _wrong_verdict(version: Version, decision: DecisionFacts) -> GateError:
    reasons = "; ".join(decision.reasons[:5])
    fix = {
        "HOLD": "gather what the reasons ask for and decide again, or let persons decide: registry.approvals",
    }.get(decision.verdict, "only a new model with new evidence can be promoted")
    return GateError(
        f"the gates said {decision.verdict}" + (f": {reasons}" if reasons else ""), key=version.uri, fix=fix
    )


def _not_entitled(version: Version, problems: list[str]) -> GateError:
    return GateError(
        "nothing was moved, the evidence does not hold: " + "; ".join(problems),
        key=version.uri,
        fix="find out who changed it (tunegate registry verify), then register the model again",
    )


def _need(who: str, why: str) -> None:
    if not who.strip():
        raise RegistryError("it must be known who does this", key="who", fix="--who NAME")
    if not why.strip():
        raise RegistryError("a reason must be given, it is kept in the history", key="why", fix='--why "…"')


def _why_of(tag: str) -> str:
    try:
        content = json.loads(tag)
        return f"{content['why']} ({content['who']}, {content['when']})"
    except (ValueError, KeyError, TypeError):
        return tag


def _slug(who: str) -> str:
    return re.sub(r"[^\w.\-]+", "_", who.strip().casefold())[:100]
