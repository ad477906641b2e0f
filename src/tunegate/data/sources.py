"""From a source's URI to files on this machine."""

from __future__ import annotations

import glob
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from urllib.parse import urlparse

from tunegate.data.config import SourceSpec
from tunegate.errors import DataError

STARTER_PREFIX = "starter:"
_GLOB_CHARACTERS = frozenset("*?[")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a source: where it lies now, and what it is called in reports."""

    path: Path
    label: str


@contextmanager
def open_source(source: SourceSpec, *, base_dir: Path, key: str) -> Iterator[list[SourceFile]]:
    """The files of a source, for as long as the context lasts (S3 objects are brought to a temporary folder).

    Args:
        source: The source.
        base_dir: What relative paths are relative to.
        key: The spec key, for errors, e.g. `data.sft[0].uri`.

    Yields:
        The files, sorted by name.

    Raises:
        DataError: There is no such file, it is a folder, or a glob matches nothing or leaves its own folder.
    """
    uri = source.uri
    with ExitStack() as stack:
        if uri.startswith(STARTER_PREFIX):
            yield [stack.enter_context(_starter(uri, key))]
        elif uri.startswith("s3://"):
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="tunegate-source-")))
            yield _from_s3(uri, folder, key)
        elif "://" in uri:
            raise DataError(
                "only files, globs, s3:// and starter: are understood",
                key=key,
                value=uri,
                fix="download the file and give its path",
            )
        elif _GLOB_CHARACTERS & set(uri):
            yield _from_glob(uri, base_dir, key)
        else:
            yield [_from_path(uri, base_dir, key)]


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
        yield SourceFile(path, uri)


def _from_path(uri: str, base_dir: Path, key: str) -> SourceFile:
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
    return SourceFile(path, uri)


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
        files.append(SourceFile(path, relative.as_posix()))
    if not files:
        raise DataError(
            "the glob matches no file",
            key=key,
            value=uri,
            fix=f"check the pattern; it was looked up in {root.absolute()}",
        )
    return files


def _from_s3(uri: str, folder: Path, key: str) -> list[SourceFile]:
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    parsed = urlparse(uri)
    bucket, name = parsed.netloc, parsed.path.lstrip("/")
    if not bucket or not name or name.endswith("/"):
        raise DataError(
            "an S3 source names a bucket and an object", key=key, value=uri, fix="s3://bucket/folder/file.jsonl"
        )
    target = folder / PurePosixPath(name).name
    try:
        client = boto3.client("s3")
        with target.open("wb") as stream:
            body = client.get_object(Bucket=bucket, Key=name)["Body"]
            shutil.copyfileobj(body, stream, 1 << 20)
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        raise DataError(
            f"S3 said {code}",
            key=key,
            value=uri,
            fix="check bucket and object, and that the credentials in use may read them",
        ) from error
    except BotoCoreError as error:
        raise DataError(
            f"S3 cannot be reached: {error}",
            key=key,
            value=uri,
            fix="check AWS_ENDPOINT_URL_S3, AWS_REGION and that credentials are set in the environment",
        ) from error
    return [SourceFile(target, uri)]
