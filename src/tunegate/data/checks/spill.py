"""Columns that grow with the dataset live in temporary files, so that memory does not."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import polars as pl

from tunegate.data.checks.shingles import mixed

# Grouping a piece takes about four times its size. The smaller the pieces, the more files: at 2 MiB, one for every
# 130,000 keys.
_PIECE_BYTES = 1 << 21
# Frames that are kept by row are read back for so many rows at once, and written when so many are waiting.
_PART_ROWS = 1 << 15
_WAITING_ROWS = 1 << 11
_PART = "part of rows"
_ITEM_SEPARATOR = "\x1e"


class Column:
    """An array in a file that is appended to and read back, whole or piece by piece."""

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        self.path = path
        self.length = 0
        self._held: npt.NDArray[Any] | None = None
        """The values of one that came from another process; it can be read, and nothing is added to it."""
        path.touch()

    def append(self, values: npt.NDArray[Any]) -> None:
        """Add values at the end."""
        # Opened for each piece: the checks together have more columns than a process may have files open.
        with self.path.open("ab") as stream:
            stream.write(np.ascontiguousarray(values, dtype=self.dtype).tobytes())
        self.length += len(values)

    def read(self) -> npt.NDArray[Any]:
        """All values."""
        return np.fromfile(self.path, dtype=self.dtype) if self._held is None else self._held.copy()

    def at(self, places: Sequence[int]) -> npt.NDArray[Any]:
        """The values at some places."""
        if self._held is not None:
            return self._held[list(places)]
        with self.path.open("rb") as stream:
            size = self.dtype.itemsize
            data = b"".join(os.pread(stream.fileno(), size, place * size) for place in places)
        return np.frombuffer(data, self.dtype)

    def pieces(self) -> Iterator[npt.NDArray[Any]]:
        """The values in pieces of limited size."""
        if self._held is not None:
            yield self._held
            return
        with self.path.open("rb") as stream:
            while len(piece := np.fromfile(stream, dtype=self.dtype, count=_PIECE_BYTES // self.dtype.itemsize)):
                yield piece

    def __getstate__(self) -> dict[str, Any]:
        """The values themselves: another process does not see the file."""
        return {"path": self.path, "dtype": self.dtype, "length": self.length, "_held": self.read()}

    def close(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)


class Keyed:
    """Values with 64-bit keys in a file, whose equal keys can be brought together in limited memory.

    Args:
        path: The file.
        fields: What is kept beside the `key`, as NumPy fields.
    """

    def __init__(self, path: Path, fields: Sequence[tuple[str, npt.DTypeLike]]) -> None:
        self._column = Column(path, [("key", np.uint64), *fields])

    def append(self, **columns: npt.NDArray[Any]) -> None:
        """Add values, given as one array a field."""
        values = np.empty(len(columns["key"]), self._column.dtype)
        for name, column in columns.items():
            values[name] = column
        self._column.append(values)

    def pieces(self) -> Iterator[npt.NDArray[Any]]:
        """The values as they were added, in pieces."""
        return self._column.pieces()

    def groups(self) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[np.int64]]]:
        """Part by part, each with all values of its keys.

        Yields:
            [N] values sorted by key, equal keys as they were added; [N] where each one's group begins.
        """
        size = self._column.length * self._column.dtype.itemsize
        if size <= _PIECE_BYTES:
            yield _grouped(self._column.read())
            return
        parts = [
            Column(self._column.path.with_name(f"{self._column.path.name}.part{part}"), self._column.dtype)
            for part in range(-(-size // _PIECE_BYTES))
        ]
        for piece in self._column.pieces():
            part = mixed(piece["key"]) % np.uint64(len(parts))
            for number, column in enumerate(parts):
                column.append(piece[part == number])
        for column in parts:
            yield _grouped(column.read())
            column.close()

    def close(self) -> None:
        """Remove the file."""
        self._column.close()


def _grouped(values: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    values = values[np.argsort(values["key"], kind="stable")]
    starts = np.ones(len(values), dtype=bool)
    starts[1:] = values["key"][1:] != values["key"][:-1]
    return values, np.flatnonzero(starts)[np.cumsum(starts) - 1]


class Texts:
    """Items of several texts each, in a file; any of them can be read back."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream: IO[bytes] = path.open("w+b")
        self._ends = Column(path.with_suffix(".ends"), np.int64)
        self._size = 0

    @property
    def length(self) -> int:
        """Number of items."""
        return self._ends.length

    def append(self, items: Sequence[Sequence[str]]) -> None:
        """Add items; their texts must not hold U+001E."""
        data = [_ITEM_SEPARATOR.join(texts).encode() for texts in items]
        self._stream.write(b"".join(data))
        self._add_ends(self._size + np.cumsum(np.fromiter(map(len, data), np.int64, len(data))))

    def extend(self, other: Texts) -> None:
        """Add all items of another one."""
        for data in other._bytes():
            self._stream.write(data)
        offset = self._size
        for ends in other._ends.pieces():
            self._add_ends(offset + ends)

    def _add_ends(self, ends: npt.NDArray[np.int64]) -> None:
        self._ends.append(ends)
        self._size = int(ends[-1]) if len(ends) else self._size

    def _bytes(self) -> Iterator[bytes]:
        self._stream.seek(0)
        while data := self._stream.read(_PIECE_BYTES):
            yield data
        self._stream.seek(0, io.SEEK_END)

    def __getstate__(self) -> dict[str, Any]:
        """The texts themselves: another process does not see the file."""
        return {
            "_path": self._path,
            "_ends": self._ends,
            "_size": self._size,
            "_stream": io.BytesIO(b"".join(self._bytes())),
        }

    def __getitem__(self, item: int) -> list[str]:
        start, end = (0, *self._ends.at([0])) if not item else self._ends.at([item - 1, item])
        self._stream.seek(int(start))
        data = self._stream.read(int(end - start))
        self._stream.seek(0, io.SEEK_END)
        return data.decode().split(_ITEM_SEPARATOR)

    def close(self) -> None:
        """Close the files and remove them."""
        self._stream.close()
        self._ends.close()
        self._path.unlink(missing_ok=True)


