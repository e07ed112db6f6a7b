"""Sliding windows in a Redis or Valkey, in which all processes count together."""

from __future__ import annotations

import structlog
from limits import RateLimitItemPerMinute
from limits.aio.storage import RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from taskvec.auth.rate_limit import Usage
from taskvec.redis import CircuitBreaker, SharedRedis, StoreDownError, StoredValueError

log = structlog.get_logger(__name__)


class SharedWindows:
    """Counts amounts in Redis, by the ``limits`` library."""

    def __init__(self, url: str, *, open_when_down: bool) -> None:
        """Prepare; no connection is opened yet.

        Args:
            url: ``redis://``, ``rediss://``, ``valkey://`` or ``valkeys://``.
            open_when_down: for the log line when Redis goes down.

        Raises:
            StartError: the URL cannot be used.
        """
        breaker = CircuitBreaker("limits", open=open_when_down)
        self._redis = SharedRedis(url, "--limits-url", breaker)
        self._storage = RedisStorage(
            "async+redis://",
            implementation="redispy",
            connection_pool=self._redis.pool,  # type: ignore[arg-type] # passed to redis-py
        )
        self._limiter = SlidingWindowCounterRateLimiter(self._storage)
        self._unusable: set[tuple[str, str]] = set()

    async def take(
        self, identity: tuple[str, str], limit: int, amount: int
    ) -> tuple[bool, Usage] | None:
        """Count an amount if it fits.

        Returns:
            Whether it did, and the usage after that; None if Redis is down, or has something else
            than a count for this identity.
        """

        async def send() -> tuple[bool, tuple[int, float, int, float]]:
            taken = await self._limiter.hit(item, *identity, cost=amount)
            return taken, await self._storage.get_sliding_window(name, item.get_expiry())

        item = RateLimitItemPerMinute(limit, namespace="taskvec")
        name = item.key_for(*identity)
        try:
            taken, counts = await self._redis.call(send)
        except StoreDownError:
            return None
        except StoredValueError:
            if identity not in self._unusable:  # one line, not one for each request
                self._unusable.add(identity)
                log.error(  # noqa: TRY400 - its text may contain what others stored
                    "limit_unusable",
                    key=identity[0],
                    kind=identity[1],
                    reason=f"Redis has something else than a count: delete its keys *{name}*",
                )
            return None
        self._unusable.discard(identity)
        return taken, Usage.from_storage(*counts)

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.close()
