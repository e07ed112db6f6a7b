"""Values of gauges that show the longest time of the last minute."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

RECENT_SECONDS = 60.0
"""Window of the gauges with a longest time: every scraper sees it, as scrapes are closer."""

_RECENT_PARTS = 12
"""Parts of the window that end one by one."""


class RecentMaximum:
    """The largest value of about the last minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start without values; ``clock`` returns seconds."""
        self._clock = clock
        self._parts: deque[tuple[int, float]] = deque(maxlen=_RECENT_PARTS)

    def add(self, value: float) -> float:
        """Add a value, and return the largest one."""
        part = int(self._clock() / RECENT_SECONDS * _RECENT_PARTS)
        if self._parts and self._parts[-1][0] == part:
            self._parts[-1] = part, max(value, self._parts[-1][1])
        else:
            self._parts.append((part, value))
        return max(largest for at, largest in self._parts if at > part - _RECENT_PARTS)
