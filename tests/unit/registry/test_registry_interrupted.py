"""MLflow goes away in the middle of a change, and several persons change at once."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
from registry_fixtures import NAME, aliases_of, on_both_stores

from tunegate.errors import RegistryError
from tunegate.registry import aliases
from tunegate.registry import lock as lock_module
from tunegate.registry import session as session_module
from tunegate.registry.lock import locked
from tunegate.registry.registry import audit, history, promote, rollback, status
from tunegate.registry.session import Session
from tunegate.tracking.client import connect


class Fuse:
    """Passes a number of calls that change something on to MLflow, then cuts the line for good."""

    def __init__(self, client: Any, changes: int, *, lose_the_answer: bool = False) -> None:
        self._client = client
        self._left = changes
        self._lose = lose_the_answer
        self.blown = False

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.blown:
                raise ConnectionError("Connection refused")
            if name.startswith(("set_", "delete_", "create_")):
                if self._left == 0:
                    self.blown = True
                    if self._lose:
                        method(*args, **kwargs)
                    raise ConnectionError("Connection reset by peer")
                self._left -= 1
            return method(*args, **kwargs)

        return call


@pytest.fixture
def cut(monkeypatch):
    """Cuts the connection of the sessions that are opened from now on; returns a function to restore it."""

    def cut_after(changes: int, *, lose_the_answer: bool = False) -> None:
        monkeypatch.setattr(
            session_module, "connect", lambda uri: Fuse(connect(uri), changes, lose_the_answer=lose_the_answer)
        )

    cut_after.restore = lambda: monkeypatch.setattr(session_module, "connect", connect)
    return cut_after


@pytest.fixture
def two(uri, add):
    """Version 1 is champion, version 2 could be."""
    add(uri, "one")
    promote(uri, NAME, 1, who="ann", why="first")
    add(uri, "two")
    return connect(uri)


def _champion(client):
    return aliases_of(client).get("champion")


@pytest.fixture
def impatient(monkeypatch):
    """This process is alive, so its own left-over lock would be respected; let the lease be over at once instead."""
    monkeypatch.setattr(lock_module, "_is_alive", lambda pid: False)


# The changes of a promotion in order: 0 lock, 1 event begun, 2 champion, 3 previous_champion, 4 event done, 5 unlock.
CUTS = [("local", changes, lost) for changes in range(5) for lost in (False, True)]


@pytest.mark.parametrize(
    ("uri", "changes", "lose_the_answer"),
    [*CUTS, ("server", 2, False), ("server", 2, True), ("server", 3, False)],
    indirect=["uri"],
)
def test_a_promotion_cut_at_any_point_is_whole_or_not_at_all_and_can_be_repeated(
    uri, two, cut, impatient, changes, lose_the_answer
):
    cut(changes, lose_the_answer=lose_the_answer)
    with pytest.raises(RegistryError) as caught:
        promote(uri, NAME, 2, who="ann", why="second")
    if changes >= 2:
        assert "was interrupted" in str(caught.value)
    cut.restore()
    moved = changes > 2 or (changes == 2 and lose_the_answer)
    assert _champion(two) == (2 if moved else 1)

    # Until somebody acts the audit tells of it, and nothing else changes.
    begun = changes > 1 or (changes == 1 and lose_the_answer)
    finished = changes == 4 and lose_the_answer
    assert ("unfinished" in {f.kind for f in audit(uri, NAME).findings}) == (begun and not finished)
    assert (status(uri, NAME).unfinished is not None) == (begun and not finished)

    promotion = promote(uri, NAME, 2, who="ann", why="second")
    assert promotion.changed == (not moved)
    assert aliases_of(two) == {"candidate": 2, "champion": 2, "previous_champion": 1}
    assert audit(uri, NAME, enforce=True, who="nightly").ok  # removes the lock when it was left behind
    assert audit(uri, NAME).findings == []
    done = [(e.action, e.version) for e in history(uri, NAME) if e.state == "done"]
    assert done == [("promote", 1), ("promote", 2)]
    assert {m.name for m in two.search_registered_models()} == {NAME}


def test_the_audit_sees_an_interrupted_promotion_through(uri, two, cut, impatient):
    cut(3)
    with pytest.raises(RegistryError, match="had become champion"):
        promote(uri, NAME, 2, who="ann", why="second")
    cut.restore()
    assert audit(uri, NAME, enforce=True, who="nightly").ok
    assert audit(uri, NAME).findings == []
    assert aliases_of(two)["previous_champion"] == 1


def test_an_interrupted_rollback_is_seen_through(uri, two, cut, impatient):
    promote(uri, NAME, 2, who="ann", why="second")
    cut(3)
    with pytest.raises(RegistryError, match="the rollback was interrupted after"):
        rollback(uri, NAME, who="ann", why="bad")
    cut.restore()
    assert audit(uri, NAME, enforce=True, who="nightly").ok
    assert aliases_of(two) == {"candidate": 2, "champion": 1}


@on_both_stores
def test_of_two_that_promote_at_once_one_wins_and_the_other_is_told(uri, two, add, monkeypatch):
    add(uri, "three")
    barrier = threading.Barrier(2)
    outcomes: dict[int, object] = {}
    real = aliases.check_entitled

    def check_together(*arguments: Any) -> Any:
        decision = real(*arguments)
        barrier.wait(timeout=240)  # both have found that they may
        return decision

    monkeypatch.setattr(aliases, "check_entitled", check_together)

    def run(version: int) -> None:
        try:
            outcomes[version] = promote(uri, NAME, version, who=f"person-{version}", why="mine")
        except RegistryError as error:
            outcomes[version] = error

    threads = [threading.Thread(target=run, args=(version,)) for version in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [v for v, outcome in outcomes.items() if not isinstance(outcome, Exception)]
    told = [str(outcome) for outcome in outcomes.values() if isinstance(outcome, Exception)]
    assert len(winners) == 1, outcomes
    assert f"version {winners[0]} became champion" in told[0]
    assert _champion(two) == winners[0]
    assert audit(uri, NAME).findings == []


PROMOTE = """
import sys
from tunegate.errors import RegistryError
from tunegate.registry import aliases
from tunegate.registry.registry import promote
uri, name, version = sys.argv[1:]
real = aliases.check_entitled
def check_together(*arguments):
    decision = real(*arguments)
    print("ready", flush=True)  # it may; the other one may, too
    sys.stdin.readline()
    return decision
