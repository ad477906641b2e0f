"""From a source's URI to files on this machine."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from tunegate.data.config import SourceSpec
from tunegate.data.readers import Limits, RawRow, read_file
from tunegate.errors import DataError, StorageError
from tunegate.storage.manifest import sha256_file
from tunegate.storage.s3 import split_uri
from tunegate.storage.transfer import Bucket

STARTER_PREFIX = "starter:"
HUB_PREFIX = "hf://"
_GLOB_CHARACTERS = frozenset("*?[")


Reader = Callable[[Limits, str], Iterator[RawRow]]


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a source, or one split of a Hugging Face data set."""

    label: str
    """What it is called in reports."""
    rows: Reader
    """Reads it, row by row, under limits; the second argument is the spec key, for errors."""
    size: int = 0
    """Bytes on this machine; 0 when that is not known before it is read."""


@contextmanager
def open_source(
    source: SourceSpec, *, base_dir: Path, key: str, scratch: Path | None = None
) -> Iterator[Iterable[SourceFile]]:
    """The files of a source, for as long as the context lasts.

    S3 objects are brought to this machine one after the other, each when it is its turn, and removed afterwards.

    Args:
        source: The source.
        base_dir: What relative paths are relative to.
        key: The spec key, for errors, e.g. `data.sft[0].uri`.
        scratch: Where objects are brought to; None: the system's folder for temporary files.

    Yields:
        The files, sorted by name.

    Raises:
        DataError: There is no such file, it is a folder, a glob matches nothing or leaves its own folder, S3 refuses,
            or a file has not the digest that the spec wants.
    """
    uri = source.uri
    with ExitStack() as stack:
        if uri.startswith(STARTER_PREFIX):
            files: Iterable[SourceFile] = [stack.enter_context(_starter(uri, key))]
        elif uri.startswith("s3://"):
            folder = Path(stack.enter_context(TemporaryDirectory(prefix=".source-", dir=scratch)))
            files = _from_s3(source, folder, key)
        elif uri.startswith(HUB_PREFIX):
            from tunegate.data.hub import open_hub

            files = [SourceFile(uri, open_hub(uri, base_dir=base_dir, key=key))]
        elif "://" in uri:
            raise DataError(
                "only files, globs, s3://, hf:// and starter: are understood",
                key=key,
                value=uri,
                fix="download the file and give its path",
            )
        elif _GLOB_CHARACTERS & set(uri):
            files = _from_glob(uri, base_dir, key)
        else:
            files = [_from_path(source, base_dir, key)]
        yield files


def _file(path: Path, label: str) -> SourceFile:
    def rows(limits: Limits, key: str) -> Iterator[RawRow]:
        return read_file(path, label=label, key=key, limits=limits)

    return SourceFile(label, rows, path.stat().st_size)


def _check_digest(path: Path, source: SourceSpec, key: str) -> None:
    if source.sha256 is not None and (actual := sha256_file(path)) != source.sha256:
        raise DataError(
            f"the file has another content than the spec pins: its sha256 is {actual}",
            key=key,
            value=source.uri,
            fix="take the file that is meant, or put its digest into the spec",
        )


@contextmanager
def _starter(uri: str, key: str) -> Iterator[SourceFile]:
    name = uri.removeprefix(STARTER_PREFIX)
    parts = PurePosixPath(name).parts
    if len(parts) != 1 or name in {".", ".."}:
        raise DataError(
            "starter: takes the plain name of a file of the starter data",
            key=key,
            value=uri,
            fix="for example starter:sft.jsonl",
        )
    try:
        entry = resources.files("tunegate.starter").joinpath(name)
        found = entry.is_file()
    except ModuleNotFoundError:
        found = False
    if not found:
        raise DataError(
            "there is no such file in the starter data",
            key=key,
            value=uri,
            fix="one of "
            + ", ".join(f"starter:{n}.jsonl" for n in ("sft", "safety", "lookalike", "preferences", "evaluation")),
        )
    with resources.as_file(entry) as path:
        yield _file(path, uri)


def _from_path(source: SourceSpec, base_dir: Path, key: str) -> SourceFile:
    uri = source.uri
    path = base_dir / Path(uri).expanduser()
    if path.is_dir():
        raise DataError(
            "the source is a folder, not a file",
            key=key,
            value=uri,
            fix=f"give a glob such as {uri.rstrip('/')}/*.jsonl",
        )
    if not path.exists():
        raise DataError(
            "there is no such file",
            key=key,
            value=uri,
            fix=f"check the path; relative paths are looked up in {base_dir.absolute()}",
        )
    if not path.is_file():
        raise DataError("the source is not a regular file", key=key, value=uri, fix="give the path of a file")
    _check_digest(path, source, key)
    return _file(path, uri)


