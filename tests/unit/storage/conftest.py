"""S3 for the tests of the storage room: one server a worker, one bucket a test."""

import uuid
from types import SimpleNamespace

import boto3
import pytest
from faulty_s3 import served


@pytest.fixture(scope="session")
def s3_server():
    with served() as server:
        yield server


@pytest.fixture
def s3(s3_server, monkeypatch, tmp_path):
    """The server without faults, named by the usual AWS settings."""
    url, application = s3_server
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    # botocore's pauses between attempts, up to seconds by chance, are not what is tested.
    monkeypatch.setattr("botocore.endpoint.time", SimpleNamespace(sleep=lambda seconds: None))
    application.faults.clear()
    application.requests.clear()
    yield application
    application.faults.clear()


@pytest.fixture
def bucket(s3):
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    boto3.client("s3").create_bucket(Bucket=name)
    s3.requests.clear()
    return name
