"""An engine's speed, as measured after its start."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from itertools import count

import httpx
import pytest

from conftest import fake_application
from fakes import FakeEngine
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.core.admission import (
    MAX_PROBE_TEXTS,
    MAX_QUIET_WAIT,
    MIN_BUDGET,
    PROBE_LENGTH,
    PROBE_SECONDS,
    QUIET_SECONDS,
    UNMEASURED_BUDGET,
    Admission,
    measure_speed,
)
from taskvec.engines.base import EngineHealth, EngineResult, EngineState, TokenBatch
from taskvec.errors import UnavailableError
from taskvec.priority import Priority
from taskvec.service import build_service
from taskvec.settings import Settings


@pytest.mark.anyio
async def test_a_slow_engine_is_asked_little(default_checkpoint: Checkpoint) -> None:
    """Where the first batch takes long, it is the only one."""
    engine = FakeEngine(default_checkpoint.card, delay=1.1 * PROBE_SECONDS)
    await engine.start()
    tokens, seconds = await measure_speed(engine)
    assert len(engine.batches) == 1
    assert tokens == engine.batches[0].tokens
    assert seconds >= PROBE_SECONDS


@pytest.mark.anyio
async def test_a_fast_engine_is_asked_for_much(default_checkpoint: Checkpoint) -> None:
    """Batches grow up to a bound; all are bulk, and valid for the model."""
    engine = FakeEngine(default_checkpoint.card)
    await engine.start()
    tokens, _ = await measure_speed(engine)
    assert tokens == MAX_PROBE_TEXTS * PROBE_LENGTH
    for batch in engine.batches:
        assert batch.priority is Priority.BULK
        assert all(ids.min() >= 0 and ids.max() < engine.model.vocabulary for ids in batch.ids)


async def quiet_after(admission: Admission) -> float:
    started = time.monotonic()
    await admission.wait_for_quiet()
    return time.monotonic() - started


@pytest.mark.anyio
async def test_the_measurement_waits_until_no_request_came_for_a_while() -> None:
    """Steady short requests put it off, those that are being embedded and those just answered."""
    admission = Admission()
    waiting = asyncio.create_task(quiet_after(admission))
    for _ in range(10):
        with admission.admit(10, Priority.INTERACTIVE):
            await asyncio.sleep(0.5 * QUIET_SECONDS)
    assert not waiting.done()
    ended = time.monotonic()
    await waiting
    assert time.monotonic() - ended >= 0.9 * QUIET_SECONDS
    assert await quiet_after(Admission()) >= 0.9 * QUIET_SECONDS


@pytest.mark.anyio
async def test_the_measurement_does_not_wait_when_much_is_queued() -> None:
    """The derived budget matters then, and the requests wait for others anyway."""
    admission = Admission()
    with admission.admit(MIN_BUDGET + 1, Priority.BULK):
        assert await quiet_after(admission) < QUIET_SECONDS


@pytest.mark.anyio
async def test_steady_requests_do_not_prevent_the_measurement() -> None:
    """It is made after a limited time."""
    tenths = count()
    admission = Admission(clock=lambda: next(tenths) / 10)
    with admission.admit(10, Priority.INTERACTIVE):
        await admission.wait_for_quiet()
    assert MAX_QUIET_WAIT < next(tenths) / 10 < 2 * MAX_QUIET_WAIT


@pytest.mark.anyio
@pytest.mark.parametrize(("seconds", "statuses"), [(1, [200, 429]), (200, [200, 200])])
async def test_the_service_derives_its_budget(
    default_checkpoint: Checkpoint, seconds: float, statuses: list[int]
) -> None:
    """A queue of as many seconds as the setting says, at the speed that the engine showed."""
    engine = FakeEngine(default_checkpoint.card, delay=1.1 * PROBE_SECONDS)
    app = fake_application(
        default_checkpoint,
        engine,
        [],
        max_queue_tokens=0,
        queue_seconds=seconds,
        max_texts=40_000,
        memory_budget=1 << 30,
    )
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        await asyncio.sleep(QUIET_SECONDS + 3 * PROBE_SECONDS)
        body = {"input": ["a"] * 20_000}
        answers = await asyncio.gather(*(client.post("/v1/embeddings", json=body) for _ in "ab"))
    assert sorted(answer.status_code for answer in answers) == statuses


class CrowdedEngine(FakeEngine):
    """Has the processor for a hundredth of the time."""

    async def embed(self, batch: TokenBatch) -> EngineResult:
        result = await super().embed(batch)
        return replace(result, forward=result.computed, processor=result.computed / 100)


@pytest.mark.anyio
async def test_time_of_other_processes_does_not_count(default_checkpoint: Checkpoint) -> None:
    """An engine that has no processor for most of the time is not slow."""
    engine = CrowdedEngine(default_checkpoint.card, delay=0.1)
    await engine.start()
    tokens, seconds = await measure_speed(engine)
    assert tokens == MAX_PROBE_TEXTS * PROBE_LENGTH
    assert seconds == 0.001
    first, *others = [batch.priority for batch in engine.batches]
    assert (first, {*others}) == (Priority.BULK, {Priority.INTERACTIVE})


class RestartingEngine(FakeEngine):
    """Fails its first batch, as an engine's process that ends."""

    async def embed(self, batch: TokenBatch) -> EngineResult:
        if not self.batches:
            self.batches.append(batch)
            raise UnavailableError("The engine's process has ended.")
        return await super().embed(batch)


class UnavailableEngine(FakeEngine):
    """Is unavailable after its start until somebody changes that."""

    async def start(self) -> None:
        self.set_health(EngineHealth(EngineState.UNAVAILABLE, "its process has ended"))


@pytest.mark.anyio
@pytest.mark.parametrize("kind", [RestartingEngine, UnavailableEngine])
async def test_an_engine_is_measured_once_it_can_be(
    default_checkpoint: Checkpoint, kind: type[FakeEngine]
) -> None:
    """An engine that is replaced right after its start is measured when it is ready again."""
    engine = kind(default_checkpoint.card, delay=1.1 * PROBE_SECONDS)
    service = build_service(Settings(), checkpoint=default_checkpoint, engine=engine)
    async with service.running(lambda error: pytest.fail(str(error))), asyncio.timeout(20):
        await asyncio.sleep(0.1)
        assert not service.admission.rate
        engine.set_health(EngineHealth(EngineState.READY))
        while not service.admission.rate:
            await asyncio.sleep(0.05)
    assert service.admission.budget != UNMEASURED_BUDGET
