"""Requests that are split into calls for several servers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.remote.peer import Peer, batch, listening, pool, truth
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.engines.base import TokenIds
from taskvec.engines.remote.engine import MAX_CALL_TEXTS, MAX_CALL_TOKENS, split


def texts(*lengths: int) -> list[TokenIds]:
    """Return texts of these lengths."""
    return [np.ones(length, dtype=np.int32) for length in lengths]


@given(
    st.lists(st.integers(1, 40) | st.integers(1, 40_000), min_size=1, max_size=300),
    st.integers(0, 20),
)
def test_calls_cover_the_request_in_order(lengths: list[int], servers: int) -> None:
    """Every text is in one call, in order, and calls respect both limits."""
    ids = texts(*lengths)
    parts = split(ids, servers)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(len(ids)))
    for part in parts:
        assert 1 <= part.stop - part.start <= MAX_CALL_TEXTS
        tokens = sum(map(len, ids[part]))
        assert tokens <= MAX_CALL_TOKENS or part.stop - part.start == 1


@given(st.integers(1, 64), st.integers(1, 200), st.integers(0, 5))
def test_a_small_request_is_not_split(count: int, length: int, servers: int) -> None:
    """A request that is small for one call and the number of servers is not split."""
    ids = texts(*[length] * count)
    if count * length <= MAX_CALL_TOKENS // max(1, servers):
        assert split(ids, servers) == [slice(0, count)]


@pytest.mark.parametrize(
    ("lengths", "servers", "calls"),
    [
        ([1] * 64, 8, 1),
        ([1] * 65, 1, 2),
        ([1] * 128, 2, 2),
        ([256] * 64, 1, 1),
        ([256] * 64, 2, 2),
        ([256] * 64, 4, 4),
        ([MAX_CALL_TOKENS], 4, 1),
        ([MAX_CALL_TOKENS + 1], 1, 1),
        ([MAX_CALL_TOKENS, 1, MAX_CALL_TOKENS], 1, 3),
    ],
)
def test_the_work_is_shared_evenly(lengths: list[int], servers: int, calls: int) -> None:
    """A large request is split into one call per server, or more if the limits require it."""
    assert len(split(texts(*lengths), servers)) == calls


@pytest.mark.anyio
@pytest.mark.parametrize("protocol", ["vllm", "taskvec"])
async def test_a_large_request_goes_to_both_servers(
    default_checkpoint: Checkpoint, tmp_path: Path, protocol: str
) -> None:
    """Of 200 texts, each server gets calls of at most 64, and the order is kept."""
    peers = [Peer(default_checkpoint, protocol=protocol) for _ in range(2)]
    async with listening(*peers), pool(default_checkpoint, tmp_path, *peers) as (engine, _):
        asked = batch(200)
        answer = await engine.embed(asked)
    assert np.array_equal(answer.vectors, truth(asked, engine.model.dimension))
    assert answer.vectors.dtype == np.float32
    assert all(len(ids) <= 64 for peer in peers for ids, _ in peer.calls)
    assert sum(len(ids) for peer in peers for ids, _ in peer.calls) == 200
    assert all(peer.calls for peer in peers)


@pytest.mark.anyio
async def test_balance_prefers_the_idle_server(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """While one server computes a long text, short texts go to the other."""
    peers = [Peer(default_checkpoint) for _ in range(2)]
    async with listening(*peers), pool(default_checkpoint, tmp_path, *peers) as (engine, _):
        for peer in peers:
            peer.released.clear()
        slow = asyncio.create_task(engine.embed(batch(1, length=500)))
        async with asyncio.timeout(10):
            while not any(peer.calls for peer in peers):
                await asyncio.sleep(0.01)
        busy, idle = sorted(peers, key=lambda peer: -len(peer.calls))
        idle.released.set()
        for start in range(20):
            await engine.embed(batch(2, start=start + 5))
        assert (len(busy.calls), len(idle.calls)) == (1, 20)
        busy.released.set()
        assert len((await slow).vectors) == 1
