"""Connection pool and circuit breaker for a Redis or Valkey that several processes share."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

import structlog

from taskvec.errors import StartError

if TYPE_CHECKING:
    from redis.asyncio import ConnectionPool

TIMEOUT_SECONDS = 0.25
"""Timeout of a call. A store that takes longer would slow requests down, and counts as down."""

OPEN_SECONDS = 1.0
"""Seconds for which the circuit breaker stays open after a failure."""

log = structlog.get_logger(__name__)


def connection_pool(url: str, option: str) -> ConnectionPool:
    """Return a connection pool; no connection is opened yet.

    Args:
        url: ``redis://``, ``rediss://``, ``valkey://`` or ``valkeys://``.
        option: the command-line option that holds the URL, for the error message.

    Raises:
        StartError: the URL cannot be used.
    """
    from redis.asyncio import ConnectionPool  # noqa: PLC0415 - slow to import, rarely used
    from redis.asyncio.retry import Retry  # noqa: PLC0415
    from redis.backoff import NoBackoff  # noqa: PLC0415

    address = re.sub("^valkey", "redis", url)  # the same protocol
    try:
        return ConnectionPool.from_url(
            address,
            socket_timeout=TIMEOUT_SECONDS,
            socket_connect_timeout=TIMEOUT_SECONDS,
            retry=Retry(NoBackoff(), 1),  # the store may have closed an idle connection
        )
    except ValueError:
        variable = f"TASKVEC_{option.removeprefix('--').replace('-', '_').upper()}"
        raise StartError(
            f"{option} ({variable}) must be an address such as redis://host:6379/0."
        ) from None


class CircuitBreaker:
    """Circuit breaker of a store: open for a while after a failure, so that no call waits for it.

    Logs one event when the store goes down and one when it is back.
    """

    def __init__(self, name: str, **fields: Any) -> None:
        """Create a closed circuit breaker.

        Args:
            name: the log events are ``{name}_down`` and ``{name}_back``.
            fields: further fields of the ``{name}_down`` event.
        """
        self._events = f"{name}_down", f"{name}_back"
        self._fields = fields
        self._open_until = 0.0
        self._down = False

    @property
    def open(self) -> bool:
        """True while the store must not be called."""
        return time.monotonic() < self._open_until

    def record_failure(self, error: Exception) -> None:
        """Open the circuit breaker after a failed call."""
        self._open_until = time.monotonic() + OPEN_SECONDS
        if not self._down:
            self._down = True
            # Only the type: the error's text may contain the URL, and the URL a password.
            log.error(self._events[0], reason=type(error).__name__, **self._fields)

    def record_success(self) -> None:
        """Close the circuit breaker after a successful call."""
        if self._down:
            self._down = False
            log.info(self._events[1])
