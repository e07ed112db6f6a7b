"""What the service says of itself while its engine works, stands still, fails, and comes back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from fakes import FakeEngine
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.core.health import ServiceHealth
from taskvec.engines.base import EngineResult, EngineState, TokenBatch
from taskvec.errors import TaskvecError, UnavailableError


class SwitchedEngine(FakeEngine):
    """Works, hangs or fails, as a test says."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint.card)
        self.works = asyncio.Event()
        self.works.set()
        self.fails = False

    async def embed(self, batch: TokenBatch) -> EngineResult:
        await self.works.wait()
        if self.fails:
            raise TaskvecError("The engine failed on this batch.")
        return await super().embed(batch)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def watched(
    checkpoint: Checkpoint,
) -> AsyncIterator[tuple[SwitchedEngine, ServiceHealth, Clock]]:
    """A started engine, its watch on, and the clock that the watch goes by."""
    engine, clock = SwitchedEngine(checkpoint), Clock()
    await engine.start()
    health = ServiceHealth(
        engine, stall_seconds=60, dead_seconds=300, canary_seconds=30, clock=clock
    )
    watching = asyncio.create_task(health.watch())
    await asyncio.sleep(0)
    yield engine, health, clock
    watching.cancel()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.anyio
async def test_waiting_work_that_goes_on_is_well(default_checkpoint: Checkpoint) -> None:
    """However long work waits: while something is finished now and then, the engine is well."""
    async with watched(default_checkpoint) as (engine, health, clock):
        with health.waiting:
            for _ in range(20):
                clock.now += 50
                engine.finished += 1
                health.check()
                assert health.readiness().ready
        assert health.liveness().ready


@pytest.mark.anyio
async def test_an_idle_engine_does_not_stall(default_checkpoint: Checkpoint) -> None:
    """Where nothing waits, nothing need be finished, whatever the time."""
    async with watched(default_checkpoint) as (_, health, clock):
        clock.now += 100_000
        with health.waiting:
            assert health.stalled_seconds == 0
            assert health.readiness().ready


@pytest.mark.anyio
async def test_a_stalled_engine_is_not_ready_then_not_live(default_checkpoint: Checkpoint) -> None:
    """A minute without progress takes it from the load balancer, five have it started again."""
    async with watched(default_checkpoint) as (engine, health, clock):
        with health.waiting:
            clock.now += 59
            assert health.readiness().ready
            clock.now += 2
            assert health.readiness().state is EngineState.UNAVAILABLE
            assert "nothing was finished for 61 seconds" in health.readiness().reason
            with pytest.raises(UnavailableError):
                health.require_open()
            assert health.liveness().state is not EngineState.DEAD
            clock.now += 240
            assert health.liveness().state is EngineState.DEAD
            engine.finished += 1
            assert health.readiness().ready, "it comes back by itself"
            assert health.liveness().ready


@pytest.mark.anyio
async def test_a_quiet_engine_is_tried(default_checkpoint: Checkpoint) -> None:
    """After half a minute without work one short text is embedded, and again half a minute on."""
    async with watched(default_checkpoint) as (engine, health, clock):
        for turn in range(1, 4):
            clock.now += 31
            await until(lambda turn=turn: len(engine.batches) == turn)
            assert engine.batches[-1].tokens == 1
            assert health.readiness().ready


@pytest.mark.anyio
async def test_a_hung_engine_is_found_without_traffic(default_checkpoint: Checkpoint) -> None:
    """The trial hangs, and so counts as work that waits."""
    async with watched(default_checkpoint) as (engine, health, clock):
        engine.works.clear()
        clock.now += 31
        await until(lambda: health.waiting.count)
        clock.now += 61
        assert not health.readiness().ready
        engine.works.set()
        await until(lambda: health.readiness().ready)


@pytest.mark.anyio
async def test_a_failing_engine_is_found_without_traffic(default_checkpoint: Checkpoint) -> None:
    """A trial that fails makes the service unready until one succeeds."""
    async with watched(default_checkpoint) as (engine, health, clock):
        engine.fails = True
        clock.now += 31
        await until(lambda: not health.readiness().ready)
        assert "failed on this batch" in health.readiness().reason
        engine.fails = False
        clock.now += 31
        await until(lambda: health.readiness().ready)


@pytest.mark.anyio
async def test_leaving_and_refusing(default_checkpoint: Checkpoint) -> None:
    """Who leaves is not ready and still takes work; who refuses takes none; both are live."""
    async with watched(default_checkpoint) as (_, health, _):
        health.start_draining()
        assert health.readiness().state is EngineState.STOPPING
        health.require_open()
        health.stop_accepting()
        with pytest.raises(UnavailableError) as refused:
            health.require_open()
        assert refused.value.code == "draining"
        assert health.liveness().ready
