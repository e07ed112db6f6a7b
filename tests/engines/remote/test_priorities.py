"""Bulk requests to a pool: few concurrent calls, so that interactive calls do not wait."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engines.remote.peer import Peer, batch, ended, listening, pool, truth, until
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.engines.remote.engine import MAX_CALL_TEXTS, MAX_CALL_TOKENS
from taskvec.engines.remote.pool_server import MAX_BULK_CALLS
from taskvec.errors import UnavailableError
from taskvec.priority import Priority

MANY = MAX_CALL_TEXTS * (2 * MAX_BULK_CALLS + 1)


@pytest.mark.anyio
@pytest.mark.parametrize("protocol", ["vllm", "taskvec"])
async def test_bulk_calls_are_limited(
    default_checkpoint: Checkpoint, tmp_path: Path, protocol: str
) -> None:
    """An interactive call is sent while the maximum of bulk calls is in progress."""
    peer = Peer(default_checkpoint, protocol=protocol)
    asked = replace(batch(MANY), priority=Priority.BULK)
    async with listening(peer), pool(default_checkpoint, tmp_path, peer) as (engine, _):
        peer.released.clear()
        bulk = asyncio.create_task(engine.embed(asked))
        await until(lambda: len(peer.calls) == MAX_BULK_CALLS)
        other = asyncio.create_task(engine.embed(batch(1, start=5000)))
        await until(lambda: len(peer.calls) == MAX_BULK_CALLS + 1)
        assert len(peer.calls[-1][0]) == 1, "the interactive one, not more bulk"
        peer.released.set()
        answers = await bulk
        await other
    assert np.array_equal(answers.vectors, truth(asked, default_checkpoint.card.dimension))
    if protocol == "taskvec":
        assert peer.priorities.count("bulk") == len(peer.calls) - 1


@pytest.mark.anyio
async def test_every_call_of_a_request_has_its_class(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """A bulk request that is split into many calls is bulk in each of them."""
    peer = Peer(default_checkpoint, protocol="taskvec")
    asked = replace(batch(MANY, length=MAX_CALL_TOKENS // MANY + 1), priority=Priority.BULK)
    async with listening(peer), pool(default_checkpoint, tmp_path, peer) as (engine, _):
        await engine.embed(asked)
    assert set(peer.priorities[-len(peer.calls) :]) == {"bulk"}


@pytest.mark.anyio
async def test_cancelled_bulk_releases_its_calls(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """After a cancelled bulk request, the next bulk request is answered."""
    peer = Peer(default_checkpoint, protocol="vllm")
    asked = replace(batch(MANY), priority=Priority.BULK)
    async with listening(peer), pool(default_checkpoint, tmp_path, peer) as (engine, metrics):
        peer.released.clear()
        left = asyncio.create_task(engine.embed(asked))
        await until(lambda: len(peer.calls) == MAX_BULK_CALLS)
        left.cancel()
        await until(lambda: ended(metrics, "abandoned") == MAX_BULK_CALLS)
        peer.released.set()
        answer = await engine.embed(asked)
    assert np.array_equal(answer.vectors, truth(asked, default_checkpoint.card.dimension))


@pytest.mark.anyio
async def test_bulk_waits_for_a_busy_server(default_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A bulk call that gets a 429 is sent again."""
    peer = Peer(default_checkpoint, protocol="taskvec")
    asked = replace(batch(MANY), priority=Priority.BULK)
    async with listening(peer), pool(default_checkpoint, tmp_path, peer) as (engine, metrics):
        peer.behaviour = "429"
        bulk = asyncio.create_task(engine.embed(asked))
        await until(lambda: ended(metrics, "busy") >= MAX_BULK_CALLS)
        assert not bulk.done()
        peer.behaviour = "honest"
        answer = await bulk
    assert np.array_equal(answer.vectors, truth(asked, default_checkpoint.card.dimension))


@pytest.mark.anyio
async def test_bulk_detects_a_hung_server(default_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A bulk call that times out opens the circuit."""
    peer = Peer(default_checkpoint)
    asked = replace(batch(3), priority=Priority.BULK)
    async with (
        listening(peer),
        pool(default_checkpoint, tmp_path, peer, call_seconds=1.0) as (engine, metrics),
    ):
        peer.behaviour = "silent"
        with pytest.raises(UnavailableError):
            await engine.embed(asked)
        assert ended(metrics, "timeout", peer) >= 1
        assert not engine.health().ready
