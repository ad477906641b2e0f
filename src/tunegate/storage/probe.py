"""A try of what a run will need of S3: write, read, list, upload in parts, delete."""

from __future__ import annotations

import uuid
from typing import Any
from urllib.parse import SplitResult, urlsplit

from tunegate.finding import Finding, Level

CHECK = "S3"


def probe_s3(root: str) -> Finding:
    """Write, read, list, upload in parts and delete below a prefix, as a run does.

    Args:
        root: `s3://bucket/prefix`.
    """
    parsed = urlsplit(root)
    if parsed.scheme != "s3" or not parsed.netloc:
        return Finding(CHECK, "failure", f"{root} is no place on S3", "--storage-root s3://bucket/prefix")
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client("s3", config=Config(connect_timeout=5, read_timeout=15, retries={"max_attempts": 2}))
    key = f"{parsed.path.strip('/')}/probe-{uuid.uuid4().hex}".lstrip("/")
    done = "nothing"
    try:
        content = uuid.uuid4().hex.encode()
        client.put_object(Bucket=parsed.netloc, Key=key, Body=content)
        done = "writing"
        if client.get_object(Bucket=parsed.netloc, Key=key)["Body"].read() != content:
            return Finding(CHECK, "failure", f"{root} does not return what was written", "check the S3 service")
        done = "writing and reading"
        if client.list_objects_v2(Bucket=parsed.netloc, Prefix=key).get("KeyCount") != 1:
            return Finding(CHECK, "failure", f"{root} does not list what was written", "check the S3 service")
        done = "writing, reading and listing"
        _multipart(client, parsed.netloc, f"{key}-parts", content)
        done = "writing, reading, listing and multipart uploads"
        client.delete_object(Bucket=parsed.netloc, Key=key)
        client.delete_object(Bucket=parsed.netloc, Key=f"{key}-parts")
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        level: Level = "warning" if done.endswith("multipart uploads") else "failure"
        doing = error.operation_name
        return Finding(CHECK, level, f"{root}: {doing} failed with {code}; {done} worked", _s3_fix(code, doing, parsed))
    except BotoCoreError as error:
        return Finding(
            CHECK,
            "failure",
            f"{root}: {error}",
            "export AWS_ENDPOINT_URL_S3=https://… AWS_REGION=… and credentials (AWS_PROFILE, or AWS_ACCESS_KEY_ID)",
        )
    where = client.meta.endpoint_url
    return Finding(CHECK, "ok", f"{root} at {where}: writing, reading, listing, multipart uploads and deleting work")


def _multipart(client: Any, bucket: str, key: str, content: bytes) -> None:
    upload = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    try:
        part = client.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=1, Body=content)
        client.complete_multipart_upload(
            Bucket=bucket,
            Key=key,
            UploadId=upload,
            MultipartUpload={"Parts": [{"ETag": part["ETag"], "PartNumber": 1}]},
        )
    except BaseException:
        client.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload)
        raise


_S3_ACTIONS = {
    "PutObject": "s3:PutObject",
    "GetObject": "s3:GetObject",
    "ListObjectsV2": "s3:ListBucket",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "DeleteObject": "s3:DeleteObject",
}


def _s3_fix(code: str, operation: str, place: SplitResult) -> str:
    if code == "NoSuchBucket":
        return f"aws s3 mb s3://{place.netloc}"
    if code in {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}:
        return "renew the credentials: aws sts get-caller-identity must work (AWS_PROFILE, AWS_ACCESS_KEY_ID)"
    if code in {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}:
        return "export AWS_REGION=<the bucket's region>"
    action = _S3_ACTIONS.get(operation, f"s3:{operation}")
    return f"allow {action} on arn:aws:s3:::{place.netloc}{'' if action == 's3:ListBucket' else '/*'}"
