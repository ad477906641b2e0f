"""S3 that breaks: every fault ends in success or in one clear error, and nothing half-written is read as whole."""

import hashlib
import os
import random
from pathlib import Path

import boto3
import pytest
from faulty_s3 import changes_body, checks_sums, fails, hangs_up, served

from tunegate.errors import StorageError, StorageUnavailableError
from tunegate.storage.manifest import verify, write_manifest
from tunegate.storage.stores import S3Store
from tunegate.storage.transfer import Bucket

PART = 5 * 2**20


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An artifact with one file of four parts and two small ones."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "model.safetensors").write_bytes(random.Random(0).randbytes(3 * PART + 12345))
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocabulary.txt").write_text("a b c")
    write_manifest(folder, kind="model", parents={}, spec_digest="s", seeds={})
    return folder


def store(bucket):
    return S3Store(f"s3://{bucket}/prefix", part_bytes=PART)


def keys(bucket):
    return {entry["Key"] for entry in boto3.client("s3").list_objects_v2(Bucket=bucket).get("Contents", [])}


def test_a_large_file_goes_and_comes_in_parts_and_side_by_side(s3, bucket, model, tmp_path):
    store(bucket).put_tree("artifacts/a", model)
    assert sorted(s3.parts_sent()) == [1, 2, 3, 4]
    s3.requests.clear()
    store(bucket).get_tree("artifacts/a", tmp_path / "back")
    assert len([r for r in s3.requests if "range" in r.headers]) == 4
    assert verify(tmp_path / "back") == verify(model)
    assert not list(tmp_path.rglob(".*"))


def test_what_is_published_is_not_sent_again(s3, bucket, model):
    store(bucket).put_tree("artifacts/a", model)
    s3.requests.clear()
    store(bucket).put_tree("artifacts/a", model)
    assert [r.path.rsplit("/", 1)[-1] for r in s3.requests if r.method == "PUT"] == ["manifest.json"]


def test_an_interrupted_upload_goes_on_with_the_missing_parts(s3, bucket, model, tmp_path):
    s3.faults.append(hangs_up(when=lambda r: r.is_part(3)))
    with pytest.raises(StorageUnavailableError, match="cannot be reached") as caught:
        store(bucket).put_tree("artifacts/a", model)
    assert caught.value.key.endswith("artifacts/a/model.safetensors") and caught.value.fix
    assert not any("model.safetensors" in key or "manifest" in key for key in keys(bucket))
    with pytest.raises(StorageError, match="not published whole"):
        store(bucket).get_tree("artifacts/a", tmp_path / "half")
    sent = set(s3.parts_sent()) - {3}
    s3.faults.clear()
    s3.requests.clear()
    store(bucket).put_tree("artifacts/a", model)
    assert 3 in s3.parts_sent() and not sent & set(s3.parts_sent())
    store(bucket).get_tree("artifacts/a", tmp_path / "back")
    assert verify(tmp_path / "back") == verify(model)
    assert Bucket(bucket).unfinished("") == []


def test_parts_of_another_content_are_not_taken_over(s3, bucket, tmp_path):
    one, other = (random.Random(seed).randbytes(2 * PART) for seed in (1, 2))
    path = tmp_path / "file"
    path.write_bytes(one)
    s3.faults.append(fails("403 Forbidden", "AccessDenied", when=lambda r: r.is_part(2)))
    with pytest.raises(StorageUnavailableError, match="access is denied"):
        Bucket(bucket, part_bytes=PART).upload(path, "k", sha256=hashlib.sha256(one).hexdigest())
    s3.faults.clear()
    path.write_bytes(other)
    Bucket(bucket, part_bytes=PART).upload(path, "k", sha256=hashlib.sha256(other).hexdigest())
    assert boto3.client("s3").get_object(Bucket=bucket, Key="k")["Body"].read() == other


def test_an_interrupted_download_goes_on_with_the_missing_parts(s3, bucket, model, tmp_path):
    store(bucket).put_tree("artifacts/a", model)
    last = f"bytes={3 * PART}-"
    s3.faults.append(fails("503 Slow Down", "SlowDown", when=lambda r: r.headers.get("range", "").startswith(last)))
    with pytest.raises(StorageUnavailableError, match="throttling: S3 said SlowDown after 2 attempts"):
        store(bucket).get_tree("artifacts/a", tmp_path / "back")
    assert not (tmp_path / "back" / "model.safetensors").exists()
    assert not (tmp_path / "back" / "manifest.json").exists()
    s3.faults.clear()
    s3.requests.clear()
    store(bucket).get_tree("artifacts/a", tmp_path / "back")
    ranges = [r.headers["range"] for r in s3.requests if "range" in r.headers]
    assert len(ranges) < 4 and any(r.startswith(last) for r in ranges)
    assert verify(tmp_path / "back") == verify(model)


