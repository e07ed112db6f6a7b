"""Priority classes of requests."""

from __future__ import annotations

import enum


class Priority(enum.StrEnum):
    """Priority class of a request; the scheduler gives each class a share of the engine's time."""

    INTERACTIVE = "interactive"
    BULK = "bulk"
