"""One S3 client for every room, and S3's failures as one clear error each.

Endpoint, region, credentials, certificates and retries come from the usual AWS settings: the environment
(`AWS_ENDPOINT_URL_S3`, `AWS_REGION`, `AWS_CA_BUNDLE`, `AWS_MAX_ATTEMPTS`, …), the files below `~/.aws`, or the
machine's role. Nothing of them is ever written into a spec, a record or a message.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from urllib.parse import urlparse

from tunegate.errors import StorageError, StorageUnavailableError

WORKERS = 8
"""Requests in flight at a time."""

_ATTEMPTS = 6
_CONNECT_SECONDS = 10
_READ_SECONDS = 60

_CREDENTIAL_CODES = frozenset(
    {
        "401",
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidAccessKeyId",
        "InvalidClientTokenId",
        "InvalidToken",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
        "UnrecognizedClientException",
    }
)
_DENIED_CODES = frozenset({"403", "AccessDenied", "AllAccessDisabled"})
_THROTTLED_CODES = frozenset(
    {"429", "503", "RequestLimitExceeded", "ServiceUnavailable", "SlowDown", "Throttling", "ThrottlingException"}
)
_BROKEN_CODES = frozenset({"500", "502", "504", "InternalError", "OperationAborted", "RequestTimeout"})
_CHECKSUM_CODES = frozenset({"BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"})
_REGION_CODES = frozenset(
    {"301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect"}
)
MISSING_CODES = frozenset({"404", "NoSuchKey", "NotFound"})

_REACH_FIX = "check AWS_ENDPOINT_URL_S3, AWS_REGION and the network, then run the same command again"
_CREDENTIAL_FIX = (
    "set credentials of the usual AWS chain (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or a role) "
    "that AWS_ENDPOINT_URL_S3 knows"
)
_USER_INFO = re.compile(r"//[^/@\s]+@")


def shared_client() -> Any:
    """A boto3 S3 client; it may be shared by threads, and is shared by all who ask under the same AWS settings.

    Retries are botocore's standard ones, up to six attempts with growing pauses, unless the AWS settings say
    otherwise. A server that is not Amazon's is addressed by path (`endpoint/bucket/key`) unless `addressing_style` in
    the AWS config file says otherwise: few of them have a host name for every bucket.

    Raises:
        StorageError: The AWS settings themselves are wrong (a profile that does not exist, say).
    """
    # A client must not be used on both sides of a fork.
    return _make_client(os.getpid(), tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))))


@lru_cache(maxsize=4)
def _make_client(process: int, environment: tuple[tuple[str, str], ...]) -> Any:
    import boto3
    from botocore.config import Config
    from botocore.session import Session

    with explained("AWS settings"):
        core = Session()
        settings = core.get_scoped_config()
        retries: dict[str, Any] = {}
        if not (os.environ.get("AWS_RETRY_MODE") or settings.get("retry_mode")):
            retries["mode"] = "standard"
        if not (os.environ.get("AWS_MAX_ATTEMPTS") or settings.get("max_attempts")):
            retries["total_max_attempts"] = _ATTEMPTS
        config = Config(
            retries=retries or None,
            connect_timeout=_CONNECT_SECONDS,
            read_timeout=_READ_SECONDS,
            max_pool_connections=2 * WORKERS,
        )
        session = boto3.session.Session(botocore_session=core)
        if (settings.get("s3") or {}).get("addressing_style"):
            return session.client("s3", config=config)
        client = session.client("s3", config=config.merge(Config(s3={"addressing_style": "path"})))
        host = urlparse(client.meta.endpoint_url).hostname or ""
        amazon = host.endswith((".amazonaws.com", ".amazonaws.com.cn"))
        return session.client("s3", config=config) if amazon else client


def split_uri(uri: str, *, key: str) -> tuple[str, str]:
    """Bucket and path of `s3://bucket/path`; the path has no slash at either end.

    Args:
        uri: The URI.
        key: What it is about, for errors, e.g. `storage.root`.

    Raises:
        StorageError: There is no bucket, or the URI carries credentials (which are not repeated).
    """
    parsed = urlparse(uri)
    if "@" in parsed.netloc:
        raise StorageError(
            "an S3 URI must not carry credentials",
            key=key,
            value=without_credentials(uri),
            fix="remove what stands before the @; credentials come from the usual AWS chain",
        )
    if parsed.scheme != "s3" or not parsed.netloc:
        raise StorageError("an S3 URI needs a bucket", key=key, value=uri, fix="s3://bucket/prefix")
    return parsed.netloc, parsed.path.strip("/")


def without_credentials(text: str) -> str:
    """A text whose URLs carry no user and no password."""
    return _USER_INFO.sub("//***@", text)


@contextmanager
def explained(place: str) -> Iterator[None]:
    """Turn whatever boto3 raises inside into one error that says what to do.

    Args:
        place: The object or bucket it is about, as a URI.

    Raises:
        StorageUnavailableError: S3 cannot be reached, throttles, breaks, or does not accept the credentials: the same
            call may succeed later.
        StorageError: The bucket or the object is not there, or a checksum does not hold.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        raise _of_response(error, place) from error
    except BotoCoreError as error:
        raise _of_client(error, place) from error


