"""Columns that grow with the dataset live in temporary files, so that memory does not."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from tunegate.data.checks.shingles import mixed

_PIECE_BYTES = 1 << 23
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
        self._sizes = Column(path.with_suffix(".sizes"), np.int64)
        self._ends: npt.NDArray[Any] | None = None

    @property
    def length(self) -> int:
        """Number of items."""
        return self._sizes.length

    def append(self, items: Sequence[Sequence[str]]) -> None:
        """Add items; their texts must not hold U+001E."""
        data = [_ITEM_SEPARATOR.join(texts).encode() for texts in items]
        self._stream.write(b"".join(data))
        self._sizes.append(np.fromiter(map(len, data), np.int64, len(data)))
        self._ends = None

    def extend(self, other: Texts) -> None:
        """Add all items of another one."""
        for data in other._bytes():
            self._stream.write(data)
        self._sizes.append(other._sizes.read())
        self._ends = None

    def _bytes(self) -> Iterator[bytes]:
        self._stream.seek(0)
        while data := self._stream.read(_PIECE_BYTES):
            yield data
        self._stream.seek(0, io.SEEK_END)

    def __getstate__(self) -> dict[str, Any]:
        """The texts themselves: another process does not see the file."""
        return {
            "_path": self._path,
            "_sizes": self._sizes,
            "_ends": None,
            "_stream": io.BytesIO(b"".join(self._bytes())),
        }

    def __getitem__(self, item: int) -> list[str]:
        if self._ends is None:
            self._stream.flush()
            self._ends = np.cumsum(self._sizes.read())
        start = int(self._ends[item - 1]) if item else 0
        self._stream.seek(start)
        return self._stream.read(int(self._ends[item]) - start).decode().split(_ITEM_SEPARATOR)

    def close(self) -> None:
        """Close the files and remove them."""
        self._stream.close()
        self._sizes.close()
        self._path.unlink(missing_ok=True)
