"""The pool's life: who is called, who is dropped, who comes back."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import numpy as np
import pytest

from engines.remote.peer import (
    Peer,
    batch,
    ended,
    listening,
    pool,
    retried,
    samples,
    serving,
    truth,
    until,
)
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.engines.base import EngineState, TokenBatch
from taskvec.engines.remote.engine import MAX_RETRY_BALANCE
from taskvec.errors import DeadlineExceededError, QueueFullError, UnavailableError
from taskvec.metrics.registry import Metrics

PROTOCOLS = pytest.mark.parametrize("protocol", ["vllm", "taskvec"])


def within(asked: TokenBatch, seconds: float) -> TokenBatch:
    """The same texts with a deadline."""
    return TokenBatch(asked.ids, asked.adapter, time.monotonic() + seconds)


@pytest.mark.anyio
async def test_a_server_may_come_up_late(default_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Until the first server is proven the pool is starting, then ready, then unavailable."""
    peer = Peer(default_checkpoint)
    async with pool(default_checkpoint, tmp_path, peer, proven=0) as (engine, metrics):
        await until(lambda: peer.url in engine.health().reason)
        assert engine.health().state is EngineState.STARTING
        async with listening(peer):
            await until(lambda: engine.health().ready)
            assert np.array_equal((await engine.embed(batch(2))).vectors, truth(batch(2), 256))
        with pytest.raises(UnavailableError) as raised:
            await engine.embed(batch(2))
        assert raised.value.retry_after
        health = engine.health()
        assert health.state is EngineState.UNAVAILABLE
        assert peer.url in health.reason
        assert samples(metrics.registry, "taskvec_engine_server_serving") == {(peer.url,): 0.0}


@pytest.mark.anyio
@PROTOCOLS
async def test_a_server_that_takes_shorter_texts_only(
    default_checkpoint: Checkpoint, tmp_path: Path, protocol: str
) -> None:
    """It is refused with both limits and what to change, unless this gateway's is lowered."""
    peer = Peer(default_checkpoint, protocol=protocol, max_tokens=512)
    async with listening(peer):
        async with pool(default_checkpoint, tmp_path, peer, proven=0) as (engine, _):
            await until(lambda: "512" in engine.health().reason)
            assert "sends up to 2048" in engine.health().reason
        async with pool(default_checkpoint, tmp_path, peer, max_tokens=512) as (engine, _):
            assert engine.health().ready


@pytest.mark.anyio
@PROTOCOLS
async def test_a_server_that_comes_back_is_proven_first(
    default_checkpoint: Checkpoint, tmp_path: Path, protocol: str
) -> None:
    """With swapped adapters it gets no call; once they are right it does."""
    peers = good, other = [Peer(default_checkpoint, protocol=protocol) for _ in range(2)]
    async with listening(*peers), pool(default_checkpoint, tmp_path, *peers) as (engine, metrics):
        await other.stop()
        for i in range(20):
            await engine.embed(batch(1, start=i + 1))
        assert serving(metrics) == 1
        assert ended(metrics, "unreachable", other) >= 1
        other.behaviour = "swapped"
        other.calls.clear()
        posts = other.posts
        await other.start()
        await until(lambda: other.posts > posts + 1)
        for i in range(20):
            await engine.embed(batch(1, start=i + 1))
        assert (other.calls, serving(metrics)) == ([], 1)
        other.behaviour = "honest"
        await until(lambda: serving(metrics) == 2)
        await asyncio.gather(*(engine.embed(batch(9, start=i + 1)) for i in range(20)))
        assert good.calls
        assert other.calls


