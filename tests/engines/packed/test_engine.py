"""Behaviour of the packed engine: vectors, fairness, cancellation, deadlines and stop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from conftest import DEFAULT_VOCABULARY
from synthetic import ADAPTERS, TINY_NANO, TINY_SMALL, write_checkpoint
from taskvec.checkpoint.checkpoint import Checkpoint, read_checkpoint
from taskvec.engines.base import EngineResult, EngineState, TokenBatch, TokenIds
from taskvec.engines.packed.engine import PackedEngine, PackedOptions
from taskvec.engines.packed.transformer import Transformer
from taskvec.engines.packed.weights import AnyTransformer, load_transformer
from taskvec.errors import CheckpointError, DeadlineExceededError, StartError, UnavailableError

FP32_DIFFERENCE = 1e-5
FP32 = PackedOptions(dtype="float32")
HUGE_STACK = 1 << 46
"""Bytes of a thread's stack that no system has: half of the address space."""


class Observed:
    """An observer that records the reports of an engine."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, int]] = []
        self.dropped: dict[str, int] = {}
        self.queued = (0, 0)
        self.oldest: list[float | None] = []

    def queue_changed(self, texts: int, tokens: int, oldest: float | None) -> None:
        assert (oldest is None) == (texts == 0)
        self.queued = (texts, tokens)
        self.oldest.append(oldest)

    def batch_started(self, waited: Sequence[float]) -> None:
        assert all(seconds >= 0 for seconds in waited)

    def batch_finished(self, texts: int, tokens: int, seconds: float, budget: int) -> None:
        assert seconds > 0
        assert texts == 1 or tokens <= budget
        self.batches.append((texts, tokens))

    def forward_paused(self, seconds: float) -> None:
        assert seconds > 0

    def memory_ran_out(self, budget: int) -> None:
        raise AssertionError(f"the budget fell to {budget}: these tests need their memory")

    def texts_dropped(self, reason: str, texts: int) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + texts


@pytest.fixture(scope="module", params=["small", "nano"])
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    """A tiny checkpoint of each architecture."""
    shape = {"small": TINY_SMALL, "nano": TINY_NANO}[request.param]
    folder = tmp_path_factory.mktemp(request.param) / "checkpoint"
    write_checkpoint(folder, replace(shape, vocabulary=DEFAULT_VOCABULARY))
    return read_checkpoint(folder, request.param)


@pytest.fixture(scope="module")
def transformer(checkpoint: Checkpoint) -> Transformer:
    """The checkpoint, loaded in float32."""
    return load_transformer(
        checkpoint, device=torch.device("cpu"), dtype=torch.float32, merge=False
    )


TEXT = st.tuples(
    st.integers(min_value=1, max_value=400),
    st.integers(min_value=0, max_value=2**31),
    st.sampled_from([None, *ADAPTERS]),
)


@settings(max_examples=25)
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
    assert np.abs(together[chosen] - alone[0]).max() <= FP32_DIFFERENCE
    order = data.draw(st.permutations(range(len(texts))))
    shuffled = unit(transformer.embed([ids[i] for i in order], [adapters[i] for i in order]))
    assert np.abs(shuffled - together[list(order)]).max() <= FP32_DIFFERENCE


@pytest.mark.anyio
async def test_concurrent_requests_get_their_own_vectors(
    checkpoint: Checkpoint, transformer: Transformer
) -> None:
    """Each of two hundred concurrent requests with different adapters gets its own vectors."""
    async with running(checkpoint, FP32) as (engine, observed):
        batches = [
            TokenBatch([random_ids(5 + n % 90, n), random_ids(9, 1000 + n)], ADAPTERS[n % 4])
            for n in range(200)
        ]
        results = await asyncio.gather(*(engine.embed(batch) for batch in batches))
    for batch, result in zip(batches, results, strict=True):
        truth = unit(transformer.embed(batch.ids, [batch.adapter] * 2))
        assert np.abs(unit(result.vectors) - truth).max() <= FP32_DIFFERENCE
    assert sum(texts for texts, _ in observed.batches) == 400
    assert len(observed.batches) < 100, "requests share forwards"


@pytest.mark.anyio
async def test_a_batch_keeps_its_token_budget(checkpoint: Checkpoint) -> None:
    """A forward has more tokens than the budget only if it is one longer text."""
    options = replace(FP32, max_batch_tokens=100)
    async with running(checkpoint, options) as (engine, observed):
        await engine.embed(TokenBatch([random_ids(n, n) for n in range(1, 60)], "retrieval"))
        await engine.embed(TokenBatch([random_ids(300, 1), random_ids(5, 2)], "retrieval"))
    over = [texts for texts, tokens in observed.batches if tokens > 100]
    assert over == [1]


@pytest.mark.anyio
async def test_a_small_request_overtakes_a_big_one(checkpoint: Checkpoint) -> None:
    """One text that is sent after two thousand is answered long before them."""
    options = replace(FP32, max_batch_tokens=512)
    async with running(checkpoint, options) as (engine, observed):
        big = await big_request_under_way(engine, observed)
        before = len(observed.batches)
        await engine.embed(TokenBatch([random_ids(16, 9)], "retrieval"))
        assert len(observed.batches) - before <= 3
        assert not big.done()
        await big


@pytest.mark.anyio
async def test_cancelled_texts_leave_the_queue(checkpoint: Checkpoint) -> None:
    """The queued texts of a cancelled request are dropped."""
    options = replace(FP32, max_batch_tokens=512)
    async with running(checkpoint, options) as (engine, observed):
        big = await big_request_under_way(engine, observed)
        big.cancel()
        await engine.embed(TokenBatch([random_ids(16, 9)], "retrieval"))
    assert big.cancelled()
    embedded = sum(texts for texts, _ in observed.batches)
    assert observed.dropped == {"cancelled": 2048 + 1 - embedded}
    assert observed.dropped["cancelled"] > 1000
    assert observed.queued == (0, 0)


@pytest.mark.anyio
async def test_expired_texts_are_dropped_before_a_forward(checkpoint: Checkpoint) -> None:
    """A request with an expired deadline fails and is not embedded."""
    async with running(checkpoint, FP32) as (engine, observed):
        with pytest.raises(DeadlineExceededError):
            await engine.embed(
                TokenBatch([random_ids(5, 1)], "retrieval", deadline=time.monotonic() - 1)
            )
    assert observed.dropped == {"expired": 1}
    assert observed.batches == []


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
    async with running(checkpoint, FP32) as (engine, observed):
        with pytest.raises(Exception, match="engine failed"):
            await engine.embed(
                TokenBatch([np.array([DEFAULT_VOCABULARY + 5], np.int32)], "retrieval")
            )
        result = await engine.embed(TokenBatch([random_ids(5, 1)], "retrieval"))
        assert result.vectors.shape == (1, checkpoint.card.dimension)
    assert observed.dropped == {"failed": 1}


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


@asynccontextmanager
async def running(
    checkpoint: Checkpoint, options: PackedOptions
) -> AsyncIterator[tuple[PackedEngine, Observed]]:
    """Run an engine with an observer."""
    observed = Observed()
    engine = PackedEngine(checkpoint, options, observed)
    await engine.start()
    try:
        yield engine, observed
    finally:
        await engine.stop()


async def big_request_under_way(
    engine: PackedEngine, observed: Observed
) -> asyncio.Task[EngineResult]:
    """Start a request of two thousand texts, and wait for its first forward."""
    big = asyncio.create_task(
        engine.embed(TokenBatch([random_ids(16, n) for n in range(2048)], "clustering"))
    )
    while not observed.batches:
        await asyncio.sleep(0.001)
    return big


def random_ids(length: int, seed: int) -> TokenIds:
    """Return random ids."""
    return np.random.default_rng(seed).integers(0, DEFAULT_VOCABULARY, length, dtype=np.int32)


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return normalised vectors."""
    normalised: NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return normalised
