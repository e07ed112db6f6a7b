"""Tune glibc's malloc so that freed memory is reused; no effect with another C library.

The parameters are described in mallopt(3).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from typing import Any

MMAP_THRESHOLD = 32 << 20
"""Bytes from which a block is mapped by itself; the maximum of glibc's own dynamic threshold."""

TRIM_THRESHOLD = 64 << 20
"""Bytes of free memory at the top of the heap from which it is returned to the system; twice
``MMAP_THRESHOLD``, as in glibc's own rule."""

ARENAS = 2
"""Heaps that the threads share. By default there are eight per core, and each retains the memory of
its own peak."""

Parameters = Mapping[str, tuple[int, int]]
"""Environment variable of a malloc parameter -> its number in malloc.h, and a value."""

SERVING: Parameters = {
    "MALLOC_TRIM_THRESHOLD_": (-1, TRIM_THRESHOLD),
    "MALLOC_MMAP_THRESHOLD_": (-3, MMAP_THRESHOLD),
    "MALLOC_ARENA_MAX": (-8, ARENAS),
}
"""Retain the memory of responses. By default each copy of a response of a few hundred kilobytes
maps new pages and unmaps them again, which takes five times as long as encoding its JSON."""

TRAINING: Parameters = {
    "MALLOC_TRIM_THRESHOLD_": (-1, -1),
    "MALLOC_MMAP_MAX_": (-4, 0),
}
"""Retain all memory. By default each training step maps gigabytes, page by page, and unmaps them
again."""


def tune_malloc(parameters: Parameters) -> None:
    """Set malloc parameters, except those that the environment sets.

    Call it before the process has threads.
    """
    mallopt = _libc_function("mallopt")
    if mallopt is None:
        return
    for variable, (number, value) in parameters.items():
        if variable not in os.environ:
            mallopt(number, value)


def trim_malloc() -> None:
    """Return all free pages to the system; small free blocks are otherwise retained forever.

    Takes a few milliseconds for a few hundred megabytes.
    """
    malloc_trim = _libc_function("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def free_heap_bytes() -> int:
    """Return the bytes that malloc has from the system and can give out again; 0 if not known.

    Takes some tenths of a millisecond: the free blocks are counted.
    """
    mallinfo = _libc_function("mallinfo2")
    if mallinfo is None:
        return 0
    mallinfo.restype = _MallocInfo
    return int(mallinfo().fordblks)


class _MallocInfo(ctypes.Structure):
    """struct mallinfo2 of malloc.h."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    )


def _libc_function(name: str) -> Any:
    """Return a function of the C library; None if it does not have one of this name."""
    return getattr(ctypes.CDLL(None), name, None)
