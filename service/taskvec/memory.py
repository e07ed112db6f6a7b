"""How the C library keeps memory that was freed; without glibc nothing here does anything."""

from __future__ import annotations

import ctypes
import os
from typing import Any

MMAP_THRESHOLD = 32 << 20
TRIM_THRESHOLD = 64 << 20
"""Bytes: what glibc itself comes to, at most, in a process that frees large blocks."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> None:
    """Keep freed blocks for the next request, up to ``TRIM_THRESHOLD``.

    By default an answer of some hundred kilobytes takes its memory from the system, and gives it
    back, at every copy: that takes five times as long as to write its JSON. What the environment
    says of malloc's thresholds goes before.
    """
    said = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys()
    mallopt = _of_c("mallopt")
    if mallopt is not None and not said:
        mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, TRIM_THRESHOLD)


def return_memory() -> None:
    """Give free pages back to the system; what was freed in pieces is otherwise kept for ever.

    Takes some milliseconds for some hundred megabytes.
    """
    trim = _of_c("malloc_trim")
    if trim is not None:
        trim(0)


def _of_c(name: str) -> Any:
    """The C library's function; None where it has none."""
    return getattr(ctypes.CDLL(None), name, None)
