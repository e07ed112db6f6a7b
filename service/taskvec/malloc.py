"""How the C library keeps memory that was freed; without glibc nothing here does anything."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from typing import Any

MMAP_THRESHOLD = 32 << 20
TRIM_THRESHOLD = 64 << 20
"""Bytes: what glibc itself comes to, at most, in a process that frees large blocks."""

ARENAS = 2
"""Heaps that threads share; by default eight a core, each with what its own peak has left."""

Choices = Mapping[str, tuple[int, int]]
"""What the environment calls a parameter of malloc -> its number in malloc.h, and a value."""

SERVING: Choices = {
    "MALLOC_TRIM_THRESHOLD_": (-1, TRIM_THRESHOLD),
    "MALLOC_MMAP_THRESHOLD_": (-3, MMAP_THRESHOLD),
    "MALLOC_ARENA_MAX": (-8, ARENAS),
}
"""Keep what answers need. By default an answer of some hundred kilobytes takes its memory from the
system, and gives it back, at every copy: that takes five times as long as to write its JSON."""

TRAINING: Choices = {
    "MALLOC_TRIM_THRESHOLD_": (-1, -1),
    "MALLOC_MMAP_MAX_": (-4, 0),
}
"""Keep everything. By default each step takes gigabytes from the system, page by page, and gives
them back."""


def tune_malloc(choices: Choices) -> None:
    """Keep freed blocks for the next time, instead of giving them back to the system.

    What the environment says of malloc goes before. Call it before there are threads.
    """
    mallopt = _of_c("mallopt")
    if mallopt is None:
        return
    for name, (number, value) in choices.items():
        if name not in os.environ:
            mallopt(number, value)


def trim_malloc() -> None:
    """Give free pages back to the system; what was freed in pieces is otherwise kept for ever.

    Takes some milliseconds for some hundred megabytes.
    """
    trim = _of_c("malloc_trim")
    if trim is not None:
        trim(0)


def _of_c(name: str) -> Any:
    """The C library's function; None where it has none."""
    return getattr(ctypes.CDLL(None), name, None)
