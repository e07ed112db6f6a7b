"""Out-of-memory errors in a forward: the batch is split, and only single texts can fail."""

from __future__ import annotations

import asyncio
import heapq
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.engines.base import EngineState, TokenBatch, TokenIds
from taskvec.engines.packed import scheduler
from taskvec.engines.packed.engine import PackedEngine
from taskvec.engines.packed.scheduler import TokenBudget
from taskvec.engines.packed.transformer import Transformer
from taskvec.errors import OverloadedError, TaskvecError, UnavailableError
from taskvec.priority import Priority
from tinyengines import FP32, Recorder, random_ids, running, tiny_checkpoint

FITS = 100
"""Maximum tokens of a forward that fits into the simulated memory."""

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError("Unable to allocate 3.05 MiB for an array"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
]


class Scarce(Recorder):
    """An observer that records reports, and lets forwards of more than ``fits`` tokens fail."""

    def __init__(self, patch: pytest.MonkeyPatch, error: Exception) -> None:
        super().__init__()
        self.fits = 1 << 20
        self.forwards: list[int] = []
        self.broken = False
        self.fails_in = ""
        embed = Transformer.embed

        def embed_or_fail(
            transformer: Transformer, ids: Sequence[TokenIds], adapters: Sequence[str | None]
        ) -> NDArray[np.float32]:
            tokens = sum(map(len, ids))
            self.forwards.append(tokens)
            if tokens > self.fits:
                raise error
            return embed(transformer, ids, adapters)

        patch.setattr(Transformer, "embed", embed_or_fail)

    def batch_started(self, waited: Sequence[float]) -> None:  # noqa: ARG002
        if self.broken:
            raise ZeroDivisionError
        self.fail_once("batch_started")

    def fail_once(self, where: str) -> None:
        if self.fails_in == where:
            self.fails_in = ""
            raise MemoryError

    def batch_finished(self, texts: int, tokens: int, seconds: float, budget: int) -> None:
        self.fail_once("batch_finished")
        super().batch_finished(texts, tokens, seconds, budget)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tiny checkpoint."""
    return tiny_checkpoint(tmp_path_factory.mktemp("scarce") / "checkpoint")


@pytest.mark.anyio
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_a_batch_that_does_not_fit_is_split(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """All texts get the right vectors, and later batches are small from the start."""
    batch = TokenBatch([random_ids(20 + n, n) for n in range(24)], "clustering")
    async with running(checkpoint) as engine:
        truth = (await engine.embed(batch)).vectors
    scarce = Scarce(monkeypatch, error)
    async with running(checkpoint, observer=scarce) as engine:
        scarce.fits = FITS
        scarce.forwards.clear()
        result = await engine.embed(batch)
        assert np.abs(result.vectors - truth).max() <= 1e-5
        assert [tokens for tokens in scarce.forwards if tokens > FITS]
        assert scarce.shrunk[-1] <= FITS
        scarce.forwards.clear()
        again = await engine.embed(batch)
        assert np.abs(again.vectors - truth).max() <= 1e-5
        assert max(scarce.forwards) <= FITS
        assert engine.health().ready
    assert scarce.dropped == {}


@pytest.mark.anyio
async def test_only_a_text_that_does_not_fit_alone_fails(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the text, and other requests of the same forward are answered."""
    scarce = Scarce(monkeypatch, ERRORS[0])
    async with running(checkpoint, observer=scarce) as engine:
        scarce.fits = FITS
        results = await asyncio.gather(
            engine.embed(TokenBatch([random_ids(30, 1), random_ids(10, 2)], "retrieval")),
            engine.embed(
                TokenBatch(
                    [random_ids(9, 3), random_ids(FITS + 1, 4), random_ids(8, 5)], "retrieval"
                )
            ),
            engine.embed(TokenBatch([random_ids(50, 6)], "clustering")),
            return_exceptions=True,
        )
        assert engine.health().ready
    first, failed, last = results
    assert not isinstance(first, BaseException)
    assert not isinstance(last, BaseException)
    assert isinstance(failed, TaskvecError)
    assert (failed.code, failed.param, failed.status) == ("out_of_memory", "input[1]", 500)
    assert "101 tokens" in failed.message


