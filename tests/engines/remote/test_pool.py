"""The pool: choice of servers, circuit breakers, retries and stop."""

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
    """Return the same batch with a deadline."""
    return TokenBatch(asked.ids, asked.adapter, time.monotonic() + seconds)


@pytest.mark.anyio
async def test_a_server_may_start_late(default_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The pool is starting until a server is serving, then ready, and then unavailable."""
    peer = Peer(default_checkpoint)
    async with pool(default_checkpoint, tmp_path, peer, wait_for=0) as (engine, metrics):
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
async def test_a_server_with_a_lower_text_limit(
    default_checkpoint: Checkpoint, tmp_path: Path, protocol: str
) -> None:
    """A server with a lower limit is rejected with both limits, unless the gateway's is lowered."""
    peer = Peer(default_checkpoint, protocol=protocol, max_tokens=512)
    async with listening(peer):
        async with pool(default_checkpoint, tmp_path, peer, wait_for=0) as (engine, _):
            await until(lambda: "512" in engine.health().reason)
            assert "sends up to 2048" in engine.health().reason
        async with pool(default_checkpoint, tmp_path, peer, max_tokens=512) as (engine, _):
            assert engine.health().ready


@pytest.mark.anyio
@PROTOCOLS
async def test_a_restarted_server_is_checked_first(
    default_checkpoint: Checkpoint, tmp_path: Path, protocol: str
) -> None:
    """A restarted server with swapped adapters does not get calls until they are right."""
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
async def test_three_consecutive_errors_open_the_circuit(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Two errors before an answer keep the circuit closed, three consecutive errors open it."""
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
async def test_a_busy_server_keeps_its_circuit_closed(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """After a 429, the call goes to the other server, and the circuit stays closed."""
    peers = busy, _ = [Peer(default_checkpoint) for _ in range(2)]
    async with listening(*peers), pool(default_checkpoint, tmp_path, *peers) as (engine, metrics):
        busy.behaviour = "429"
        while ended(metrics, "busy", busy) < 5:
            await engine.embed(batch(1))
        assert serving(metrics) == 2


@pytest.mark.anyio
async def test_retries_are_limited(default_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A call is sent once to each busy server, and retries stop when the budget is empty."""
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
async def test_a_deadline_of_a_client_keeps_the_circuit_closed(
    default_checkpoint: Checkpoint, tmp_path: Path, protocol: str
) -> None:
    """A deadline cancels the call without opening the circuit and without a retry."""
    peer = Peer(default_checkpoint, protocol=protocol)
    async with listening(peer), pool(default_checkpoint, tmp_path, peer) as (engine, metrics):
        peer.released.clear()
        for i in range(5):
            with pytest.raises(DeadlineExceededError):
                await engine.embed(within(batch(3), 0.2))
            await until(lambda i=i: peer.closed == i + 1)
        assert serving(metrics) == 1
        assert (ended(metrics, "abandoned"), ended(metrics, "timeout")) == (5, 0)
        assert retried(metrics) == 0
        if protocol == "taskvec":
            assert max(peer.deadlines[-5:]) <= 200 < min(peer.deadlines[:-5])
        peer.released.set()
        assert len((await engine.embed(batch(3))).vectors) == 3


@pytest.mark.anyio
@PROTOCOLS
@pytest.mark.parametrize("count", [3, 150])
async def test_a_cancelled_request_cancels_its_calls(
    default_checkpoint: Checkpoint, tmp_path: Path, protocol: str, count: int
) -> None:
    """The connections of a cancelled request are closed, and circuits stay closed."""
    peer = Peer(default_checkpoint, protocol=protocol)
    async with listening(peer), pool(default_checkpoint, tmp_path, peer) as (engine, metrics):
        peer.released.clear()
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
    """The key is sent as a bearer token; after a 401 the reason names the setting, not the key."""
    peer = Peer(default_checkpoint)
    async with listening(peer):
        async with pool(default_checkpoint, tmp_path, peer, api_key="s3cret"):
            assert set(peer.keys) == {"Bearer s3cret"}
        peer.behaviour = "401"
        async with pool(default_checkpoint, tmp_path, peer, wait_for=0, api_key="s3cret") as (
            engine,
            _,
        ):
            await until(lambda: "401" in engine.health().reason)
            assert "TASKVEC_ENGINE_API_KEY" in engine.health().reason
            assert "s3cret" not in engine.health().reason
        async with pool(default_checkpoint, tmp_path, peer, wait_for=0):
            await until(lambda: peer.keys[-1] is None)


@pytest.mark.anyio
@PROTOCOLS
async def test_stopping_waits_for_calls(
    default_checkpoint: Checkpoint, tmp_path: Path, protocol: str
) -> None:
    """Stopping answers the admitted requests, rejects new ones and closes connections."""
    peer = Peer(default_checkpoint, protocol=protocol)
    async with listening(peer), pool(default_checkpoint, tmp_path, peer) as (engine, _):
        peer.released.clear()
        requests = [asyncio.create_task(engine.embed(batch(2, start=i + 1))) for i in range(5)]
        await until(lambda: peer.calls)
        stopping = asyncio.create_task(engine.stop())
        await until(lambda: engine.health().state is EngineState.STOPPING)
        with pytest.raises(UnavailableError) as raised:
            await engine.embed(batch(1))
        assert raised.value.code == "draining"
        await asyncio.sleep(0.05)
        assert not stopping.done()
        peer.released.set()
        for i, request in enumerate(requests):
            assert np.array_equal((await request).vectors, truth(batch(2, start=i + 1), 256))
        await stopping
        assert engine.health().state is EngineState.DEAD


@pytest.mark.anyio
async def test_waiting_texts_are_not_sent_after_the_circuit_opened(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Texts that wait for a shared call fail when the circuit opens."""
    peer = Peer(default_checkpoint, protocol="taskvec")
    async with listening(peer), pool(default_checkpoint, tmp_path, peer) as (engine, _):
        peer.released.clear()
        requests = [asyncio.create_task(engine.embed(batch(1))) for _ in range(4)]
        await until(lambda: len(peer.calls) == 2)
        await peer.stop()
        peer.behaviour = "swapped"
        peer.released.set()
        await peer.start()
        answers = await asyncio.gather(*requests, return_exceptions=True)
        assert [type(answer) for answer in answers] == [UnavailableError] * 4
        assert len(peer.calls) == 2


@pytest.mark.anyio
@PROTOCOLS
async def test_a_wrong_server_answers_no_call_in_progress(
    default_checkpoint: Checkpoint, tmp_path: Path, protocol: str
) -> None:
    """When a check finds a server wrong, another one answers the calls that it is computing."""
    peers = wrong, _ = [Peer(default_checkpoint, protocol=protocol) for _ in range(2)]
    async with (
        listening(*peers),
        pool(default_checkpoint, tmp_path, *peers, check_seconds=0.2) as (engine, metrics),
    ):
        wrong.released.clear()
        requests = [asyncio.create_task(engine.embed(batch(9, start=i + 1))) for i in range(12)]
        await until(lambda: wrong.calls)
        wrong.behaviour = "swapped"
        await until(lambda: serving(metrics) == 1)
        wrong.released.set()
        for i, request in enumerate(requests):
            assert np.array_equal((await request).vectors, truth(batch(9, start=i + 1), 256))
        assert ended(metrics, "abandoned", wrong) == len(wrong.calls)


@pytest.mark.anyio
async def test_a_call_that_waits_for_a_connection_is_not_sent_after_the_circuit_opened(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """The server may have been started again, and is not checked yet."""
    peer = Peer(default_checkpoint)
    async with (
        listening(peer),
        pool(default_checkpoint, tmp_path, peer, connections=1) as (engine, metrics),
    ):
        peer.released.clear()
        requests = [asyncio.create_task(engine.embed(batch(2))) for _ in range(3)]
        await until(lambda: peer.calls)
        await peer.stop()
        answers = await asyncio.gather(*requests, return_exceptions=True)
        assert [type(answer) for answer in answers] == [UnavailableError] * 3
        assert (ended(metrics, "unreachable"), ended(metrics, "abandoned")) == (1, 2)


@pytest.mark.anyio
@PROTOCOLS
async def test_unanswered_texts_are_the_queue(
    default_checkpoint: Checkpoint, tmp_path: Path, protocol: str
) -> None:
    """Texts, tokens and age of unanswered calls are reported as the queue."""
    peer = Peer(default_checkpoint, protocol=protocol)
    async with (
        listening(peer),
        pool(default_checkpoint, tmp_path, peer) as (engine, metrics),
    ):
        assert queued(metrics) == (0, 0, 0)
        peer.released.clear()
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
        peer.released.set()
        await small
        assert queued(metrics) == (0, 0, 0)


@pytest.mark.anyio
async def test_a_call_that_fails_leaves_the_queue(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Texts of a failed call are no longer reported."""
    peer = Peer(default_checkpoint)
    async with listening(peer), pool(default_checkpoint, tmp_path, peer) as (engine, metrics):
        peer.behaviour = "500"
        with pytest.raises(UnavailableError):
            await engine.embed(batch(3))
        assert queued(metrics) == (0, 0, 0)


def queued(metrics: Metrics) -> tuple[float, ...]:
    """Return texts, tokens and the age of the oldest text."""
    metrics.update_queue_age()
    return tuple(
        samples(metrics.registry, f"taskvec_queue_{name}")[()]
        for name in ("texts", "tokens", "oldest_seconds")
    )
