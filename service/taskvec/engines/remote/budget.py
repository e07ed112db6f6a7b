"""How many calls may be sent again: enough for a server that dies, too few for a storm."""

from __future__ import annotations

SHARE = 0.2
"""Retries earned by each call."""

RESERVE = 1000.0
"""Most retries in hand, as many as calls may be in flight to a server that dies."""


class RetryBudget:
    """Each call earns a fifth of a retry; starts full."""

    def __init__(self) -> None:
        self._left = RESERVE

    def earn(self) -> None:
        """A call is about to be sent for the first time."""
        self._left = min(RESERVE, self._left + SHARE)

    def spend(self) -> bool:
        """True where one more retry may be sent."""
        if self._left < 1:
            return False
        self._left -= 1
        return True
