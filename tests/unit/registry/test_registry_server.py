"""The registry on a real MLflow server process with PostgreSQL and S3, which are killed and restarted under it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import Any

import pytest
from registry_fixtures import NAME, aliases_of
from test_registry_interrupted import PROMOTE

from tunegate.errors import GateError, RegistryError
from tunegate.registry import session as session_module
from tunegate.registry.registry import audit, champion_model, history, promote, rollback, status
from tunegate.storage.manifest import verify
from tunegate.tracking.client import connect

pytestmark = pytest.mark.parametrize("uri", ["server"], indirect=True)


@pytest.fixture(autouse=True)
def one_try(monkeypatch):
    """A request that fails is not repeated, so that an outage is seen at once."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture
def two(uri, add):
    """Version 1 is champion, version 2 could be."""
    add(uri, "one")
    promote(uri, NAME, 1, who="ann", why="first")
    add(uri, "two")
    return connect(uri)


@pytest.fixture
def happens_before(monkeypatch):
    """Runs something in the middle of a promotion, right before a request of the given name."""

    def arrange(request: str, incident: Any) -> None:
        class Client:
            def __init__(self, client: Any) -> None:
                self._client = client

            def __getattr__(self, name: str) -> Any:
                if name == request:
                    incident()
                return getattr(self._client, name)

        monkeypatch.setattr(session_module, "connect", lambda uri: Client(connect(uri)))

    arrange.over = lambda: monkeypatch.setattr(session_module, "connect", connect)
    return arrange


def test_killed_in_the_middle_restarted_rolled_back_and_tampered_with(
    service, uri, two, tmp_path, monkeypatch, happens_before, artifacts
):
    happens_before("set_registered_model_alias", service.mlflow.stop)
    with pytest.raises(RegistryError, match="interrupted while the alias champion was being moved"):
        promote(uri, NAME, who="ann", why="second")
    with pytest.raises(RegistryError, match="MLflow did not let us"):
        status(uri, NAME)
    happens_before.over()
    service.mlflow.start()
    assert aliases_of(two) == {"candidate": 2, "champion": 1}
    unfinished = status(uri, NAME).unfinished
    assert unfinished is not None
    assert unfinished.version == 2

    # The lock of the interrupted promotion is this living process's own; its lease is what ends it.
    monkeypatch.setattr("tunegate.registry.lock.LEASE_SECONDS", 0.0)
    with pytest.raises(RegistryError, match="lock on the registry ran out"):
        promote(uri, NAME, who="ann", why="second")
    monkeypatch.setattr("tunegate.registry.lock.LEASE_SECONDS", 120.0)
    assert promote(uri, NAME, who="ann", why="second").changed
    assert aliases_of(two) == {"candidate": 2, "champion": 2, "previous_champion": 1}
    assert [(e.version, e.state) for e in history(uri, NAME)] == [
        (1, "done"),
        (2, "abandoned"),
        (2, "abandoned"),
        (2, "done"),
    ]
    out = champion_model(uri, NAME, tmp_path / "champion")
    assert out is not None
    assert verify(out).digest == verify(tmp_path / "made" / "two" / "model").digest
    rollback(uri, NAME, who="bob", why="x")
    assert audit(uri, NAME).findings == []
    with artifacts(2) as root:
        (root / "model.safetensors").write_bytes(b"tampered")
    with pytest.raises(GateError, match=r"model\.safetensors was changed"):
        promote(uri, NAME, 2, who="ann", why="x")
    assert aliases_of(two)["champion"] == 1


def test_the_database_is_restarted_between_the_check_and_the_move(service, uri, two, happens_before):
    def restart() -> None:
        service.postgres.stop()
        service.postgres.start()

    happens_before("set_registered_model_alias", restart)
    # The server's connections are dead: it may answer with an error once, or open new ones unseen.
    try:
        promote(uri, NAME, 2, who="ann", why="second")
    except RegistryError as error:
        assert "interrupted" in str(error)
    happens_before.over()
    assert audit(uri, NAME, enforce=True, who="nightly").ok
    promote(uri, NAME, 2, who="ann", why="second")
    assert aliases_of(two) == {"candidate": 2, "champion": 2, "previous_champion": 1}
    assert audit(uri, NAME).findings == []


def test_while_the_database_is_away_nothing_moves_and_the_error_says_so(service, uri, two):
    service.postgres.stop()
    try:
        with pytest.raises(RegistryError, match="MLflow did not let us"):
            promote(uri, NAME, 2, who="ann", why="second")
    finally:
        service.postgres.start()
    assert aliases_of(two) == {"candidate": 2, "champion": 1}
    assert promote(uri, NAME, 2, who="ann", why="second").changed


def test_while_s3_has_lost_the_evidence_nothing_moves(uri, two, artifacts):
    with artifacts(2) as root:
        for path in sorted(root.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
    with pytest.raises((RegistryError, GateError)):
        promote(uri, NAME, 2, who="ann", why="second")
    assert aliases_of(two)["champion"] == 1


def test_two_processes_promote_while_the_server_is_restarted_under_them(service, uri, two, add):
    """Both have found that they may; the server goes away and comes back while they take the lock and move."""
    add(uri, "three")
    environment = {**os.environ, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "5", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROMOTE, uri, NAME, version],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for version in ("2", "3")
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    service.mlflow.stop()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    back = threading.Thread(target=service.mlflow.start)
    back.start()
    answers = [process.communicate(timeout=240)[0].strip() for process in processes]
    back.join()
    # However it went, it went whole: a winner is champion, and who did not win was told why.
    assert all(answer.startswith(("won", "told: ")) for answer in answers), answers
    winners = [number for number, answer in zip((2, 3), answers, strict=True) if answer == "won"]
    assert len(winners) <= 1, answers
    assert aliases_of(two)["champion"] == (winners[0] if winners else 1)
    assert audit(uri, NAME, enforce=True, who="nightly").ok
    assert audit(uri, NAME).findings == []
    if not winners:
        assert promote(uri, NAME, 2, who="ann", why="again").changed
