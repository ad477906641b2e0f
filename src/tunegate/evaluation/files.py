"""Reads the users' own evaluation sets: the rows of files that a spec names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tunegate.data.config import DataSpec, SourceSpec
from tunegate.data.readers import Limits
from tunegate.data.sources import open_source
from tunegate.errors import DataError

_Item = TypeVar("_Item")


def read_items(
    uris: Sequence[str], key: str, convert: Callable[[dict[str, Any]], _Item], *, wanted: str
) -> list[_Item]:
    """The items of all files, in their order.

    Args:
        uris: Paths, globs, `s3://…` or `starter:…`.
        key: The spec key, for errors.
        convert: Makes an item of a row; raises KeyError, TypeError or ValueError when the row is none.
        wanted: What a row looks like, for errors.

    Raises:
        DataError: A file is missing or damaged, or a row is no item; the first bad row is named.
    """
    limits = Limits(DataSpec().max_line_bytes, DataSpec().max_decompression_ratio)
    items = []
    for number, uri in enumerate(uris):
        place = f"{key}[{number}]"
        with open_source(SourceSpec(uri=uri), base_dir=Path.cwd(), key=place) as files:
            for file in files:
                for row in file.rows(limits, place):
                    try:
                        if row.fault is not None:
                            raise ValueError(str(row.fault))
                        items.append(convert(row.value))
                    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                        said = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
                        raise DataError(
                            f"the row cannot be used: {said}",
                            key=f"{place} ({file.label}, line {row.line})",
                            fix=f"a row looks like {wanted}",
                        ) from None
    return items
