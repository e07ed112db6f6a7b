"""An engine behind a Unix socket: a real server and real connections, in one event loop."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fakes import FakeEngine, hashed_vector
from taskvec import concurrency
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.concurrency import BackgroundTaskError
from taskvec.engines.base import (
    DropReason,
    EngineHealth,
    EngineResult,
    EngineState,
    TokenBatch,
)
from taskvec.engines.process import client as client_module
from taskvec.engines.process import server as server_module
from taskvec.engines.process.client import EngineSocket, ProcessEngine
from taskvec.engines.process.server import EngineServer, EventBuffer, as_observer
from taskvec.errors import DeadlineExceededError, StartError, TaskvecError, UnavailableError
from taskvec.metrics.registry import Metrics
from taskvec.priority import Priority

pytestmark = pytest.mark.anyio


class Recorder:
    """An observer that keeps the events that it got."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: self.events.append((name, *args))


class FailingEngine(FakeEngine):
    """Raises an error instead of embedding."""

    failure: Exception

    async def embed(self, _: TokenBatch) -> EngineResult:
        raise self.failure


@asynccontextmanager
async def serving(
    engine: FakeEngine, path: Path, files: dict[str, tuple[int, ...]] | None = None
) -> AsyncIterator[EngineServer]:
    """Serve a started engine on a path."""
    server = EngineServer(engine, as_observer(EventBuffer()), files=files)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen()
    listener = await server.listen(listening)
    watching = asyncio.create_task(server.watch())
    try:
        yield server
    finally:
        watching.cancel()
        listener.close()
        path.unlink()  # noqa: ASYNC240 - in memory
        await server.close()


@asynccontextmanager
async def gateway(
    checkpoint: Checkpoint, path: Path, observer: Any = None
) -> AsyncIterator[ProcessEngine]:
    """Connect a gateway to a path, and wait until it is ready."""
    engine = ProcessEngine(checkpoint.card, EngineSocket(str(path)), observer, launches=False)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def batch(*lengths: int, adapter: str | None = "retrieval", **options: Any) -> TokenBatch:
    return TokenBatch([np.arange(n, dtype=np.int32) for n in lengths], adapter, **options)


async def until(condition: Callable[[], object], seconds: float = 10) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        await asyncio.sleep(0.01)


@asynccontextmanager
async def connected(
    checkpoint: Checkpoint, folder: Path, engine: FakeEngine | None = None
) -> AsyncIterator[tuple[ProcessEngine, FakeEngine]]:
    """A gateway and the fake engine behind its socket."""
    engine = engine or FakeEngine(checkpoint.card)
    await engine.start()
    async with (
        serving(engine, folder / "engine.sock"),
        gateway(checkpoint, folder / "engine.sock") as client,
    ):
        yield client, engine


