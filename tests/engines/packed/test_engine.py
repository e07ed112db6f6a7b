"""Behaviour of the packed engine: vectors, fairness, cancellation, deadlines and stop."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import DEFAULT_VOCABULARY, examples
from synthetic import ADAPTERS, TINY_NANO, TINY_SMALL, write_checkpoint
from taskvec.cgroups import has_quota
from taskvec.checkpoint.checkpoint import Checkpoint, read_checkpoint
from taskvec.engines.base import EngineResult, EngineState, TokenBatch
from taskvec.engines.packed.engine import PackedEngine
from taskvec.engines.packed.transformer import Transformer
from taskvec.engines.packed.weights import AnyTransformer
from taskvec.errors import CheckpointError, DeadlineExceededError, StartError, UnavailableError
from tinyengines import (
    DIFFERENCE,
    FP32,
    Recorder,
    load_reference,
    random_ids,
    recording,
    tiny_checkpoint,
    unit,
)

HUGE_STACK = 1 << 46
"""Bytes of a thread's stack that no system has: half of the address space."""


@pytest.fixture(scope="module", params=["small", "nano"])
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    """A tiny checkpoint of each architecture."""
    shape = {"small": TINY_SMALL, "nano": TINY_NANO}[request.param]
    return tiny_checkpoint(tmp_path_factory.mktemp("engine") / request.param, shape)


@pytest.fixture(scope="module")
def transformer(checkpoint: Checkpoint) -> Transformer:
    """The checkpoint, loaded in float32."""
    return load_reference(checkpoint)


TEXT = st.tuples(
    st.integers(min_value=1, max_value=400),
    st.integers(min_value=0, max_value=2**31),
    st.sampled_from([None, *ADAPTERS]),
)


@settings(max_examples=examples(25))
@given(texts=st.lists(TEXT, min_size=1, max_size=24), data=st.data())
def test_a_vector_does_not_depend_on_its_batch(
    transformer: Transformer, texts: list[tuple[int, int, str | None]], data: st.DataObject
) -> None:
    """The vector of a text does not depend on the other texts, their order or their adapters."""
    ids = [random_ids(length, seed) for length, seed, _ in texts]
    adapters = [adapter for *_, adapter in texts]
    together = unit(transformer.embed(ids, adapters))
    chosen = data.draw(st.integers(min_value=0, max_value=len(texts) - 1))
    alone = unit(transformer.embed([ids[chosen]], [adapters[chosen]]))
    assert np.abs(together[chosen] - alone[0]).max() <= DIFFERENCE
    order = data.draw(st.permutations(range(len(texts))))
    shuffled = unit(transformer.embed([ids[i] for i in order], [adapters[i] for i in order]))
    assert np.abs(shuffled - together[list(order)]).max() <= DIFFERENCE


@pytest.mark.anyio
async def test_concurrent_requests_get_their_own_vectors(
    checkpoint: Checkpoint, transformer: Transformer
) -> None:
    """Each of two hundred concurrent requests with different adapters gets its own vectors."""
    async with recording(checkpoint, FP32) as (engine, recorder):
        batches = [
            TokenBatch([random_ids(5 + n % 90, n), random_ids(9, 1000 + n)], ADAPTERS[n % 4])
            for n in range(200)
        ]
        results = await asyncio.gather(*(engine.embed(batch) for batch in batches))
    for batch, result in zip(batches, results, strict=True):
        truth = unit(transformer.embed(batch.ids, [batch.adapter] * 2))
        assert np.abs(unit(result.vectors) - truth).max() <= DIFFERENCE
    assert sum(texts for texts, _ in recorder.batches) == 400
    assert len(recorder.batches) < 100, "requests share forwards"


@pytest.mark.anyio
async def test_a_batch_keeps_its_token_budget(checkpoint: Checkpoint) -> None:
    """A forward has more tokens than the budget only if it is one longer text."""
    options = replace(FP32, max_batch_tokens=100)
    async with recording(checkpoint, options) as (engine, recorder):
        await engine.embed(TokenBatch([random_ids(n, n) for n in range(1, 60)], "retrieval"))
        await engine.embed(TokenBatch([random_ids(300, 1), random_ids(5, 2)], "retrieval"))
    over = [texts for texts, tokens in recorder.batches if tokens > 100]
    assert over == [1]


