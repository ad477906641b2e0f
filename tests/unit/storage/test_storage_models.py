"""Models that lie on S3: as plain files that somebody uploaded, or as an artifact of a run."""

from pathlib import Path

import boto3
import pytest
from safetensors.torch import load_file

from tunegate.errors import ModelError, StorageError
from tunegate.storage.manifest import write_manifest
from tunegate.storage.stores import S3Store
from tunegate.training.config import ModelSpec
from tunegate.training.models import resolve_model

TEXTS = ["What is a gate? A door in a fence.", "Who asks? Everybody does."] * 20


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    resolve_model(ModelSpec(source="tiny-random"), folder, texts=TEXTS, seed=1)
    return folder


def upload(model: Path, bucket: str, prefix: str) -> None:
    for file in model.rglob("*"):
        if file.is_file():
            boto3.client("s3").upload_file(str(file), bucket, f"{prefix}/{file.relative_to(model)}")


def same(one: Path, other: Path) -> bool:
    left, right = (load_file(folder / "model.safetensors") for folder in (one, other))
    return left.keys() == right.keys() and all(left[name].equal(right[name]) for name in left)


def test_plain_files_are_a_model(bucket, model, tmp_path):
    upload(model, bucket, "models/mine")
    boto3.client("s3").put_object(Bucket=bucket, Key="models/mine/original/", Body=b"")  # as consoles make folders
    boto3.client("s3").put_object(Bucket=bucket, Key="models/mine-too/config.json", Body=b"{}")  # another model's
    facts = resolve_model(ModelSpec(source=f"s3://{bucket}/models/mine"), tmp_path / "out")
    assert same(tmp_path / "out", model) and facts.parameters > 0


def test_an_artifact_is_a_model_and_its_digests_are_checked(bucket, model, tmp_path):
    write_manifest(model, kind="model", parents={}, spec_digest="", seeds={})
    try:
        S3Store(f"s3://{bucket}/runs").put_tree("artifacts/one", model)
    finally:
        (model / "manifest.json").unlink()
    source = ModelSpec(source=f"s3://{bucket}/runs/artifacts/one")
    resolve_model(source, tmp_path / "out")
    assert same(tmp_path / "out", model)
    weights = (model / "model.safetensors").read_bytes()
    changed = weights[:-1] + bytes([weights[-1] ^ 1])
    boto3.client("s3").put_object(Bucket=bucket, Key="runs/artifacts/one/model.safetensors", Body=changed)
    with pytest.raises(StorageError, match=r"model\.safetensors"):
        resolve_model(source, tmp_path / "again")


def test_an_empty_prefix_is_no_model(bucket, tmp_path):
    with pytest.raises(ModelError, match="nothing under this prefix"):
        resolve_model(ModelSpec(source=f"s3://{bucket}/models/none"), tmp_path / "out")


def test_files_that_would_lie_elsewhere_are_refused(bucket, tmp_path):
    boto3.client("s3").put_object(Bucket=bucket, Key="models/bad/../../escaped", Body=b"x")
    with pytest.raises(StorageError, match="outside"):
        S3Store(f"s3://{bucket}/models").get_files("bad", tmp_path / "out")
