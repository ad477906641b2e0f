"""Clocks and memory of a training run."""

from __future__ import annotations

import ctypes
import resource
import sys
from functools import cache

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # parameters of mallopt(3)


def peak_memory_bytes() -> int:
    """Most memory in use so far: allocated on the GPU if there is one, else resident in the process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reuse_memory() -> None:
    """Let the C library keep freed memory for the next microbatch instead of handing it back to the system.

    Large tensors otherwise come from fresh pages each time, which the system has to clear: with SmolLM2-135M on a CPU
    half a million page faults and a third of the time of a training step. What is kept is given back by
    `release_memory`. Does nothing where the C library is not glibc.
    """
    library = _glibc()
    if library is not None:
        library.mallopt(_M_MMAP_MAX, 0)  # no block comes from fresh pages of its own
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)  # the heap does not shrink by itself


def release_memory() -> None:
    """Give freed memory back to the system, at the end of a stage. Does nothing where the C library is not glibc."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux") or torch.cuda.is_available():
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None