@pytest.mark.anyio
async def test_a_small_request_overtakes_a_big_one(checkpoint: Checkpoint) -> None:
    """One text that is sent after two thousand is answered long before them."""
    options = replace(FP32, max_batch_tokens=512)
    async with recording(checkpoint, options) as (engine, recorder):
        big = await big_request_under_way(engine, recorder)
        before = len(recorder.batches)
        await engine.embed(TokenBatch([random_ids(16, 9)], "retrieval"))
        assert len(recorder.batches) - before <= 3
        assert not big.done()
        await big


@pytest.mark.anyio
async def test_the_queue_is_reported_empty_when_its_only_request_is_cancelled(
    checkpoint: Checkpoint,
) -> None:
    """No further request is needed for it."""
    options = replace(FP32, max_batch_tokens=512)
    async with recording(checkpoint, options) as (engine, recorder):
        big = await big_request_under_way(engine, recorder)
        big.cancel()
        async with asyncio.timeout(20):
            while recorder.queued != (0, 0):
                await asyncio.sleep(0.01)


@pytest.mark.anyio
async def test_cancelled_texts_leave_the_queue(checkpoint: Checkpoint) -> None:
    """The queued texts of a cancelled request are dropped."""
    options = replace(FP32, max_batch_tokens=512)
    async with recording(checkpoint, options) as (engine, recorder):
        big = await big_request_under_way(engine, recorder)
        big.cancel()
        await engine.embed(TokenBatch([random_ids(16, 9)], "retrieval"))
    assert big.cancelled()
    embedded = sum(texts for texts, _ in recorder.batches)
    assert recorder.dropped == {"cancelled": 2048 + 1 - embedded}
    assert recorder.dropped["cancelled"] > 1000
    assert recorder.queued == (0, 0)


@pytest.mark.anyio
async def test_expired_texts_are_dropped_before_a_forward(checkpoint: Checkpoint) -> None:
    """A request with an expired deadline fails and is not embedded."""
    async with recording(checkpoint, FP32) as (engine, recorder):
        with pytest.raises(DeadlineExceededError):
            await engine.embed(
                TokenBatch([random_ids(5, 1)], "retrieval", deadline=time.monotonic() - 1)
            )
    assert recorder.dropped == {"expired": 1}
    assert recorder.batches == []


@pytest.mark.anyio
async def test_stop_answers_admitted_requests(checkpoint: Checkpoint) -> None:
    """Stopping finishes queued texts and rejects new ones; afterwards the engine is dead."""
    options = replace(FP32, max_batch_tokens=256)
    engine = PackedEngine(checkpoint, options)
    await engine.start()
    waiting = [
        asyncio.create_task(engine.embed(TokenBatch([random_ids(64, n)] * 8, "retrieval")))
        for n in range(20)
    ]
    await asyncio.sleep(0)
    stopping = asyncio.create_task(engine.stop())
    await asyncio.sleep(0)
    with pytest.raises(UnavailableError) as refused:
        await engine.embed(TokenBatch([random_ids(4, 1)], "retrieval"))
    assert refused.value.code == "draining"
    await stopping
    results = await asyncio.gather(*waiting)
    assert all(np.isfinite(result.vectors).all() for result in results)
    assert engine.health().state is EngineState.DEAD


@pytest.mark.anyio
async def test_a_failed_forward_fails_only_its_requests(checkpoint: Checkpoint) -> None:
    """A failed forward is reported to its callers, and the engine continues."""
    async with recording(checkpoint, FP32) as (engine, recorder):
        with pytest.raises(Exception, match="engine failed"):
            await engine.embed(
                TokenBatch([np.array([DEFAULT_VOCABULARY + 5], np.int32)], "retrieval")
            )
        result = await engine.embed(TokenBatch([random_ids(5, 1)], "retrieval"))
        assert result.vectors.shape == (1, checkpoint.card.dimension)
    assert recorder.dropped == {"failed": 1}


