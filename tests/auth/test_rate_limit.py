"""Rate limits per minute, counted in memory and in a real Redis."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs

from keyfiles import Redis, avoid_the_end_of_a_minute, running_redis
from taskvec.auth.rate_limit import LimitReachedError, RateLimiter, Usage, Window
from taskvec.errors import InvalidRequestError, StartError, UnavailableError


class Unchecked:
    """Observer that counts the limits that could not be checked."""

    count = 0

    def limit_unchecked(self) -> None:
        self.count += 1


@pytest.fixture
def redis() -> Iterator[Redis]:
    with running_redis() as server:
        yield server


@pytest.fixture(params=["memory", "redis", "valkey"])
def url(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """None for limits in memory, or the address of a Redis or Valkey."""
    request.getfixturevalue("patience")
    if request.param == "memory":
        avoid_the_end_of_a_minute()
        yield None
        return
    with running_redis() as server:
        yield server.url.replace("redis", request.param, 1)


def limiter(url: str | None, *, open_when_down: bool = True) -> tuple[RateLimiter, Unchecked]:
    observer = Unchecked()
    return RateLimiter(url, open_when_down=open_when_down, observer=observer), observer


@pytest.mark.anyio
async def test_no_more_than_the_limit_passes(url: str | None) -> None:
    """Of 20 concurrent requests exactly 5 pass; keys and kinds are counted separately."""
    counted, _ = limiter(url)
    results = await asyncio.gather(
        *(counted.take("web", "requests", 5, 1) for _ in range(20)), return_exceptions=True
    )
    passed = [result for result in results if isinstance(result, Window)]
    refused = [result for result in results if isinstance(result, LimitReachedError)]
    assert (len(passed), len(refused)) == (5, 15)
    assert min(window.remaining for window in passed) == 0
    assert all(window.limit == 5 and 0 < window.reset <= 120 for window in passed)
    for error in refused:
        assert error.retry_after is not None
        assert 0 < error.retry_after <= 120
        assert error.window.remaining == 0
    other = await counted.take("jobs", "requests", 5, 1)
    tokens = await counted.take("web", "tokens", 5, 5)
    assert other is not None
    assert tokens is not None
    assert (other.remaining, tokens.remaining) == (4, 0)
    await counted.close()


@pytest.mark.anyio
async def test_an_amount_that_does_not_fit_is_not_counted(url: str | None) -> None:
    """A rejected amount uses nothing, so a smaller one may still pass."""
    counted, _ = limiter(url)
    first = await counted.take("web", "tokens", 1000, 700)
    assert first is not None
    assert first.remaining == 300
    with pytest.raises(LimitReachedError):
        await counted.take("web", "tokens", 1000, 301)
    last = await counted.take("web", "tokens", 1000, 300)
    assert last is not None
    assert last.remaining == 0
    await counted.close()


@pytest.mark.anyio
async def test_a_request_over_the_whole_limit_is_invalid(url: str | None) -> None:
    """A request that can never fit is a 400 and not a 429."""
    counted, _ = limiter(url)
    with pytest.raises(InvalidRequestError, match="1001 tokens") as refused:
        await counted.take("web", "tokens", 1000, 1001)
    assert refused.value.code == "too_many_tokens"
    await counted.close()


@pytest.mark.anyio
async def test_processes_count_together_in_redis(redis: Redis) -> None:
    """Two limiters on one Redis share a limit; two in their own memory do not."""
    together = [limiter(redis.url)[0] for _ in range(2)]
    await together[0].take("web", "requests", 1, 1)
    with pytest.raises(LimitReachedError):
        await together[1].take("web", "requests", 1, 1)
    for counted in together:
        await counted.close()
    apart = [limiter(None)[0] for _ in range(2)]
    for counted in apart:
        assert await counted.take("web", "requests", 1, 1) is not None


@pytest.mark.anyio
@pytest.mark.parametrize("open_when_down", [True, False])
async def test_requests_go_on_while_redis_is_down(redis: Redis, open_when_down: bool) -> None:
    """While Redis is down requests pass unchecked or get a 503, at once; later they are counted."""
    counted, unchecked = limiter(redis.url, open_when_down=open_when_down)
    assert await counted.take("web", "requests", 100, 1) is not None
    redis.stop()
    with capture_logs() as lines:
        for n in range(1, 4):
            start = time.monotonic()
            if open_when_down:
                assert await counted.take("web", "requests", 100, 1) is None
            else:
                with pytest.raises(UnavailableError) as refused:
                    await counted.take("web", "requests", 100, 1)
                assert refused.value.code == "limits_unavailable"
                assert refused.value.retry_after
            assert time.monotonic() - start < 1
            assert unchecked.count == n
        redis.start()
        async with asyncio.timeout(20):
            while await passes(counted) is None:
                await asyncio.sleep(0.1)
    assert [line["event"] for line in lines] == ["limits_down", "limits_back"]
    assert redis.url not in str(lines)
    await counted.close()


async def passes(counted: RateLimiter) -> Window | None:
    try:
        return await counted.take("web", "requests", 100, 1)
    except UnavailableError:
        return None


@pytest.mark.anyio
async def test_a_redis_that_hangs_is_not_waited_for(redis: Redis) -> None:
    """A Redis that accepts connections and never answers delays only the first requests."""
    counted, unchecked = limiter(redis.url)
    assert redis.process is not None
    os.kill(redis.process.pid, signal.SIGSTOP)
    try:
        start = time.monotonic()
        taken = await asyncio.gather(*(counted.take("web", "requests", 100, 1) for _ in range(20)))
        for _ in range(20):
            taken.append(await counted.take("web", "requests", 100, 1))
        assert time.monotonic() - start < 1
        assert taken == [None] * 40
        assert unchecked.count == 40
    finally:
        os.kill(redis.process.pid, signal.SIGCONT)
    await counted.close()


def test_an_invalid_address_is_a_start_error() -> None:
    """An invalid URL is rejected without being repeated: it may contain a password."""
    with pytest.raises(StartError, match="--limits-url") as refused:
        limiter("redis://:hush@host:port/0")
    assert "hush" not in str(refused.value)


@pytest.mark.parametrize(
    ("usage", "used", "waits"),
    [
        (Usage(0, 0.0, 0, 0.0), 0, {0: 0.0, 10: 0.0}),
        (Usage(60, 30.0, 0, 30.0), 30, {30: 0.0, 15: 15.0, 0: 30.0}),
        (Usage(0, 0.0, 60, 20.0), 60, {60: 0.0, 30: 50.0, 0: 80.0}),
        (Usage(60, 20.0, 40, 20.0), 60, {60: 0.0, 50: 10.0, 40: 20.0, 20: 50.0, 0: 80.0}),
    ],
)
def test_the_wait_ends_when_enough_has_expired(
    usage: Usage, used: int, waits: dict[int, float]
) -> None:
    """The weight of the previous minute falls linearly, and after that the current minute's."""
    assert usage.used == used
    assert {amount: usage.seconds_until(amount) for amount in waits} == pytest.approx(waits)
