"""The two classes of requests."""

from __future__ import annotations

import enum


class Priority(enum.StrEnum):
    """Which class a request belongs to; each gets its share of the engine's time."""

    INTERACTIVE = "interactive"
    BULK = "bulk"
