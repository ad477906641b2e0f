from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from registry_service import Service

from tunegate.gates.results import Decision, GateResult, write_decision
from tunegate.registry.config import RegistrySpec
from tunegate.registry.registry import Registered, register
from tunegate.storage.manifest import write_manifest
from tunegate.tracking.client import connect
from tunegate.tracking.database import prepare_database

NAME = "assistant"
STORE_VARIABLE = "TUNEGATE_TEST_REGISTRY"
"""`server` runs every test of this room against an MLflow server on PostgreSQL with S3 (some minutes)."""
on_both_stores = pytest.mark.parametrize("uri", ["local", "server"], indirect=True)
"""For the tests that say most about a server; the others run against it when the variable says so."""


@dataclass
class Made:
    """The artifacts that a pipeline run would hand to the register stage."""

    model: Path
    decision: Path
    evaluation: Path
    digest: str


@pytest.fixture(scope="session")
def local_store() -> Iterator[str]:
    """One local MLflow store for all tests of the room: making and opening one takes longer than most tests."""
    # Every change is a commit that waits for the disk, so the file is kept in memory where that can be had.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        uri = f"sqlite:///{folder}/mlflow.db"
        prepare_database(uri)
        yield uri


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """An MLflow server on PostgreSQL and S3 for all tests of the room."""
    running = Service(tmp_path_factory.mktemp("service"))
    yield running
    running.close()


@pytest.fixture
def uri(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A registry without models: a local store, or a server on PostgreSQL with S3."""
    # A server that is killed refuses at once; one that only has to wait for a busy machine's cores gets its time.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "200")
    kind = getattr(request, "param", os.environ.get(STORE_VARIABLE, "local"))
    store = request.getfixturevalue("local_store") if kind == "local" else request.getfixturevalue("service").uri
    yield store
    client = connect(store)
    for model in client.search_registered_models():
        client.delete_registered_model(model.name)


@pytest.fixture
def artifacts(uri: str, request: pytest.FixtureRequest) -> Callable[[int], AbstractContextManager[Path]]:
    """Opens a version's artifacts, wherever they lie, as a folder that may be changed."""

    @contextmanager
    def opened(version: int) -> Iterator[Path]:
        location = str(connect(uri).get_model_version_download_uri(NAME, str(version)))
        if location.startswith("mlflow-artifacts:"):
            with request.getfixturevalue("service").artifacts(location) as folder:
                yield folder
        else:
            yield Path(location.removeprefix("file://"))

    return opened


def aliases_of(client: Any, name: str = NAME) -> dict[str, int]:
    """The aliases of a registered model (MLflow gives the versions as int or as str, as the store has it)."""
    return {alias: int(version) for alias, version in client.get_registered_model(name).aliases.items()}


def make_artifacts(
    folder: Path,
    content: str,
    verdict: str = "PROMOTE",
    reasons: Sequence[str] = (),
    champion: str = "",
    parents: dict[str, str] | None = None,
) -> Made:
    """A model of some bytes with a manifest, an evaluation, and a decision about them."""
    model, evaluation, decision = folder / "model", folder / "evaluation", folder / "decision"
    for path in (model / "tokenizer", evaluation, decision):
        path.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps({"name": content}))
    (model / "model.safetensors").write_bytes(content.encode() * 100)
    (model / "tokenizer" / "vocab.txt").write_text("a\nb\n")
    manifest = write_manifest(
        model,
        kind="model",
        parents={"dataset": "d" * 64, "sft": "e" * 64, **(parents or {})},
        spec_digest="5" * 64,
        seeds={"ppo": 1},
    )
    (evaluation / "evaluation.json").write_text(json.dumps({"of": content}))
    evaluated = write_manifest(evaluation, kind="evaluation", parents={}, spec_digest="5" * 64, seeds={})
    gates = [
        GateResult(name=name, title=name, verdict=one, reason="as measured")
        for name, one in (("harmlessness", verdict), ("bias", "PROMOTE"))
    ]
    digests = {"candidate": manifest.digest, "evaluation": evaluated.digest}
    decided = Decision(
        verdict=verdict,
        reasons=list(reasons) or [f"the gates say {verdict}"],
        gates=gates,
        compared_with="champion" if champion else "anchor",
        digests=digests | ({"champion": champion} if champion else {}),
    )
    write_decision(decided, decision)
    write_manifest(decision, kind="decision", parents={}, spec_digest="5" * 64, seeds={})
    return Made(model, decision, evaluation, manifest.digest)


def register_artifacts(uri: str, made: Made, *, approvals: int = 0, content: str = "") -> Registered:
    """Register what a run has made."""
    return register(
        uri,
        RegistrySpec(model_name=NAME, approvals=approvals),
        model=made.model,
        decision=made.decision,
        evaluation=made.evaluation,
        run_id=f"run-{content or made.model.parent.name}",
        mlflow_run_id=None,
        lineage={"base": "b" * 64},
        model_card=f"# {content}\n",
    )


def _champion_digest(uri: str) -> str:
    client = connect(uri)
    try:
        version = aliases_of(client).get("champion")
    except MlflowException:
        return ""
    return client.get_model_version(NAME, str(version)).tags["tunegate.model_digest"] if version else ""


@pytest.fixture
def add(tmp_path: Path) -> Callable[..., Registered]:
    """Register a model with the given verdict, judged against the present champion."""

    def add_version(uri: str, content: str, verdict: str = "PROMOTE", *, approvals: int = 0) -> Registered:
        made = make_artifacts(tmp_path / "made" / content, content, verdict, champion=_champion_digest(uri))
        return register_artifacts(uri, made, approvals=approvals, content=content)

    return add_version
