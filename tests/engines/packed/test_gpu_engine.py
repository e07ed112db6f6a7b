"""The packed engine with the forward pass for GPUs, which runs here on the CPU with plain torch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from synthetic import ADAPTERS
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.engines.base import EngineState, TokenBatch, TokenIds
from taskvec.engines.packed import engine as engine_module
from taskvec.engines.packed.gpu import GpuTransformer
from taskvec.engines.packed.transformer import Transformer
from taskvec.errors import TaskvecError, UnavailableError
from tinyengines import FP32, check, load_reference, running, tiny_checkpoint

FAILING_ID = 13
"""A forward pass with this token fails while it is waited for, as an error on a device does."""


class RecordedTransformer(GpuTransformer):
    """Records how many forward passes are started and not finished."""

    unfinished = 0
    most_unfinished = 0
    memory = 10**9
    dies = False

    def start(
        self, ids: Sequence[TokenIds], adapters: Sequence[str | None]
    ) -> Callable[[], NDArray[np.float32]]:
        if self.dies:
            raise KeyboardInterrupt
        if sum(map(len, ids)) > self.memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        wait = super().start(ids, adapters)
        self.unfinished += 1
        self.most_unfinished = max(self.most_unfinished, self.unfinished)

        def recorded() -> NDArray[np.float32]:
            self.unfinished -= 1
            if any((text == FAILING_ID).any() for text in ids):
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return wait()

        return recorded


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("gpu") / "checkpoint")


@pytest.fixture(scope="module")
def reference(checkpoint: Checkpoint) -> Transformer:
    return load_reference(checkpoint)


@pytest.fixture
def recorded(
    reference: Transformer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RecordedTransformer]:
    """The transformer that the engine loads."""
    transformer = RecordedTransformer(
        reference.backbone, reference._embedding, reference.layers, reference._final_norm
    )
    monkeypatch.setattr(engine_module, "load_transformer", lambda *_, **__: transformer)
    yield transformer
    assert transformer.unfinished == 0


def texts(count: int, seed: int) -> list[TokenIds]:
    random = np.random.default_rng(seed)
    return [
        random.integers(100, 5000, length, dtype=np.int32)
        for length in random.integers(1, 90, count)
    ]


@pytest.mark.anyio
async def test_two_forward_passes_are_started(
    checkpoint: Checkpoint, reference: Transformer, recorded: RecordedTransformer
) -> None:
    """One batch is started while another is computed, and every request gets its own vectors."""
    batches = [TokenBatch(texts(7, n), ADAPTERS[n % 4]) for n in range(80)]
    async with running(checkpoint, replace(FP32, max_batch_tokens=512)) as engine:
        results = await asyncio.gather(*map(engine.embed, batches))
        assert engine.finished == 560
    assert recorded.most_unfinished == 2
    for batch, result in zip(batches, results, strict=True):
        check(reference, batch, result)


@pytest.mark.anyio
async def test_a_failed_forward_pass_fails_its_own_requests(
    checkpoint: Checkpoint, recorded: RecordedTransformer
) -> None:
    """A forward pass that fails on the device fails its requests; the others are answered."""
    batches = [TokenBatch(texts(5, n), ADAPTERS[0]) for n in range(60)]
    batches[30].ids[2][:] = FAILING_ID
    async with running(checkpoint, replace(FP32, max_batch_tokens=256)) as engine:
        results = await asyncio.gather(*map(engine.embed, batches), return_exceptions=True)
    assert recorded.most_unfinished == 2
    failed = [i for i, result in enumerate(results) if isinstance(result, BaseException)]
    assert 30 in failed
    assert len(failed) <= 8, "only requests that shared a forward pass with the failing one"
    assert all(isinstance(results[i], TaskvecError) for i in failed)


@pytest.mark.anyio
async def test_out_of_memory_splits_the_batch(
    checkpoint: Checkpoint, reference: Transformer, recorded: RecordedTransformer
) -> None:
    recorded.memory = 200
    batches = [TokenBatch(texts(6, n), ADAPTERS[n % 4]) for n in range(20)]
    async with running(checkpoint, replace(FP32, max_batch_tokens=1024)) as engine:
        results = await asyncio.gather(*map(engine.embed, batches))
    for batch, result in zip(batches, results, strict=True):
        check(reference, batch, result)


@pytest.mark.anyio
async def test_every_request_is_answered_when_the_thread_ends(
    checkpoint: Checkpoint, recorded: RecordedTransformer
) -> None:
    """Requests of started forward passes and waiting requests get an error."""
    async with running(checkpoint, replace(FP32, max_batch_tokens=256)) as engine:
        recorded.dies = True
        batches = [TokenBatch(texts(5, n), ADAPTERS[0]) for n in range(40)]
        results = await asyncio.gather(*map(engine.embed, batches), return_exceptions=True)
        assert all(isinstance(result, UnavailableError) for result in results)
        assert engine.health().state is EngineState.DEAD
    recorded.unfinished = 0
