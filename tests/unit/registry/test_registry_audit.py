from __future__ import annotations

import json

import pytest
from registry_fixtures import NAME, aliases_of, on_both_stores

from tunegate.registry.registry import audit, history, promote, reject
from tunegate.tracking.client import connect


@pytest.fixture
def promoted(uri, add):
    """Two champions in turn, and a third version that nobody promoted."""
    for version, content in enumerate(("one", "two"), start=1):
        add(uri, content)
        promote(uri, NAME, version, who="ann", why="x")
    add(uri, "three")
    return connect(uri)


RIGHT = {"candidate": 3, "champion": 2, "previous_champion": 1}


MOVED = (lambda c: c.set_registered_model_alias(NAME, "champion", "3"), "champion", "3", "2")


@pytest.mark.parametrize(
    ("uri", "by_hand", "alias", "found", "expected"),
    [
        ("local", *MOVED),
        ("server", *MOVED),
        ("local", lambda c: c.delete_registered_model_alias(NAME, "champion"), "champion", None, "2"),
        (
            "local",
            lambda c: c.set_registered_model_alias(NAME, "previous_champion", "3"),
            "previous_champion",
            "3",
            "1",
        ),
        ("local", lambda c: c.set_registered_model_alias(NAME, "candidate", "1"), "candidate", "1", "3"),
    ],
    indirect=["uri"],
)
def test_an_alias_moved_by_hand_is_found_and_put_back(promoted, uri, by_hand, alias, found, expected):
    assert audit(uri, NAME).ok
    by_hand(promoted)
    report = audit(uri, NAME)
    assert not report.ok
    (finding,) = report.findings
    assert (finding.kind, finding.alias, finding.found, finding.expected) == ("alias", alias, found, expected)
    assert aliases_of(promoted) != RIGHT

    enforced = audit(uri, NAME, enforce=True, who="nightly")
    assert enforced.ok
    assert [f.repaired for f in enforced.findings] == [True]
    assert aliases_of(promoted) == RIGHT
    event = history(uri, NAME)[-1]
    assert (event.action, event.who) == ("enforce", "nightly")
    assert audit(uri, NAME).findings == []


def test_a_champion_set_by_hand_where_there_never_was_one_is_removed(uri, add):
    add(uri, "one", "REJECT")
    client = connect(uri)
    client.set_registered_model_alias(NAME, "champion", "1")
    assert "should not be set" in audit(uri, NAME).findings[0].message
    audit(uri, NAME, enforce=True, who="nightly")
    assert aliases_of(client) == {"candidate": 1}


def test_a_promotion_after_a_move_by_hand_goes_by_the_history(promoted, uri):
    promoted.set_registered_model_alias(NAME, "champion", "1")
    promotion = promote(uri, NAME, 3, who="ann", why="x")
    assert promotion.previous == "2"
    assert aliases_of(promoted) == {"candidate": 3, "champion": 3, "previous_champion": 2}


def test_promoting_the_rightful_champion_puts_its_alias_back(promoted, uri):
    promoted.set_registered_model_alias(NAME, "champion", "3")
    assert promote(uri, NAME, 2, who="ann", why="x").changed
    assert aliases_of(promoted) == RIGHT


@on_both_stores
def test_changed_files_of_the_champion_are_reported_and_stay_reported(promoted, uri, artifacts):
    with artifacts(2) as root:
        (root / "config.json").write_text("{}")
    for enforce in (False, True):
        report = audit(uri, NAME, enforce=enforce, who="nightly")
        assert not report.ok
        assert [f.kind for f in report.findings] == ["evidence"]
        assert "config.json was changed" in report.findings[0].message
    assert audit(uri, NAME, files=False).ok


def test_a_deleted_champion_is_reported(promoted, uri):
    promoted.delete_model_version(NAME, "1")
    kinds = {(f.kind, f.alias) for f in audit(uri, NAME).findings}
    assert ("evidence", "previous_champion") in kinds


@pytest.mark.parametrize("edit", ["delete", "change", "garble"])
def test_an_edited_history_is_found(promoted, uri, edit):
    key = "tunegate.history.000001"
    if edit == "delete":
        promoted.delete_registered_model_tag(NAME, key)
    elif edit == "change":
        content = json.loads(promoted.get_registered_model(NAME).tags[key])
        promoted.set_registered_model_tag(NAME, key, json.dumps({**content, "version": 3}))
    else:
        promoted.set_registered_model_tag(NAME, key, "?")
    report = audit(uri, NAME, files=False)
    assert "history" in {f.kind for f in report.findings}


def test_a_rejected_version_is_not_the_expected_candidate(promoted, uri):
    reject(uri, NAME, 3, who="ann", why="x")
    assert audit(uri, NAME).findings == []
    promoted.set_registered_model_alias(NAME, "candidate", "3")
    assert audit(uri, NAME).findings[0].expected == "2"
