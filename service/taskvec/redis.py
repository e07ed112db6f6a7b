"""Calls to a Redis or Valkey that several processes share, bounded in number and in time.

Three things must not be taken for one another: a store that is down, a value that cannot be used,
and a shortage of this process (of connections, open files, or time of the event loop), which only
delays a call.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import structlog
from redis.asyncio import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from taskvec.concurrency import ResponsiveTimeout
from taskvec.errors import QueueFullError, StartError
from taskvec.open_files import FILE_RETRY_SECONDS, out_of_files

T = TypeVar("T")

TIMEOUT_SECONDS = 0.25
"""Timeout of a call. A store that takes longer would slow requests down, and counts as down."""

OPEN_SECONDS = 1.0
"""Seconds for which the circuit breaker stays open after a failure."""

MAX_CONNECTIONS = 16
"""Connections of one process to one store, and so concurrent calls; further calls wait."""

MAX_WAIT_SECONDS = 5.0
"""Maximum wait for a connection, so that a slow store does not fill the process with requests."""

_UNUSABLE_VALUE = re.compile("WRONGTYPE|not an integer|not a valid float")
"""Errors of Redis about one stored value; all its other errors are about the store."""

log = structlog.get_logger(__name__)


class StoreDownError(Exception):
    """The store did not answer, or its circuit breaker is open."""


class StoredValueError(Exception):
    """The store has a value of another form than this service writes; the store itself works."""


class SharedRedis:
    """One Redis or Valkey: connection pool, timeout and circuit breaker."""

    def __init__(self, url: str, option: str, breaker: CircuitBreaker) -> None:
        """Prepare; no connection is opened yet.

        Args:
            url: ``redis://``, ``rediss://``, ``valkey://`` or ``valkeys://``.
            option: the command-line option that holds the URL, for the error message.
            breaker: notified of every call.

        Raises:
            StartError: the URL cannot be used.
        """
        address = re.sub("^valkey", "redis", url)  # the same protocol
        try:
            self.pool = ConnectionPool.from_url(
                address,
                max_connections=MAX_CONNECTIONS,
                socket_timeout=None,  # ``call`` has a timeout that excludes delays of this process
                socket_connect_timeout=None,
                retry=Retry(NoBackoff(), 1),  # the store may have closed an idle connection
            )
        except ValueError:
            variable = f"TASKVEC_{option.removeprefix('--').replace('-', '_').upper()}"
            raise StartError(
                f"{option} ({variable}) must be an address such as redis://host:6379/0."
            ) from None
        self._breaker = breaker
        self._slots = asyncio.Semaphore(MAX_CONNECTIONS)

    async def call(self, send: Callable[[], Awaitable[T]]) -> T:
        """Call the store, after waiting for a connection if all are in use.

        Args:
            send: sends the commands on one connection of ``pool``, and returns their result.

        Raises:
            StoreDownError: the store failed, did not answer in time, or failed a moment ago.
            StoredValueError: a stored value has another form.
            QueueFullError: no connection was free for ``MAX_WAIT_SECONDS``.
        """
        if self._breaker.open:
            raise StoreDownError
        try:
            async with asyncio.timeout(MAX_WAIT_SECONDS):
                await self._slots.acquire()
        except TimeoutError:
            raise QueueFullError(
                "Too many requests wait for the store of the rate limits: send it again later.",
                retry_after=1.0,
            ) from None
        try:
            while not self._breaker.open:  # another call may have failed during the wait
                try:
                    with ResponsiveTimeout(TimeoutError, TIMEOUT_SECONDS):
                        result = await send()
                except ResponseError as error:
                    if _UNUSABLE_VALUE.search(str(error)):
                        raise StoredValueError(str(error)) from None
                    self._breaker.record_failure(error)
                except (RedisError, OSError) as error:  # TimeoutError is an OSError
                    if out_of_files(error):
                        await asyncio.sleep(FILE_RETRY_SECONDS)
                        continue
                    self._breaker.record_failure(error)
                except ValueError as error:
                    raise StoredValueError(str(error)) from None
                else:
                    self._breaker.record_success()
                    return result
        finally:
            self._slots.release()
        raise StoreDownError

    async def close(self) -> None:
        """Close the connections."""
        await self.pool.aclose()


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