async def test_vectors_are_those_of_the_engine(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Each text of each call gets the vector of its ids and its adapter, also of large calls."""
    adapters = [None, *default_checkpoint.card.adapters]
    async with connected(default_checkpoint, tmp_path) as (client, engine):
        calls = [batch(*range(1, 1 + n), adapter=adapters[n % len(adapters)]) for n in range(1, 60)]
        calls.append(batch(*[1, 7] * 1024))
        results = await asyncio.gather(*map(client.embed, calls))
        for call, result in zip(calls, results, strict=True):
            expected = [hashed_vector(i, call.adapter, engine.model.dimension) for i in call.ids]
            assert np.array_equal(result.vectors, np.stack(expected))


async def test_a_call_keeps_its_deadline_and_class(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """The engine schedules a call as the gateway asked it to."""
    async with connected(default_checkpoint, tmp_path) as (client, engine):
        deadline = time.monotonic() + 5
        await client.embed(batch(3, deadline=deadline, priority=Priority.BULK))
        (got,) = engine.batches
        assert (got.deadline, got.priority) == (deadline, Priority.BULK)


async def test_the_state_is_that_of_the_engine(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Readiness, its reason, the batch size and the counter of work follow those of the engine."""
    async with connected(default_checkpoint, tmp_path) as (client, engine):
        assert client.health().ready
        assert client.batch_tokens == engine.batch_tokens
        await client.embed(batch(3))
        assert client.finished == engine.finished == 1
        engine.finished, engine.batch_tokens = 7, 512  # others' work, and a smaller budget
        engine.set_health(EngineHealth(EngineState.UNAVAILABLE, "it is broken", "public"))
        await until(lambda: client.health().state is EngineState.UNAVAILABLE)
        assert (client.health().reason, client.health().for_clients) == ("it is broken", "public")
        assert (client.finished, client.batch_tokens) == (7, 512)
        with pytest.raises(UnavailableError, match="public"):
            await client.embed(batch(3))


async def test_a_cancelled_call_is_cancelled_in_the_engine(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Whoever leaves takes its texts out of the engine's queue; others are not affected."""
    slow = FakeEngine(default_checkpoint.card, delay=0.5)
    async with connected(default_checkpoint, tmp_path, slow) as (client, engine):
        stays = asyncio.create_task(client.embed(batch(4)))
        leaves = asyncio.create_task(client.embed(batch(5)))
        await until(lambda: len(engine.batches) == 2)
        leaves.cancel()
        await until(lambda: engine.cancelled)
        assert (await stays).vectors.shape == (1, engine.model.dimension)
        assert engine.cancelled == 1


async def test_a_call_that_is_cancelled_at_once_is_forgotten(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """A call and its cancellation that arrive together leave nothing in the engine's process."""
    engine = FakeEngine(default_checkpoint.card)
    await engine.start()
    path = tmp_path / "engine.sock"
    async with serving(engine, path) as server, gateway(default_checkpoint, path) as client:
        for _ in range(100):
            leaves = asyncio.create_task(client.embed(batch(3)))
            await asyncio.sleep(0)  # sent
            leaves.cancel()
        await client.embed(batch(4))
        await until(lambda: server.calls == 0, seconds=2)
        assert len(engine.batches) < 100, "some were cancelled before their first step"


@pytest.mark.parametrize(
    ("failure", "shown"),
    [
        (DeadlineExceededError("too late"), "too late"),
        (TaskvecError("no memory", code="out_of_memory", param="input[2]"), "no memory"),
        (ValueError("secret"), "see the log"),
        (MemoryError(), "no memory left"),
        (RuntimeError("can't start new thread"), "no memory left"),
    ],
    ids=lambda item: type(item).__name__,
)
async def test_errors_of_the_engine_reach_the_caller(
    default_checkpoint: Checkpoint, tmp_path: Path, failure: Exception, shown: str
) -> None:
    """An error has the class and the code that the engine gave it; an unexpected one is hidden."""
    failing = FailingEngine(default_checkpoint.card)
    failing.failure = failure
    async with connected(default_checkpoint, tmp_path, failing) as (client, _):
        with pytest.raises(TaskvecError, match=shown) as caught:
            await client.embed(batch(3))
    if isinstance(failure, TaskvecError):
        assert type(caught.value) is type(failure)
        assert (caught.value.code, caught.value.param) == (failure.code, failure.param)


async def test_a_long_call_is_known_to_be_computed(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """A gateway learns that a call entered a forward pass while it is still there."""

    class Entering(FakeEngine):
        async def embed(self, batch: TokenBatch) -> EngineResult:
            batch.entered()
            return await super().embed(batch)

    entered: list[float] = []
    slow = Entering(default_checkpoint.card, delay=0.5)
    async with connected(default_checkpoint, tmp_path, slow) as (client, _):
        started = time.monotonic()
        await client.embed(batch(3, entered=lambda: entered.append(time.monotonic() - started)))
    (seconds,) = entered
    assert seconds < 0.5


async def test_calls_fail_when_the_process_ends_and_the_next_one_serves(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Calls in progress are answered as unavailable, once; a new process is used when ready."""
    path = tmp_path / "engine.sock"
    slow = FakeEngine(default_checkpoint.card, delay=5)
    quick = FakeEngine(default_checkpoint.card)
    await slow.start()
    async with asyncio.timeout(30):
        server = serving(slow, path)
        await server.__aenter__()
        async with gateway(default_checkpoint, path) as client:
            calls = [asyncio.create_task(client.embed(batch(n))) for n in range(1, 9)]
            await until(lambda: len(slow.batches) == 8)
            await server.__aexit__(None, None, None)
            errors = await asyncio.gather(*calls, return_exceptions=True)
            assert {type(error) for error in errors} == {UnavailableError}
            assert {getattr(error, "retry_after", None) for error in errors} == {1}
            assert client.health().state is EngineState.UNAVAILABLE
            with pytest.raises(UnavailableError) as caught:
                await client.embed(batch(3))
            assert caught.value.code == "engine_unavailable"
            async with serving(quick, path):
                await asyncio.sleep(0.5)
                assert not client.health().ready, "its engine is loading"
                await quick.start()
                await until(lambda: client.health().ready)
                assert len((await client.embed(batch(3))).vectors) == 1


class Silent:
    """A source whose process can stop sending; keeps for how long it was silent when ended."""

    def __init__(self, engine: FakeEngine) -> None:
        self.server = EngineServer(engine, as_observer(EventBuffer()))
        self.ended_after: list[float] = []
        self._opened = asyncio.Event()

    async def open(self) -> socket.socket:
        if self._opened.is_set():
            await asyncio.Event().wait()
        self._opened.set()
        own, theirs = socket.socketpair()
        for each in (own, theirs):
            each.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(self.server.connect_launcher, sock=theirs)
        return own

    async def ended(self, *, ready: bool) -> str:
        assert ready
        return "ended"

    def end_silent(self, seconds: float) -> None:
        self.ended_after.append(seconds)

    async def close(self) -> None:
        await self.server.close()


async def test_a_process_that_is_silent_is_ended(
    default_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not ready, then it is ended and its calls fail; one that works for long is not."""
    monkeypatch.setattr(client_module, "SILENCE_INTERVAL", 0.1)
    monkeypatch.setattr(server_module, "HEARTBEAT_SECONDS", 0.1)
    engine = FakeEngine(default_checkpoint.card, delay=3)
    await engine.start()
    source = Silent(engine)
    client = ProcessEngine(default_checkpoint.card, source, launches=True, silent_seconds=1.0)
    source.server.start_heartbeat()
    await client.start()
    await client.embed(batch(3))
    assert client.health().ready
    assert not source.ended_after, "it was busy for three times as long"
    call = asyncio.create_task(client.embed(batch(3)))
    await until(lambda: len(engine.batches) == 2)
    assert source.server._heartbeat is not None
    source.server._heartbeat.cancel()
    await until(lambda: not client.health().ready)
    assert client.health().state is EngineState.UNAVAILABLE
    assert not source.ended_after
    with pytest.raises(UnavailableError):
        await client.embed(batch(3))
    with pytest.raises(UnavailableError):
        await call
    (seconds,) = source.ended_after
    assert seconds == pytest.approx(1.0)
    await client.stop()


async def test_a_process_that_responds_again_is_ready_again(
    default_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that was silent for a while, and not for too long, is used again."""
    monkeypatch.setattr(client_module, "SILENCE_INTERVAL", 0.1)
    engine = FakeEngine(default_checkpoint.card)
    await engine.start()
    source = Silent(engine)
    client = ProcessEngine(default_checkpoint.card, source, launches=True, silent_seconds=60)
    monkeypatch.setattr(client_module, "UNRESPONSIVE_SECONDS", 0.5)
    await client.start()
    await until(lambda: not client.health().ready)
    source.server.start_heartbeat()
    await until(lambda: client.health().ready)
    assert not source.ended_after
    await client.stop()


async def test_an_engine_that_finishes_nothing_ends_its_process(
    default_checkpoint: Checkpoint,
) -> None:
    """Calls that wait while nothing is finished end the watch; without calls it goes on."""
    engine = FakeEngine(default_checkpoint.card, delay=60)
    await engine.start()
    server = EngineServer(engine, as_observer(EventBuffer()), stall_seconds=1.0)
    own, theirs = socket.socketpair()
    for each in (own, theirs):
        each.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.create_unix_connection(server.connect_launcher, sock=theirs)
    watching = asyncio.create_task(server.watch())
    await asyncio.sleep(1.5)
    assert not watching.done(), "it has no work"
    _, connection = await loop.create_unix_connection(
        lambda: client_module._Connection(
            ProcessEngine(default_checkpoint.card, EngineSocket(""), launches=False)
        ),
        sock=own,
    )
    call = asyncio.create_task(connection.embed(batch(3)))
    began = time.monotonic()
    await asyncio.wait_for(watching, 10)
    assert time.monotonic() - began >= 0.9
    call.cancel()
    await server.close()


async def test_another_checkpoint_is_refused(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Two processes that read different files do not work together: the adapters would be mixed."""
    other = replace(default_checkpoint.card, adapters=("clustering", "retrieval"))
    engine = FakeEngine(other)
    await engine.start()
    path = tmp_path / "engine.sock"
    async with serving(engine, path):
        client = ProcessEngine(default_checkpoint.card, EngineSocket(str(path)), launches=False)
        with pytest.raises(StartError, match="another checkpoint"):
            await client.start()
        assert not client.health().ready
        await client.stop()


WEIGHTS = {"config.json": (1, 2, 3), "model.safetensors": (10, 20, 30)}
OTHER_WEIGHTS = WEIGHTS | {"model.safetensors": (10, 21, 31)}


@pytest.mark.parametrize("change", ["card", "weights"])
async def test_another_checkpoint_is_refused_after_a_restart(
    default_checkpoint: Checkpoint, tmp_path: Path, change: str
) -> None:
    """A gateway never uses a new process that has read other files, also not when it is ready."""
    path = tmp_path / "engine.sock"
    card = default_checkpoint.card
    swapped = replace(card, adapters=tuple(reversed(card.adapters)))
    first, second = FakeEngine(card), FakeEngine(swapped if change == "card" else card)
    third = FakeEngine(card)
    await first.start()
    client = ProcessEngine(card, EngineSocket(str(path)), launches=False, files=WEIGHTS)
    async with serving(first, path, WEIGHTS):
        await client.start()
    await until(lambda: not client.health().ready)
    async with serving(second, path, WEIGHTS if change == "card" else OTHER_WEIGHTS):
        await until(lambda: "read" in client.health().reason)  # while it loads
        reason = client.health().reason
        assert ("another checkpoint" if change == "card" else "model.safetensors") in reason
        await second.start()
        await asyncio.sleep(0.5)
        assert client.health() == EngineHealth(EngineState.UNAVAILABLE, reason)
        with pytest.raises(UnavailableError):
            await client.embed(batch(3))
    await third.start()
    async with serving(third, path, WEIGHTS):
        await until(lambda: client.health().ready)
        await client.embed(batch(3))
    await client.stop()
    assert second.batches == []


class FailingSource(EngineSocket):
    """Fails some times when a connection has ended."""

    failures = 0

    async def ended(self, *, ready: bool) -> str:
        self.failures -= 1
        if self.failures >= 0:
            raise RuntimeError("can't start new thread")
        return await super().ended(ready=ready)


@pytest.mark.parametrize("failures", [1, 100])
async def test_unexpected_errors_of_the_connection_are_bounded(
    default_checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failures: int,
) -> None:
    """After an error the gateway connects again; after some in a row it gives up."""
    monkeypatch.setattr(concurrency, "FIRST_RESTART_SECONDS", 0.01)
    path = tmp_path / "engine.sock"
    engine = FakeEngine(default_checkpoint.card)
    await engine.start()
    source = FailingSource(str(path))
    source.failures = failures
    ends: list[BaseException] = []
    client = ProcessEngine(default_checkpoint.card, source, launches=False)
    client.on_end(ends.append)
    async with serving(engine, path):
        await client.start()
    for _ in range(4):
        async with serving(engine, path):
            await until(lambda: client.health().ready or ends)
            if failures == 1:
                await client.embed(batch(3))
    await until(lambda: not client.health().ready)
    if failures == 1:
        assert ends == []
    else:
        await until(lambda: ends)
        assert client.health().state is EngineState.DEAD
        assert isinstance(ends[0], BackgroundTaskError)
    await client.stop()


async def test_stopping_waits_for_calls(default_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A gateway that stops gets the results that it waits for, and takes no new calls."""
    slow = FakeEngine(default_checkpoint.card, delay=0.3)
    async with connected(default_checkpoint, tmp_path, slow) as (client, _):
        call = asyncio.create_task(client.embed(batch(3)))
        await until(lambda: slow.batches)
        stopping = asyncio.create_task(client.stop())
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError) as caught:
            await client.embed(batch(3))
        assert caught.value.code == "draining"
        await stopping
        assert call.done()
        assert len((await call).vectors) == 1


async def test_a_gateway_that_waits_can_be_stopped(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Stopping ends the start of a gateway whose engine process does not come."""
    client = ProcessEngine(
        default_checkpoint.card, EngineSocket(str(tmp_path / "nobody.sock")), launches=False
    )
    starting = asyncio.create_task(client.start())
    await asyncio.sleep(0.3)
    await client.stop()
    async with asyncio.timeout(5):
        await starting
    assert client.health().state is EngineState.DEAD


async def test_events_reach_the_metrics_of_the_launcher(default_checkpoint: Checkpoint) -> None:
    """What the engine reports is counted once, by the process that launched it and by no other."""

    class Observed(FakeEngine):
        observer: Any

        async def embed(self, batch: TokenBatch) -> EngineResult:
            self.observer.queue_changed(1, 3, 1.0)
            self.observer.batch_started([0.25])
            result = await super().embed(batch)
            self.observer.batch_finished(1, 3, 0.5, 64)
            self.observer.texts_dropped(DropReason.EXPIRED, 2)
            self.observer.queue_changed(0, 0, None)
            return result

    engine, events, metrics = Observed(default_checkpoint.card), EventBuffer(), Metrics([])
    engine.observer = events
    await engine.start()
    server = EngineServer(engine, as_observer(events), events)
    own, theirs = socket.socketpair()
    for each in (own, theirs):
        each.setblocking(False)

    class Launcher(EngineSocket):
        async def open(self) -> socket.socket:
            return own

    await asyncio.get_running_loop().create_unix_connection(server.connect_launcher, sock=theirs)
    watching = asyncio.create_task(server.watch())
    client = ProcessEngine(default_checkpoint.card, Launcher(""), metrics, launches=True)
    await client.start()
    for _ in range(3):
        await client.embed(batch(3))

    def value(name: str, **labels: str) -> float:
        return metrics.registry.get_sample_value(name, labels) or 0.0

    await until(lambda: value("taskvec_forward_seconds_count") == 3)
    assert value("taskvec_queue_seconds_sum") == 0.75
    assert value("taskvec_texts_dropped_total", reason="expired") == 6
    assert value("taskvec_queue_texts") == 0
    assert value("taskvec_batch_budget_tokens") == 64
    await until(lambda: value("taskvec_engine_process_resident_bytes") > 1e6)
    await client.stop()
    assert server.stop_requested.is_set()
    watching.cancel()
    await server.close()


def test_events_that_nobody_takes_are_bounded() -> None:
    """A gateway that does not read loses the oldest events, and the queue's state is the latest."""
    events = EventBuffer()
    observer = as_observer(events)
    for number in range(30_000):
        observer.batch_started([float(number)])
        observer.queue_changed(number, number, None)
    taken = events.take()
    assert len(taken) == 10_001
    assert taken[-1] == ("queue_changed", (29_999, 29_999, None))
    assert events.take() == []
    with pytest.raises(AttributeError):
        events.no_such_event()
