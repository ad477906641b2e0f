"""Data sets in the format of Hugging Face, from folders on disk."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from data_helpers import GOOD, jsonl, quarantined, run_ingest

from tunegate.config import resolve_paths
from tunegate.data.hub import HubSet, parse_hub_uri
from tunegate.errors import DataError

datasets = pytest.importorskip("datasets", reason="the extra `hub` is not installed")

ROWS: list[dict[str, Any]] = [
    {"prompt": f"What is {n} squared?", "chosen": f"{n * n}.", "rejected": "No idea."} for n in range(30)
]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)


def test_a_folder_of_files_is_read_by_split(tmp_path: Path) -> None:
    (tmp_path / "pairs" / "data").mkdir(parents=True)
    (tmp_path / "pairs" / "data" / "train.jsonl").write_bytes(jsonl(ROWS[:20]))
    (tmp_path / "pairs" / "data" / "test.jsonl").write_bytes(jsonl(ROWS[20:]))
    for split, count in (("train", 20), ("test", 10)):
        _, summary = run_ingest(tmp_path, {"preferences": [f"hf://./pairs?split={split}"]})
        assert summary.rows["preferences"].total == count
        assert summary.sources[0].name == "pairs" and summary.sources[0].files == [f"hf://./pairs?split={split}"]


def test_the_rows_are_those_of_the_same_files_read_directly(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(jsonl(ROWS))
    columns = ["prompt", "chosen", "rejected", "split", "line"]
    tables = []
    for uri in ("hf://./set", "set/train.jsonl"):
        out, _ = run_ingest(tmp_path, {"preferences": [uri]})
        tables.append(pq.read_table(out / "preferences.parquet", columns=columns))
    assert tables[0].equals(tables[1])


def test_what_save_to_disk_wrote_is_read(tmp_path: Path) -> None:
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": whole, "test": whole.select(range(4))}).save_to_disk(str(tmp_path / "two"))
    for uri, count in ((f"hf://{tmp_path}/one", 30), (f"hf://{tmp_path}/two?split=test", 4)):
        _, summary = run_ingest(tmp_path, {"preferences": [uri]})
        assert summary.rows["preferences"].total == count
    with pytest.raises(DataError, match="no split 'nowhere', only train, test"):
        run_ingest(tmp_path, {"preferences": [f"hf://{tmp_path}/two?split=nowhere"]})


def test_a_bad_row_is_quarantined_with_its_number(tmp_path: Path) -> None:
    rows = [*ROWS[:3], {"prompt": "A question?", "chosen": None, "rejected": "No."}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "set"))
    out, summary = run_ingest(tmp_path, {"preferences": [f"hf://{tmp_path}/set"]})
    assert (summary.rows["preferences"].total, summary.quarantined) == (3, 1)
    assert quarantined(out)[0]["line"] == 4


def test_values_that_json_does_not_know_do_not_stop_a_run(tmp_path: Path) -> None:
    from datetime import UTC, datetime

    rows = [{**GOOD["prompts"], "when": datetime(2026, 1, 2, tzinfo=UTC), "raw": b"\x00\xff"}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "set"))
    _, summary = run_ingest(tmp_path, {"prompts": [f"hf://{tmp_path}/set"]})
    assert summary.rows["prompts"].total == 1


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("hf://?split=train", "no name"),
        ("hf://org/name?splitt=train", "'splitt' is no option"),
        ("hf://./nowhere", "no such folder"),
        ("hf://org/name-that-is-not-here", "cannot be read"),
    ],
)
def test_mistakes_are_named(uri: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=told) as caught:
        run_ingest(tmp_path, {"sft": [uri]})
    assert caught.value.key == "data.sft[0].uri" and caught.value.fix


def test_the_parts_of_a_uri(tmp_path: Path) -> None:
    whole = parse_hub_uri("hf://org/name?split=train_prefs&config=en&revision=v1.2", base_dir=tmp_path, key="k")
    assert whole == HubSet("org/name", False, "train_prefs", "en", "v1.2")
    assert parse_hub_uri("hf://../x", base_dir=tmp_path, key="k").folder


def test_relative_folders_are_relative_to_the_spec(tmp_path: Path) -> None:
    from tunegate.config import build_spec

    spec = build_spec({"data": {"sft": ["hf://./pairs?split=a", "hf://org/name"]}})
    uris = [source.uri for source in resolve_paths(spec, tmp_path).data.sft]
    assert uris == [f"hf://{tmp_path}/pairs?split=a", "hf://org/name"]


def test_without_the_package_the_error_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        "from pathlib import Path\n"
        "from tunegate.data.hub import open_hub\n"
        "try:\n    open_hub('hf://a/b', base_dir=Path('.'), key='k')\n"
        "except Exception as error:\n    print(error)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "tunegate[hub]" in shown and json.dumps(shown)
