"""Vectors kept in Redis or Valkey, for all processes that ask it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from typing import TypeVar, cast

from redis.asyncio import Redis
from redis.exceptions import RedisError

from taskvec.cache.embeddings import CacheObserver
from taskvec.redis import ANSWER_SECONDS, CircuitBreaker, connection_pool

T = TypeVar("T")

PREFIX = b"taskvec:vector:"

KEYS_A_CALL = 256
"""Vectors in one call: a megabyte at 1,024 dimensions."""

MOST_WRITES = 32
"""Writes to Redis under way; what comes on top is not kept."""


class RedisStore:
    """In Redis or Valkey, for all processes that ask it; its own maxmemory bounds it."""

    def __init__(self, url: str, seconds: int, observer: CacheObserver) -> None:
        """Prepare; no connection is opened yet.

        Args:
            url: where it is.
            seconds: how long an entry is kept.
            observer: told of failures.

        Raises:
            StartError: the URL cannot be used.
        """
        self._pool = connection_pool(url, "--answer-cache-url")
        self._redis = Redis(connection_pool=self._pool)
        self._seconds = seconds
        self._observer = observer
        self._outage = CircuitBreaker("answer_cache")
        self._writes: set[asyncio.Task[None]] = set()

    async def get(self, keys: Sequence[bytes]) -> Sequence[bytes | None]:
        """See ``VectorStore``."""
        if self._outage.pausing:
            return [None] * len(keys)
        found: list[bytes | None] = []
        for start in range(0, len(keys), KEYS_A_CALL):
            names = [PREFIX + key for key in keys[start : start + KEYS_A_CALL]]
            asked = cast("Awaitable[list[bytes | None]]", self._redis.mget(names))
            answer = await self._ask(asked)
            found += [None] * len(names) if answer is None else answer
        return found

    def put(self, entries: Mapping[bytes, bytes]) -> None:
        """See ``VectorStore``."""
        if self._outage.pausing or len(self._writes) >= MOST_WRITES:
            self._observer.cache_failed()
            return
        writing = asyncio.create_task(self._write(list(entries.items())))
        self._writes.add(writing)
        writing.add_done_callback(self._writes.discard)

    async def close(self) -> None:
        """See ``VectorStore``."""
        await asyncio.gather(*self._writes)
        await self._pool.aclose()

    async def _write(self, entries: Sequence[tuple[bytes, bytes]]) -> None:
        for start in range(0, len(entries), KEYS_A_CALL):
            pipe = self._redis.pipeline(transaction=False)
            for key, value in entries[start : start + KEYS_A_CALL]:
                pipe.set(PREFIX + key, value, ex=self._seconds)
            if await self._ask(pipe.execute()) is None:
                return

    async def _ask(self, call: Awaitable[list[T]]) -> list[T] | None:
        """What Redis answers; None where it does not."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                answer = await call
        except (RedisError, OSError, TimeoutError) as error:
            self._outage.failed(error)
            self._observer.cache_failed()
            return None
        self._outage.over()
        return answer
