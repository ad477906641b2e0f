from __future__ import annotations

import json
from pathlib import Path

import pytest
from registry_fixtures import NAME, aliases_of, on_both_stores

from tunegate.errors import GateError, RegistryError
from tunegate.gates.results import GATES_VERSION
from tunegate.registry import aliases
from tunegate.registry.registry import (
    approve,
    audit,
    history,
    promote,
    reject,
    rollback,
    status,
    verify,
)
from tunegate.tracking.client import connect


def _aliases(uri):
    return aliases_of(connect(uri))


@on_both_stores
def test_register_promote_roll_back(uri, add):
    add(uri, "one")
    assert _aliases(uri) == {"candidate": 1}
    first = promote(uri, NAME, who="ann", why="the first release")
    assert (first.version, first.previous, first.changed, first.verdict) == ("1", None, True, "PROMOTE")
    assert _aliases(uri) == {"candidate": 1, "champion": 1}

    add(uri, "two")
    promote(uri, NAME, "2", who="ann", why="better")
    add(uri, "three")
    third = promote(uri, NAME, who="pipeline", why="better still")
    assert (third.version, third.previous) == ("3", "2")
    assert _aliases(uri) == {"candidate": 3, "champion": 3, "previous_champion": 2}

    back = rollback(uri, NAME, who="bob", why="users complain")
    assert (back.version, back.previous) == ("2", "3")
    assert _aliases(uri) == {"candidate": 3, "champion": 2, "previous_champion": 1}
    rollback(uri, NAME, who="bob", why="still")
    assert _aliases(uri) == {"candidate": 3, "champion": 1}
    with pytest.raises(RegistryError, match="no earlier champion"):
        rollback(uri, NAME, who="bob", why="further")

    events = history(uri, NAME)
    assert [(e.action, e.version, e.champion_before, e.who, e.why, e.state) for e in events] == [
        ("promote", 1, None, "ann", "the first release", "done"),
        ("promote", 2, 1, "ann", "better", "done"),
        ("promote", 3, 2, "pipeline", "better still", "done"),
        ("rollback", 2, 3, "bob", "users complain", "done"),
        ("rollback", 1, 2, "bob", "still", "done"),
    ]
    assert all(e.when.startswith("20") for e in events)
    promoted = json.loads(connect(uri).get_model_version(NAME, "3").tags["tunegate.promoted"])
    assert (promoted["who"], promoted["why"]) == ("pipeline", "better still")
    rolled_back = {v.version: json.loads(v.rolled_back)["why"] for v in status(uri, NAME).versions if v.rolled_back}
    assert rolled_back == {"3": "users complain", "2": "still"}
    assert audit(uri, NAME).findings == []


def test_promoting_the_champion_again_changes_nothing(uri, add):
    add(uri, "one")
    promote(uri, NAME, who="ann", why="first")
    again = promote(uri, NAME, "1", who="bob", why="again")
    assert not again.changed
    assert len(history(uri, NAME)) == 1


def test_a_version_that_was_rolled_back_is_promoted_only_when_named(uri, add):
    add(uri, "one")
    promote(uri, NAME, "1", who="ann", why="first")
    add(uri, "two")
    promote(uri, NAME, "2", who="ann", why="second")
    rollback(uri, NAME, who="bob", why="broken tokenizer")
    with pytest.raises(RegistryError, match=r"rolled back.*broken tokenizer"):
        promote(uri, NAME, who="ann", why="again")
    promote(uri, NAME, "2", who="ann", why="the tokenizer was fine after all")
    assert _aliases(uri)["champion"] == 2
    assert _aliases(uri)["previous_champion"] == 1
    assert status(uri, NAME).versions[0].rolled_back is None


def test_rolling_back_to_a_named_version(uri, add):
    for version, content in enumerate(("one", "two", "three"), start=1):
        add(uri, content)
        promote(uri, NAME, version, who="ann", why="x")
    add(uri, "never")
    with pytest.raises(RegistryError, match=r"was champion before.*one of: 1, 2"):
        rollback(uri, NAME, 4, who="ann", why="x")
    rollback(uri, NAME, 1, who="ann", why="x")
    assert _aliases(uri) == {"candidate": 4, "champion": 1}


