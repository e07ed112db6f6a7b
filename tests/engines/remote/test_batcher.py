"""Small calls that travel together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from engines.remote.peer import Peer, batch, ended, listening, pool, truth, until
from fakes import hashed_vector
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.engines.base import CallOutcome, TokenIds
from taskvec.engines.remote.batcher import MAX_CALLS, MAX_TEXTS, CallBatcher
from taskvec.engines.remote.client import ServerCallError
from taskvec.engines.remote.protocols import Vectors

WIDTH = 8


class Road:
    """What a batcher sends over: each call waits until ``open`` is set."""

    def __init__(self) -> None:
        self.sent: list[tuple[list[TokenIds], list[str | None], float]] = []
        self.open = asyncio.Event()
        self.fault: ServerCallError | None = None
        self.closed = 0

    async def send(
        self, texts: Sequence[TokenIds], adapters: Sequence[str | None], seconds: float
    ) -> Vectors:
        self.sent.append((list(texts), list(adapters), seconds))
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.closed += 1
            raise
        if self.fault is not None:
            raise self.fault
        pairs = zip(texts, adapters, strict=True)
        return np.stack([hashed_vector(*pair, WIDTH) for pair in pairs])


def submit(
    batcher: CallBatcher, number: int, adapter: str | None = "a", seconds: float = 20
) -> asyncio.Task[Vectors]:
    """One parcel on its way: two texts."""
    return asyncio.create_task(batcher.submit(texts(number), adapter, seconds))


def texts(number: int) -> list[TokenIds]:
    """Two texts that belong to this number alone."""
    return [np.array([number, i], dtype=np.int32) for i in range(2)]


def right(number: int, adapter: str | None) -> Vectors:
    """Their vectors."""
    return np.stack([hashed_vector(text, adapter, WIDTH) for text in texts(number)])


@pytest.mark.anyio
async def test_what_waits_travels_together() -> None:
    """The first parcels go alone; those that arrive meanwhile share one call, each gets its own."""
    road = Road()
    batcher = CallBatcher(road.send)
    adapters = ["a", None, "b"]
    parcels = [submit(batcher, i, adapters[i % 3]) for i in range(12)]
    await asyncio.sleep(0.01)
    assert [len(sent) for sent, *_ in road.sent] == [2] * MAX_CALLS
    road.open.set()
    for i, parcel in enumerate(parcels):
        assert np.array_equal(await parcel, right(i, adapters[i % 3]))
    assert len(road.sent) == MAX_CALLS + 1
    assert road.sent[-1][1][:4] == ["b", "b", "a", "a"]


@pytest.mark.anyio
async def test_a_trip_has_room_for_so_many() -> None:
    """However many wait, a call carries 64 texts at most."""
    road = Road()
    batcher = CallBatcher(road.send)
    parcels = [submit(batcher, i) for i in range(100)]
    await asyncio.sleep(0.01)
    road.open.set()
    await asyncio.gather(*parcels)
    sizes = [len(sent) for sent, *_ in road.sent]
    assert max(sizes) == MAX_TEXTS
    assert sum(sizes) == 200
    assert len(sizes) == MAX_CALLS + 4


@pytest.mark.anyio
async def test_abandoned_parcels_are_not_sent() -> None:
    """What nobody waits for any more when its call starts is left out of it."""
    road = Road()
    batcher = CallBatcher(road.send)
    parcels = [submit(batcher, i) for i in range(MAX_CALLS + 3)]
    await asyncio.sleep(0.01)
    parcels[MAX_CALLS].cancel()
    await asyncio.sleep(0.01)
    road.open.set()
    done = await asyncio.gather(*parcels, return_exceptions=True)
    assert isinstance(done[MAX_CALLS], asyncio.CancelledError)
    last = [int(text[0]) for text in road.sent[-1][0]]
    assert last == [MAX_CALLS + 1, MAX_CALLS + 1, MAX_CALLS + 2, MAX_CALLS + 2]


@pytest.mark.anyio
async def test_a_call_nobody_waits_for_is_closed() -> None:
    """It is closed when its last parcel is withdrawn, not before, and makes room for others."""
    road = Road()
    batcher = CallBatcher(road.send)
    first = [submit(batcher, i) for i in range(MAX_CALLS)]
    await asyncio.sleep(0.01)
    pair = [submit(batcher, 7), submit(batcher, 8)]
    await asyncio.sleep(0.01)
    first[0].cancel()
    await until(lambda: len(road.sent) == MAX_CALLS + 1)
    assert road.closed == 1
    pair[0].cancel()
    await asyncio.sleep(0.01)
    assert road.closed == 1
    road.open.set()
    assert np.array_equal(await pair[1], right(8, "a"))
    assert np.array_equal(await first[1], right(1, "a"))


@pytest.mark.anyio
async def test_a_failed_call_is_told_to_all_in_it() -> None:
    """Each of those who shared it learns the reason, and the next call is made."""
    road = Road()
    batcher = CallBatcher(road.send)
    road.fault = ServerCallError(CallOutcome.ERROR, "status 500: no, sorry")
    parcels = [submit(batcher, i) for i in range(MAX_CALLS + 2)]
    road.open.set()
    done = await asyncio.gather(*parcels, return_exceptions=True)
    assert [getattr(fault, "outcome", None) for fault in done] == [CallOutcome.ERROR] * (
        MAX_CALLS + 2
    )
    assert {str(fault) for fault in done} == {"status 500: no, sorry"}
    assert len({id(fault) for fault in done}) == len(done)
    road.fault = None
    assert np.array_equal(await submit(batcher, 9), right(9, "a"))


@pytest.mark.anyio
async def test_one_who_waits_too_long_goes_alone() -> None:
    """A parcel's own limit ends its wait, on its way or before, and nobody else's."""
    road = Road()
    batcher = CallBatcher(road.send)
    patient = [submit(batcher, i) for i in range(MAX_CALLS)]
    await asyncio.sleep(0.01)
    hasty = submit(batcher, 9, seconds=0.05)
    with pytest.raises(ServerCallError, match=r"no answer within 0\.05 seconds") as raised:
        await hasty
    assert raised.value.outcome is CallOutcome.TIMEOUT
    road.open.set()
    await asyncio.gather(*patient)
    assert len(road.sent) == MAX_CALLS
    assert road.closed == 0


@pytest.mark.anyio
async def test_many_small_requests_share_calls(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """A taskvec server gets far fewer calls than requests, adapters mixed; each gets its own."""
    peer = Peer(default_checkpoint, protocol="taskvec")
    names = default_checkpoint.card.adapters
    async with listening(peer), pool(default_checkpoint, tmp_path, peer) as (engine, metrics):
        before = ended(metrics, "ok")
        peer.held.clear()
        asked = [batch(1 + i % 3, names[i % 4], start=1 + 5 * i) for i in range(100)]
        requests = [asyncio.create_task(engine.embed(each)) for each in asked]
        await until(lambda: len(peer.calls) == MAX_CALLS)
        peer.held.set()
        for each, request in zip(asked, requests, strict=True):
            assert np.array_equal((await request).vectors, truth(each, 256))
        assert ended(metrics, "ok") - before == len(peer.calls) < 10
    assert any(set(adapters) == set(names) for _, adapters in peer.calls)


@pytest.mark.anyio
async def test_large_requests_do_not_wait_for_small_ones(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """A request of more than eight texts is a call of its own, at once; so is any for vLLM."""
    for protocol, count in (("taskvec", 9), ("vllm", 1)):
        peer = Peer(default_checkpoint, protocol=protocol)
        async with listening(peer), pool(default_checkpoint, tmp_path, peer) as (engine, _):
            peer.held.clear()
            asked = [batch(count, start=1 + 20 * i) for i in range(6)]
            requests = [asyncio.create_task(engine.embed(each)) for each in asked]
            await until(lambda peer=peer: len(peer.calls) == 6)
            peer.held.set()
            for each, request in zip(asked, requests, strict=True):
                assert np.array_equal((await request).vectors, truth(each, 256))