class StarvedEngine(PackedEngine):
    """From a point on, the system has no room for the stack of a further thread."""

    def __init__(self, checkpoint: Checkpoint, *, threads: int) -> None:
        super().__init__(checkpoint, FP32)
        if not threads:
            threading.stack_size(HUGE_STACK)

    def _make_workers(self, transformer: AnyTransformer) -> None:
        super()._make_workers(transformer)
        threading.stack_size(HUGE_STACK)


@pytest.mark.anyio
@pytest.mark.parametrize("threads", [0, 1])
async def test_an_engine_without_its_threads_does_not_start(
    checkpoint: Checkpoint, threads: int
) -> None:
    """It is never ready, the start says why, and it can be stopped."""
    before = threading.stack_size()
    try:
        engine = StarvedEngine(checkpoint, threads=threads)
        with pytest.raises(StartError, match="thread of the engine could not be started"):
            await engine.start()
    finally:
        threading.stack_size(before)
    assert engine.health().state is EngineState.DEAD
    async with asyncio.timeout(20):
        await engine.stop()


@pytest.mark.anyio
async def test_no_thread_starts_once_the_program_ends(checkpoint: Checkpoint) -> None:
    """A thread that nobody waits for would be computing when the interpreter ends."""
    engine = PackedEngine(checkpoint, FP32)
    engine.stop_at_exit(0)
    with pytest.raises(StartError, match="the program ends"):
        await engine.start()
    assert not engine._threads


@pytest.mark.anyio
async def test_requests_before_the_start_are_rejected(checkpoint: Checkpoint) -> None:
    """An engine that has not started rejects requests with the code starting."""
    engine = PackedEngine(checkpoint, FP32)
    with pytest.raises(UnavailableError) as refused:
        await engine.embed(TokenBatch([random_ids(4, 1)], "retrieval"))
    assert refused.value.code == "starting"


@pytest.mark.anyio
@pytest.mark.parametrize("fault", ["empty", "copy"])
@pytest.mark.parametrize("mode", ["merged", "low-rank"])
async def test_an_adapter_without_effect_fails_the_start(
    tmp_path: Path, fault: str, mode: str
) -> None:
    """An adapter without effect, or a copy of another, fails the start and is named."""
    from safetensors.torch import load_file, save_file  # noqa: PLC0415 - one test needs it

    folder = write_checkpoint(
        tmp_path / "checkpoint", replace(TINY_SMALL, vocabulary=DEFAULT_VOCABULARY)
    )
    weights = folder / "adapters" / "clustering" / "adapter_model.safetensors"
    if fault == "empty":
        tensors = load_file(weights)
        save_file(
            {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in tensors.items()}, weights
        )
    else:
        weights.write_bytes((folder / "adapters" / "retrieval" / weights.name).read_bytes())
    engine = PackedEngine(read_checkpoint(folder, "broken"), replace(FP32, adapter_mode=mode))
    with pytest.raises(CheckpointError, match="'clustering'"):
        await engine.start()
    assert engine.health().state is EngineState.DEAD


async def big_request_under_way(
    engine: PackedEngine, recorder: Recorder
) -> asyncio.Task[EngineResult]:
    """Start a request of two thousand texts, and wait for its first forward."""
    big = asyncio.create_task(
        engine.embed(TokenBatch([random_ids(16, n) for n in range(2048)], "clustering"))
    )
    while not recorder.batches:
        await asyncio.sleep(0.001)
    return big


@pytest.mark.anyio
async def test_processor_time_is_of_all_forward_passes(checkpoint: Checkpoint) -> None:
    """A result has the processor time of a thread in all its passes, not more than they took."""
    engine = PackedEngine(checkpoint, replace(FP32, max_batch_tokens=256))
    await engine.start()
    try:
        ids = np.split(np.arange(64 * 64, dtype=np.int32) % DEFAULT_VOCABULARY, 64)
        before = time.process_time()
        result = await engine.embed(TokenBatch(ids, None))
        used = time.process_time() - before
    finally:
        await engine.stop()
    assert 0.1 * used < result.forward <= result.computed
    if has_quota():  # processor time would not include the time without a processor
        assert result.processor == math.inf
    else:
        assert 0.1 * used < result.processor <= min(used, result.forward) + 0.001
