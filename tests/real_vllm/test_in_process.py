"""vLLM in this process: parity, mixed adapters in one batch, and stop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from synthetic import TINY_NANO, TINY_SMALL, write_checkpoint
from taskvec.checkpoint.checkpoint import Checkpoint, read_checkpoint
from taskvec.engines.base import EngineState, TokenBatch
from taskvec.engines.packed.engine import PackedEngine, PackedOptions
from taskvec.engines.vllm.arguments import VllmOptions
from taskvec.engines.vllm.engine import VllmEngine
from taskvec.errors import CheckpointError, UnavailableError
from vllm_servers import cosines, mixed_batches, unit

LEAST_COSINE = 0.999
OPTIONS = VllmOptions(memory_share=0.15)

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def started(checkpoint: Checkpoint, cache: Path) -> AsyncIterator[VllmEngine]:
    """Run a started engine."""
    engine = VllmEngine(checkpoint, cache, OPTIONS)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def assert_parity(engine: VllmEngine, checkpoint: Checkpoint) -> None:
    """Check vectors of all adapters and lengths against the reference and the packed engine."""
    batches = mixed_batches(checkpoint)
    packed = PackedEngine(checkpoint, PackedOptions(dtype="bfloat16"))
    await packed.start()
    try:
        for engine_side in (engine, packed):
            answers = await asyncio.gather(
                *(engine_side.embed(TokenBatch(ids, adapter)) for adapter, ids in batches)
            )
            for (adapter, ids), answer in zip(batches, answers, strict=True):
                assert answer.vectors.shape == (len(ids), checkpoint.card.dimension)
                found = cosines(checkpoint, adapter, ids, answer.vectors)
                assert found.min() >= LEAST_COSINE, (adapter, found)
    finally:
        await packed.stop()


async def test_the_default_model(default_checkpoint: Checkpoint, cache: Path) -> None:
    """Parity, a long text next to a short one, cancelled requests, and stop, with one engine."""
    async with started(default_checkpoint, cache) as engine:
        await assert_parity(engine, default_checkpoint)

        longest = default_checkpoint.card.max_tokens
        random = np.random.default_rng(2)
        ids = [random.integers(5, 1000, n, dtype=np.int32) for n in (2, longest, 3)]
        async with asyncio.timeout(120):
            answer = await engine.embed(TokenBatch(ids, "retrieval"))
        alone = await engine.embed(TokenBatch(ids[:1], "retrieval"))
        assert float(unit(answer.vectors[:1])[0] @ unit(alone.vectors)[0]) >= LEAST_COSINE

        leaving = asyncio.create_task(engine.embed(TokenBatch(ids * 50, "clustering")))
        await asyncio.sleep(0.05)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        after = await engine.embed(TokenBatch(ids[:1], "retrieval"))
        assert float(unit(after.vectors)[0] @ unit(alone.vectors)[0]) >= LEAST_COSINE

        staying = asyncio.create_task(engine.embed(TokenBatch(ids[:1] * 20, "clustering")))
        await asyncio.sleep(0)
        await engine.stop()
        assert (await staying).vectors.shape[0] == 20
        assert engine.health().state is EngineState.DEAD
        with pytest.raises(UnavailableError):
            await engine.embed(TokenBatch(ids[:1], "retrieval"))


@pytest.mark.parametrize("shape", [TINY_SMALL, TINY_NANO], ids=["small", "nano"])
async def test_both_architectures(tmp_path: Path, shape: object) -> None:
    """Causal and bidirectional backbones serve one adapter per request."""
    checkpoint = read_checkpoint(write_checkpoint(tmp_path / "model", shape), "synthetic")
    async with started(checkpoint, tmp_path) as engine:
        await assert_parity(engine, checkpoint)


async def test_wrong_vectors_fail_the_start(default_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """If vectors differ from the golden vectors, the start fails and names alternatives."""
    extra = {"hf_overrides": {"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}}}
    engine = VllmEngine(default_checkpoint, tmp_path, VllmOptions(memory_share=0.15, extra=extra))
    with pytest.raises(CheckpointError, match=r"adapter .* gives wrong vectors.*--engine packed"):
        await engine.start()
    assert engine.health().state is EngineState.DEAD
    await engine.stop()
