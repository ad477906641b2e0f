"""Sources on S3, against a server that speaks S3 over HTTP."""

import gzip
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from data_helpers import GOOD, jsonl, run_ingest
from moto.server import ThreadedMotoServer

from tunegate.data import DataSpec
from tunegate.data.sources import check_s3_source, glob_expression
from tunegate.errors import DataError


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    yield f"http://{host}:{port}"
    moto.stop()


@pytest.fixture
def s3(server: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    yield client
    for entry in client.list_objects_v2(Bucket="bucket").get("Contents", []):
        client.delete_object(Bucket="bucket", Key=entry["Key"])


def test_an_object_is_read_like_a_file_and_leaves_nothing_behind(s3: Any, tmp_path: Path) -> None:
    s3.put_object(Bucket="bucket", Key="folder/chats.jsonl", Body=jsonl([GOOD["sft"]] * 3))
    out, summary = run_ingest(tmp_path, {"sft": ["s3://bucket/folder/chats.jsonl"]})
    assert summary.rows["sft"].total == 3
    assert summary.sources[0].files == ["s3://bucket/folder/chats.jsonl"] and summary.sources[0].name == "chats"
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_a_glob_names_objects_in_their_order(s3: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {n}?", "response": f"A number, {n}."} for n in range(4)]
    for key, body in {
        "chats/b.jsonl": jsonl(rows[1:2]),
        "chats/a.jsonl.gz": gzip.compress(jsonl(rows[:1])),
        "chats/deep/c.jsonl": jsonl(rows[2:3]),
        "chats/notes.txt": b"no data",
        "other/d.jsonl": jsonl(rows[3:]),
    }.items():
        s3.put_object(Bucket="bucket", Key=key, Body=body)
    flat = {"uri": "s3://bucket/chats/*.jsonl*", "name": "flat"}
    deep = {"uri": "s3://bucket/chats/**/*.jsonl", "name": "deep"}
    _, summary = run_ingest(tmp_path, {"sft": [flat, deep]})
    files = [[file.removeprefix("s3://bucket/") for file in source.files] for source in summary.sources]
    assert files == [["chats/a.jsonl.gz", "chats/b.jsonl"], ["chats/b.jsonl", "chats/deep/c.jsonl"]]


@pytest.mark.parametrize(
    ("pattern", "key", "matches"),
    [
        ("a/*.jsonl", "a/b.jsonl", True),
        ("a/*.jsonl", "a/b/c.jsonl", False),
        ("a/**/*.jsonl", "a/b/c/d.jsonl", True),
        ("a/part-0[0-4]?.csv", "a/part-037.csv", True),
        ("a/part-[!0]*.csv", "a/part-037.csv", False),
        ("a/x+y(1).*", "a/x+y(1).json", True),
        ("a/[", "a/[", True),
    ],
)
def test_wildcards(pattern: str, key: str, matches: bool) -> None:
    import re

    assert bool(re.fullmatch(glob_expression(pattern), key)) == matches


def test_the_digest_of_a_source_can_be_pinned(s3: Any, tmp_path: Path) -> None:
    body = jsonl([GOOD["sft"]])
    s3.put_object(Bucket="bucket", Key="chats.jsonl", Body=body)
    (tmp_path / "local.jsonl").write_bytes(body)
    digest = hashlib.sha256(body).hexdigest()
    for uri in ("s3://bucket/chats.jsonl", "local.jsonl"):
        _, summary = run_ingest(tmp_path, {"sft": [{"uri": uri, "sha256": digest}]})
        assert summary.rows["sft"].total == 1
        with pytest.raises(DataError, match=f"its sha256 is {digest}") as caught:
            run_ingest(tmp_path, {"sft": [{"uri": uri, "sha256": "0" * 64}]})
        assert caught.value.key == "data.sft[0].uri"
    with pytest.raises(ValueError, match="single file"):
        DataSpec.model_validate({"sft": [{"uri": "*.jsonl", "sha256": digest}]})


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("s3://bucket/missing.jsonl", "NoSuchKey"),
        ("s3://nowhere/chats.jsonl", "NoSuchBucket"),
        ("s3://bucket/none/*.jsonl", "matches no object"),
        ("s3://bucket/folder/", "names a bucket and an object"),
    ],
)
def test_what_is_missing_is_named(s3: Any, uri: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=told) as caught:
        run_ingest(tmp_path, {"sft": [uri]})
    assert caught.value.key == "data.sft[0].uri" and caught.value.fix


def test_a_source_is_checked_without_reading_it(s3: Any) -> None:
    s3.put_object(Bucket="bucket", Key="chats/a.jsonl", Body=b"{}")
    for uri in ("s3://bucket/chats/a.jsonl", "s3://bucket/chats/*.jsonl"):
        check_s3_source(DataSpec.model_validate({"sft": [uri]}).sft[0], key="data.sft[0].uri")
    with pytest.raises(DataError, match="no such object"):
        check_s3_source(DataSpec.model_validate({"sft": ["s3://bucket/b.jsonl"]}).sft[0], key="k")


def test_without_credentials_the_error_says_what_to_set(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(DataError, match="credentials") as caught:
        run_ingest(tmp_path, {"sft": ["s3://bucket/chats.jsonl"]})
    assert caught.value.fix and "AWS_ACCESS_KEY_ID" in caught.value.fix
