"""Batching of small calls to one server."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from engines.remote.peer import (
    POISON,
    Peer,
    batch,
    ended,
    joined,
    listening,
    pool,
    retried,
    truth,
    until,
)
from fakes import hashed_vector
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.engines.base import CallOutcome, EngineResult, TokenBatch, TokenIds
from taskvec.engines.remote.batcher import MAX_CALLS, MAX_TEXTS, CallBatcher
from taskvec.engines.remote.client import ServerCallError
from taskvec.engines.remote.protocols import Vectors
from taskvec.errors import TaskvecError

WIDTH = 8


class FakeServer:
    """Receives the calls of a batcher; each waits until ``released`` is set."""

    def __init__(self) -> None:
        self.sent: list[tuple[list[TokenIds], list[str | None], float]] = []
        self.released = asyncio.Event()
        self.error: ServerCallError | None = None
        self.closed = 0

    async def send(
        self, texts: Sequence[TokenIds], adapters: Sequence[str | None], seconds: float
    ) -> Vectors:
        self.sent.append((list(texts), list(adapters), seconds))
        try:
            await self.released.wait()
        except asyncio.CancelledError:
            self.closed += 1
            raise
        if self.error is not None:
            raise self.error
        pairs = zip(texts, adapters, strict=True)
        return np.stack([hashed_vector(*pair, WIDTH) for pair in pairs])


def submit(
    batcher: CallBatcher, number: int, adapter: str | None = "a", seconds: float = 20
) -> asyncio.Task[Vectors]:
    """Submit two texts in a task."""
    return asyncio.create_task(batcher.submit(texts(number), adapter, seconds))


def texts(number: int) -> list[TokenIds]:
    """Return two texts that depend on a number."""
    return [np.array([number, i], dtype=np.int32) for i in range(2)]


def right(number: int, adapter: str | None) -> Vectors:
    """Return the vectors of these texts."""
    return np.stack([hashed_vector(text, adapter, WIDTH) for text in texts(number)])


@pytest.mark.anyio
async def test_waiting_texts_share_a_call() -> None:
    """The first submissions are sent alone, and those that arrive meanwhile share one call."""
    server = FakeServer()
    batcher = CallBatcher(server.send)
    adapters = ["a", None, "b"]
    submissions = [submit(batcher, i, adapters[i % 3]) for i in range(12)]
    await asyncio.sleep(0.01)
    assert [len(sent) for sent, *_ in server.sent] == [2] * MAX_CALLS
    server.released.set()
    for i, submission in enumerate(submissions):
        assert np.array_equal(await submission, right(i, adapters[i % 3]))
    assert len(server.sent) == MAX_CALLS + 1
    assert server.sent[-1][1][:4] == ["b", "b", "a", "a"]


@pytest.mark.anyio
async def test_a_call_has_a_maximum_of_texts() -> None:
    """A call has at most 64 texts."""
    server = FakeServer()
    batcher = CallBatcher(server.send)
    submissions = [submit(batcher, i) for i in range(100)]
    await asyncio.sleep(0.01)
    server.released.set()
    await asyncio.gather(*submissions)
    sizes = [len(sent) for sent, *_ in server.sent]
    assert max(sizes) == MAX_TEXTS
    assert sum(sizes) == 200
    assert len(sizes) == MAX_CALLS + 4


@pytest.mark.anyio
async def test_cancelled_submissions_are_not_sent() -> None:
    """Texts that were cancelled before their call starts are not sent."""
    server = FakeServer()
    batcher = CallBatcher(server.send)
    submissions = [submit(batcher, i) for i in range(MAX_CALLS + 3)]
    await asyncio.sleep(0.01)
    submissions[MAX_CALLS].cancel()
    await asyncio.sleep(0.01)
    server.released.set()
    done = await asyncio.gather(*submissions, return_exceptions=True)
    assert isinstance(done[MAX_CALLS], asyncio.CancelledError)
    last = [int(text[0]) for text in server.sent[-1][0]]
    assert last == [MAX_CALLS + 1, MAX_CALLS + 1, MAX_CALLS + 2, MAX_CALLS + 2]


@pytest.mark.anyio
async def test_a_call_without_callers_is_cancelled() -> None:
    """A call is cancelled with its last caller, and the next call starts."""
    server = FakeServer()
    batcher = CallBatcher(server.send)
    first = [submit(batcher, i) for i in range(MAX_CALLS)]
    await asyncio.sleep(0.01)
    pair = [submit(batcher, 7), submit(batcher, 8)]
    await asyncio.sleep(0.01)
    first[0].cancel()
    await until(lambda: len(server.sent) == MAX_CALLS + 1)
    assert server.closed == 1
    pair[0].cancel()
    await asyncio.sleep(0.01)
    assert server.closed == 1
    server.released.set()
    assert np.array_equal(await pair[1], right(8, "a"))
    assert np.array_equal(await first[1], right(1, "a"))


@pytest.mark.anyio
async def test_a_failed_call_fails_all_its_callers() -> None:
    """Every caller of a failed call gets its own copy of the error, and later calls succeed."""
    server = FakeServer()
    batcher = CallBatcher(server.send)
    server.error = ServerCallError(CallOutcome.ERROR, "status 500: no, sorry")
    submissions = [submit(batcher, i) for i in range(MAX_CALLS + 2)]
    server.released.set()
    done = await asyncio.gather(*submissions, return_exceptions=True)
    outcomes = [getattr(error, "outcome", None) for error in done]
    assert outcomes == [CallOutcome.ERROR] * (MAX_CALLS + 2)
    assert {str(error) for error in done} == {"status 500: no, sorry"}
    assert len({id(error) for error in done}) == len(done)
    server.error = None
    assert np.array_equal(await submit(batcher, 9), right(9, "a"))


@pytest.mark.anyio
async def test_a_text_that_is_refused_fails_only_its_caller(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """After a shared call with such a text, each caller has a call of its own."""
    peer = Peer(default_checkpoint, protocol="taskvec", behaviour="nan text")
    good, poisoned, other = batch(2), batch(1, "clustering", start=POISON - 2), batch(1, start=9)
    poisoned = TokenBatch([*batch(1, start=7).ids, *poisoned.ids], "clustering")
    async with listening(peer), pool(default_checkpoint, tmp_path, peer) as (engine, metrics):
        first, error, last = await joined(engine, peer, good, poisoned, other)
        assert isinstance(first, EngineResult)
        assert isinstance(last, EngineResult)
        assert np.array_equal(first.vectors, truth(good, 256))
        assert np.array_equal(last.vectors, truth(other, 256))
        assert isinstance(error, TaskvecError)
        assert (error.code, error.param) == ("vector_not_finite", "input[1]")
        assert [len(texts) for texts, _ in peer.calls[MAX_CALLS:]] == [5, 2, 2, 1]
        assert (ended(metrics, "text_error"), ended(metrics, "error"), retried(metrics)) == (
            2,
            0,
            0,
        )


@pytest.mark.anyio
async def test_a_timeout_ends_only_its_own_submission() -> None:
    """A submission with a short timeout fails, and the others continue."""
    server = FakeServer()
    batcher = CallBatcher(server.send)
    patient = [submit(batcher, i) for i in range(MAX_CALLS)]
    await asyncio.sleep(0.01)
    hasty = submit(batcher, 9, seconds=0.05)
    with pytest.raises(ServerCallError, match=r"no answer within 0\.05 seconds") as raised:
        await hasty
    assert raised.value.outcome is CallOutcome.TIMEOUT
    server.released.set()
    await asyncio.gather(*patient)
    assert len(server.sent) == MAX_CALLS
    assert server.closed == 0


@pytest.mark.anyio
async def test_many_small_requests_share_calls(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """A taskvec server gets far fewer calls than requests, with mixed adapters."""
    peer = Peer(default_checkpoint, protocol="taskvec")
    names = default_checkpoint.card.adapters
    async with listening(peer), pool(default_checkpoint, tmp_path, peer) as (engine, metrics):
        before = ended(metrics, "ok")
        peer.released.clear()
        asked = [batch(1 + i % 3, names[i % 4], start=1 + 5 * i) for i in range(100)]
        requests = [asyncio.create_task(engine.embed(each)) for each in asked]
        await until(lambda: len(peer.calls) == MAX_CALLS)
        peer.released.set()
        for each, request in zip(asked, requests, strict=True):
            assert np.array_equal((await request).vectors, truth(each, 256))
        assert ended(metrics, "ok") - before == len(peer.calls) < 10
    assert any(set(adapters) == set(names) for _, adapters in peer.calls)


@pytest.mark.anyio
async def test_large_requests_do_not_wait_for_small_ones(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Requests of more than eight texts, and all requests to vLLM, are sent at once."""
    for protocol, count in (("taskvec", 9), ("vllm", 1)):
        peer = Peer(default_checkpoint, protocol=protocol)
        async with listening(peer), pool(default_checkpoint, tmp_path, peer) as (engine, _):
            peer.released.clear()
            asked = [batch(count, start=1 + 20 * i) for i in range(6)]
            requests = [asyncio.create_task(engine.embed(each)) for each in asked]
            await until(lambda peer=peer: len(peer.calls) == 6)
            peer.released.set()
            for each, request in zip(asked, requests, strict=True):
                assert np.array_equal((await request).vectors, truth(each, 256))


@pytest.mark.anyio
async def test_closing_ends_a_call_that_outlives_its_caller() -> None:
    """A caller's timeout does not end a call, which others may share; closing does."""
    server = FakeServer()
    batcher = CallBatcher(server.send)
    with pytest.raises(ServerCallError):
        await batcher.submit(texts(1), "a", 0.01)
    assert server.closed == 0
    await batcher.close()
    assert server.closed == 1
