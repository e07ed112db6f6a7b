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
    """Beats once in every turn of the event loop that lasts, and in time where none does."""

    def __init__(self, metrics: Metrics) -> None:
        """Nothing beats yet; the metrics learn how late the beats are."""
        self._metrics = metrics
        self._due = math.inf

    @property
    def late(self) -> float:
        """Seconds for which the present turn has kept the next beat waiting; 0 if it is not due."""
        return max(0.0, time.monotonic() - self._due)

    async def keep(self) -> None:
        """Beat, and renew the ages that change by themselves, until cancelled."""
        try:
            while True:
                latest = 0.0
                for _ in range(BEATS):
                    self._due = time.monotonic() + EVERY
                    await asyncio.sleep(EVERY)
                    latest = max(latest, self.late)
                self._metrics.loop_late(latest)
                self._metrics.let_time_pass()
        finally:
            self._due = math.inf
