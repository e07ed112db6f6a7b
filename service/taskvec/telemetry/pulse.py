"""A timer that tells how late the event loop runs."""

from __future__ import annotations

import asyncio
import math
import time

from taskvec.telemetry.metrics import Metrics

EVERY = 0.05
"""Seconds between two beats."""

BEATS = 5
"""Of so many, the latest is reported."""


class Pulse:
    """Beats first thing in every turn of the event loop that lasts, and in time where none does.

    A timer's callback and not a task: a task would come behind those that the same turn begins.
    """

    def __init__(self, metrics: Metrics) -> None:
        """Nothing beats yet; the metrics learn how late the beats are."""
        self._metrics = metrics
        self._due = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._late: list[float] = []

    @property
    def late(self) -> float:
        """Seconds for which the present turn has kept the next beat waiting; 0 if it is not due."""
        return max(0.0, time.monotonic() - self._due)

    def start(self) -> None:
        """Beat in the running loop from now on, and renew the ages that change by themselves."""
        self._due = time.monotonic() + EVERY
        self._timer = asyncio.get_running_loop().call_later(EVERY, self._beat)

    def stop(self) -> None:
        """Beat no more."""
        if self._timer is not None:
            self._timer.cancel()
        self._due = math.inf

    def _beat(self) -> None:
        self._late.append(self.late)
        if len(self._late) == BEATS:
            self._metrics.loop_late(max(self._late))
            self._metrics.let_time_pass()
            self._late.clear()
        self.start()