aliases.check_entitled = check_together
try:
    print("won" if promote(uri, name, version, who="process " + version, why="mine").changed else "same")
except RegistryError as error:
    print("told:", error)
"""


def test_of_two_processes_that_promote_at_once_one_wins(uri, two, add):
    add(uri, "three")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROMOTE, uri, NAME, version],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for version in ("2", "3")
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=240)[0].strip() for process in processes]
    assert sorted(answer[:3] for answer in answers) == ["tol", "won"], answers
    assert _champion(two) == 2 + [a[:3] for a in answers].index("won")
    assert audit(uri, NAME).findings == []


def test_two_that_promote_the_same_version_both_succeed(uri, two):
    outcomes: list[Any] = []
    threads = [
        threading.Thread(target=lambda: outcomes.append(promote(uri, NAME, 2, who="ann", why="x"))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcome.changed for outcome in outcomes) == [False, True]
    assert [(e.action, e.version) for e in history(uri, NAME)] == [("promote", 1), ("promote", 2)]


def test_whoever_finds_the_lock_taken_is_told_who_has_it(uri, two):
    with (
        locked(Session(uri), NAME, who="bob", what="promoting version 9"),
        pytest.raises(RegistryError, match=r"bob \(promoting version 9\) is changing this model"),
    ):
        promote(uri, NAME, 2, who="ann", why="x", wait=0)
    assert _champion(two) == 1
    assert promote(uri, NAME, 2, who="ann", why="x", wait=0).changed


def _leave_lock(client: Any, **changes: Any) -> None:
    content = {"token": "t", "who": "bob", "what": "x", "host": "elsewhere", "pid": 1, "time": time.time(), **changes}
    client.create_registered_model(f"{NAME}.lock", tags={"tunegate.lock": json.dumps(content)})


def test_a_lock_of_a_dead_machine_is_broken_after_its_lease_and_not_before(uri, two):
    _leave_lock(two, time=time.time() - lock_module.LEASE_SECONDS + 30)
    with pytest.raises(RegistryError, match="bob"):
        promote(uri, NAME, 2, who="ann", why="x", wait=0)
    two.delete_registered_model(f"{NAME}.lock")
    _leave_lock(two, time=time.time() - lock_module.LEASE_SECONDS - 1)
    assert promote(uri, NAME, 2, who="ann", why="x", wait=0).changed


def test_a_lock_of_a_dead_process_of_this_machine_is_broken_at_once(uri, two):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    _leave_lock(two, host=lock_module.platform.node(), pid=dead.pid)
    assert promote(uri, NAME, 2, who="ann", why="x", wait=0).changed


def test_a_holder_whose_lock_was_broken_moves_nothing(uri, two, monkeypatch):
    """It paused for longer than the lease, and somebody else took the lock meanwhile."""
    real = lock_module.Held.check

    def paused(held: Any) -> None:
        two.delete_registered_model(f"{NAME}.lock")
        _leave_lock(two)
        real(held)

    monkeypatch.setattr(lock_module.Held, "check", paused)
    with pytest.raises(RegistryError, match="ran out; nothing was moved"):
        promote(uri, NAME, 2, who="ann", why="x")
    assert _champion(two) == 1
    assert "bob" in str(status(uri, NAME).held_by)  # the other's lock was left alone


@on_both_stores
def test_tags_that_change_between_check_and_move_stop_the_promotion(uri, two, monkeypatch):
    real = aliases.check_entitled

    def checked(*arguments: Any) -> Any:
        decision = real(*arguments)
        two.set_model_version_tag(NAME, "2", "tunegate.rejected", "{}")
        return decision

    monkeypatch.setattr(aliases, "check_entitled", checked)
    with pytest.raises(RegistryError, match="tags changed"):
        promote(uri, NAME, 2, who="ann", why="x")
    assert _champion(two) == 1
