"""Clocks and memory of a training run."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from functools import cache

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # parameters of mallopt(3)
_MADV_HUGEPAGE = 14  # advice of madvise(2)
_HUGE_PAGE = 2 << 20


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
        library.mallopt(_M_TRIM_THRESHOLD, -1)  # the heap does not shrink by itself
        _want_huge_pages(library)


def release_memory() -> None:
    """Give freed memory back to the system, at the end of a stage. Does nothing where the C library is not glibc."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def _want_huge_pages(library: ctypes.CDLL) -> None:
    """Ask for pages of 2 MB under the heap that is still to come, half of the machine's memory at most.

    A block is taken and freed without being written to, so it costs address space alone; it stays the heap's end.
    """
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    while size > 64 * _HUGE_PAGE:
        block = library.malloc(ctypes.c_size_t(size))
        if block:
            first = -(-block // _HUGE_PAGE) * _HUGE_PAGE
            library.madvise(
                ctypes.c_void_p(first),
                ctypes.c_size_t((block + size - first) // _HUGE_PAGE * _HUGE_PAGE),
                _MADV_HUGEPAGE,
            )
            library.free(ctypes.c_void_p(block))
            return
        size //= 2


@cache
def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux") or torch.cuda.is_available():
        return None
    library = ctypes.CDLL(None)
    library.malloc.restype = ctypes.c_void_p
    return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None
