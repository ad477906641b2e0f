"""From a file to raw rows: JSONL, JSON, Parquet, CSV and TSV, plain, gzip or zstd, one row at a time.

A fault of a row is handed on beside the good rows and ends in the quarantine. A fault of a file (cut off, not what
its name says, a decompression bomb) is an error: half a file must not pass for a whole one.
"""

from __future__ import annotations

import csv
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tunegate.data.faults import RowError
from tunegate.data.tables import read_batches
from tunegate.errors import DataError

_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_COMPRESSED_ENDINGS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_RATIO_FREE_BYTES = 16 * 2**20
_CHUNK_BYTES = 1 << 20
_SHOWN_CHARACTERS = 2000
_FORMATS = ".jsonl, .ndjson, .json, .parquet, .csv, .tsv, each also as .gz or .zst"
_JSON_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it was read: its value, or what is wrong with it."""

    line: int
    value: Any
    fault: RowError | None = None
    text: str = ""
    """The beginning of a faulty row, for the quarantine."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a file may cost."""

    max_line_bytes: int
    max_ratio: float


def read_file(path: Path, *, label: str, key: str, limits: Limits) -> Iterator[RawRow]:
    """Read a file row by row.

    Args:
        path: The file.
        label: Its name in errors and in the quarantine; its endings say what it is.
        key: The spec key of its source, for errors.
        limits: Longest line and largest growth.

    Yields:
        The rows, each with its line (JSONL, CSV: 1-based line of the file; else the 1-based number of the row).

    Raises:
        DataError: The file as a whole cannot be read.
    """
    name = label.lower()
    compressed = next((e for e in _COMPRESSED_ENDINGS if name.endswith(e)), "")
    ending = Path(name.removesuffix(compressed)).suffix
    readers: dict[str, Callable[[_File], Iterator[RawRow]]] = {
        ".jsonl": _read_jsonl,
        ".ndjson": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".parquet": _read_parquet,
    }
    file = _File(path, label, key, limits, ending)
    if ending not in readers:
        file.fail("the file's ending does not say what it is", value=label, fix=f"one of {_FORMATS}")
    if path.stat().st_size == 0:
        file.fail("the file is empty", value=label, fix="check how it was exported")
    yield from readers[ending](file)


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    label: str
    key: str
    limits: Limits
    ending: str

    def fail(self, reason: str, *, fix: str, value: Any = None, cause: BaseException | None = None) -> NoReturn:
        raise DataError(reason, key=f"{self.key} ({self.label})", value=value, fix=fix) from cause

    def open(self) -> io.BufferedReader:
        """The decompressed bytes; the compression is recognised by content, not by name."""
        with self.path.open("rb") as stream:
            magic = stream.read(4)
        if magic.startswith(_GZIP_MAGIC):
            return io.BufferedReader(_Inflating(self, "gzip"), _CHUNK_BYTES)
        if magic == _ZSTD_MAGIC:
            return io.BufferedReader(_Inflating(self, "zstd"), _CHUNK_BYTES)
        for ending, kind in _COMPRESSED_ENDINGS.items():
            if self.label.lower().endswith(ending):
                self.fail(
                    f"the name says {kind}, the content does not",
                    value=self.label,
                    fix="rename it or compress it again",
                )
        if magic[:2] in (b"\xff\xfe", b"\xfe\xff"):
            self.fail(
                "the file is UTF-16", value=self.label, fix="convert it: iconv -f UTF-16 -t UTF-8 file > file.utf8"
            )
        return self.path.open("rb")


class _Inflating(io.RawIOBase):
    """Decompressed bytes of a file; refuses to grow without limit and to end before the stream does."""

    def __init__(self, file: _File, kind: str) -> None:
        self._file = file
        self._kind = kind
        self._size = max(1, file.path.stat().st_size)
        self._grown = 0
        self._raw = file.path.open("rb")
        self._inner: Any = _GzipMembers(self._raw) if kind == "gzip" else _zstd_stream(self._raw)

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._raw.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._inner.read(len(buffer))
        except (OSError, EOFError, zlib.error) as error:
            self._file.fail(
                f"the {self._kind} stream is cut off or damaged after {self._grown} bytes",
                fix="download or export the file again; no part of it was used",
                cause=error,
            )
        self._grown += len(data)
        limit = self._file.limits.max_ratio
        if self._grown > _RATIO_FREE_BYTES and self._grown > limit * self._size:
            self._file.fail(
                f"the file grows to more than {limit:g} times its size, as a decompression bomb does",
                value=self._file.label,
                fix="check where it comes from; raise data.max_decompression_ratio if it is right",
            )
        buffer[: len(data)] = data
        return len(data)


class _GzipMembers:
    """Reads concatenated gzip members and raises EOFError when the last one is not complete."""

    def __init__(self, raw: io.BufferedIOBase) -> None:
        import gzip

        self._stream = gzip.GzipFile(fileobj=raw, mode="rb")

    def read(self, size: int) -> bytes:
        return self._stream.read(size)


def _zstd_stream(raw: Any) -> Any:
    import pyarrow as pa

    return pa.CompressedInputStream(pa.PythonFile(raw), "zstd")


def _parse_constant(text: str) -> NoReturn:
    raise RowError("not_finite", f"{text} is not a JSON number")


def _parse_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RowError("duplicate_key", f"the key {twice!r} occurs twice")
    return value


_DECODER = json.JSONDecoder(parse_constant=_parse_constant, object_pairs_hook=_parse_pairs)


