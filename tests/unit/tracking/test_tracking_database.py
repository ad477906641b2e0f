from __future__ import annotations

import multiprocessing
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from tunegate.errors import StorageError
from tunegate.tracking.client import connect, ensure_experiment
from tunegate.tracking.database import prepare_database


def _create(uri: str, together: Any, ids: Any) -> None:
    together.wait(timeout=60)
    client = connect(uri)
    experiment = ensure_experiment(client, "shared", None)
    ids.put(client.create_run(experiment).info.run_id)


def _objects(path: Path) -> set[tuple[str, str]]:
    with sqlite3.connect(path) as database:
        return set(database.execute("select type, name from sqlite_master"))


def test_the_store_is_the_one_that_mlflow_itself_would_make(empty_store, tmp_path):
    import sqlalchemy
    from mlflow.store.db.utils import _get_latest_schema_revision, _initialize_tables
    from sqlalchemy.pool import StaticPool

    engine = sqlalchemy.create_engine("sqlite://", poolclass=StaticPool)
    _initialize_tables(engine)
    with engine.connect() as connection:
        theirs = {tuple(row) for row in connection.execute(sqlalchemy.text("select type, name from sqlite_master"))}
    assert _objects(empty_store) == theirs
    with sqlite3.connect(empty_store) as database:
        assert database.execute("select version_num from alembic_version").fetchall() == [
            (_get_latest_schema_revision(),)
        ]


def test_two_processes_that_start_at_once_share_one_whole_store(tmp_path):
    uri = f"sqlite:///{tmp_path}/new/mlflow.db"
    context = multiprocessing.get_context("fork")  # which need not import MLflow again
    together, ids = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_create, args=(uri, together, ids)) for _ in range(2)]
    for process in processes:
        process.start()
    made = {ids.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]
    client = connect(uri)
    experiment = ensure_experiment(client, "shared", None)
    assert {run.info.run_id for run in client.search_runs([experiment])} == made
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [".mlflow.db.lock", "mlflow.db"]


def test_a_store_that_exists_is_left_alone(store_uri):
    path = Path(store_uri.removeprefix("sqlite:///"))
    before = path.read_bytes()
    prepare_database(store_uri)
    assert path.read_bytes() == before


def test_other_uris_need_no_preparation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare_database("http://127.0.0.1:1")  # nothing listens there: a call would raise
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"mlflow\.db.*tracking\.uri"):
        prepare_database(f"sqlite:///{tmp_path}/file/mlflow.db")


def test_a_deleted_experiment_is_brought_back(store_uri, tmp_path):
    client = connect(store_uri)
    first = ensure_experiment(client, "again", str(tmp_path / "artifacts"))
    client.delete_experiment(first)
    assert ensure_experiment(client, "again", None) == first
    assert client.get_experiment(first).lifecycle_stage == "active"
    assert client.get_experiment(first).artifact_location == str(tmp_path / "artifacts")
