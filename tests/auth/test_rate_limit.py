"""Rate limits per minute, counted in memory and in a real Redis."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
from redis import Redis as RedisClient
from structlog.testing import capture_logs

from conftest import no_open_files
from keyfiles import Redis, avoid_the_end_of_a_minute, running_redis
from taskvec.auth.rate_limit import LimitReachedError, RateLimiter, Usage, Window
from taskvec.errors import InvalidRequestError, StartError, UnavailableError
from taskvec.redis import TIMEOUT_SECONDS


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


def hold(seconds: float) -> None:
    """Hold the thread, and with it the event loop."""
    time.sleep(seconds)


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
    """While Redis is down the process counts alone or rejects, at once; later Redis counts."""
    counted, unchecked = limiter(redis.url, open_when_down=open_when_down)
    avoid_the_end_of_a_minute()
    assert (await counted.take("web", "requests", 100, 1)).remaining == 99
    redis.stop()
    with capture_logs() as lines:
        for n in range(1, 4):
            start = time.monotonic()
            if open_when_down:
                assert (await counted.take("web", "requests", 100, 1)).remaining == 99 - n
            else:
                with pytest.raises(UnavailableError) as refused:
                    await counted.take("web", "requests", 100, 1)
                assert refused.value.code == "limits_unavailable"
                assert refused.value.retry_after
            assert time.monotonic() - start < 1
            assert unchecked.count == n
        redis.start()
        async with asyncio.timeout(20):
            while lines[-1]["event"] != "limits_back":
                await asyncio.sleep(0.1)
                with suppress(UnavailableError):
                    await counted.take("web", "requests", 100, 1)
    assert [line["event"] for line in lines] == ["limits_down", "limits_back"]
    assert redis.url not in str(lines)
    await counted.close()


@pytest.mark.anyio
async def test_the_limit_holds_while_redis_is_down(redis: Redis) -> None:
    """What Redis has counted for this process is not forgiven when Redis goes down."""
    counted, _ = limiter(redis.url)
    avoid_the_end_of_a_minute()
    for _ in range(3):
        await counted.take("web", "requests", 5, 1)
    redis.stop()
    results = await asyncio.gather(
        *(counted.take("web", "requests", 5, 1) for _ in range(20)), return_exceptions=True
    )
    assert sum(isinstance(result, Window) for result in results) == 2
    assert sum(isinstance(result, LimitReachedError) for result in results) == 18
    await counted.close()


@pytest.mark.anyio
@pytest.mark.parametrize("open_when_down", [True, False])
async def test_many_at_once_are_no_outage(redis: Redis, open_when_down: bool) -> None:
    """Of 600 at once exactly 10 pass with a healthy Redis; those of another key all pass."""
    counted, unchecked = limiter(redis.url, open_when_down=open_when_down)
    with capture_logs() as lines:
        results = await asyncio.gather(
            *(counted.take("web", "requests", 10, 1) for _ in range(600)),
            *(counted.take("jobs", "requests", 10_000, 1) for _ in range(255)),
            return_exceptions=True,
        )
    passed = [isinstance(result, Window) for result in results]
    assert (sum(passed[:600]), sum(passed[600:])) == (10, 255)
    assert (lines, unchecked.count) == ([], 0)
    await counted.close()


@pytest.mark.anyio
async def test_a_busy_event_loop_is_no_outage(redis: Redis) -> None:
    """Work that holds the event loop for longer than the timeout does not make Redis late."""
    counted, unchecked = limiter(redis.url, open_when_down=False)
    stop = asyncio.Event()

    async def hold_the_loop() -> None:
        while not stop.is_set():
            hold(2 * TIMEOUT_SECONDS)
            await asyncio.sleep(0)

    holding = asyncio.create_task(hold_the_loop())
    assert (await counted.take("web", "requests", 5, 1)).remaining == 4
    stop.set()
    await holding
    assert unchecked.count == 0
    await counted.close()


@pytest.mark.anyio
async def test_a_lack_of_open_files_is_no_outage(redis: Redis) -> None:
    """Without a file for the connection, a limit waits for one, and is then checked."""
    counted, unchecked = limiter(redis.url, open_when_down=False)
    with no_open_files() as release, capture_logs() as lines:
        taking = asyncio.create_task(counted.take("web", "requests", 5, 1))
        await asyncio.sleep(0.3)
        assert not taking.done()
        release()
        assert (await taking).remaining == 4
    assert unchecked.count == 0
    assert {line["event"] for line in lines} <= {"out_of_files"}
    await counted.close()


@pytest.mark.anyio
@pytest.mark.parametrize("value", ["1e3", "many", b"\xff"])
@pytest.mark.parametrize("limit", [5, 5000])
async def test_a_stored_value_that_is_no_count(redis: Redis, value: str, limit: int) -> None:
    """A value that is no count costs its own key the shared limit, logged once; nothing else."""
    counted, unchecked = limiter(redis.url)
    avoid_the_end_of_a_minute()
    await counted.take("web", "requests", limit, 1)
    with RedisClient.from_url(redis.url) as direct:
        names = direct.keys("*web*")
        assert names
        for name in names:
            direct.set(name, value, keepttl=True)
    with capture_logs() as lines:
        for n in range(2, 5):
            assert (await counted.take("web", "requests", limit, 1)).remaining == limit - n
        other = await counted.take("jobs", "requests", limit, 1)
    assert other.remaining == limit - 1
    assert unchecked.count == 3
    assert [(line["event"], line["key"]) for line in lines] == [("limit_unusable", "web")]
    await counted.close()


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
        assert {window.limit for window in taken} == {100}
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
