"""Lanes: interactive forward passes run while bulk ones are paused, and nothing is lost."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import DEFAULT_VOCABULARY
from synthetic import ADAPTERS
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.engines.base import EngineResult, EngineState, TokenBatch, TokenIds
from taskvec.engines.packed.engine import CPU_LANES, PackedOptions
from taskvec.engines.packed.lanes import Lane, Lanes
from taskvec.engines.packed.scheduler import FairQueue
from taskvec.engines.packed.transformer import Transformer
from taskvec.errors import TaskvecError, UnavailableError
from taskvec.priority import Priority
from tinyengines import check, load_reference, random_ids, recording, tiny_checkpoint

WHOLE_BATCH = PackedOptions(dtype="float32", max_batch_tokens=1 << 16)
"""One forward pass contains all texts of a request."""


class Clock:
    """Seconds that pass only when a lane computes."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_lanes(clock: Clock) -> tuple[FairQueue[object], Lanes[object], Lane, Lane]:
    queue: FairQueue[object] = FairQueue(64)
    lanes = Lanes(CPU_LANES, queue, threading.Lock(), clock)
    interactive, bulk = lanes
    return queue, lanes, interactive, bulk


def test_an_interactive_batch_starts_beside_a_bulk_one() -> None:
    """The interactive lane takes its batch at once; the bulk lane takes no other meanwhile."""
    clock = Clock()
    queue, lanes, interactive, bulk = make_lanes(clock)
    queue.push("long", [64] * 10, Priority.BULK)
    assert lanes.take(bulk, 64) == [("long", 0)]
    clock.now += 2
    queue.push("short", [16])
    assert lanes.take(interactive, 64) == [("short", 0)]
    clock.now += 0.5
    assert lanes.take(bulk, 64) == []
    with interactive.wake:
        assert lanes.finish(interactive), "it paused the bulk batch"
    clock.now += 3
    with bulk.wake:
        lanes.finish(bulk)
    assert (interactive.seconds, bulk.seconds) == (0.5, 5.0), "pauses do not count"
    assert lanes.take(bulk, 64) == [("long", 1)]


def test_a_bulk_forward_pass_pauses_until_the_interactive_one_is_finished() -> None:
    """A step of the bulk forward pass returns only after the interactive batch."""
    queue, lanes, interactive, bulk = make_lanes(Clock())
    queue.push("long", [64] * 10, Priority.BULK)
    lanes.take(bulk, 64)
    lanes.step(bulk)
    queue.push("short", [16])
    with interactive.wake:
        lanes.take(interactive, 64)
    thread = threading.Thread(target=lanes.step, args=(bulk,))
    thread.start()
    thread.join(0.1)
    assert thread.is_alive(), "it is paused"
    with interactive.wake:
        lanes.finish(interactive)
    thread.join(20)
    assert not thread.is_alive()


