"""Files to and from a bucket: in parts, in parallel, resumable, with their sha256 checked.

boto3's own transfer manager cuts files into parts, too, but it throws the parts away when one of them fails. A model
is one file of many gigabytes: here the parts that arrived stay where they are, and the next attempt, in this process
or another, sends or fetches only the others.

What is sent carries its sha256 (each part its own), which S3 checks before it accepts it. What is fetched is checked
before it gets its name: a file that is there is whole.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from tunegate.errors import StorageError, StorageUnavailableError
from tunegate.storage.manifest import sha256_file
from tunegate.storage.s3 import MISSING_CODES, WORKERS, code_of, explained, shared_client

PART_BYTES = 16 * 2**20
"""Size of a part; S3 wants at least 5 MiB and at most 10,000 parts a file."""

_MAX_PARTS = 10_000
_STREAM_ATTEMPTS = 5
_CHUNK_BYTES = 1 << 20
_DELETE_AT_ONCE = 1000
_DIGEST_FIELD = "sha256"


@dataclass(frozen=True, slots=True)
class RemoteObject:
    """An object as S3 lists it."""

    key: str
    size: int
    modified: datetime
    etag: str = ""
    sha256: str | None = None
    """Of the whole content, when whoever wrote it said so; only known of single objects that were asked for."""


@dataclass(frozen=True, slots=True)
class UnfinishedUpload:
    """A multipart upload that was neither completed nor aborted."""

    key: str
    upload_id: str
    started: datetime


@dataclass(frozen=True, slots=True)
class _Span:
    """A part of a file: its number (from 1) and its bytes."""

    number: int
    start: int
    size: int


class Bucket:
    """A bucket on S3.

    Every method raises `StorageError` (or `StorageUnavailableError`, when the same call may succeed later) with the
    object, the cause and the remedy.

    Args:
        name: The bucket.
        part_bytes: Larger files are transferred in parts of this size.
        workers: Requests in flight at a time.
    """

    def __init__(self, name: str, *, part_bytes: int = PART_BYTES, workers: int = WORKERS) -> None:
        self.name = name
        self._part_bytes = part_bytes
        self._workers = workers

    @property
    def client(self) -> Any:
        """The boto3 client."""
        return shared_client()

    def uri(self, key: str) -> str:
        """`s3://bucket/key`."""
        return f"s3://{self.name}/{key}"

    def put(self, key: str, data: bytes) -> None:
        """Write a small object; readers see the old or the new content."""
        digest = hashlib.sha256(data)
        with explained(self.uri(key)):
            self.client.put_object(
                Bucket=self.name,
                Key=key,
                Body=data,
                ChecksumSHA256=_base64(digest),
                Metadata={_DIGEST_FIELD: digest.hexdigest()},
            )

    def get(self, key: str) -> bytes | None:
        """The content of a small object, or None when there is none."""
        from botocore.exceptions import ClientError

        for attempt in range(1, _STREAM_ATTEMPTS + 1):
            with explained(self.uri(key)):
                try:
                    answer = self.client.get_object(Bucket=self.name, Key=key)
                    data = bytes(answer["Body"].read())
                except ClientError as error:
                    if code_of(error) in MISSING_CODES:
                        return None
                    raise
                except _stream_errors():
                    if attempt == _STREAM_ATTEMPTS:
                        raise
                    continue
            wanted = answer.get("Metadata", {}).get(_DIGEST_FIELD)
            if wanted is None or hashlib.sha256(data).hexdigest() == wanted:
                return data
        raise self._wrong_digest(key)

    def head(self, key: str) -> RemoteObject | None:
        """What is known about an object, or None when there is none."""
        from botocore.exceptions import ClientError

        with explained(self.uri(key)):
            try:
                return self._head(key)
            except ClientError as error:
                if code_of(error) in MISSING_CODES:
                    return None
                raise

    def _head(self, key: str) -> RemoteObject:
        found = self.client.head_object(Bucket=self.name, Key=key)
        return RemoteObject(
            key=key,
            size=int(found["ContentLength"]),
            modified=found["LastModified"],
            etag=found["ETag"],
            sha256=found.get("Metadata", {}).get(_DIGEST_FIELD),
        )

    def objects(self, prefix: str) -> Iterator[RemoteObject]:
        """All objects whose key begins with `prefix`, sorted."""
        with explained(self.uri(prefix)):
            for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix):
                for entry in page.get("Contents", []):
                    yield RemoteObject(entry["Key"], int(entry["Size"]), entry["LastModified"], entry["ETag"])

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects, in their order as far as that goes; those that are not there do not matter."""
        for start in range(0, len(keys), _DELETE_AT_ONCE):
            some = keys[start : start + _DELETE_AT_ONCE]
            with explained(self.uri(some[0])):
                answer = self.client.delete_objects(
                    Bucket=self.name, Delete={"Objects": [{"Key": key} for key in some], "Quiet": True}
                )
            for problem in answer.get("Errors", []):
                raise StorageError(
                    f"the object cannot be deleted: S3 said {problem.get('Code')}",
                    key=self.uri(problem.get("Key", "")),
                    fix="check that the credentials in use may delete there (s3:DeleteObject)",
                )

    def unfinished(self, prefix: str) -> list[UnfinishedUpload]:
        """Multipart uploads below `prefix` that were begun and not ended."""
        uploads = []
        with explained(self.uri(prefix)):
            for page in self.client.get_paginator("list_multipart_uploads").paginate(Bucket=self.name, Prefix=prefix):
                for entry in page.get("Uploads", []):
                    uploads.append(UnfinishedUpload(entry["Key"], entry["UploadId"], entry["Initiated"]))
        return uploads

    def abort(self, upload: UnfinishedUpload) -> None:
        """Drop an unfinished upload and its parts."""
        with explained(self.uri(upload.key)):
            self.client.abort_multipart_upload(Bucket=self.name, Key=upload.key, UploadId=upload.upload_id)

    def upload(self, path: Path, key: str, *, sha256: str) -> None:
        """Send a file; an object with this content that is already there is left as it is.

        Args:
            path: The file.
            key: Where to.
            sha256: The file's digest, hexadecimal.
        """
        size = path.stat().st_size
        if self._holds(key, size, sha256):
            return
        if size > self._part_bytes:
            self._upload_parts(path, key, size, sha256)
            return
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise _changed(path)
        self.put(key, data)

    def upload_all(self, files: Iterable[tuple[Path, str, str]]) -> None:
        """Send several files, given as (path, key, sha256): small ones side by side, large ones part by part."""
        large: list[tuple[Path, str, str]] = []
        small: list[tuple[Path, str, str]] = []
        for item in files:
            (large if item[0].stat().st_size > self._part_bytes else small).append(item)
        self._together([partial(self.upload, path, key, sha256=sha256) for path, key, sha256 in small])
        for path, key, sha256 in large:
            self.upload(path, key, sha256=sha256)

    def download(self, key: str, path: Path, *, sha256: str | None = None) -> None:
        """Fetch an object; a file of this name exists afterwards only when it is whole.

        Parts of an earlier attempt that lie beside the target are used when the object is still the same.

        Args:
            key: The object.
            path: The file to write; its folder is made.
            sha256: The digest that the content must have; None: the one that was stored with it, if any.
        """
        if sha256 is not None and path.is_file() and sha256_file(path) == sha256:
            return
        found = self.head(key)
        if found is None:
            with explained(self.uri(key)):  # says whether the object or the bucket is missing
                self.client.get_object(Bucket=self.name, Key=key)
            raise StorageError("the object appeared just now", key=self.uri(key), fix="run the command again")
        wanted = sha256 or found.sha256
        path.parent.mkdir(parents=True, exist_ok=True)
        for attempt in (1, 2):
            fetched = self._download_parts(found, path)
            if wanted is None or sha256_file(fetched) == wanted:
                fetched.replace(path)
                return
            # Nothing says which part is wrong: all of them are fetched again, once.
            fetched.unlink()
            if attempt == 2:
                raise self._wrong_digest(key)

    def download_all(self, files: Iterable[tuple[str, Path, str | None, int]]) -> None:
        """Fetch several objects, given as (key, path, sha256, size)."""
        large: list[tuple[str, Path, str | None, int]] = []
        small: list[tuple[str, Path, str | None, int]] = []
        for item in files:
            (large if item[3] > self._part_bytes else small).append(item)
        self._together([partial(self.download, key, path, sha256=sha256) for key, path, sha256, _ in small])
        for key, path, sha256, _ in large:
            self.download(key, path, sha256=sha256)

    def _holds(self, key: str, size: int, sha256: str) -> bool:
        """Whether the object is there with this content; False, too, when that may not be asked."""
        from botocore.exceptions import ClientError

        with explained(self.uri(key)):
            try:
                found = self._head(key)
            except ClientError as error:
                # Without the permission to list, S3 answers 403 for what is not there.
                if code_of(error) in {*MISSING_CODES, "403"}:
                    return False
                raise
        return found.size == size and found.sha256 == sha256

    def _upload_parts(self, path: Path, key: str, size: int, sha256: str) -> None:
        from botocore.exceptions import ClientError

        spans = _spans(size, self._part_bytes)
        upload_id = self._unfinished_of(key) or self._begin(key, sha256)
        there = self._parts_there(key, upload_id)
        parts: dict[int, dict[str, Any]] = {}
        whole = hashlib.sha256()
        lock = threading.Lock()
        work: list[Callable[[], None]] = []

        def send(span: _Span, digest: str) -> None:
            data = _read(path, span)
            with explained(self.uri(key)):
                answer = self.client.upload_part(
                    Bucket=self.name,
                    Key=key,
                    UploadId=upload_id,
                    PartNumber=span.number,
                    Body=data,
                    ChecksumSHA256=digest,
                )
            with lock:
                parts[span.number] = {"PartNumber": span.number, "ETag": answer["ETag"], "ChecksumSHA256": digest}

        for span in spans:
            data = _read(path, span)
            whole.update(data)
            digest = _base64(hashlib.sha256(data))
            part = there.get(span.number)
            if part is not None and _is_part(part, data, digest):
                parts[span.number] = {"PartNumber": span.number, "ETag": part["ETag"], "ChecksumSHA256": digest}
            else:
                work.append(partial(send, span, digest))
        if whole.hexdigest() != sha256:
            raise _changed(path)
        self._together(work)
        with explained(self.uri(key)):
            try:
                self.client.complete_multipart_upload(
                    Bucket=self.name,
                    Key=key,
                    UploadId=upload_id,
                    MultipartUpload={"Parts": [parts[number] for number in sorted(parts)]},
                )
            except ClientError as error:
                # An answer that was lost, or another process with the same file: what counts is what is there.
                if code_of(error) != "NoSuchUpload" or not self._holds(key, size, sha256):
                    raise

    def _begin(self, key: str, sha256: str) -> str:
        with explained(self.uri(key)):
            answer = self.client.create_multipart_upload(
                Bucket=self.name, Key=key, ChecksumAlgorithm="SHA256", Metadata={_DIGEST_FIELD: sha256}
            )
        return str(answer["UploadId"])

    def _unfinished_of(self, key: str) -> str | None:
        """The latest unfinished upload of an object, if it may be looked for."""
        try:
            mine = [upload for upload in self.unfinished(key) if upload.key == key]
        except StorageUnavailableError:
            # Listing uploads needs a permission of its own (s3:ListBucketMultipartUploads).
            return None
        return max(mine, key=lambda upload: upload.started).upload_id if mine else None

    def _parts_there(self, key: str, upload_id: str) -> dict[int, Any]:
        there = {}
        with explained(self.uri(key)):
            pages = self.client.get_paginator("list_parts").paginate(Bucket=self.name, Key=key, UploadId=upload_id)
            for page in pages:
                there.update({int(part["PartNumber"]): part for part in page.get("Parts", [])})
        return there

    def _download_parts(self, found: RemoteObject, path: Path) -> Path:
        """Bring all parts of an object to a hidden file beside `path`."""
        growing = path.with_name(f".{path.name}.partial")
        journal = _Journal(path.with_name(f".{path.name}.parts"), found, self._part_bytes)
        if not growing.is_file() or growing.stat().st_size != found.size:
            journal.restart()
            with growing.open("wb") as stream:
                stream.truncate(found.size)
        handle = os.open(growing, os.O_WRONLY)
        try:

            def fetch(span: _Span) -> None:
                self._fetch(found, span, lambda offset, data: _write_at(handle, data, offset))
                journal.add(span.number)

            spans = _spans(found.size, self._part_bytes)
            self._together([partial(fetch, span) for span in spans if span.number not in journal.done])
        except OSError as error:
            raise StorageError(
                f"cannot write: {error.strerror or error}",
                key=str(path),
                fix="free some space, or choose another folder",
            ) from error
        finally:
            os.close(handle)
        journal.remove()
        return growing

    def _fetch(self, found: RemoteObject, span: _Span, keep: Callable[[int, bytes], Any]) -> None:
        """Read a part of an object; a connection that breaks within it is tried again."""
        from botocore.exceptions import IncompleteReadError

        wanted = {} if span.size == found.size else {"Range": f"bytes={span.start}-{span.start + span.size - 1}"}
        for attempt in range(1, _STREAM_ATTEMPTS + 1):
            with explained(self.uri(found.key)):
                try:
                    answer = self.client.get_object(Bucket=self.name, Key=found.key, IfMatch=found.etag, **wanted)
                    offset = span.start
                    for chunk in answer["Body"].iter_chunks(_CHUNK_BYTES):
                        keep(offset, chunk)
                        offset += len(chunk)
                    if offset != span.start + span.size:
                        raise IncompleteReadError(actual_bytes=offset - span.start, expected_bytes=span.size)
                    return
                except _stream_errors():
                    if attempt == _STREAM_ATTEMPTS:
                        raise

    def _together(self, work: Sequence[Callable[[], None]]) -> None:
        """Run some calls side by side; the first failure ends them all and is raised."""
        if len(work) <= 1:
            for call in work:
                call()
            return
        pool = ThreadPoolExecutor(min(self._workers, len(work)), thread_name_prefix="tunegate-s3")
        try:
            futures = [pool.submit(call) for call in work]
            wait(futures, return_when=FIRST_EXCEPTION)
            for future in futures:
                if future.done():
                    future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _wrong_digest(self, key: str) -> StorageError:
        return StorageError(
            "the content does not have the sha256 that it should have; nothing of it was used",
            key=self.uri(key),
            fix="run the command again; if it stays so, the object is damaged: run the stage that made it again",
        )