@pytest.mark.anyio
async def test_three_errors_in_a_row_drop_a_server(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Two errors and an answer leave it in; the third in a row does not."""
    peer = Peer(default_checkpoint)
    good = Peer(default_checkpoint)
    async with (
        listening(peer, good),
        pool(default_checkpoint, tmp_path, peer, good) as (
            engine,
            metrics,
        ),
    ):

        async def fail(times: int) -> None:
            limit = ended(metrics, "error", peer) + times
            while ended(metrics, "error", peer) < limit:
                await engine.embed(batch(1))

        async def succeed() -> None:
            before = len(peer.calls)
            while len(peer.calls) == before:
                await engine.embed(batch(1))

        for _ in range(3):
            peer.behaviour = "500"
            await fail(2)
            peer.behaviour = "honest"
            await succeed()
            assert serving(metrics) == 2
        peer.behaviour = "500"
        await fail(3)
        assert serving(metrics) == 1
        assert retried(metrics) == 9


@pytest.mark.anyio
async def test_a_busy_server_stays(default_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A 429 sends the call to the other server and drops nobody, however often."""
    peers = busy, _ = [Peer(default_checkpoint) for _ in range(2)]
    async with listening(*peers), pool(default_checkpoint, tmp_path, *peers) as (engine, metrics):
        busy.behaviour = "429"
        while ended(metrics, "busy", busy) < 5:
            await engine.embed(batch(1))
        assert serving(metrics) == 2


@pytest.mark.anyio
async def test_retries_come_to_an_end(default_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Each busy server is asked once, and when the reserve of retries is spent hardly a second."""
    peers = Peer(default_checkpoint), Peer(default_checkpoint)
    async with listening(*peers), pool(default_checkpoint, tmp_path, *peers) as (engine, metrics):
        for peer in peers:
            peer.behaviour = "429"
        with pytest.raises(QueueFullError):
            await engine.embed(batch(1))
        assert (ended(metrics, "busy"), retried(metrics)) == (2, 1)
        for _ in range(14):
            await asyncio.gather(
                *(engine.embed(batch(1)) for _ in range(100)), return_exceptions=True
            )
        assert MAX_RETRY_BALANCE <= retried(metrics) <= MAX_RETRY_BALANCE + 1401 * 0.2
        before = ended(metrics, "busy")
        await asyncio.gather(*(engine.embed(batch(1)) for _ in range(50)), return_exceptions=True)
        assert ended(metrics, "busy") - before <= 50 + 11


@pytest.mark.anyio
@PROTOCOLS
async def test_a_client_s_deadline_is_not_the_server_s_fault(
    default_checkpoint: Checkpoint, tmp_path: Path, protocol: str
) -> None:
    """It ends the call at the server, drops nobody, and counts as no retry."""
    peer = Peer(default_checkpoint, protocol=protocol)
    async with listening(peer), pool(default_checkpoint, tmp_path, peer) as (engine, metrics):
        peer.held.clear()
        for i in range(5):
            with pytest.raises(DeadlineExceededError):
                await engine.embed(within(batch(3), 0.2))
            await until(lambda i=i: peer.closed == i + 1)
        assert serving(metrics) == 1
        assert (ended(metrics, "abandoned"), ended(metrics, "timeout")) == (5, 0)
        assert retried(metrics) == 0
        if protocol == "taskvec":
            assert max(peer.deadlines[-5:]) <= 200 < min(peer.deadlines[:-5])
        peer.held.set()
        assert len((await engine.embed(batch(3))).vectors) == 3


@pytest.mark.anyio
@PROTOCOLS
@pytest.mark.parametrize("count", [3, 150])
async def test_a_request_that_is_withdrawn_ends_its_calls(
    default_checkpoint: Checkpoint, tmp_path: Path, protocol: str, count: int
) -> None:
    """The servers see their connections closed, and nobody is dropped for it."""
    peer = Peer(default_checkpoint, protocol=protocol)
    async with listening(peer), pool(default_checkpoint, tmp_path, peer) as (engine, metrics):
        peer.held.clear()
        request = asyncio.create_task(engine.embed(batch(count)))
        await until(lambda: sum(len(ids) for ids, _ in peer.calls) == count)
        request.cancel()
        await until(lambda: peer.closed == len(peer.calls))
        await asyncio.gather(request, return_exceptions=True)
        assert request.cancelled()
        assert ended(metrics, "abandoned") == len(peer.calls)
        assert serving(metrics) == 1


@pytest.mark.anyio
async def test_the_key_is_sent(default_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Every server gets it as a bearer token; a 401 says which setting to look at, not the key."""
    peer = Peer(default_checkpoint)
    async with listening(peer):
        async with pool(default_checkpoint, tmp_path, peer, api_key="s3cret"):
            assert set(peer.keys) == {"Bearer s3cret"}
        peer.behaviour = "401"
        async with pool(default_checkpoint, tmp_path, peer, proven=0, api_key="s3cret") as (
            engine,
            _,
        ):
            await until(lambda: "401" in engine.health().reason)
            assert "TASKVEC_ENGINE_API_KEY" in engine.health().reason
            assert "s3cret" not in engine.health().reason
        async with pool(default_checkpoint, tmp_path, peer, proven=0):
            await until(lambda: peer.keys[-1] is None)


@pytest.mark.anyio
@PROTOCOLS
async def test_stopping_waits_for_calls(
    default_checkpoint: Checkpoint, tmp_path: Path, protocol: str
) -> None:
    """What was accepted is answered, nothing new is taken, then everything is closed."""
    peer = Peer(default_checkpoint, protocol=protocol)
    async with listening(peer), pool(default_checkpoint, tmp_path, peer) as (engine, _):
        peer.held.clear()
        requests = [asyncio.create_task(engine.embed(batch(2, start=i + 1))) for i in range(5)]
        await until(lambda: peer.calls)
        stopping = asyncio.create_task(engine.stop())
        await until(lambda: engine.health().state is EngineState.STOPPING)
        with pytest.raises(UnavailableError) as raised:
            await engine.embed(batch(1))
        assert raised.value.code == "draining"
        await asyncio.sleep(0.05)
        assert not stopping.done()
        peer.held.set()
        for i, request in enumerate(requests):
            assert np.array_equal((await request).vectors, truth(batch(2, start=i + 1), 256))
        await stopping
        assert engine.health().state is EngineState.DEAD


@pytest.mark.anyio
async def test_texts_that_waited_are_not_sent_to_a_dropped_server(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """What waits for a shared call fails with its server, which may come back as another."""
    peer = Peer(default_checkpoint, protocol="taskvec")
    async with listening(peer), pool(default_checkpoint, tmp_path, peer) as (engine, _):
        peer.held.clear()
        requests = [asyncio.create_task(engine.embed(batch(1))) for _ in range(4)]
        await until(lambda: len(peer.calls) == 2)
        await peer.stop()
        peer.behaviour = "swapped"
        peer.held.set()
        await peer.start()
        answers = await asyncio.gather(*requests, return_exceptions=True)
        assert [type(answer) for answer in answers] == [UnavailableError] * 4
        assert len(peer.calls) == 2


@pytest.mark.anyio
@PROTOCOLS
async def test_what_is_not_answered_yet_is_the_queue(
    default_checkpoint: Checkpoint, tmp_path: Path, protocol: str
) -> None:
    """Texts, tokens and the age of the oldest: of every call, until it is answered or given up."""
    peer = Peer(default_checkpoint, protocol=protocol)
    async with (
        listening(peer),
        pool(default_checkpoint, tmp_path, peer) as (engine, metrics),
    ):
        assert queued(metrics) == (0, 0, 0)
        peer.held.clear()
        large = asyncio.create_task(engine.embed(batch(100)))
        await until(lambda: len(peer.calls) == 2)
        small = asyncio.create_task(engine.embed(batch(5, start=500, length=7)))
        await until(lambda: len(peer.calls) == 3)
        await asyncio.sleep(0.3)
        texts, tokens, oldest = queued(metrics)
        assert (texts, tokens) == (105, 335)
        assert 0.3 <= oldest < 10
        large.cancel()
        await asyncio.gather(large, return_exceptions=True)
        texts, tokens, age = queued(metrics)
        assert (texts, tokens) == (5, 35)
        assert 0.3 <= age < oldest + 1
        peer.held.set()
        await small
        assert queued(metrics) == (0, 0, 0)


@pytest.mark.anyio
async def test_a_call_that_fails_leaves_the_queue(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """What no server could embed waits no more."""
    peer = Peer(default_checkpoint)
    async with listening(peer), pool(default_checkpoint, tmp_path, peer) as (engine, metrics):
        peer.behaviour = "500"
        with pytest.raises(UnavailableError):
            await engine.embed(batch(3))
        assert queued(metrics) == (0, 0, 0)


@pytest.mark.anyio
async def test_a_server_that_reports_its_queue_is_not_counted_twice(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Where the server reports to the same series, the pool does not."""
    peer = Peer(default_checkpoint, protocol="taskvec")
    async with (
        listening(peer),
        pool(default_checkpoint, tmp_path, peer, reports_queue=False) as (engine, metrics),
    ):
        peer.held.clear()
        asked = asyncio.create_task(engine.embed(batch(3)))
        await until(lambda: peer.calls)
        assert queued(metrics) == (0, 0, 0)
        peer.held.set()
        await asked


def queued(metrics: Metrics) -> tuple[float, ...]:
    """Texts, tokens, and the seconds of the oldest."""
    metrics.update_queue_age()
    return tuple(
        samples(metrics.registry, f"taskvec_queue_{name}")[()]
        for name in ("texts", "tokens", "oldest_seconds")
    )
