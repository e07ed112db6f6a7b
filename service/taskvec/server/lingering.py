"""Lingering close: read and discard what a client still sends, so that it can read its answer.

If a socket is closed while data is unread, the kernel resets the connection, and the client loses
the answer that it has not read yet. nginx has the term, and the two bounds in time, from its
``lingering_close``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from uvicorn.protocols.http.flow_control import FlowControl

LINGERING_SECONDS = 30.0
"""Maximum time of one connection: 34 MB at 10 Mbit/s."""

INTERVAL, MIN_BYTES_PER_INTERVAL = 2.0, 65_536
"""Seconds in which at least so many bytes must arrive. A client that has sent everything closes its
connection when it has read the answer; one that sends a byte now and then is not waited for."""

BYTES_PER_SECOND = 256 << 20
"""Maximum rate of all lingering connections of a process together. Discarding so much takes a few
hundredths of the event loop's time; a body that is accepted costs much more."""

MAX_LINGERING = 256
"""Maximum number of lingering connections of a process; beyond it the oldest one is closed."""

BYTES_BEYOND_BODY = 32 << 20
"""A connection may send the largest accepted body and this many bytes more, which are discarded."""


class LingeringClose:
    """Discards what arrives on one connection, within bounds."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        flow: FlowControl,
        max_bytes: int,
        end: Callable[[], None],
    ) -> None:
        """Start reading.

        Args:
            loop: of the connection.
            flow: pauses and resumes reading.
            max_bytes: maximum number of bytes that are discarded.
            end: closes the connection; called once a bound is reached.
        """
        self._loop = loop
        self._flow = flow
        self._remaining = max_bytes
        self._end = end
        self._recent = 0
        self._ends_at = loop.time() + LINGERING_SECONDS
        self._resume: asyncio.TimerHandle | None = None
        self._check = loop.call_later(INTERVAL, self._check_progress)
        flow.resume_reading()

    def discard(self, size: int, connections: int) -> None:
        """Count bytes that arrived, and read on when this connection's share of the rate allows.

        Args:
            size: number of bytes.
            connections: number of lingering connections of the process.
        """
        self._remaining -= size
        self._recent += size
        if self._remaining < 0:
            self._end()
            return
        # libuv would read up to 32 times in one iteration of the event loop.
        self._flow.pause_reading()
        seconds = size * connections / BYTES_PER_SECOND
        self._resume = self._loop.call_later(seconds, self._flow.resume_reading)

    def stop(self) -> None:
        """Stop the timers: the connection is closed."""
        self._check.cancel()
        if self._resume is not None:
            self._resume.cancel()

    def _check_progress(self) -> None:
        if self._recent < MIN_BYTES_PER_INTERVAL or self._loop.time() >= self._ends_at:
            self._end()
            return
        self._recent = 0
        self._check = self._loop.call_later(INTERVAL, self._check_progress)
