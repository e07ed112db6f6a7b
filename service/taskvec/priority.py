"""Priority classes of requests."""

from __future__ import annotations

import enum


class Priority(enum.StrEnum):
    """Priority class of a request; the scheduler gives each class a share of the engine's time."""

    INTERACTIVE = "interactive"
    BULK = "bulk"


WEIGHTS = {Priority.INTERACTIVE: 4.0, Priority.BULK: 1.0}
"""Relative shares of the classes in the engine's time, and in the tokenizer's, while both have
requests that wait."""