@pytest.mark.parametrize("status", ["500 Internal Server Error", "503 Slow Down"])
def test_one_error_then_success(status, s3, bucket, model, tmp_path):
    code = "InternalError" if status[0:3] == "500" else "SlowDown"
    s3.faults += [
        fails(status, code, when=lambda r: r.is_part(2), times=1),
        fails(status, code, when=lambda r: r.method == "POST" and "uploadId" in r.query, times=1),
        fails(status, code, when=lambda r: r.method == "GET" and "range" in r.headers, times=1),
    ]
    store(bucket).put_tree("artifacts/a", model)
    store(bucket).get_tree("artifacts/a", tmp_path / "back")
    assert verify(tmp_path / "back") == verify(model)


def test_a_connection_that_breaks_within_an_answer_is_tried_again(s3, bucket, model, tmp_path):
    store(bucket).put_tree("artifacts/a", model)
    s3.faults.append(changes_body(lambda body: body[: len(body) // 2], when=lambda r: "range" in r.headers, times=2))
    store(bucket).get_tree("artifacts/a", tmp_path / "back")
    assert verify(tmp_path / "back") == verify(model)


def test_damage_on_the_way_is_noticed_and_fetched_again(s3, bucket, model, tmp_path):
    store(bucket).put_tree("artifacts/a", model)
    s3.faults.append(changes_body(lambda body: b"\0" + body[1:], when=lambda r: "range" in r.headers, times=1))
    store(bucket).get_tree("artifacts/a", tmp_path / "back")
    assert verify(tmp_path / "back") == verify(model)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_object_is_an_error_and_no_file(name, s3, bucket, model, tmp_path):
    store(bucket).put_tree("artifacts/a", model)
    size = (model / name).stat().st_size
    boto3.client("s3").put_object(Bucket=bucket, Key=f"prefix/artifacts/a/{name}", Body=b"x" * size)
    with pytest.raises(StorageError, match="sha256") as caught:
        store(bucket).get_tree("artifacts/a", tmp_path / "back")
    assert caught.value.key.endswith(name) and not isinstance(caught.value, StorageUnavailableError)
    assert not (tmp_path / "back" / name).exists() and not (tmp_path / "back" / "manifest.json").exists()


def test_damage_on_the_way_up_is_refused(s3, bucket, model, tmp_path):
    def flipped(server, request, environ, start_response):
        if request.method == "PUT" and request.path.endswith("config.json"):
            import io

            size = int(environ["CONTENT_LENGTH"])
            environ["wsgi.input"] = io.BytesIO(b"!" + environ["wsgi.input"].read(size)[1:])
        return

    s3.faults += [flipped, checks_sums]
    with pytest.raises(StorageError, match="not what was sent: S3 said BadDigest"):
        store(bucket).put_tree("artifacts/a", model)
    with pytest.raises(StorageError, match="not published whole"):
        store(bucket).get_tree("artifacts/a", tmp_path / "back")
    s3.faults.remove(flipped)
    store(bucket).put_tree("artifacts/a", model)
    store(bucket).get_tree("artifacts/a", tmp_path / "back")
    assert verify(tmp_path / "back") == verify(model)


def test_an_object_that_changes_while_it_is_read_is_an_error(s3, bucket, model, tmp_path):
    store(bucket).put_tree("artifacts/a", model)
    key = "prefix/artifacts/a/model.safetensors"
    when = {"asked": 0}

    def replaced(server, request, environ, start_response):
        if "range" in request.headers:
            when["asked"] += 1
            if when["asked"] == 2:
                return server.error(start_response, "412 Precondition Failed", "PreconditionFailed")
        return None

    s3.faults.append(replaced)
    with pytest.raises(StorageError, match="changed while it was read"):
        Bucket(bucket, part_bytes=PART).download(key, tmp_path / "file")
    assert all("if-match" in r.headers for r in s3.requests if "range" in r.headers)
    assert not (tmp_path / "file").exists()


def test_a_missing_object_of_a_published_tree_is_named(s3, bucket, model, tmp_path):
    store(bucket).put_tree("artifacts/a", model)
    boto3.client("s3").delete_object(Bucket=bucket, Key="prefix/artifacts/a/config.json")
    with pytest.raises(StorageError, match=r"no such object: S3 said NoSuchKey") as caught:
        store(bucket).get_tree("artifacts/a", tmp_path / "back")
    assert caught.value.key.endswith("config.json")


def test_a_manifest_that_names_files_elsewhere_is_refused(s3, bucket, tmp_path):
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "a").write_text("x")
    manifest = write_manifest(folder, kind="model", parents={}, spec_digest="", seeds={})
    text = manifest.model_dump_json().replace('"path":"a"', '"path":"../../a"')
    store(bucket).put("artifacts/evil/manifest.json", text.encode())
    with pytest.raises(StorageError, match="outside"):
        store(bucket).get_tree("artifacts/evil", tmp_path / "back")


@pytest.mark.parametrize("doing", ["put", "get", "keys", "put_tree", "get_tree", "remove"])
def test_a_missing_bucket_is_one_clear_error(doing, s3, model, tmp_path):
    gone = S3Store("s3://no-such-bucket-anywhere/p")
    calls = {
        "put": lambda: gone.put("a", b"1"),
        "get": lambda: gone.get("a"),
        "keys": lambda: list(gone.keys("")),
        "put_tree": lambda: gone.put_tree("a", model),
        "get_tree": lambda: gone.get_tree("a", tmp_path / "x"),
        "remove": lambda: gone.remove("a"),
    }
    with pytest.raises(StorageError, match="no such bucket: S3 said NoSuchBucket") as caught:
        calls[doing]()
    assert "no-such-bucket-anywhere" in str(caught.value) and "aws s3 mb" in caught.value.fix


@pytest.mark.parametrize(
    ("status", "code", "told"),
    [
        ("403 Forbidden", "InvalidAccessKeyId", "credentials are not accepted"),
        ("403 Forbidden", "SignatureDoesNotMatch", "credentials are not accepted"),
        ("400 Bad Request", "ExpiredToken", "credentials are not accepted"),
        ("403 Forbidden", "AccessDenied", "access is denied"),
        ("503 Slow Down", "SlowDown", "throttling: S3 said SlowDown after 2 attempts"),
        ("500 Internal Server Error", "InternalError", "broke down: S3 said InternalError after 2 attempts"),
    ],
)
def test_what_s3_refuses_for_now_is_one_clear_error(status, code, told, s3, bucket, model, tmp_path):
    s3.faults.append(fails(status, code, when=lambda r: True))
    for call in (
        lambda: store(bucket).put("a", b"1"),
        lambda: store(bucket).get("a"),
        lambda: store(bucket).put_tree("a", model),
        lambda: store(bucket).get_tree("a", tmp_path / "x"),
    ):
        with pytest.raises(StorageUnavailableError, match=told) as caught:
            call()
        assert caught.value.fix and caught.value.key.startswith(f"s3://{bucket}/")


def test_without_credentials_the_error_says_what_to_set(s3, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StorageUnavailableError, match="no usable credentials") as caught:
        S3Store("s3://b/p").put("a", b"1")
    assert "AWS_ACCESS_KEY_ID" in caught.value.fix


def test_a_server_that_is_not_there_is_one_clear_error(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://someone:secret-word@127.0.0.1:9")
    with pytest.raises(StorageUnavailableError, match="cannot be reached") as caught:
        S3Store("s3://b/p").put("a", b"1")
    assert "secret-word" not in str(caught.value)


def test_a_profile_that_does_not_exist_is_named(s3, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StorageError, match=r"settings are wrong.*nobody"):
        S3Store("s3://b/p").put("a", b"1")


def test_a_uri_with_credentials_is_refused_without_repeating_them():
    with pytest.raises(StorageError, match="must not carry credentials") as caught:
        S3Store("s3://AKIAKEY:hush@bucket/p")
    assert "hush" not in str(caught.value) and "AKIAKEY" not in str(caught.value)


def test_endpoint_region_and_path_style_come_from_the_aws_settings(s3, bucket, monkeypatch, tmp_path):
    config = tmp_path / "config"
    url = os.environ["AWS_ENDPOINT_URL_S3"]
    config.write_text(
        f"[profile lab]\nregion = eu-central-1\nendpoint_url = {url}\ns3 =\n    addressing_style = path\n"
    )
    (tmp_path / "credentials").write_text("[lab]\naws_access_key_id = test\naws_secret_access_key = test\n")
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    store(bucket).put("a", b"1")
    put = s3.requests[-1]
    assert put.path == f"/{bucket}/prefix/a" and "/eu-central-1/s3/" in put.headers["authorization"]


def test_another_server_than_amazons_is_addressed_by_path(s3, bucket, monkeypatch):
    url = os.environ["AWS_ENDPOINT_URL_S3"].replace("127.0.0.1", "localhost")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", url)
    store(bucket).put("a", b"1")
    assert s3.requests[-1].path == f"/{bucket}/prefix/a"


def test_a_private_authority_is_trusted_by_its_bundle(s3, monkeypatch, tmp_path):
    certificate, key = self_signed(tmp_path)
    with served((str(certificate), str(key))) as (url, _):
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", url)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        with pytest.raises(StorageUnavailableError, match="certificate is not trusted") as caught:
            S3Store("s3://b/p").put("a", b"1")
        assert "AWS_CA_BUNDLE" in caught.value.fix
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        boto3.client("s3").create_bucket(Bucket="bucket")
        S3Store("s3://bucket/p").put("a", b"1")
        assert S3Store("s3://bucket/p").get("a") == b"1"


def self_signed(folder: Path) -> tuple[Path, Path]:
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "certificate.pem", folder / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    paths[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, *private))
    return paths
