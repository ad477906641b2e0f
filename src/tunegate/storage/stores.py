"""Small files and folders on disk or on S3 behind one interface.

A store maps keys (`runs/<id>/run.json`) to bytes. Writing is atomic: a reader sees the old content or the new one,
never half of it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Protocol

from tunegate.errors import StorageError
from tunegate.storage.manifest import MANIFEST_NAME, Manifest, list_files
from tunegate.storage.s3 import split_uri
from tunegate.storage.transfer import PART_BYTES, Bucket


@dataclass(frozen=True, slots=True)
class Entry:
    """A key of a store, the bytes under it, and when they were written."""

    key: str
    size: int
    modified: datetime


class Store(Protocol):
    """Keys to bytes and folders."""

    uri: str

    def put(self, key: str, data: bytes) -> None:
        """Write `data` under `key`, atomically."""

    def get(self, key: str) -> bytes | None:
        """The bytes under `key`, or None."""

    def keys(self, prefix: str) -> Iterator[str]:
        """All keys below `prefix`, sorted."""

    def entries(self, prefix: str) -> Iterator[Entry]:
        """All keys below `prefix` with their sizes and ages, sorted."""

    def put_tree(self, key: str, folder: Path) -> str:
        """Publish a folder under `key`; its manifest goes last, so a reader sees all or nothing. Returns the URI."""

    def get_tree(self, key: str, folder: Path) -> None:
        """Bring the folder published under `key` to `folder`."""

    def remove(self, key: str, *, last: str = "") -> None:
        """Remove the folder under `key` and all below it, manifests first, so that no reader sees half of one.

        Args:
            key: The folder.
            last: The file of it that goes after all others, so that an interrupted removal can be found.
        """


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

    def entries(self, prefix: str) -> Iterator[Entry]:
        """See `Store.entries`."""
        base = self._path(prefix)
        if base.is_dir():
            for path in sorted(base.rglob("*")):
                if path.is_file():
                    facts = path.stat()
                    modified = datetime.fromtimestamp(facts.st_mtime, UTC)
                    yield Entry(path.relative_to(self.root).as_posix(), facts.st_size, modified)

    def keys(self, prefix: str) -> Iterator[str]:
        """See `Store.keys`."""
        return (entry.key for entry in self.entries(prefix))

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

    def remove(self, key: str, *, last: str = "") -> None:
        """See `Store.remove`; here the whole folder is renamed at once and then removed."""
        target = self._path(key)
        if target.is_dir():
            gone = target.with_name(f".{target.name}.{os.getpid()}.removed")
            target.replace(gone)
            shutil.rmtree(gone)


class S3Store:
    """A prefix of an S3 bucket; endpoint, region and credentials come from the usual AWS settings.

    Every method raises `StorageUnavailableError` when S3 cannot be used now (the same call may succeed later), and
    `StorageError` when bucket or object are not there or damaged.

    Args:
        uri: `s3://bucket/prefix`.
        part_bytes: Larger files are transferred in parts of this size.
    """

    def __init__(self, uri: str, *, part_bytes: int = PART_BYTES) -> None:
        name, self.prefix = split_uri(uri, key="storage.root")
        self.uri = uri.rstrip("/")
        self.bucket = Bucket(name, part_bytes=part_bytes)

    def key(self, key: str) -> str:
        """The object's key in the bucket."""
        return f"{self.prefix}/{key}" if self.prefix else key

    def put(self, key: str, data: bytes) -> None:
        """See `Store.put` (a PutObject is atomic)."""
        self.bucket.put(self.key(key), data)

    def get(self, key: str) -> bytes | None:
        """See `Store.get`."""
        return self.bucket.get(self.key(key))

    def entries(self, prefix: str) -> Iterator[Entry]:
        """See `Store.entries`."""
        skip = len(self.prefix) + 1 if self.prefix else 0
        for found in self.bucket.objects(self.key(prefix)):
            yield Entry(found.key[skip:], found.size, found.modified)

    def keys(self, prefix: str) -> Iterator[str]:
        """See `Store.keys`."""
        return (entry.key for entry in self.entries(prefix))

    def put_tree(self, key: str, folder: Path) -> str:
        """See `Store.put_tree`; files that an earlier, interrupted attempt has sent are not sent again."""
        base, path = self.key(key), folder / MANIFEST_NAME
        if not path.is_file():
            raise StorageError("the folder has no manifest.json, so it is not finished", key=str(folder))
        data, there = path.read_bytes(), self.get(f"{key}/{MANIFEST_NAME}")
        if there is None or not _same(there, data):
            manifest = _manifest(data)
            files = manifest.files if manifest is not None else list_files(folder)
            self.bucket.upload_all((folder / f.path, f"{base}/{f.path}", f.sha256) for f in files)
            there = data
        # Written anew in any case: what was published or used just now is young, and no garbage.
        self.bucket.put(f"{base}/{MANIFEST_NAME}", there)
        return f"{self.uri}/{key}"

    def get_tree(self, key: str, folder: Path) -> None:
        """See `Store.get_tree`; every file's digest is checked, and the manifest is written last.

        Files that an earlier, interrupted attempt has brought are not fetched again.
        """
        data = self.get(f"{key}/{MANIFEST_NAME}")
        if data is None:
            raise StorageError(
                "no such artifact, or it was not published whole",
                key=f"{self.uri}/{key}",
                fix="run the stage that makes it again",
            )
        manifest, base = _manifest(data), self.key(key)
        files: list[tuple[str, str | None, int]]
        if manifest is not None:
            files = [(f.path, f.sha256, f.size) for f in manifest.files]
        else:  # a manifest of another kind, a checkpoint's: the digests that the objects carry are checked
            found = ((f.key[len(base) + 1 :], f.size) for f in self.bucket.objects(f"{base}/"))
            files = [(name, None, size) for name, size in found if name != MANIFEST_NAME]
        self._inside(key, [name for name, _, _ in files])
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        self.bucket.download_all((f"{base}/{name}", folder / name, sha256, size) for name, sha256, size in files)
        (folder / MANIFEST_NAME).write_bytes(data)

    def get_files(self, key: str, folder: Path) -> int:
        """Fetch all objects under a key that nobody sealed as an artifact, side by side and in parts.

        Returns:
            How many there were.
        """
        base = self.key(key)
        found = [(entry.key[len(base) + 1 :], entry.size) for entry in self.bucket.objects(f"{base}/")]
        files = [(name, size) for name, size in found if name and not name.endswith("/")]  # consoles make "folders"
        self._inside(key, [name for name, _ in files])
        self.bucket.download_all((f"{base}/{name}", folder / name, None, size) for name, size in files)
        return len(files)

    def _inside(self, key: str, names: Iterable[str]) -> None:
        for name in names:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise StorageError("a file of the artifact lies outside of it", key=f"{self.uri}/{key}", value=name)

    def remove(self, key: str, *, last: str = "") -> None:
        """See `Store.remove`."""
        found = sorted(self.keys(f"{key}/"), key=lambda name: not name.endswith(f"/{MANIFEST_NAME}"))
        finally_ = [name for name in found if last and name == f"{key}/{last}"]
        self.bucket.delete([self.key(name) for name in found if name not in finally_])
        self.bucket.delete([self.key(name) for name in finally_])


def _manifest(data: bytes) -> Manifest | None:
    """An artifact's manifest, or None when the file of this name is something else."""
    try:
        return Manifest.model_validate_json(data)
    except ValueError:
        return None


def _same(there: bytes, here: bytes) -> bool:
    """Whether two manifests stand for the same content."""
    one, other = _manifest(there), _manifest(here)
    return there == here if one is None or other is None else one.digest == other.digest


def open_store(root: str) -> Store:
    """The store at `root`: a folder, or `s3://bucket/prefix`."""
    return S3Store(root) if root.startswith("s3://") else LocalStore(Path(root))


def bring_tree(uri: str, folder: Path) -> None:
    """Put the artifact at a place (a folder, or an `s3://` prefix) into a folder: linked, or fetched and checked.

    Raises:
        StorageError: There is no whole artifact.
    """
    if uri.startswith("s3://"):
        parent, _, key = uri.rstrip("/").rpartition("/")
        open_store(parent).get_tree(key, folder)
    else:
        link_tree(Path(uri), folder)