def test_interactive_work_that_has_used_its_share_waits() -> None:
    """The lanes share the time by weight, at the granularity of steps and not of batches."""
    clock = Clock()
    queue, lanes, interactive, bulk = make_lanes(clock)
    ended = threading.Event()

    def work(lane: Lane, steps: int, seconds: float) -> None:
        priority = lane.classes[0]
        with lane.wake:
            queue.push(object(), [64], priority)
        while not ended.is_set():
            with lane.wake:
                queue.push(object(), [64], priority)  # one more waits while this one is computed
                while not ended.is_set() and not lanes.take(lane, 64):
                    lane.wake.wait()
            for _ in range(steps):
                lanes.step(lane)
                with lane.wake:
                    clock.now += seconds
            with lane.wake:
                lanes.finish(lane)
                if clock.now > 50:
                    ended.set()
                    queue.drop(lambda _: True)
                    lanes.notify()

    threads = [
        threading.Thread(target=work, daemon=True, args=(interactive, 1, 0.003)),
        threading.Thread(target=work, daemon=True, args=(bulk, 40, 0.005)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    share = interactive.seconds / (interactive.seconds + bulk.seconds)
    assert share == pytest.approx(0.8, abs=0.1)


def test_the_first_of_two_lanes_without_memory_waits_for_the_other() -> None:
    """A lane waits until it computes alone; it does not if the other one waits as well."""
    queue, lanes, interactive, bulk = make_lanes(Clock())
    assert not lanes.wait_alone(bulk), "it is alone"
    queue.push("long", [64], Priority.BULK)
    assert lanes.take(bulk, 64)
    queue.push("short", [16])
    assert lanes.take(interactive, 64)
    waiting = threading.Thread(target=lanes.wait_alone, args=(interactive,))
    waiting.start()
    lanes.step(bulk)  # it is not paused by a lane that waits for it
    waiting.join(0.05)
    assert waiting.is_alive()
    with bulk.wake:
        assert interactive.alone
    assert not lanes.wait_alone(bulk)
    with bulk.wake:
        lanes.finish(bulk)
    waiting.join(20)
    assert not waiting.is_alive()
    assert not interactive.alone


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("lanes") / "checkpoint")


@pytest.fixture(scope="module")
def reference(checkpoint: Checkpoint) -> Transformer:
    return load_reference(checkpoint)


@pytest.mark.anyio
async def test_a_short_text_is_embedded_while_a_bulk_forward_pass_is_paused(
    checkpoint: Checkpoint, reference: Transformer
) -> None:
    """A short text does not wait for the forward pass of two thousand; both vectors are right."""
    async with recording(checkpoint, WHOLE_BATCH) as (engine, recorded):
        bulk, entered = bulk_batch(2048)
        embedding = asyncio.create_task(engine.embed(bulk))
        await entered.wait()
        short = TokenBatch([random_ids(12, 1)], "retrieval")
        result = await engine.embed(short)
        assert not embedding.done()
        assert recorded.batches == [(1, 12)], "the bulk forward pass is not finished"
        check(reference, short, result)
        check(reference, bulk, await embedding)
        assert recorded.pauses
        assert min(recorded.pauses) > 0.0002, "a pause is as long as a forward pass"


@pytest.mark.anyio
async def test_a_failure_beside_a_paused_forward_pass_loses_nothing(
    checkpoint: Checkpoint, reference: Transformer
) -> None:
    """An interactive forward pass that fails does not affect the bulk one that it paused."""
    async with recording(checkpoint, WHOLE_BATCH) as (engine, recorded):
        bulk, entered = bulk_batch(2048)
        embedding = asyncio.create_task(engine.embed(bulk))
        await entered.wait()
        with pytest.raises(TaskvecError, match="engine failed"):
            await engine.embed(
                TokenBatch([np.array([DEFAULT_VOCABULARY + 5], np.int32)], "retrieval")
            )
        assert recorded.batches == []
        check(reference, bulk, await embedding)


@pytest.mark.anyio
async def test_memory_that_ran_out_beside_another_batch_is_tried_again_alone(
    checkpoint: Checkpoint, reference: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch without memory waits for the paused one, and is then embedded whole."""
    computing = failures = 0
    loop, bulk_computes = asyncio.get_running_loop(), asyncio.Event()
    forward = Transformer._forward

    def only_one(
        self: Transformer, texts: Sequence[TokenIds], adapters: Sequence[str | None]
    ) -> NDArray[np.float32]:
        nonlocal computing, failures
        if len(texts) <= 24 and computing:
            failures += 1
            raise MemoryError
        computing += 1
        if len(texts) > 24:
            loop.call_soon_threadsafe(bulk_computes.set)
        try:
            return forward(self, texts, adapters)
        finally:
            computing -= 1

    monkeypatch.setattr(Transformer, "_forward", only_one)
    async with recording(checkpoint, WHOLE_BATCH) as (engine, recorded):
        bulk, _ = bulk_batch(2048)
        embedding = asyncio.create_task(engine.embed(bulk))
        await bulk_computes.wait()
        short = TokenBatch([random_ids(12, n) for n in range(24)], "retrieval")
        result = await engine.embed(short)
        long_result = await embedding
    monkeypatch.undo()
    check(reference, short, result)
    check(reference, bulk, long_result)
    assert failures == 1
    assert recorded.shrunk == [], "no batch was split"
    assert [texts for texts, _ in recorded.batches] == [2048, 24]


@pytest.mark.anyio
async def test_the_reported_budget_of_a_batch_is_the_one_that_it_was_taken_with(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch is not reported with the budget that the other lane has reduced meanwhile."""
    loop, bulk_computes = asyncio.get_running_loop(), asyncio.Event()
    failed = threading.Event()
    embed = Transformer.embed

    def both_fail_once(
        self: Transformer, texts: Sequence[TokenIds], adapters: Sequence[str | None]
    ) -> NDArray[np.float32]:
        if len(texts) == 2048:
            loop.call_soon_threadsafe(bulk_computes.set)
            assert failed.wait(20)
            self._step()  # until the interactive lane waits for this one
            raise MemoryError
        if len(texts) == 24 and not failed.is_set():
            failed.set()
            raise MemoryError
        return embed(self, texts, adapters)

    monkeypatch.setattr(Transformer, "embed", both_fail_once)
    async with recording(checkpoint, WHOLE_BATCH) as (engine, recorded):
        bulk, _ = bulk_batch(2048)
        embedding = asyncio.create_task(engine.embed(bulk))
        await bulk_computes.wait()
        await engine.embed(TokenBatch([random_ids(12, n) for n in range(24)], "retrieval"))
        await embedding
    assert recorded.shrunk == [2048 * 20 // 2]
    reported = dict(zip((texts for texts, _ in recorded.batches), recorded.budgets, strict=True))
    assert reported == {24: WHOLE_BATCH.max_batch_tokens, 1024: 2048 * 20 // 2}


@pytest.mark.anyio
@pytest.mark.parametrize("dying", Priority)
async def test_an_engine_with_a_dead_lane_is_dead(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, dying: Priority
) -> None:
    """If the thread of either lane ends, every request of both lanes is answered with an error."""
    embed = Transformer.embed

    def die(
        self: Transformer, texts: Sequence[TokenIds], adapters: Sequence[str | None]
    ) -> NDArray[np.float32]:
        if (len(texts[0]) == 20) == (dying is Priority.BULK) and armed:
            raise KeyboardInterrupt
        return embed(self, texts, adapters)

    armed = False
    monkeypatch.setattr(Transformer, "embed", die)
    async with recording(checkpoint, WHOLE_BATCH) as (engine, _):
        requests = [bulk_batch(256)[0] for _ in range(4)]
        requests += [TokenBatch([random_ids(12, n)], "retrieval") for n in range(20)]
        armed = True
        tasks = [asyncio.create_task(engine.embed(batch)) for batch in requests]
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
        failed = [result for result in results if isinstance(result, BaseException)]
        assert failed
        assert all(isinstance(result, UnavailableError) for result in failed)
        assert engine.health().state is EngineState.DEAD
        assert "KeyboardInterrupt" in engine.health().reason
        with pytest.raises(UnavailableError):
            await engine.embed(requests[-1])


@pytest.mark.anyio
@pytest.mark.parametrize("seed", range(3))
async def test_any_mixture_of_requests_is_answered(
    checkpoint: Checkpoint,
    reference: Transformer,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    """Both classes with cancellations and memory errors: each request gets its own vectors."""
    rng = random.Random(seed)
    embed = Transformer.embed

    def unreliable(
        self: Transformer, texts: Sequence[TokenIds], adapters: Sequence[str | None]
    ) -> NDArray[np.float32]:
        if len(texts) > 1 and rng.random() < 0.1:
            raise MemoryError
        return embed(self, texts, adapters)

    monkeypatch.setattr(Transformer, "embed", unreliable)
    async with recording(checkpoint, replace(WHOLE_BATCH, max_batch_tokens=512)) as (engine, _):

        async def one(number: int) -> tuple[TokenBatch, EngineResult] | None:
            await asyncio.sleep(rng.random() / 5)
            priority = rng.choice(list(Priority))
            lengths = [rng.randint(1, 90) for _ in range(rng.choice([1, 1, 3, 40]))]
            batch = TokenBatch(
                [random_ids(length, 1000 * number + i) for i, length in enumerate(lengths)],
                ADAPTERS[number % 4],
                priority=priority,
            )
            embedding = asyncio.create_task(engine.embed(batch))
            if rng.random() < 0.1:
                await asyncio.sleep(rng.random() / 50)
                embedding.cancel()
            try:
                return batch, await embedding
            except asyncio.CancelledError:
                return None

        results = await asyncio.wait_for(asyncio.gather(*map(one, range(150))), 120)
        assert engine.health().ready
    monkeypatch.undo()
    answered = [result for result in results if result is not None]
    assert len(answered) > 100
    for batch, result in answered:
        check(reference, batch, result)


def bulk_batch(texts: int) -> tuple[TokenBatch, asyncio.Event]:
    """Return a bulk batch, and an event that is set when it enters a forward pass."""
    loop, entered = asyncio.get_running_loop(), asyncio.Event()
    batch = TokenBatch(
        [random_ids(20, n) for n in range(texts)],
        "clustering",
        priority=Priority.BULK,
        entered=lambda: loop.call_soon_threadsafe(entered.set),
    )
    return batch, entered