class ByRow:
    """Frames with a column `row`, brought into the order of their rows in limited memory.

    Frames wait in memory until there is a place to spill them to; then only the latest do. One that came from another
    process holds its frames in memory.

    Args:
        schema: The columns, `row` (an integer) among them.
    """

    def __init__(self, schema: pl.Schema) -> None:
        self._schema = schema
        self._path: Path | None = None
        self._waiting: list[pl.DataFrame] = []
        self._height = 0
        self._parts: set[int] = set()
        self._latest: tuple[int, pl.DataFrame] | None = None
        """The part that was read last, by its number."""

    def spill_to(self, path: Path) -> None:
        """Keep what is added in files whose names begin like this one."""
        self._path = path

    def append(self, frame: pl.DataFrame) -> None:
        """Add a frame."""
        if frame.height:
            self._waiting.append(frame)
            self._height += frame.height
            if self._path is not None and self._height >= _WAITING_ROWS:
                self._write()

    def extend(self, other: ByRow) -> None:
        """Add all frames of another one."""
        for frame in other.parts():
            self.append(frame)

    def _write(self) -> None:
        if not self._waiting or self._path is None:
            return
        frame = pl.concat(self._waiting).with_columns(pl.col("row").floordiv(_PART_ROWS).alias(_PART))
        self._waiting, self._height, self._latest = [], 0, None
        for (part,), rows in frame.partition_by(_PART, maintain_order=True, include_key=False, as_dict=True).items():
            with self._file(part).open("ab") as stream:
                stream.write(rows.write_ndjson().encode())
            self._parts.add(part)

    def _file(self, part: int) -> Path:
        assert self._path is not None
        return self._path.with_name(f"{self._path.name}.{part}")

    def _part(self, number: int) -> pl.DataFrame:
        if self._latest is None or self._latest[0] != number:
            frame = pl.read_ndjson(self._file(number), schema=self._schema)
            self._latest = number, frame.sort("row", maintain_order=True)
        return self._latest[1]

    def parts(self) -> Iterator[pl.DataFrame]:
        """All rows in their order, rows of one number as they were added, in frames of limited size."""
        self._write()
        if self._waiting:
            yield pl.concat(self._waiting).sort("row", maintain_order=True)
        for number in sorted(self._parts):
            yield self._part(number)

    def between(self, first: int, end: int) -> pl.DataFrame:
        """The rows whose numbers are at least `first` and below `end`, in their order."""
        self._write()
        if self._path is None:
            frames = list(self.parts())
        else:
            wanted = range(first // _PART_ROWS, -(-end // _PART_ROWS))
            frames = [self._part(number) for number in wanted if number in self._parts]
        # Parts are sorted: a slice is a hundred times cheaper than a filter.
        inside = []
        for frame in frames:
            start, stop = (int(frame["row"].search_sorted(row)) for row in (first, end))
            inside.append(frame.slice(start, stop - start))
        return pl.concat(inside) if inside else self._schema.to_frame()

    def __getstate__(self) -> dict[str, Any]:
        """The rows themselves: another process does not see the files."""
        frames = list(self.parts())
        return self.__dict__ | {"_path": None, "_waiting": frames, "_parts": set(), "_latest": None}


class Marks:
    """Which of many items are marked, at a bit an item."""

    def __init__(self, length: int) -> None:
        self._bits = np.zeros(-(-length // 8), np.uint8)

    def add(self, items: npt.NDArray[np.int64]) -> None:
        """Mark some items."""
        np.bitwise_or.at(self._bits, items >> 3, np.uint8(1) << (items & 7).astype(np.uint8))

    def __getitem__(self, items: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether each of some items is marked."""
        bits: npt.NDArray[np.uint8] = self._bits[items >> 3] >> (items & 7).astype(np.uint8)
        return (bits & 1).astype(np.bool_)
