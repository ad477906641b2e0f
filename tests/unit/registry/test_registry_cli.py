"""The registry's commands: what they print, what they write, and their exit codes."""

from __future__ import annotations

import json

import pytest
from registry_fixtures import NAME, aliases_of
from test_registry_balance import release  # noqa: F401  (a fixture)
from typer.testing import CliRunner

from tunegate.cli import models  # noqa: F401  (registers the commands)
from tunegate.cli.app import app
from tunegate.errors import GateError
from tunegate.tracking.client import connect


@pytest.fixture
def run(uri, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")

    def command(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, [*arguments, "--tracking-uri", uri])
        failed = getattr(result.exception, "exit_code", result.exit_code)
        assert failed == code, (result.output, result.exception)
        return result.output + (str(result.exception) if code and result.exception else "")

    return command


def test_a_release_and_its_way_back(uri, add, run):
    add(uri, "one")
    assert f"{NAME} version 1 is champion" in run("promote", NAME, "--why", "first", "--who", "ann")
    add(uri, "two")
    assert json.loads(run("promote", NAME, "--why", "second", "--json"))["previous"] == "1"
    assert "version 1 is champion again, was 2" in run("rollback", NAME, "--why", "bad")
    status = run("registry", "status", NAME)
    assert "2/2 passed" in status
    assert "champion" in status
    history = run("registry", "history", NAME).splitlines()
    assert [line.split()[1] for line in history] == ["promote", "promote", "rollback"]
    assert history[0].endswith("ann: first")
    assert "version 1 is what was registered (verdict PROMOTE)" in run("registry", "verify", NAME)
    assert "version 2 is rejected" in run("reject", NAME, "2", "--why", "worse")


def test_two_approvals(uri, add, run):
    add(uri, "one", "HOLD", approvals=2)
    assert "asks for 2 approvals" in run("promote", NAME, "--why", "x", code=GateError.exit_code)
    for who in ("ann", "bob"):
        assert f"{who} approved {NAME} version 1" in run(
            "registry", "approve", NAME, "1", "--who", who, "--why", "read"
        )
    assert "is champion" in run("promote", NAME, "--why", "two persons read it")


def test_the_audit_finds_and_mends_what_was_moved_by_hand(uri, add, run):
    assert "not registered yet" in run("registry", "audit", NAME)
    add(uri, "one")
    run("promote", NAME, "--why", "x")
    add(uri, "two", "REJECT")
    connect(uri).set_registered_model_alias(NAME, "champion", "2")
    assert "FOUND: champion points to version 2" in run("registry", "audit", NAME, code=GateError.exit_code)
    assert "repaired: champion points to version 2" in run("registry", "audit", NAME, "--enforce")
    assert aliases_of(connect(uri))["champion"] == 1
    assert "every alias stands where the gates put it" in run("registry", "audit", NAME)


def test_tampering_fails_verification(uri, add, run, artifacts):
    add(uri, "one")
    with artifacts(1) as root:
        (root / "config.json").write_text("{}")
    assert "config.json was changed" in run("registry", "verify", NAME, "1", code=GateError.exit_code)


def test_the_balance_as_table_picture_and_json(uri, release, run, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    release(0.1, 0.6)
    release(0.05, 0.7, over_refusal=0.25)
    told = run("balance", NAME)
    row = next(line for line in told.splitlines() if "candidate" in line)
    assert row.split() == [
        "◆",
        "2",
        "candidate",
        "PROMOTE",
        "70.0%",
        "[67,",
        "73]",
        "95.0%",
        "[92,",
        "98]",
        "25.0%",
        "base",
    ]
    assert (tmp_path / f"{NAME}-balance.svg").read_text().startswith("<svg")
    points = json.loads(run("balance", NAME, "--json", "--last", "1"))["points"]
    assert [p["version"] for p in points] == ["base", "2"]
    run("balance", NAME, "--out", "other.svg")
    assert (tmp_path / "other.svg").exists()
