"""Vector store in Redis or Valkey, shared by several processes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar, cast

from redis.asyncio import Redis

from taskvec.cache.embeddings import CacheObserver
from taskvec.errors import QueueFullError
from taskvec.redis import CircuitBreaker, SharedRedis, StoreDownError, StoredValueError

T = TypeVar("T")

PREFIX = b"taskvec:vector:"

KEYS_PER_CALL = 256
"""Vectors in one call: one megabyte at 1,024 dimensions."""

MAX_WRITES = 32
"""Concurrent writes to Redis. Further writes are skipped, so that a slow Redis holds no memory."""


class RedisStore:
    """Store in Redis or Valkey; Redis' own maxmemory setting limits its size."""

    def __init__(self, url: str, ttl_seconds: int, observer: CacheObserver) -> None:
        """Prepare a store; no connection is opened yet.

        Args:
            url: address of the Redis or Valkey server.
            ttl_seconds: time to live of an entry.
            observer: notified of failures.

        Raises:
            StartError: the URL cannot be used.
        """
        self._breaker = CircuitBreaker("answer_cache")
        self._shared = SharedRedis(url, "--answer-cache-url", self._breaker)
        self._redis = Redis(connection_pool=self._shared.pool)
        self._ttl_seconds = ttl_seconds
        self._observer = observer
        self._writes: set[asyncio.Task[None]] = set()

    async def get(self, keys: Sequence[bytes]) -> Sequence[bytes | None]:
        """See ``VectorStore``."""
        if self._breaker.open:
            return [None] * len(keys)
        found: list[bytes | None] = []
        for start in range(0, len(keys), KEYS_PER_CALL):
            names = [PREFIX + key for key in keys[start : start + KEYS_PER_CALL]]
            values = await self._call(partial(self._read, names))
            found += [None] * len(names) if values is None else values
        return found

    def put(
        self,
        entries: Mapping[bytes, bytes],
        since: float | None = None,  # noqa: ARG002 - every entry is stored
    ) -> None:
        """See ``VectorStore``."""
        if self._breaker.open or len(self._writes) >= MAX_WRITES:
            self._observer.cache_failed()
            return
        task = asyncio.create_task(self._write(list(entries.items())))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def close(self) -> None:
        """See ``VectorStore``."""
        await asyncio.gather(*self._writes)
        await self._shared.close()

    def _read(self, names: Sequence[bytes]) -> Awaitable[list[bytes | None]]:
        return cast("Awaitable[list[bytes | None]]", self._redis.mget(names))

    async def _write(self, entries: Sequence[tuple[bytes, bytes]]) -> None:
        for start in range(0, len(entries), KEYS_PER_CALL):
            part = entries[start : start + KEYS_PER_CALL]
            if await self._call(partial(self._set, part)) is None:
                return

    def _set(self, entries: Sequence[tuple[bytes, bytes]]) -> Awaitable[list[bool]]:
        pipe = self._redis.pipeline(transaction=False)
        for key, value in entries:
            pipe.set(PREFIX + key, value, ex=self._ttl_seconds)
        return pipe.execute()

    async def _call(self, send: Callable[[], Awaitable[list[T]]]) -> list[T] | None:
        """Return the result of a call; None if it failed or took too long."""
        try:
            return await self._shared.call(send)
        except (StoreDownError, StoredValueError, QueueFullError):
            self._observer.cache_failed()
            return None
