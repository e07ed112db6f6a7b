"""A Redis or Valkey that several processes share: how it is reached, and what happens without."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

import structlog

from taskvec.errors import StartError

if TYPE_CHECKING:
    from redis.asyncio import ConnectionPool

ANSWER_SECONDS = 0.25
"""How long a store may take before it counts as down."""

PAUSE = 1.0
"""Seconds for which a store that is down is not asked again."""

log = structlog.get_logger(__name__)


def connection_pool(url: str, option: str) -> ConnectionPool:
    """Connections to a store; none is opened yet.

    Args:
        url: ``redis://``, ``rediss://``, ``valkey://`` or ``valkeys://``.
        option: the command line's, for the error.

    Raises:
        StartError: the URL cannot be used.
    """
    from redis.asyncio import ConnectionPool  # noqa: PLC0415 - slow to load, and few need it
    from redis.asyncio.retry import Retry  # noqa: PLC0415
    from redis.backoff import NoBackoff  # noqa: PLC0415

    address = re.sub("^valkey", "redis", url)  # the same protocol
    try:
        return ConnectionPool.from_url(
            address,
            socket_timeout=ANSWER_SECONDS,
            socket_connect_timeout=ANSWER_SECONDS,
            retry=Retry(NoBackoff(), 1),  # a connection that the store closed meanwhile
        )
    except ValueError:
        variable = f"TASKVEC_{option.removeprefix('--').replace('-', '_').upper()}"
        raise StartError(
            f"{option} ({variable}) is no address such as redis://host:6379/0."
        ) from None


class CircuitBreaker:
    """Whether a store is down: it is then left alone for a while, and the log says so once."""

    def __init__(self, what: str, **told: Any) -> None:
        """Nothing is down.

        Args:
            what: begins the names of the log's events.
            told: further fields of the event when it is down.
        """
        self._events = f"{what}_down", f"{what}_back"
        self._told = told
        self._ask_again = 0.0
        self._down = False

    @property
    def pausing(self) -> bool:
        """True while the store had better not be asked."""
        return time.monotonic() < self._ask_again

    def failed(self, error: Exception) -> None:
        """The store did not answer."""
        self._ask_again = time.monotonic() + PAUSE
        if not self._down:
            self._down = True
            # The error's text may hold the address, and that a password.
            log.error(self._events[0], reason=type(error).__name__, **self._told)

    def over(self) -> None:
        """The store has answered."""
        if self._down:
            self._down = False
            log.info(self._events[1])
