"""Calls to a shared store: the wait for a connection is bounded, and is no outage."""

from __future__ import annotations

import asyncio

import pytest

from taskvec.errors import QueueFullError
from taskvec.redis import MAX_CONNECTIONS, CircuitBreaker, SharedRedis


@pytest.mark.anyio
async def test_the_wait_for_a_connection_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all connections in use a call is refused with 429, and the store is not down."""
    monkeypatch.setattr("taskvec.redis.MAX_WAIT_SECONDS", 0.05)
    breaker = CircuitBreaker("store")
    shared = SharedRedis("redis://127.0.0.1:1/0", "--limits-url", breaker)
    released = asyncio.Event()

    async def send() -> int:
        await released.wait()
        return 1

    running = [asyncio.create_task(shared.call(send)) for _ in range(MAX_CONNECTIONS)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError):
        await shared.call(send)
    assert not breaker.open
    released.set()
    assert await asyncio.gather(*running) == [1] * MAX_CONNECTIONS
    assert await shared.call(send) == 1
    await shared.close()