def _decode_json(text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise RowError("not_json", f"{error.msg} at column {error.colno}") from None
    except RecursionError:
        raise RowError("too_deep", "the row is nested too deeply") from None
    except ValueError as error:
        raise RowError("not_json", str(error)[:200]) from None


def _read_jsonl(file: _File) -> Iterator[RawRow]:
    limit = file.limits.max_line_bytes
    line = 0
    with file.open() as stream:
        while data := stream.readline(limit + 1):
            line += 1
            if line == 1:
                data = data.removeprefix(b"\xef\xbb\xbf")
            if len(data) > limit:
                size = len(data)
                while not data.endswith(b"\n") and (more := stream.readline(_CHUNK_BYTES)):
                    size += len(more)
                    if more.endswith(b"\n"):
                        break
                start = data[:_SHOWN_CHARACTERS].decode("utf-8", "replace")
                yield RawRow(line, None, RowError("line_too_long", f"{size} bytes, allowed are {limit}"), start)
                continue
            if not data.strip():
                continue
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError as error:
                fault = RowError("not_utf8", f"byte {data[error.start]:#04x} at position {error.start}")
                yield RawRow(line, None, fault, data[:_SHOWN_CHARACTERS].decode("utf-8", "replace"))
                continue
            try:
                yield RawRow(line, _decode_json(text))
            except RowError as fault:
                yield RawRow(line, None, fault, text[:_SHOWN_CHARACTERS])


def _read_json(file: _File) -> Iterator[RawRow]:
    with file.open() as stream:
        head = stream.peek(256).removeprefix(b"\xef\xbb\xbf").lstrip()
        if not head.startswith(b"["):
            # Many sets carry JSON lines under the name .json.
            is_array = False
        else:
            is_array = True
            yield from _read_array(file, io.TextIOWrapper(stream, encoding="utf-8-sig"))
    if not is_array:
        yield from _read_jsonl(file)


def _read_array(file: _File, stream: io.TextIOWrapper) -> Iterator[RawRow]:
    """The elements of a JSON array, without holding more than one of them."""
    buffer, position, line, ended = "", 0, 0, False

    def fill() -> None:
        nonlocal buffer, position, ended
        try:
            more = stream.read(max(_CHUNK_BYTES, len(buffer) - position))
        except UnicodeDecodeError as error:
            file.fail("the file is not UTF-8", fix="convert it to UTF-8", cause=error)
        buffer, position, ended = buffer[position:] + more, 0, not more

    def skip() -> str:
        nonlocal position
        while True:
            match = _JSON_SPACE.match(buffer, position)
            position = match.end() if match else position
            if position < len(buffer) or ended:
                return buffer[position : position + 1]
            fill()

    skip()
    position += 1  # the opening bracket
    if skip() == "]":
        return
    while True:
        line += 1
        skip()
        while True:
            try:
                value, end = _DECODER.raw_decode(buffer, position)
            except RowError as fault:
                # The decoder stopped inside the element; a decoder without rules finds its end.
                found = _end_of_element(buffer, position)
                if found is None and not ended:
                    fill()
                    continue
                if found is None:
                    file.fail(f"element {line} of the array is not JSON", fix="export the file again", cause=fault)
                yield RawRow(line, None, fault, buffer[position : position + _SHOWN_CHARACTERS])
                position = found
                break
            except (json.JSONDecodeError, RecursionError, ValueError) as error:
                if ended:
                    file.fail(
                        f"element {line} of the array is not JSON, or the file is cut off",
                        fix="export the file again; no part of it was used",
                        cause=error,
                    )
                fill()
                continue
            if end == len(buffer) and not ended:
                fill()  # a number may go on in the next chunk
                continue
            yield RawRow(line, value)
            position = end
            break
        separator = skip()
        position += 1
        if separator == "]":
            return
        if separator != ",":
            file.fail(
                f"the array is not closed after element {line}; the file is cut off",
                fix="export the file again; no part of it was used",
            )


def _end_of_element(buffer: str, position: int) -> int | None:
    try:
        return json.JSONDecoder().raw_decode(buffer, position)[1]
    except (ValueError, RecursionError):
        return None


def _read_csv(file: _File) -> Iterator[RawRow]:
    csv.field_size_limit(file.limits.max_line_bytes)
    with file.open() as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="", errors="strict") as text:
        reader = csv.reader(text, delimiter="\t" if file.ending == ".tsv" else ",")
        try:
            header = next(reader, [])
            if len(set(header)) < len(header):
                file.fail("two columns have the same name", value=header, fix="rename one of them")
            while True:
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield RawRow(reader.line_num, None, RowError("not_csv", str(error)))
                    continue
                if not cells:
                    continue
                if len(cells) != len(header):
                    fault = RowError("columns", f"{len(cells)} cells, the header has {len(header)}")
                    yield RawRow(reader.line_num, None, fault, ",".join(cells)[:_SHOWN_CHARACTERS])
                else:
                    yield RawRow(reader.line_num, dict(zip(header, cells, strict=True)))
        except UnicodeDecodeError as error:
            file.fail("the file is not UTF-8", fix="convert it to UTF-8", cause=error)


def _read_parquet(file: _File) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    line = 0
    try:
        with pq.ParquetFile(file.path) as table:
            for batch in read_batches(table, rows=1024):
                for value in batch.to_pylist():
                    line += 1
                    yield RawRow(line, value)
    except (pa.ArrowException, OSError) as error:
        file.fail(f"the file is not Parquet, or damaged: {str(error)[:200]}", fix="export the file again", cause=error)
