"""Measures how late the event loop runs: something blocks it, or it has too much to do."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

INTERVAL = 0.01
"""Seconds between two lag measurements: a turn of the event loop is at most so much longer than the
lag that it causes. Each takes three microseconds."""

INTERVALS_PER_REPORT = 25
"""Measurements per report; the largest one is reported."""

LATE = 0.15
"""Seconds of lag above which a measurement counts as late."""


class EventLoopLag:
    """Timer callback that measures how late the event loop runs.

    asyncio runs due timers before the tasks of an iteration, so a slow iteration is seen at its
    start; a task would be scheduled behind the tasks that the same iteration starts.
    """

    def __init__(self, report: Callable[[float], None]) -> None:
        """Prepare; ``start`` begins measuring.

        Args:
            report: called every 0.25 s with the largest lag since the last report, in seconds.
        """
        self._report = report
        self._due = math.inf
        self._late_since: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._longest = 0.0
        self._measured = 0

    @property
    def seconds(self) -> float:
        """Seconds by which the next measurement is overdue; 0 if it is not due yet."""
        return max(0.0, time.monotonic() - self._due)

    @property
    def standing_delay(self) -> float:
        """Seconds for which every measurement has been late; 0 if the next one is not late yet.

        The least delay over a time shows a queue that does not empty, as in CoDel (RFC 8289); a
        single late measurement shows a burst.
        """
        now = time.monotonic()
        if now - self._due <= LATE:
            return 0.0
        return now - (self._due if self._late_since is None else self._late_since)

    def start(self) -> None:
        """Measure in the running loop until ``stop``."""
        self._due = time.monotonic() + INTERVAL
        self._timer = asyncio.get_running_loop().call_later(INTERVAL, self._measure)

    def stop(self) -> None:
        """Stop measuring."""
        if self._timer is not None:
            self._timer.cancel()
        self._due = math.inf

    def _measure(self) -> None:
        lag = self.seconds
        self._longest = max(self._longest, lag)
        if lag <= LATE:
            self._late_since = None
        elif self._late_since is None:
            self._late_since = self._due
        self.start()  # first: an error of the report must not end the measurement
        self._measured += 1
        if self._measured == INTERVALS_PER_REPORT:
            longest, self._longest, self._measured = self._longest, 0.0, 0
            self._report(longest)