@pytest.mark.anyio
async def test_a_text_for_which_memory_sufficed_before_can_be_sent_again(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where others have taken the memory meanwhile, the text is not to blame: 503, not 500."""
    scarce = Scarce(monkeypatch, ERRORS[0])
    async with running(checkpoint, observer=scarce) as engine:
        text = TokenBatch([random_ids(90, 1)], "retrieval")
        await engine.embed(text)
        scarce.fits = 50
        with pytest.raises(OverloadedError) as caught:
            await engine.embed(text)
        assert (caught.value.status, caught.value.code) == (503, "overloaded")
        assert caught.value.retry_after
        scarce.fits = 100
        await engine.embed(text)


@pytest.mark.anyio
@pytest.mark.parametrize("where", ["take", "entered", "batch_started", "batch_finished"])
async def test_memory_that_runs_out_beside_a_forward_pass_fails_its_requests_alone(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Taking, starting or answering a batch may fail: its requests get 503, the engine lives."""
    scarce = Scarce(monkeypatch, ERRORS[0])
    loop, bulk_computes = asyncio.get_running_loop(), asyncio.Event()
    async with running(checkpoint, observer=scarce) as engine:
        bulk = TokenBatch(
            [random_ids(20, n) for n in range(2000)],
            "clustering",
            priority=Priority.BULK,
            entered=lambda: loop.call_soon_threadsafe(bulk_computes.set),
        )
        other = asyncio.create_task(engine.embed(bulk))
        await bulk_computes.wait()
        scarce.fails_in = where
        if where == "take":
            monkeypatch.setattr(scheduler, "heapq", ScarceHeap(scarce))
        failing = TokenBatch(
            [random_ids(9, 1)] * 3, None, entered=lambda: scarce.fail_once("entered")
        )
        failures = await asyncio.wait_for(
            asyncio.gather(
                *(engine.embed(failing) for _ in range(1 if where == "batch_finished" else 4)),
                return_exceptions=True,
            ),
            20,
        )
        failed = [each for each in failures if isinstance(each, BaseException)]
        assert failed
        assert {type(each) for each in failed} == {OverloadedError}
        assert engine.health().ready
        assert len((await engine.embed(failing)).vectors) == 3
        assert len((await asyncio.wait_for(other, 60)).vectors) == 2000
        assert not engine._waiting.queue.texts


class ScarceHeap:
    """The module ``heapq``, in which memory runs out once."""

    def __init__(self, scarce: Scarce) -> None:
        self._scarce = scarce

    def __getattr__(self, name: str) -> Any:
        if name == "heappop":
            self._scarce.fail_once("take")
        return getattr(heapq, name)


@pytest.mark.anyio
async def test_an_ended_thread_fails_all_requests(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error outside the forward kills the engine: running, queued and new requests fail."""
    scarce = Scarce(monkeypatch, ERRORS[0])
    async with running(checkpoint, observer=scarce) as engine:
        scarce.broken = True
        tasks = [
            asyncio.create_task(engine.embed(TokenBatch([random_ids(90, n)] * 200, "retrieval")))
            for n in range(5)
        ]
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
        assert all(isinstance(result, UnavailableError) for result in results), results
        assert engine.health().state is EngineState.DEAD
        assert "ZeroDivisionError" in engine.health().reason
        with pytest.raises(UnavailableError):
            await engine.embed(TokenBatch([random_ids(9, 1)], "retrieval"))


def test_a_budget_shrinks_and_grows_again() -> None:
    """The budget is halved on failure and doubled after an interval that grows with failures."""
    now = 0.0
    tokens = TokenBudget(4096, lambda: now)
    tokens.shrink(4000)
    assert tokens.tokens == 2000
    tokens.shrink(100_000)
    assert tokens.tokens == 2000, "a text longer than the budget does not change the budget"
    tokens.grow()
    assert tokens.tokens == 2000
    now += 2 * scheduler.MIN_RETRY_SECONDS
    tokens.grow()
    tokens.grow()
    assert tokens.tokens == 4000
    now += 4 * scheduler.MIN_RETRY_SECONDS
    tokens.grow()
    assert tokens.tokens == tokens.max_tokens == 4096
    for _ in range(40):
        tokens.shrink(tokens.tokens)
    assert tokens.tokens == scheduler.MIN_BUDGET_TOKENS
    now += scheduler.MAX_RETRY_SECONDS
    tokens.grow()
    assert tokens.tokens == 2 * scheduler.MIN_BUDGET_TOKENS


@pytest.mark.anyio
async def test_an_engine_stops_without_another_thread(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop needs no thread: under a lack of them an engine must end as well."""
    engine = PackedEngine(checkpoint, FP32)
    await engine.start()
    embedding = asyncio.create_task(engine.embed(TokenBatch([np.arange(9, dtype=np.int32)], None)))
    await asyncio.sleep(0)

    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    async with asyncio.timeout(30):
        await engine.stop()
        await embedding
    assert engine.health().state is EngineState.DEAD
