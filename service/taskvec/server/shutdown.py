"""A signal first empties the service; only then does the server hear of it."""

from __future__ import annotations

import asyncio
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import structlog
import uvicorn

from taskvec.core.health import ServiceHealth

log = structlog.get_logger(__name__)

LOOK_EVERY = 0.02
"""Seconds between two looks at what is still being worked on."""


NUMBERS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def graceful_shutdown(health: ServiceHealth, grace: float, limit: float) -> Iterator[None]:
    """Stand before the server's own handlers of SIGTERM and SIGINT; where it has none, do nothing.

    On the first signal the service is not ready any more; after ``grace`` it refuses requests; when
    all that it had admitted is answered, or ``limit`` has passed, the server is told, and given
    what is left of ``limit``, or a second, for the answers to be read. The same signal again ends
    everything at once.

    Args:
        health: told to leave, then to refuse.
        grace: seconds in which load balancers may notice; SIGINT comes from a person, and has none.
        limit: seconds after the grace.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or not callable(signal.getsignal(signal.SIGTERM)):
        yield
        return
    drain = _Drain(health, grace, limit)
    for number in NUMBERS:
        signal.signal(number, drain.on_signal)
    try:
        yield
    finally:
        for number, handler in drain.server.items():
            signal.signal(number, handler)


class _Drain:
    """What happens from the first signal on.

    Attributes:
        server: the handlers that were there before.
    """

    def __init__(self, health: ServiceHealth, grace: float, limit: float) -> None:
        self.server: dict[signal.Signals, Any] = {
            number: signal.getsignal(number) for number in NUMBERS
        }
        self._health = health
        self._grace = grace
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._seen: set[int] = set()
        self._task: asyncio.Task[None] | None = None

    def on_signal(self, number: int, _: FrameType | None) -> None:
        """Called between any two instructions of the main thread: leave it to the loop."""
        self._loop.call_soon_threadsafe(self._hear, signal.Signals(number))

    def _hear(self, number: signal.Signals) -> None:
        if number in self._seen:
            self._tell_server(signal.SIGINT)  # the first one makes uvicorn stop
            self._tell_server(signal.SIGINT)  # the second one makes it stop at once
        elif self._task is None:
            self._task = self._loop.create_task(self._empty(number))
        self._seen.add(number)

    async def _empty(self, number: signal.Signals) -> None:
        health = self._health
        log.info("draining", signal=number.name, working=health.work.count)
        health.leave()
        if number == signal.SIGTERM:
            await asyncio.sleep(self._grace)
        health.refuse()
        until = time.monotonic() + self._limit
        while health.work.count and time.monotonic() < until:  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(LOOK_EVERY)
        log.info("drained", unfinished=health.work.count)
        # uvicorn has a limit of its own, which it would begin to count only now.
        server = getattr(self.server[number], "__self__", None)
        if isinstance(server, uvicorn.Server):
            left = max(1, math.ceil(until - time.monotonic()))
            server.config.timeout_graceful_shutdown = left
        self._tell_server(number)

    def _tell_server(self, number: signal.Signals) -> None:
        if callable(self.server[number]):
            self.server[number](number, None)