@pytest.mark.parametrize("verdict", ["HOLD", "REJECT", "INVALID"])
def test_without_the_verdict_promote_nothing_moves(uri, add, verdict):
    add(uri, "one", verdict)
    with pytest.raises(GateError, match=f"gates said {verdict}: the gates say {verdict}") as caught:
        promote(uri, NAME, who="ann", why="please")
    assert caught.value.exit_code == 4
    assert _aliases(uri) == {"candidate": 1}
    assert history(uri, NAME) == []


@on_both_stores
def test_two_persons_must_approve_when_the_spec_says_so(uri, add):
    add(uri, "one", "HOLD", approvals=2)
    with pytest.raises(GateError, match=r"asks for 2 approvals, it has 0 \(nobody yet\)"):
        promote(uri, NAME, who="ann", why="x")
    approve(uri, NAME, 1, who="Ann", why="read 50 answers")
    approve(uri, NAME, 1, who="ann ", why="read 50 more")  # the same person
    with pytest.raises(GateError, match="it has 1"):
        promote(uri, NAME, who="ann", why="x")
    approve(uri, NAME, 1, who="bob", why="read them too")
    promotion = promote(uri, NAME, who="ann", why="x")
    assert promotion.verdict == "HOLD"
    assert len(promotion.approvals) == 2
    assert [e.action for e in history(uri, NAME)] == ["approve", "approve", "approve", "promote"]


def test_approvals_are_needed_for_promote_too_and_cannot_lift_a_reject(uri, add):
    add(uri, "one", approvals=1)
    with pytest.raises(GateError, match="asks for 1 approvals"):
        promote(uri, NAME, who="ann", why="x")
    add(uri, "two", "REJECT", approvals=1)
    with pytest.raises(GateError, match="gates said REJECT"):
        approve(uri, NAME, 2, who="ann", why="x")


def test_an_approval_of_other_evidence_does_not_count(uri, add):
    add(uri, "one", "HOLD", approvals=1)
    add(uri, "two", "HOLD", approvals=1)
    approve(uri, NAME, 1, who="ann", why="x")
    client = connect(uri)
    tags = client.get_model_version(NAME, "1").tags
    client.set_model_version_tag(NAME, "2", "tunegate.approval.ann", tags["tunegate.approval.ann"])
    with pytest.raises(GateError, match="it has 0"):
        promote(uri, NAME, 2, who="ann", why="x")


TAGS_BY_HAND = [
    ("tunegate.approvals_required", "0"),
    ("tunegate.verdict", "HOLD"),
    ("tunegate.evaluation_digest", "0" * 64),
    ("tunegate.parent.dataset", "0" * 64),
    ("tunegate.gate.bias", "PROMOTE "),
]


@pytest.mark.parametrize(("tag", "value"), TAGS_BY_HAND)
def test_a_tag_that_was_edited_by_hand_stops_a_promotion(uri, add, tag, value):
    add(uri, "one", approvals=1)
    approve(uri, NAME, 1, who="ann", why="read it")
    connect(uri).set_model_version_tag(NAME, "1", tag, value)
    with pytest.raises(GateError, match=f"the tag {tag} was changed after the registration"):
        promote(uri, NAME, 1, who="ann", why="x")
    connect(uri).delete_model_version_tag(NAME, "1", tag)
    with pytest.raises(GateError):
        promote(uri, NAME, 1, who="ann", why="x")
    assert _aliases(uri) == {"candidate": 1}


def test_an_approval_written_by_hand_is_none(uri, add):
    add(uri, "one", "HOLD", approvals=2)
    approve(uri, NAME, 1, who="ann", why="read it")
    client = connect(uri)
    forged = json.loads(client.get_model_version(NAME, "1").tags["tunegate.approval.ann"]) | {"who": "bob"}
    client.set_model_version_tag(NAME, "1", "tunegate.approval.bob", json.dumps(forged))
    assert status(uri, NAME).versions[0].approvals == ["ann"]
    with pytest.raises(GateError, match=r"asks for 2 approvals, it has 1 \(ann\)"):
        promote(uri, NAME, 1, who="ann", why="x")


def test_a_rejection_holds_when_its_tag_is_deleted_by_hand(uri, add):
    add(uri, "one")
    reject(uri, NAME, 1, who="ann", why="it swears")
    connect(uri).delete_model_version_tag(NAME, "1", "tunegate.rejected")
    with pytest.raises(GateError, match="was rejected: it swears"):
        promote(uri, NAME, 1, who="bob", why="x")
    assert "version 1 was rejected by ann, but its tag is gone" in {f.message for f in audit(uri, NAME).findings}


