"""Every near-duplicate pair of a set, by comparing all with all: what recall is measured against."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix

_ROWS = 500


def _sets(texts: list[str], width: int) -> csr_matrix:
    """[texts, distinct shingles] of zeros and ones."""
    numbers: dict[str, int] = {}
    indices, ends = [], [0]
    for text in texts:
        padded = text.ljust(width)
        shingles = {padded[i : i + width] for i in range(len(padded) - width + 1)}
        indices.extend(numbers.setdefault(s, len(numbers)) for s in shingles)
        ends.append(len(indices))
    return csr_matrix((np.ones(len(indices), np.int32), indices, ends), shape=(len(texts), len(numbers)))


def near_rows(fields: list[list[str]], limit: float, width: int = 5) -> npt.NDArray[np.bool_]:
    """Which rows have an earlier row that is similar to them in every field.

    Args:
        fields: Of each field, the texts of all rows.
        limit: Jaccard similarity of the sets of shingles from which two texts are similar.
        width: Characters of a shingle.

    Returns:
        [rows] whether there is such an earlier row.
    """
    count = len(fields[0])
    found = np.zeros(count, dtype=bool)
    matrices = [_sets(texts, width) for texts in fields]
    sizes = [np.asarray(matrix.sum(axis=1)).ravel() for matrix in matrices]
    for start in range(0, count, _ROWS):
        end = min(start + _ROWS, count)
        similar = np.ones((end - start, end), dtype=bool)
        for matrix, size in zip(matrices, sizes, strict=True):
            common = (matrix[start:end] @ matrix[:end].T).toarray()
            whole = size[start:end, None] + size[None, :end] - common
            similar &= common >= limit * whole
        similar &= np.arange(end)[None, :] < np.arange(start, end)[:, None]
        found[start:end] = similar.any(axis=1)
    return found
