"""RequestLimits a minute, counted here and in a real Redis."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs

from keyfiles import Redis, running_redis, wait_for_a_minute_with_room
from taskvec.auth.rate_limit import Limiter, LimitReachedError, Usage, Window
from taskvec.errors import InvalidRequestError, StartError, UnavailableError


class Unchecked:
    """Counts what could not be checked."""

    count = 0

    def limit_unchecked(self) -> None:
        self.count += 1


@pytest.fixture
def redis() -> Iterator[Redis]:
    with running_redis() as server:
        yield server


@pytest.fixture(params=["memory", "redis", "valkey"])
def url(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """None, or where a Redis is; Valkey speaks the same."""
    request.getfixturevalue("patience")
    if request.param == "memory":
        wait_for_a_minute_with_room()
        yield None
        return
    with running_redis() as server:
        yield server.url.replace("redis", request.param, 1)


def limiter(url: str | None, *, open_when_down: bool = True) -> tuple[Limiter, Unchecked]:
    observer = Unchecked()
    return Limiter(url, open_when_down=open_when_down, observer=observer), observer


@pytest.mark.anyio
async def test_no_more_than_the_limit_passes(url: str | None) -> None:
    """Of many requests at once as many pass as the limit says; keys and kinds do not mix."""
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
async def test_tokens_count_as_many_as_they_are(url: str | None) -> None:
    """What does not fit is refused and not counted: less may still fit."""
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
async def test_what_can_never_fit_is_no_matter_of_waiting(url: str | None) -> None:
    """A request beyond the whole limit is the client's mistake."""
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
async def test_a_redis_that_dies_costs_no_request(redis: Redis, open_when_down: bool) -> None:
    """Dead, requests pass unchecked or get a 503, at once; back, they are counted again."""
    counted, unchecked = limiter(redis.url, open_when_down=open_when_down)
    assert await counted.take("web", "requests", 100, 1) is not None
    redis.stop()
    with capture_logs() as lines:
        for n in range(1, 4):
            begun = time.monotonic()
            if open_when_down:
                assert await counted.take("web", "requests", 100, 1) is None
            else:
                with pytest.raises(UnavailableError) as refused:
                    await counted.take("web", "requests", 100, 1)
                assert refused.value.code == "limits_unavailable"
                assert refused.value.retry_after
            assert time.monotonic() - begun < 1
            assert unchecked.count == n
        redis.start()
        async with asyncio.timeout(20):
            while await passes(counted) is None:
                await asyncio.sleep(0.1)
    assert [line["event"] for line in lines] == ["limits_down", "limits_back"]
    assert redis.url not in str(lines)
    await counted.close()


async def passes(counted: Limiter) -> Window | None:
    try:
        return await counted.take("web", "requests", 100, 1)
    except UnavailableError:
        return None


@pytest.mark.anyio
async def test_a_redis_that_hangs_is_not_waited_for(redis: Redis) -> None:
    """A Redis that takes connections and answers nothing holds a few requests, and briefly."""
    counted, unchecked = limiter(redis.url)
    assert redis.process is not None
    os.kill(redis.process.pid, signal.SIGSTOP)
    try:
        begun = time.monotonic()
        taken = await asyncio.gather(*(counted.take("web", "requests", 100, 1) for _ in range(20)))
        for _ in range(20):
            taken.append(await counted.take("web", "requests", 100, 1))
        assert time.monotonic() - begun < 1
        assert taken == [None] * 40
        assert unchecked.count == 40
    finally:
        os.kill(redis.process.pid, signal.SIGCONT)
    await counted.close()


def test_a_wrong_address_ends_the_start() -> None:
    """An address that cannot be one is refused, and not repeated: it may hold a password."""
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
def test_the_wait_is_until_there_is_room(usage: Usage, used: int, waits: dict[int, float]) -> None:
    """The minute before fades evenly, then this one does: the wait ends when enough has."""
    assert usage.used == used
    assert {room: usage.seconds_until(room) for room in waits} == pytest.approx(waits)