def test_files_registered_under_another_name_are_no_evidence(uri, add, artifacts):
    add(uri, "one")
    with artifacts(1) as root:
        path = root / "tunegate" / "registration.json"
        path.write_text(path.read_text().replace(f'"{NAME}"', '"another"'))
    with pytest.raises(GateError, match=f"registered as another, not as {NAME}"):
        promote(uri, NAME, 1, who="ann", why="x")


@on_both_stores
def test_a_rejected_version_is_never_promoted_and_the_candidate_moves_on(uri, add):
    add(uri, "one")
    add(uri, "two")
    reject(uri, NAME, 2, who="ann", why="it swears")
    assert _aliases(uri) == {"candidate": 1}
    with pytest.raises(GateError, match="was rejected: it swears"):
        promote(uri, NAME, 2, who="bob", why="x")
    promote(uri, NAME, who="bob", why="the one before")
    with pytest.raises(RegistryError, match="champion cannot be rejected"):
        reject(uri, NAME, 1, who="ann", why="x")
    assert audit(uri, NAME).findings == []


def test_rejecting_an_old_champion_takes_it_out_of_the_line(uri, add):
    for version, content in enumerate(("one", "two", "three"), start=1):
        add(uri, content)
        promote(uri, NAME, version, who="ann", why="x")
    reject(uri, NAME, 2, who="ann", why="leaks its prompt")
    assert _aliases(uri)["previous_champion"] == 1
    assert rollback(uri, NAME, who="ann", why="x").version == "1"


@pytest.mark.parametrize("missing", ["who", "why"])
def test_who_and_why_must_be_given(uri, add, missing):
    add(uri, "one")
    with pytest.raises(RegistryError, match=missing):
        promote(uri, NAME, **{"who": "ann", "why": "x", missing: "  "})


def test_names_and_versions_that_do_not_exist(uri, add):
    with pytest.raises(RegistryError, match="register one first"):
        promote(uri, "nobody", who="ann", why="x")
    add(uri, "one")
    with pytest.raises(RegistryError, match=f"one of: {NAME}"):
        promote(uri, "nobody", who="ann", why="x")
    with pytest.raises(RegistryError, match=r"no such version.*one of: 1"):
        promote(uri, NAME, 7, who="ann", why="x")
    with pytest.raises(RegistryError, match=r"no such alias.*candidate"):
        verify(uri, NAME, "champion")


# Evidence that does not hold: in every case the promotion is refused, nothing moves, and `verify` says why.


def _change_model(root: Path) -> None:
    with (root / "model.safetensors").open("r+b") as stream:
        stream.write(b"X")


def _remove_model_file(root: Path) -> None:
    (root / "tokenizer" / "vocab.txt").unlink()


def _add_code(root: Path) -> None:
    (root / "modeling_custom.py").write_text("import os")


def _rewrite_model_and_manifest(root: Path) -> None:
    from tunegate.storage.manifest import FileEntry, digest_files, read_manifest, sha256_file

    _change_model(root)
    old = read_manifest(root)
    files = [
        FileEntry(path=f.path, sha256=sha256_file(root / f.path), size=(root / f.path).stat().st_size)
        for f in old.files
    ]
    changed = old.model_copy(update={"files": files, "digest": digest_files(files)})
    (root / "manifest.json").write_text(changed.model_dump_json())


def _swap_verdict(root: Path) -> None:
    path = root / "tunegate" / "decision.json"
    path.write_text(path.read_text().replace("HOLD", "PROMOTE"))


def _remove_decision(root: Path) -> None:
    (root / "tunegate" / "decision.json").unlink()


def _remove_registration(root: Path) -> None:
    (root / "tunegate" / "registration.json").unlink()


def _change_evaluation(root: Path) -> None:
    (root / "tunegate" / "evaluation" / "evaluation.json").write_text('{"of": "another"}')


def _remove_evaluation(root: Path) -> None:
    import shutil

    shutil.rmtree(root / "tunegate" / "evaluation")


