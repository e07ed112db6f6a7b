"""Load shedding: refuse embedding requests under overload, before their bodies are read.

This is the early check; the limits on tokens and requests are in ``core.admission``.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping

from starlette.types import Scope

from taskvec.api.request import header_dict, request_priority
from taskvec.auth.keys import Key
from taskvec.core.admission import Admission
from taskvec.core.health import ServiceHealth
from taskvec.core.memory_pressure import LARGE_BODY_BYTES, MemoryPressure
from taskvec.errors import InvalidRequestError, QueueFullError
from taskvec.metrics.registry import Metrics
from taskvec.priority import Priority

MAX_LAG = 0.15
"""Seconds of event-loop lag above which requests are refused. Requests that a slow iteration has
not read yet are then refused cheaply, so it ends soon and admitted requests continue."""

INTERVAL = 0.01
"""Seconds between two lag measurements: a turn of the event loop is at most so much longer than the
lag that it causes. Each takes three microseconds."""

INTERVALS_PER_REPORT = 25
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
        self._longest = 0.0
        self._measured = 0

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
        self._longest = max(self._longest, self.seconds)
        self._measured += 1
        if self._measured == INTERVALS_PER_REPORT:
            self._metrics.loop_late(self._longest)
            self._metrics.update_queue_age()
            self._longest, self._measured = 0.0, 0
        self.start()


class LoadShedder:
    """Refuses embedding requests when queue or memory is full, or the event loop is late."""

    def __init__(
        self,
        health: ServiceHealth,
        admission: Admission,
        lag: EventLoopLag,
        pressure: MemoryPressure,
    ) -> None:
        """Take the sources of overload signals."""
        self._health = health
        self._admission = admission
        self._lag = lag
        self._pressure = pressure

    def check(self, scope: Scope, key: Key | None) -> None:
        """Pass a request, or refuse it at once.

        Args:
            scope: ASGI scope of the request.
            key: its API key; decides the priority class of a request that names none.

        Raises:
            QueueFullError: the queue of its class is full, memory is short, or the event loop is
                late.
            UnavailableError: under overload, the service is draining or the engine cannot embed;
                otherwise ``ServiceHealth.work`` refuses these.
        """
        lag = self._lag.seconds
        pressure = self._pressure.level
        if self._admission.accepting and lag <= MAX_LAG and not pressure:
            return
        self._health.require_open()
        if lag > MAX_LAG:
            raise QueueFullError(
                f"This process receives more requests than it can read and is {lag:.1f} seconds "
                "behind: send the request again later.",
                retry_after=1.0,
            )
        headers = header_dict(scope)
        try:
            priority = request_priority(headers, key)
        except InvalidRequestError:
            return  # the handler reports the invalid header
        self._pressure.require_embedding(bulk=priority is Priority.BULK or _is_large(headers))
        self._admission.require_room(priority)


def _is_large(headers: Mapping[str, str]) -> bool:
    """Return whether a body may have more than ``LARGE_BODY_BYTES``."""
    length = headers.get("content-length", "")
    return (
        not length.isdecimal()
        or len(length) > len(str(LARGE_BODY_BYTES))
        or (int(length) > LARGE_BODY_BYTES)
    )
