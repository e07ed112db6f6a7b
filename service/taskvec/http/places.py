"""Room for client connections: how many, what each may take, and who leaves when it is short."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

import structlog

WARN_EVERY = 10.0
"""Seconds between two warnings that connections are closed to make room."""

log = structlog.get_logger(__name__)


class ConnectionLimits(NamedTuple):
    """The limits of a process's connections.

    Attributes:
        header_seconds: a request's head takes no longer, from its first byte or the connection's.
        header_bytes: most bytes of a request's head, and of a body's trailers.
        answer_seconds: an answer that the client has not read by then is dropped.
        connections: most at a time.
    """

    header_seconds: float
    header_bytes: int
    answer_seconds: float
    connections: int


class Waiting(Protocol):
    """A connection that has no request in work."""

    def close(self) -> None:
        """Close it; its place is free at once."""


class Places:
    """The places of one process, and the connections that wait in them, longest first."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self._waiting: dict[Waiting, None] = {}
        self._warned = -WARN_EVERY

    def begins_to_wait(self, connection: Waiting) -> None:
        """Put it behind all others that wait."""
        self._waiting.pop(connection, None)
        self._waiting[connection] = None

    def waits_no_more(self, connection: Waiting) -> None:
        """Its request is in work, or it is gone."""
        self._waiting.pop(connection, None)

    def make_room(self) -> bool:
        """Close the one that has waited longest, whether idle or in the middle of sending.

        Under attack those are the attacker's: who sends whole requests has just begun to wait.
        False where all have a request in work.
        """
        now = time.monotonic()
        if now - self._warned >= WARN_EVERY:
            self._warned = now
            log.warning("too_many_connections", limit=self.limits.connections)
        if not self._waiting:
            return False
        next(iter(self._waiting)).close()
        return True


class Timer:
    """Acts once, so many seconds after it is started, unless it is stopped."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, seconds: float, action: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._seconds = seconds
        self._action = action
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Start it; one that runs goes on."""
        if self._handle is None:
            self._handle = self._loop.call_later(self._seconds, self._action)

    def stop(self) -> None:
        """Stop it; it can be started again."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