@on_both_stores
@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        (_change_model, r"model\.safetensors was changed"),
        (_remove_model_file, r"tokenizer/vocab\.txt is missing"),
        (_add_code, r"modeling_custom\.py was added"),
        (_rewrite_model_and_manifest, "the version is registered for"),
        (_remove_decision, r"decision\.json is missing"),
        (_remove_registration, r"registration\.json is missing"),
        (_change_evaluation, "evaluation's files were changed"),
        (_remove_evaluation, "evaluation is missing"),
    ],
)
def test_files_that_were_changed_stop_a_promotion(uri, add, artifacts, tamper, reason):
    add(uri, "one")
    with artifacts(1) as root:
        tamper(root)
    with pytest.raises(GateError, match=reason):
        promote(uri, NAME, who="ann", why="x")
    assert _aliases(uri) == {"candidate": 1}
    assert not verify(uri, NAME, 1).ok


@on_both_stores
def test_evidence_that_was_edited_stops_a_promotion_even_when_the_tag_says_promote(uri, add, artifacts):
    add(uri, "one", "HOLD")
    with artifacts(1) as root:
        _swap_verdict(root)
    with pytest.raises(GateError, match="not the one that the version was registered with"):
        promote(uri, NAME, who="ann", why="x")
    connect(uri).set_model_version_tag(NAME, "1", "tunegate.verdict", "PROMOTE")
    with pytest.raises(GateError, match="digest differs"):
        promote(uri, NAME, who="ann", why="x")


@on_both_stores
def test_evidence_of_another_version_stops_a_promotion(uri, add, artifacts):
    """The whole evidence of a good version, its tags included, is put on a bad one."""
    add(uri, "good")
    add(uri, "bad", "REJECT")
    with artifacts(1) as good, artifacts(2) as bad:
        (bad / "tunegate" / "decision.json").write_bytes((good / "tunegate" / "decision.json").read_bytes())
    client = connect(uri)
    tags = client.get_model_version(NAME, "1").tags
    for tag in ("tunegate.decision_digest", "tunegate.verdict"):
        client.set_model_version_tag(NAME, "2", tag, tags[tag])
    with pytest.raises(GateError, match="the decision judged the model"):
        promote(uri, NAME, 2, who="ann", why="x")
    client.set_model_version_tag(NAME, "2", "tunegate.model_digest", tags["tunegate.model_digest"])
    with pytest.raises(GateError, match="the version is registered for"):
        promote(uri, NAME, 2, who="ann", why="x")


def test_a_version_that_did_not_come_through_the_gates_is_refused(uri, add):
    add(uri, "one")
    connect(uri).create_model_version(NAME, "s3://somewhere/anything")
    with pytest.raises(GateError, match="did not come through the gates"):
        promote(uri, NAME, 2, who="ann", why="x")


def test_evidence_of_older_gates_is_refused_for_promotion_but_not_for_rollback(uri, add, monkeypatch):
    add(uri, "one")
    promote(uri, NAME, 1, who="ann", why="x")
    add(uri, "two")
    promote(uri, NAME, 2, who="ann", why="x")
    add(uri, "three")
    monkeypatch.setattr(aliases, "GATES_VERSION", GATES_VERSION + 1)
    with pytest.raises(GateError, match=f"gates of version {GATES_VERSION}, the present ones are {GATES_VERSION + 1}"):
        promote(uri, NAME, 3, who="ann", why="x")
    assert rollback(uri, NAME, who="ann", why="x").version == "1"


def test_a_rollback_checks_what_it_goes_back_to(uri, add, artifacts):
    add(uri, "one")
    promote(uri, NAME, 1, who="ann", why="x")
    add(uri, "two")
    promote(uri, NAME, 2, who="ann", why="x")
    with artifacts(1) as root:
        _change_model(root)
    with pytest.raises(GateError, match="was changed"):
        rollback(uri, NAME, who="ann", why="x")
    assert _aliases(uri)["champion"] == 2


def test_evidence_against_an_older_champion_is_stale(uri, add):
    add(uri, "one")
    add(uri, "also without a champion")
    promote(uri, NAME, 1, who="ann", why="x")
    with pytest.raises(GateError, match=r"compares the version with no champion, but version 1 .* is champion now"):
        promote(uri, NAME, 2, who="ann", why="x")
    add(uri, "three")
    add(uri, "four")
    promote(uri, NAME, 3, who="ann", why="x")
    with pytest.raises(GateError, match=r"compares the version with the model .*, but version 3"):
        promote(uri, NAME, 4, who="ann", why="x")
    rollback(uri, NAME, who="ann", why="x")
    promote(uri, NAME, 4, who="ann", why="its evidence is about the champion again")