def code_of(error: Any) -> str:
    """S3's code of a `ClientError`, e.g. `NoSuchKey`."""
    return str(error.response.get("Error", {}).get("Code", ""))


def _of_response(error: Any, place: str) -> StorageError:
    code = code_of(error)
    again = int(error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0))
    tried = f" after {again + 1} attempts" if again else ""
    said = f"S3 said {code}{tried} ({error.operation_name})"
    bucket = urlparse(place).netloc
    if code == "NoSuchBucket":
        return StorageError(
            f"there is no such bucket: {said}", key=place, fix=f"check the name, or make it: aws s3 mb s3://{bucket}"
        )
    if code in MISSING_CODES:
        return StorageError(f"there is no such object: {said}", key=place, fix="check bucket and key")
    if code in _CREDENTIAL_CODES:
        # The server's own words may repeat the key id or the signed request.
        return StorageUnavailableError(f"the credentials are not accepted: {said}", key=place, fix=_CREDENTIAL_FIX)
    if code in _DENIED_CODES:
        return StorageUnavailableError(
            f"access is denied: {said}",
            key=place,
            fix=f"check bucket and key, and that the credentials in use may do {error.operation_name} there",
        )
    if code in _THROTTLED_CODES:
        return StorageUnavailableError(
            f"S3 is throttling: {said}",
            key=place,
            fix="run the same command again later; what was transferred is kept. AWS_MAX_ATTEMPTS allows more attempts",
        )
    if code in _BROKEN_CODES:
        return StorageUnavailableError(f"S3 broke down: {said}", key=place, fix=_REACH_FIX)
    if code in _CHECKSUM_CODES:
        return StorageError(
            f"what arrived at S3 is not what was sent: {said}", key=place, fix="run the same command again"
        )
    if code in _REGION_CODES:
        return StorageError(
            f"the bucket is in another region: {said}", key=place, fix="export AWS_REGION=<the bucket's region>"
        )
    if code in {"412", "PreconditionFailed"}:
        return StorageError(
            f"the object was changed while it was read: {said}", key=place, fix="run the same command again"
        )
    message = without_credentials(str(error.response.get("Error", {}).get("Message", "")))
    return StorageError(
        f"{said}: {message}", key=place, fix="check the bucket, the region and what the credentials in use may do"
    )


def _of_client(error: Exception, place: str) -> StorageError:
    from botocore import exceptions as known

    text = without_credentials(str(error)).strip().rstrip(".")
    if isinstance(
        error,
        (
            known.NoCredentialsError,
            known.PartialCredentialsError,
            known.CredentialRetrievalError,
            known.TokenRetrievalError,
            known.UnauthorizedSSOTokenError,
        ),
    ):
        return StorageUnavailableError(f"there are no usable credentials: {text}", key=place, fix=_CREDENTIAL_FIX)
    if isinstance(error, (known.ProfileNotFound, known.ConfigParseError, known.InvalidConfigError)):
        return StorageError(f"the AWS settings are wrong: {text}", key=place, fix="check AWS_PROFILE and ~/.aws/config")
    if isinstance(error, known.SSLError):
        return StorageUnavailableError(
            f"the server's certificate is not trusted: {text}",
            key=place,
            fix="set AWS_CA_BUNDLE to the file with your authority's certificate",
        )
    if isinstance(error, known.FlexibleChecksumError):
        return StorageError(f"what arrived is not what S3 sent: {text}", key=place, fix="run the same command again")
    if isinstance(error, known.ParamValidationError):
        return StorageError(f"S3 cannot take this: {text}", key=place, fix="check the names of bucket and object")
    return StorageUnavailableError(f"S3 cannot be reached: {text}", key=place, fix=_REACH_FIX)
