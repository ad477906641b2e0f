"""Who moved which alias when and why: an append-only history in the tags of the registered model.

The aliases are what serving reads and what anybody can move in MLflow's UI; the ledger is what was moved through the
gates. Every event names the digest of the one before it, so that a removed or edited event shows.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from tunegate.registry import names
from tunegate.registry.session import RegisteredName, Session
from tunegate.storage.manifest import digest_json
from tunegate.storage.runs import now

Action = Literal["promote", "rollback", "reject", "approve", "enforce"]
_WHY_CHARS = 1000


class Event(BaseModel):
    """One entry of the ledger."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    number: int
    id: str
    action: Action
    version: int | None
    """The version it is about; None for an enforcement that removed an alias."""
    champion_before: int | None = None
    """The version that was champion, by the ledger."""
    who: str
    when: str
    why: str
    decision_digest: str = ""
    model_digest: str = ""
    after: str = ""
    """Digest of the event before this one."""
    state: Literal["begun", "done", "abandoned"] = "done"
    """`begun` until the aliases are where they belong; `abandoned` when it was interrupted before anything moved."""

    @property
    def digest(self) -> str:
        """The digest that the next event names; the state may still change."""
        return digest_json(self.model_dump(mode="json", exclude={"state"}))[:24]

    @property
    def key(self) -> str:
        """The tag that holds it."""
        return f"{names.TAG_HISTORY}{self.number:06d}"


class Ledger:
    """The events of a registered model, oldest first."""

    def __init__(self, events: Sequence[Event], unreadable: Sequence[str] = ()) -> None:
        self.events = list(events)
        self.unreadable = list(unreadable)

    @classmethod
    def read(cls, model: RegisteredName) -> Ledger:
        """Take the ledger out of a registered model's tags."""
        events, unreadable = [], []
        for key in sorted(k for k in model.tags if k.startswith(names.TAG_HISTORY)):
            try:
                events.append(Event.model_validate_json(model.tags[key]))
            except ValidationError:
                unreadable.append(key)
        return cls(events, unreadable)

    @property
    def unfinished(self) -> Event | None:
        """The last event, when it was begun and not seen through."""
        return self.events[-1] if self.events and self.events[-1].state == "begun" else None

    def reign(self) -> list[int]:
        """The versions that are or were champion and would be again by rolling back, the current one last."""
        line: list[int] = []
        for event in self.events:
            if event.state != "done" or event.version is None:
                continue
            if event.action == "promote":
                line = [v for v in line if v != event.version] + [event.version]
            elif event.action == "rollback" and event.version in line:
                line = line[: line.index(event.version) + 1]
            elif event.action == "reject":
                line = [v for v in line if v != event.version]
        return line

    @property
    def champion(self) -> int | None:
        """The version that the gates made champion."""
        line = self.reign()
        return line[-1] if line else None

    @property
    def previous_champion(self) -> int | None:
        """The version that a rollback would go back to."""
        line = self.reign()
        return line[-2] if len(line) > 1 else None

    def rejection(self, version: int) -> Event | None:
        """Who rejected a version, if anybody did."""
        return next((e for e in self.events if e.action == "reject" and e.version == version), None)

    def approvals(self, version: int, *, model_digest: str, decision_digest: str) -> list[Event]:
        """The approvals of a version that hold for this very model and evidence: the first one of each person."""
        found: dict[str, Event] = {}
        for event in self.events:
            about = (event.action, event.version, event.model_digest, event.decision_digest)
            if about == ("approve", version, model_digest, decision_digest):
                found.setdefault(event.who.strip().casefold(), event)
        return list(found.values())

    def problems(self) -> list[str]:
        """Signs that the ledger was edited by hand."""
        found = [f"the history entry {key} cannot be read" for key in self.unreadable]
        before = ""
        for expected, event in enumerate(self.events, start=1):
            if event.number != expected:
                found.append(f"history entry {expected} is missing")
                break
            if event.after != before:
                found.append(f"history entry {event.number} does not follow from the one before it: one was edited")
                break
            before = event.digest
        return found

    def begin(
        self,
        session: Session,
        model: str,
        action: Action,
        version: int | None,
        *,
        who: str,
        why: str,
        decision_digest: str = "",
        model_digest: str = "",
        state: Literal["begun", "done"] = "begun",
    ) -> Event:
        """Append an event; the caller holds the lock.

        Raises:
            RegistryError: MLflow cannot be reached.
        """
        event = Event(
            number=self.events[-1].number + 1 if self.events else 1,
            id=uuid.uuid4().hex[:12],
            action=action,
            version=version,
            champion_before=self.champion,
            who=who,
            when=now(),
            why=why if len(why) <= _WHY_CHARS else why[: _WHY_CHARS - 1] + "…",
            decision_digest=decision_digest,
            model_digest=model_digest,
            after=self.events[-1].digest if self.events else "",
            state=state,
        )
        session.tag_model(model, event.key, event.model_dump_json(exclude_none=True))
        self.events.append(event)
        return event

    def settle(self, session: Session, model: str, state: Literal["done", "abandoned"]) -> Event:
        """Change the state of the last event; the caller holds the lock."""
        event = self.events[-1].model_copy(update={"state": state})
        session.tag_model(model, event.key, event.model_dump_json(exclude_none=True))
        self.events[-1] = event
        return event