def _stream_errors() -> tuple[type[Exception], ...]:
    """What a connection that breaks within an answer raises, and a damaged answer: nobody else tries these again."""
    from botocore.exceptions import (
        FlexibleChecksumError,
        IncompleteReadError,
        ReadTimeoutError,
        ResponseStreamingError,
    )

    return FlexibleChecksumError, IncompleteReadError, ReadTimeoutError, ResponseStreamingError


class _Journal:
    """Which parts of an object are already here: one line a part, after a line that says of what."""

    def __init__(self, path: Path, found: RemoteObject, part_bytes: int) -> None:
        self._path = path
        self._head = json.dumps([found.etag, found.size, part_bytes])
        self._lock = threading.Lock()
        self.done: set[int] = set()
        lines = path.read_text().split("\n") if path.is_file() else []
        if lines and lines[0] == self._head:
            # What comes after the last line break was cut off.
            self.done = {int(line) for line in lines[1:-1] if line.isdigit()}
        else:
            self.restart()

    def restart(self) -> None:
        self.done = set()
        self._path.write_text(self._head + "\n")

    def add(self, number: int) -> None:
        with self._lock, self._path.open("a") as stream:
            stream.write(f"{number}\n")

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


def _spans(size: int, part_bytes: int) -> list[_Span]:
    """The parts of a file; parts of very large files are larger, so that there are at most 10,000."""
    part = max(part_bytes, -(-size // _MAX_PARTS))
    return [_Span(i + 1, start, min(part, size - start)) for i, start in enumerate(range(0, size, part))]


def _read(path: Path, span: _Span) -> bytes:
    with path.open("rb") as stream:
        stream.seek(span.start)
        return stream.read(span.size)


def _write_at(handle: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(handle, data, offset)
        data, offset = data[written:], offset + written


def _is_part(part: Any, data: bytes, digest: str) -> bool:
    """Whether a part that S3 already has is this data."""
    if part.get("ChecksumSHA256"):
        return bool(part["ChecksumSHA256"] == digest)
    # The ETag of an unencrypted part is its MD5.
    return bool(part["ETag"].strip('"') == hashlib.md5(data, usedforsecurity=False).hexdigest())


def _base64(digest: Any) -> str:
    return base64.b64encode(digest.digest()).decode()


def _changed(path: Path) -> StorageError:
    return StorageError(
        "the file was changed after its digest was taken",
        key=str(path),
        fix="artifacts are never modified: run the stage that makes it again",
    )
