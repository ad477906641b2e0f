"""Small files and folders on disk or on S3 behind one interface.

A store maps keys (`runs/<id>/run.json`) to bytes. Writing is atomic: a reader sees the old content or the new one,
never half of it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from tunegate.errors import StorageError
from tunegate.storage.manifest import MANIFEST_NAME


class Store(Protocol):
    """Keys to bytes and folders."""

    uri: str

    def put(self, key: str, data: bytes) -> None:
        """Write `data` under `key`, atomically."""

    def get(self, key: str) -> bytes | None:
        """The bytes under `key`, or None."""

    def keys(self, prefix: str) -> Iterator[str]:
        """All keys below `prefix`, sorted."""

    def put_tree(self, key: str, folder: Path) -> str:
        """Publish a folder under `key`; its manifest goes last, so a reader sees all or nothing. Returns the URI."""

    def get_tree(self, key: str, folder: Path) -> None:
        """Bring the folder published under `key` to `folder`."""

    def remove(self, key: str) -> None:
        """Remove the folder under `key` and all below it, manifests first, so that no reader sees half of one."""


def link_tree(source: Path, target: Path) -> None:
    """Copy a folder; files are hard-linked where the file system allows, since artifacts are never modified."""

    def link(src: str, dst: str) -> None:
        try:
            os.link(src, dst)
        except OSError:
            shutil.copy2(src, dst)

    shutil.copytree(source, target, copy_function=link, dirs_exist_ok=True)


class LocalStore:
    """A folder."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.uri = str(self.root)

    def _path(self, key: str) -> Path:
        return self.root / key

    def put(self, key: str, data: bytes) -> None:
        """See `Store.put`.

        Raises:
            StorageError: The folder cannot be written (read-only, full).
        """
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            try:
                with os.fdopen(handle, "wb") as stream:
                    stream.write(data)
                Path(temporary).replace(path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise StorageError(
                f"cannot write: {error.strerror or error}",
                key=str(path),
                fix="free some space or set storage.root to a folder that can be written",
            ) from error

    def get(self, key: str) -> bytes | None:
        """See `Store.get`."""
        try:
            return self._path(key).read_bytes()
        except FileNotFoundError:
            return None

    def keys(self, prefix: str) -> Iterator[str]:
        """See `Store.keys`."""
        base = self._path(prefix)
        if base.is_dir():
            for path in sorted(base.rglob("*")):
                if path.is_file():
                    yield path.relative_to(self.root).as_posix()

    def put_tree(self, key: str, folder: Path) -> str:
        """See `Store.put_tree`."""
        target = self._path(key)
        if not (target / MANIFEST_NAME).exists():
            temporary = target.with_name(f".{target.name}.{os.getpid()}")
            link_tree(folder, temporary)
            shutil.rmtree(target, ignore_errors=True)
            temporary.replace(target)
        return str(target)

    def get_tree(self, key: str, folder: Path) -> None:
        """See `Store.get_tree`.

        Raises:
            StorageError: Nothing was published under `key`.
        """
        source = self._path(key)
        if not source.is_dir():
            raise StorageError("no such artifact", key=str(source))
        link_tree(source, folder)

    def remove(self, key: str) -> None:
        """See `Store.remove`."""
        target = self._path(key)
        if target.is_dir():
            gone = target.with_name(f".{target.name}.{os.getpid()}.removed")
            target.replace(gone)
            shutil.rmtree(gone)


class S3Store:
    """A prefix of an S3 bucket; endpoint, region and credentials come from the usual AWS settings."""

    def __init__(self, uri: str) -> None:
        parsed = urlparse(uri)
        if not parsed.netloc:
            raise StorageError("an S3 root needs a bucket", key="storage.root", value=uri, fix="s3://bucket/prefix")
        self.uri = uri.rstrip("/")
        self.bucket = parsed.netloc
        self.prefix = parsed.path.strip("/")

    @property
    def _client(self) -> Any:
        import boto3

        return boto3.client("s3")

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def put(self, key: str, data: bytes) -> None:
        """See `Store.put` (a PutObject is atomic).

        Raises:
            StorageError: S3 refused; the message names the object and the cause.
        """
        self._call("put_object", key, Body=data)

    def get(self, key: str) -> bytes | None:
        """See `Store.get`."""
        response = self._call("get_object", key, missing_ok=True)
        return None if response is None else bytes(response["Body"].read())

    def keys(self, prefix: str) -> Iterator[str]:
        """See `Store.keys`."""
        skip = len(self.prefix) + 1 if self.prefix else 0
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self._key(prefix))
        for page in pages:
            for entry in page.get("Contents", []):
                yield entry["Key"][skip:]

    def put_tree(self, key: str, folder: Path) -> str:
        """See `Store.put_tree`."""
        client = self._client
        if self.get(f"{key}/{MANIFEST_NAME}") is None:
            files = sorted(p for p in folder.rglob("*") if p.is_file())
            files.sort(key=lambda p: p.name == MANIFEST_NAME)
            for path in files:
                client.upload_file(str(path), self.bucket, self._key(f"{key}/{path.relative_to(folder).as_posix()}"))
        return f"{self.uri}/{key}"

    def get_tree(self, key: str, folder: Path) -> None:
        """See `Store.get_tree`."""
        client = self._client
        found = list(self.keys(f"{key}/"))
        if f"{key}/{MANIFEST_NAME}" not in found:
            raise StorageError("no such artifact, or it was not published whole", key=f"{self.uri}/{key}")
        for name in found:
            target = folder / name[len(key) + 1 :]
            target.parent.mkdir(parents=True, exist_ok=True)
            client.download_file(self.bucket, self._key(name), str(target))

    def remove(self, key: str) -> None:
        """See `Store.remove`."""
        found = sorted(self.keys(f"{key}/"), key=lambda name: not name.endswith(f"/{MANIFEST_NAME}"))
        for name in found:
            self._call("delete_object", name)

    def _call(self, operation: str, key: str, *, missing_ok: bool = False, **arguments: Any) -> Any:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return getattr(self._client, operation)(Bucket=self.bucket, Key=self._key(key), **arguments)
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            if missing_ok and code in {"NoSuchKey", "404"}:
                return None
            raise StorageError(
                f"S3 said {code}: {error.response.get('Error', {}).get('Message', '')}",
                key=f"{self.uri}/{key}",
                fix="check the bucket's name, the region and the permissions of the credentials in use",
            ) from error
        except BotoCoreError as error:
            raise StorageError(
                str(error),
                key=f"{self.uri}/{key}",
                fix="check AWS_ENDPOINT_URL_S3, AWS_REGION and that credentials are set in the environment",
            ) from error


def open_store(root: str) -> Store:
    """The store at `root`: a folder, or `s3://bucket/prefix`."""
    return S3Store(root) if root.startswith("s3://") else LocalStore(Path(root))
