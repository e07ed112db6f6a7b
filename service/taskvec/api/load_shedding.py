"""Load shedding: refuse embedding requests under overload, before their bodies are read.

This is the early check; the limits on tokens and requests are in ``core.admission``.
"""

from __future__ import annotations

import asyncio
import math
import time

from starlette.types import Scope

from taskvec.api.request import header_dict, request_priority
from taskvec.auth.keys import Key
from taskvec.core.admission import Admission
from taskvec.core.health import ServiceHealth
from taskvec.errors import InvalidRequestError, QueueFullError
from taskvec.metrics.registry import Metrics

MAX_LAG = 0.1
"""Seconds of event-loop lag above which requests are refused. Requests that a slow iteration has
not read yet are then refused cheaply, so it ends soon and admitted requests continue."""

INTERVAL = 0.05
"""Seconds between two lag measurements."""

INTERVALS_PER_REPORT = 5
"""Measurements per report; the largest one is reported."""


class EventLoopLag:
    """Timer callback that measures how late the event loop runs.

    asyncio runs due timers before the tasks of an iteration, so a slow iteration is seen at its
    start; a task would be scheduled behind the tasks that the same iteration starts.
    """

    def __init__(self, metrics: Metrics) -> None:
        """Prepare; ``start`` begins measuring.

        Args:
            metrics: gets the lag every 0.25 s, and is asked to update its queue age.
        """
        self._metrics = metrics
        self._due = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._lags: list[float] = []

    @property
    def seconds(self) -> float:
        """Seconds by which the next measurement is overdue; 0 if it is not due yet."""
        return max(0.0, time.monotonic() - self._due)

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
        self._lags.append(self.seconds)
        if len(self._lags) == INTERVALS_PER_REPORT:
            self._metrics.loop_late(max(self._lags))
            self._metrics.update_queue_age()
            self._lags.clear()
        self.start()


class LoadShedder:
    """Refuses embedding requests when the queue is full or the event loop is late."""

    def __init__(self, health: ServiceHealth, admission: Admission, lag: EventLoopLag) -> None:
        """Take the sources of overload signals."""
        self._health = health
        self._admission = admission
        self._lag = lag

    def check(self, scope: Scope, key: Key | None) -> None:
        """Pass a request, or refuse it at once.

        Args:
            scope: ASGI scope of the request.
            key: its API key; decides the priority class of a request that names none.

        Raises:
            QueueFullError: the queue of its class is full, or the event loop is late.
            UnavailableError: under overload, the service is draining or the engine cannot embed;
                otherwise ``ServiceHealth.work`` refuses these.
        """
        lag = self._lag.seconds
        if self._admission.accepting and lag <= MAX_LAG:
            return
        self._health.require_open()
        if lag > MAX_LAG:
            raise QueueFullError(
                f"This process receives more requests than it can read and is {lag:.1f} seconds "
                "behind: send the request again later.",
                retry_after=1.0,
            )
        try:
            priority = request_priority(header_dict(scope), key)
        except InvalidRequestError:
            return  # the handler reports the invalid header
        self._admission.require_room(priority)