def _from_glob(uri: str, base_dir: Path, key: str) -> list[SourceFile]:
    parts = Path(uri).expanduser().parts
    first = next(i for i, part in enumerate(parts) if _GLOB_CHARACTERS & set(part))
    if ".." in parts[first:]:
        raise DataError(
            "a glob may not step upwards after its first wildcard",
            key=key,
            value=uri,
            fix="put the `..` before the first wildcard",
        )
    root = base_dir.joinpath(*parts[:first])
    pattern = str(PurePosixPath(*parts[first:]))
    found = sorted(Path(p) for p in glob.glob(pattern, root_dir=root, recursive=True))  # noqa: PTH207
    files = []
    for relative in found:
        path = root / relative
        if not path.is_file():
            continue
        if not path.resolve().is_relative_to(root.resolve()):
            raise DataError(
                "the glob matches a link that leads out of its folder",
                key=key,
                value=str(relative),
                fix="name the file that is meant, or remove the link",
            )
        files.append(_file(path, relative.as_posix()))
    if not files:
        raise DataError(
            "the glob matches no file",
            key=key,
            value=uri,
            fix=f"check the pattern; it was looked up in {root.absolute()}",
        )
    return files


def check_s3_source(source: SourceSpec, *, key: str) -> None:
    """Check that a source on S3 is there and may be read, without reading it.

    Raises:
        DataError: It is not, or S3 cannot be reached.
    """
    with _as_data_error(source.uri, key):
        bucket, names = _objects(source, key)
        if bucket.head(names[0]) is None:
            raise DataError("there is no such object", key=key, value=source.uri, fix="check bucket, key and region")


def _from_s3(source: SourceSpec, folder: Path, key: str) -> Iterator[SourceFile]:
    """The objects that a URI or a glob names, each fetched when its turn comes."""
    with _as_data_error(source.uri, key):
        bucket, names = _objects(source, key)
        for name in names:
            target = folder / PurePosixPath(name).name
            bucket.download(name, target)
            _check_digest(target, source, key)
            yield _file(target, bucket.uri(name))
            target.unlink(missing_ok=True)


def _objects(source: SourceSpec, key: str) -> tuple[Bucket, list[str]]:
    name, path = split_uri(source.uri, key=key)
    bucket = Bucket(name)
    if not path or source.uri.endswith("/"):
        raise DataError(
            "an S3 source names a bucket and an object, or a glob of them",
            key=key,
            value=source.uri,
            fix="s3://bucket/folder/file.jsonl, or s3://bucket/folder/*.jsonl.gz",
        )
    if not _GLOB_CHARACTERS & set(path):
        return bucket, [path]
    names = find_objects(bucket, path)
    if not names:
        raise DataError(
            "the glob matches no object", key=key, value=source.uri, fix="check the pattern; * does not match a slash"
        )
    return bucket, names


@contextmanager
def _as_data_error(uri: str, key: str) -> Iterator[None]:
    try:
        yield
    except StorageError as error:
        raise DataError(error.reason, key=key, value=error.key or uri, fix=error.fix) from error


def find_objects(bucket: Bucket, pattern: str) -> list[str]:
    """The keys that a glob matches, sorted; `*` and `?` stop at a slash, `**/` stands for any folders.

    Raises:
        StorageError: The bucket cannot be listed.
    """
    first = min(pattern.index(character) for character in _GLOB_CHARACTERS if character in pattern)
    expression = re.compile(glob_expression(pattern))
    return sorted(found.key for found in bucket.objects(pattern[:first]) if expression.fullmatch(found.key))


def glob_expression(pattern: str) -> str:
    """A glob as a regular expression."""
    parts = []
    position = 0
    while position < len(pattern):
        rest = pattern[position:]
        if rest.startswith("**/"):
            parts.append("(?:[^/]+/)*")
            position += 3
        elif rest.startswith("*"):
            parts.append("[^/]*")
            position += 1
        elif rest.startswith("?"):
            parts.append("[^/]")
            position += 1
        elif match := re.match(r"\[(!?)(\]?[^\]/]*)\]", rest):
            inside = match[2].replace("\\", r"\\").replace("^", r"\^")
            parts.append(f"[{'^' if match[1] else ''}{inside}]")
            position += match.end()
        else:
            parts.append(re.escape(rest[0]))
            position += 1
    return "".join(parts)
