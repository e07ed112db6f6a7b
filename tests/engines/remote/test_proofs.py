"""Cached vectors of engine servers: stored after a check, forgotten when a server fails."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from engines.remote.peer import Peer, batch, listening, pool, serving, until
from taskvec.cache.embeddings import EmbeddingCache
from taskvec.cache.memory import MemoryStore
from taskvec.cache.proven import ProvenStore
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.metrics.registry import Metrics

pytestmark = pytest.mark.anyio


async def test_vectors_of_a_server_that_turns_wrong_are_forgotten(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """What a server gave since its last good check is not in the store once it is found wrong."""
    peer = Peer(default_checkpoint)
    async with (
        listening(peer),
        pool(default_checkpoint, tmp_path, peer, check_seconds=0.3) as (engine, metrics),
    ):
        memory = MemoryStore(1 << 20, Metrics([]))
        store = ProvenStore(memory)
        engine.watch_proofs(store)
        cache = EmbeddingCache(
            store, identity=b"", dimension=256, shared=True, observer=Metrics([])
        )

        async def embed(start: int) -> list[bytes]:
            asked = batch(2, start=start)
            lookup = await cache.lookup(asked.ids, asked.adapter, None)
            lookup.vectors[:] = (await engine.embed(asked)).vectors
            cache.store(lookup)
            assert not (await cache.lookup(asked.ids, asked.adapter, None)).missing
            return list(lookup.keys)

        proven = await embed(1)
        assert await memory.get(proven) == [None, None]
        await until(lambda: proven[0] in memory._entries)
        peer.behaviour = "base"  # plausible vectors, of the wrong adapter
        wrong = await embed(10)
        await until(lambda: serving(metrics) == 0)
        assert await store.get(wrong) == [None, None]
        assert None not in await store.get(proven)


async def test_vectors_computed_during_a_failure_are_not_stored() -> None:
    """A request that was being embedded when a server failed may have its vectors."""
    memory = MemoryStore(1 << 20, Metrics([]))
    store = ProvenStore(memory)
    cache = EmbeddingCache(store, identity=b"", dimension=4, shared=True, observer=Metrics([]))

    async def embed(*, failing: bool) -> list[bytes]:
        lookup = await cache.lookup(batch(1, start=int(failing)).ids, None, None)
        if failing:
            store.server_failed()
        lookup.vectors[:] = 1
        cache.store(lookup)
        store.servers_proven(time.monotonic() + 1)
        return list(lookup.keys)

    assert await memory.get(await embed(failing=True)) == [None]
    assert await memory.get(await embed(failing=False)) != [None]
