"""One random schedule: a service, its clients and what goes wrong, all drawn from one seed.

What must hold, whatever the schedule:

* Every request ends once, with the vectors of its own texts or with an error that it may get then.
* A request that is refused for want of room is admitted when it is sent again; a request that is
  small is served before the rest of larger ones.
* With one server that works, no request fails because of the others.
* A server that is known to be wrong gives no answer, and one that is wrong is found in time.
* Nothing waits for ever, and after the last request every count is zero.
* When all faults are over the service works again, unless its engine's thread has ended.
* A stop ends in its time.
"""

from __future__ import annotations

import asyncio
import collections
import gc
import logging
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import aiohttp.connector
import numpy as np
import structlog
import uvicorn

import taskvec.core.tokenizer_queue
import taskvec.engines.packed.engine
import taskvec.engines.packed.lanes
import taskvec.engines.packed.worker
import taskvec.engines.remote.engine
import taskvec.service
from simulation.loop import SimulatedLoop, StuckError
from simulation.network import CARD, Fault, Network, Server, right_vector
from simulation.parts import (
    GOLDEN,
    Observer,
    SimulatedPackedEngine,
    SimulatedPool,
    SimulatedTokenizer,
    SimulatedTransformer,
    WatchedEngine,
    word_ids,
)
from simulation.threads import Threads
from taskvec.api.request import cancel_on_disconnect
from taskvec.cache.embeddings import EmbeddingCache
from taskvec.cache.memory import MemoryStore
from taskvec.cache.proven import ProvenStore
from taskvec.core.admission import Admission
from taskvec.core.client_shares import current_client
from taskvec.core.embedder import AsyncEmbedder
from taskvec.core.health import ServiceHealth
from taskvec.core.job import EmbedJob, JobContext
from taskvec.core.tasks import TaskTable
from taskvec.engines.base import CallOutcome, EngineState, do_nothing
from taskvec.engines.remote.client import ServerCallError
from taskvec.engines.remote.engine import RemoteOptions
from taskvec.engines.remote.pool_server import PoolServer, ServerState
from taskvec.errors import TaskvecError
from taskvec.priority import Priority
from taskvec.server.shutdown import GracefulServer
from taskvec.service import STATE_KEY, Role, Service

SECONDS = 900.0
"""Virtual seconds of a schedule; those of most are below 60."""

LOAD_SECONDS = 12.0
"""Virtual seconds in which requests start and faults begin."""

CALL_SECONDS, CHECK_SECONDS = 8.0, 4.0

MAX_REFUSALS = 60
"""Times that a client may be told in a row to send its request again."""

WORDS = [f"word{number}" for number in range(60)]

TASKS = TaskTable(CARD.adapters, {"query": "query: ", "document": "document: "}, None)


@dataclass
class Report:
    """What happened in one schedule.

    Attributes:
        failures: sentences, one for each property that did not hold.
        outcomes: number of requests that ended in each way.
        course: checksum of the course of events.
        log: what happened, for people.
    """

    seed: int
    failures: list[str] = field(default_factory=list)
    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    course: int = 0
    seconds: float = 0.0
    log: list[str] = field(default_factory=list)


def run_schedule(seed: int) -> Report:
    """Run the schedule of a seed."""
    report = Report(seed)
    with _simulated(seed) as (loop, threads), ExitStack() as patches:
        simulation = Simulation(loop, threads, report)
        patches.enter_context(
            patch.object(taskvec.engines.remote.engine, "PoolServer", simulation.watched_server())
        )
        try:
            loop.run_until_complete(simulation.run())
        except StuckError as error:
            report.failures.append(f"{error}: {simulation.unfinished()}")
        except Exception as error:  # noqa: BLE001 - whatever it is, the seed has shown it
            report.failures.append(f"the simulation ended with {error!r}")
        report.failures += [f"a thread ended with {error!r}" for error in threads.crashes]
        report.course, report.seconds = loop.course, loop.time()
        del simulation
        gc.collect(0)
        report.failures += loop.errors
    return report


@contextmanager
def _simulated(seed: int) -> Iterator[tuple[SimulatedLoop, Threads]]:
    loop = SimulatedLoop(seed, SECONDS)
    threads = Threads(loop)
    queue, packed = taskvec.core.tokenizer_queue, taskvec.engines.packed.engine
    worker, remote = taskvec.engines.packed.worker, taskvec.engines.remote.engine
    with ExitStack() as stack:
        for target, name, value in [
            (time, "monotonic", loop.time),
            (time, "perf_counter", loop.time),
            (time, "thread_time", loop.time),
            (aiohttp.connector, "monotonic", loop.time),
            (queue, "threading", threads),
            (queue, "ThreadPoolExecutor", threads.executor),
            (packed, "threading", threads),
            (packed, "lower_priority", lambda _: None),
            (taskvec.engines.packed.lanes, "threading", threads),
            (worker, "threading", threads),
            (worker, "trim_malloc", lambda: None),
            (worker, "release_memory", lambda _: None),
            (taskvec.service, "trim_malloc", lambda: None),
            (taskvec.service, "InterpreterLockMonitor", lambda _: nullcontext()),
            (remote, "golden_vectors", lambda *_: GOLDEN),
        ]:
            stack.enter_context(patch.object(target, name, value))
        structlog.configure(
            processors=[_drop],
            wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL),
        )
        random.seed(seed)
        try:
            yield loop, threads
        finally:
            for task in asyncio.all_tasks(loop):  # of a schedule that was stuck
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                with suppress(BaseException):  # a `finally` that waits cannot
                    task.get_coro().close()  # type: ignore[union-attr]
            threads.end_all()
            loop.close()
            structlog.reset_defaults()


def _drop(*_: Any) -> Any:
    raise structlog.DropEvent


def _no_pressure() -> Any:
    """Return what stands for the watch of the memory: the schedules do not run out of it."""
    return SimpleNamespace(watch=asyncio.Event().wait, close=do_nothing)


@dataclass(eq=False)
class Request:
    """One request of a client.

    Attributes:
        client: who sends it.
        inputs: texts.
        disconnect: seconds after which the client goes; None if it waits.
        timeout: seconds for the answer; None without a limit.
    """

    client: str
    task: str
    inputs: list[str]
    priority: Priority = Priority.INTERACTIVE
    disconnect: float | None = None
    timeout: float | None = None
    started: float = 0.0


class Simulation:
    """One schedule."""

    def __init__(self, loop: SimulatedLoop, threads: Threads, report: Report) -> None:
        """Draw the schedule."""
        self.loop = loop
        self.threads = threads
        self.report = report
        self.random = loop.random
        self.servers: list[Server] = []
        self.watched: dict[str, WatchedServer] = {}
        self.observer = Observer()
        self.tasks: set[asyncio.Task[str]] = set()
        self.requests: dict[asyncio.Task[str], Request] = {}
        self.network = Network(loop, [])
        self.transformer: SimulatedTransformer | None = None
        self.reliable = False
        self.failing_passes = False
        self.stopping = False
        self.known_wrong_at: dict[int, float] = {}
        self.cache: EmbeddingCache | None = None
        self.service = self._build()

    # The parts.

    def _build(self) -> Service:
        choose = self.random.choice
        inner = self._build_pool() if self.random.random() < 0.65 else self._build_packed()
        self.engine = WatchedEngine(inner)
        engine: Any = self.engine
        clock = self.loop.time
        self.admission = Admission(
            choose((0, 600, 3000, 20_000)), 5.0, choose((3, 20, 1000)), clock
        )
        self.health = ServiceHealth(
            engine, stall_seconds=30.0, dead_seconds=120.0, canary_seconds=5.0, clock=clock
        )
        self.tokenizer = SimulatedTokenizer(
            self.threads, choose((1, 2, 3)), choose((3000, 20_000, 1_000_000))
        )
        tokenizer: Any = self.tokenizer
        self.embedder = AsyncEmbedder(
            engine, tokenizer, TASKS, self.admission, self.health, cache=self.cache
        )
        settings: Any = SimpleNamespace(
            drain_grace=choose((0.0, 0.5)), drain_timeout=choose((1, 5, 30))
        )
        nothing: Any = None
        unused: Any = SimpleNamespace(lock_held=None)
        return Service(
            settings=settings,
            role=Role.STANDALONE,
            checkpoint=nothing,
            engine=engine,
            embedder=self.embedder,
            admission=self.admission,
            health=self.health,
            budget=nothing,
            pressure=_no_pressure(),
            names=nothing,
            metrics=unused,
            keys=None,
            limiter=None,
            tracer=None,
            request_log=None,
        )

    def _build_packed(self) -> SimulatedPackedEngine:
        self.failing_passes = self.random.random() < 0.2
        batch_tokens = self.random.choice((200, 1000))
        memory = self.random.choice((1 << 30, 1 << 30, 450))
        self.transformer = SimulatedTransformer(
            self.threads, memory, 0.05 if self.failing_passes else 0.0
        )
        if self.random.random() < 0.5:
            self.cache = self._build_cache(MemoryStore(1 << 16, self.observer))
        return SimulatedPackedEngine(self.transformer, batch_tokens, self.observer)

    def _build_pool(self) -> SimulatedPool:
        count = self.random.choice((1, 2, 3))
        self.servers = [
            Server(self.loop, index, vllm=self.random.random() < 0.3) for index in range(count)
        ]
        self.reliable = self.random.random() < 0.6
        self.network = Network(self.loop, self.servers)
        dns = self.random.random() < 0.3
        self.addresses = [server.address for server in self.servers]
        urls = ("dns://engines:80",) if dns else tuple(server.url for server in self.servers)
        options = RemoteOptions(
            urls=urls,
            call_seconds=CALL_SECONDS,
            check_seconds=CHECK_SECONDS,
            lookup_seconds=2.0,
            connections=self.random.choice((2, 5, 200)),
        )
        pool = SimulatedPool(self.network, options, self.observer, self._resolve)
        if self.random.random() < 0.4:
            store = ProvenStore(MemoryStore(1 << 20, self.observer))
            pool.watch_proofs(store)
            self.cache = self._build_cache(store)
        return pool

    def _build_cache(self, store: Any) -> EmbeddingCache:
        return EmbeddingCache(
            store, identity=b"", dimension=CARD.dimension, shared=True, observer=self.observer
        )

    async def _resolve(self, _: str) -> list[str]:
        await asyncio.sleep(self.random.choice((0.0, 0.01, 1.0)))
        if not self.addresses:
            raise OSError("no such name")
        return list(self.addresses)

    # The course.

    def watched_server(self) -> type[PoolServer]:
        """Return the class of the pool's servers."""

        class Watched(WatchedServer):
            def __init__(inner, url: str, *arguments: Any, **options: Any) -> None:  # noqa: N805
                inner.simulation = self
                inner.server = self.network.servers[url.removeprefix("http://").partition(":")[0]]
                self.watched[url] = inner
                super().__init__(url, *arguments, **options)

        return Watched

    async def run(self) -> None:
        """Run everything, and check what must hold."""
        async with self.service.running(lambda error: self.fail(f"no start: {error!r}")):
            await self._until("the engine is ready", lambda: self.engine.health().ready)
            clients = [asyncio.create_task(client) for client in self._clients()]
            faults = asyncio.create_task(self._break_things())
            if self.random.random() < 0.3:
                await asyncio.sleep(self.random.uniform(0.0, LOAD_SECONDS))
                faults.cancel()
            else:
                await self._calm(clients, faults)
            self._ask_at_last()
            await self._stop()
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, faults, return_exceptions=True)
            began = self.loop.time()
        if self.loop.time() - began > 30:
            self.fail(f"the end took {self.loop.time() - began:.1f} s")
        for name, count in {**self._counts(), "open connections": self.network.open}.items():
            if count:
                self.fail(f"after the end, {count} {name}")
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        if left:
            self.fail(f"tasks left: {left}")
        for fault in self.engine.faults:
            self.fail(fault)

    async def _calm(self, clients: list[asyncio.Task[None]], faults: asyncio.Task[None]) -> None:
        """Wait for the end of all requests and faults; the service must work as before."""
        await asyncio.gather(*clients)
        while self.tasks:
            await asyncio.wait(list(self.tasks))
        await faults
        began = self.loop.time()
        while await self.ask(Request("last", "clustering", ["is it well again"])) != "answered":
            if self.transformer is not None and self.transformer.died:
                if self.health.liveness().state is not EngineState.DEAD:
                    self.fail("the engine's thread has ended, and the service is live")
                return
            if self.loop.time() - began > 90:
                self.fail("90 s after the last fault, requests still fail")
                break
            await asyncio.sleep(0.5)
        try:
            await self._until("no request is in progress", lambda: not any(self._counts().values()))
        except TimeoutError:
            counts = {name: count for name, count in self._counts().items() if count}
            self.fail(f"without a request there are {counts}")

    async def _until(self, what: str, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.05)
        self.note(what)

    def _ask_at_last(self) -> None:
        for _ in range(self.random.choice((0, 3, 10))):
            texts = self._texts(self.random.choice((1, 5, 40)))
            self._start(Request("late", "retrieval.query", texts))

    async def _stop(self) -> None:
        """Stop as ``taskvec serve`` does: drain, then cancel what is left."""
        server = GracefulServer(uvicorn.Config(None, log_config=None))
        lifespan: Any = SimpleNamespace(state={STATE_KEY: self.service})
        server.lifespan = lifespan
        settings = self.service.settings
        limit = settings.drain_grace + settings.drain_timeout + 1.0
        began = self.loop.time()
        self.stopping = True
        self.note("the service is stopped")
        await server._drain(signal.SIGTERM)
        if self.loop.time() - began > limit + 2.0:
            self.fail(f"the drain took {self.loop.time() - began:.1f} s, not {limit:g}")
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=server.config.timeout_graceful_shutdown)
        for task in self.tasks:
            task.cancel()
        if self.tasks:
            await asyncio.wait(list(self.tasks))

    def _counts(self) -> dict[str, int]:
        """Return everything that is zero without requests."""
        admission, queue = self.admission, self.tokenizer.queue
        counts = {
            "admitted tokens": admission.tokens,
            "admitted requests": sum(admission._requests.values()),
            "shares": sum(
                len(s._held) + s._beyond.requests + s._beyond.tokens
                for s in admission._shares.values()
            ),
            "characters": sum(c.characters for c in queue._classes.values()),
            "tokenizing requests": sum(c.requests for c in queue._classes.values()),
            "tokenizer shares": sum(
                len(c.shares._held) + c.shares._beyond.requests for c in queue._classes.values()
            ),
            "requests in progress": self.health.work.count,
            "waiting calls": self.health.waiting.count,
            "engine calls": self.engine.calls,
            "queued texts and tokens": sum(self.observer.queue),
        }
        if self.transformer is None:
            pool: Any = self.engine.engine
            counts["connection slots taken"] = pool._options.connections - pool._connections._value
            for server, _ in pool._servers.values():
                counts[f"tokens at {server.name}"] = server.tokens
                counts[f"calls to {server.name}"] = len(server._calls)
                counts[f"bulk calls to {server.name}"] = 4 - server._bulk_calls._value
                counts[f"batched calls to {server.name}"] = len(server._batcher._calls)
        return counts

    # The clients.

    def _clients(self) -> list[Any]:
        kinds = [self._flood, self._bulk, self._impatient, self._flaky, self._polite]
        chosen = [self._polite, *self.random.choices(kinds, k=self.random.randrange(1, 4))]
        return [kind(f"{kind.__name__} {index}") for index, kind in enumerate(chosen)]

    async def _polite(self, name: str) -> None:
        for _ in range(self.random.randrange(2, 6)):
            await asyncio.sleep(self.random.uniform(0, LOAD_SECONDS / 5))
            await self._persist(Request(name, self._task(), self._texts(1)))

    async def _flood(self, name: str) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(self.random.randrange(10, 25)):
                await asyncio.sleep(self.random.choice((0.0, 0.0, 0.01, 0.3)))
                texts = self._texts(self.random.choice((1, 8, 30)))
                group.create_task(self._persist(Request(name, self._task(), texts)))

    async def _bulk(self, name: str) -> None:
        for _ in range(self.random.randrange(1, 4)):
            texts = self._texts(self.random.choice((20, 70, 200)))
            await self._persist(Request(name, self._task(), texts, Priority.BULK))

    async def _impatient(self, name: str) -> None:
        for _ in range(self.random.randrange(3, 9)):
            await asyncio.sleep(self.random.uniform(0, 1))
            timeout = self.random.choice((0.001, 0.02, 0.3, 3.0))
            texts = self._texts(self.random.choice((1, 8, 30)))
            priority = self.random.choice(list(Priority))
            self._start(Request(name, self._task(), texts, priority, timeout=timeout))

    async def _flaky(self, name: str) -> None:
        for _ in range(self.random.randrange(3, 9)):
            await asyncio.sleep(self.random.uniform(0, 1))
            after = self.random.choice((0.0, 0.005, 0.05, 0.5, 3.0))
            texts = self._texts(self.random.choice((1, 8, 30)))
            priority = self.random.choice(list(Priority))
            self._start(Request(name, self._task(), texts, priority, disconnect=after))

    def _task(self) -> str:
        return self.random.choice(TASKS.names)

    def _texts(self, count: int) -> list[str]:
        """Return texts of 1 to 12 words; the first of one in ten requests has hundreds."""
        texts = [self._text(self.random.randrange(1, 12)) for _ in range(count)]
        if self.random.random() < 0.1:
            texts[0] = self._text(self.random.choice((150, 600)))
        return texts

    def _text(self, words: int) -> str:
        return " ".join(self.random.choices(WORDS, k=words))

    async def _persist(self, request: Request) -> str:
        """Send a request again while it is refused for want of room."""
        for _ in range(MAX_REFUSALS):
            outcome = await asyncio.shield(self._start(request))
            if not outcome.startswith("queue_full"):
                return outcome
            await asyncio.sleep(float(outcome.split()[1]))
        self.fail(f"{request.client} was refused {MAX_REFUSALS} times")
        return outcome

    def _start(self, request: Request) -> asyncio.Task[str]:
        task = asyncio.create_task(self.ask(request))
        self.tasks.add(task)
        self.requests[task] = request

        def ended(task: asyncio.Task[str]) -> None:
            self.tasks.discard(task)
            del self.requests[task]

        task.add_done_callback(ended)
        return task

    async def ask(self, request: Request) -> str:
        """Send a request as the endpoint does; return how it ended."""
        current_client.set(request.client)
        now = request.started = self.loop.time()
        job = EmbedJob(
            inputs=request.inputs,
            task=TASKS.get(request.task),
            deadline=None if request.timeout is None else now + request.timeout,
            priority=request.priority,
        )
        try:
            with self.health.work:
                work = self.embedder.embed(job, JobContext())
                result = await cancel_on_disconnect(self._receive(request), work)
        except TaskvecError as error:
            self._check_error(request, error)
            outcome = error.code
            if outcome == "queue_full":
                outcome = f"queue_full {error.retry_after}"
        except asyncio.CancelledError:
            if not self.stopping:
                self.fail(f"a request of {request.client} was cancelled by nobody")
            outcome = "cancelled"
        except Exception as error:  # noqa: BLE001 - a failure, whatever it is
            self.fail(f"a request of {request.client} ended with {error!r}")
            outcome = "failed"
        else:
            self._check_vectors(request, job, result.vectors)
            outcome = "answered"
        self.report.outcomes[outcome.split()[0]] += 1
        self.note(f"{request.client}: {len(request.inputs)} texts {outcome}")
        return outcome

    def _receive(self, request: Request) -> Any:
        async def receive() -> Any:
            if request.disconnect is None:
                await asyncio.Event().wait()
            await asyncio.sleep(request.disconnect or 0.0)
            return {"type": "http.disconnect"}

        return receive

    # What must hold.

    def _check_error(self, request: Request, error: TaskvecError) -> None:
        broken = (not self.reliable and self.transformer is None) or (
            self.transformer is not None and self.transformer.died
        )
        allowed = {
            "queue_full": True,
            "deadline_exceeded": request.timeout is not None
            and self.loop.time() >= request.started + request.timeout - 1e-6,
            "client_closed": request.disconnect is not None,
            "draining": self.stopping,
            "engine_unavailable": broken or self.failing_passes,  # the canary may fail as well
            "internal_error": self.failing_passes,
            "out_of_memory": self.transformer is not None
            and max(len(text.split()) for text in request.inputs) > 400,
        }
        if not allowed.get(error.code, False):
            self.fail(f"a request of {request.client} got {error.code}: {error.message}")

    def _check_vectors(self, request: Request, job: EmbedJob, vectors: Any) -> None:
        for text, vector in zip(request.inputs, vectors, strict=True):
            ids = word_ids(text, job.task.prompt)
            if np.array_equal(vector, right_vector(ids, job.task.adapter)):
                continue
            index = round(float(np.linalg.norm(vector))) - 2
            # Nobody could know before the server's next check.
            if index >= 0 and request.started <= self.known_wrong_at.get(index, float("inf")):
                self.report.outcomes["wrong, not known yet"] += 1
                continue
            self.fail(f"{request.client} got a wrong vector {vector} for {text!r}")

    # What goes wrong.

    async def _break_things(self) -> None:
        if self.transformer is not None:
            await self._break_engine(self.transformer)
            return
        breakable = self.servers[1:] if self.reliable else self.servers
        end = self.loop.time() + LOAD_SECONDS
        try:
            while breakable and self.loop.time() < end:
                await asyncio.sleep(self.random.uniform(0, 2))
                server = self.random.choice(breakable)
                await self._break_server(server)
        finally:
            for server in self.servers:
                server.faults.clear()
                server.thaw()
                if server.wrong:
                    server.crash()
                server.start()
            self.addresses = [server.address for server in self.servers]
            self.note("all faults are over")

    async def _break_server(self, server: Server) -> None:
        choice = self.random.choice(
            ("crash", "restart", "freeze", "vanish", "fault", "wrong", "thaw", "leave", "lookup")
        )
        self.note(f"{choice} {server.address}")
        if choice == "crash":
            server.crash()
        elif choice == "restart":
            server.crash()
            await asyncio.sleep(self.random.choice((0.0, 0.3, 1.0)))
            server.start()
        elif choice in ("freeze", "vanish"):
            server.freeze()
            server.vanished = choice == "vanish"
        elif choice == "thaw":
            server.thaw()
            server.start()
            server.faults.clear()
        elif choice == "fault":
            server.faults = {self.random.choice(list(Fault)): self.random.choice((0.2, 1.0))}
        elif choice == "wrong":
            server.crash()
            await asyncio.sleep(self.random.choice((0.0, 0.3)))
            server.start(self.random.choice(("swapped", "constant")))
            server.wrong_since = self.loop.time()
        elif choice == "leave" and server.address in self.addresses[1:]:
            self.addresses.remove(server.address)
        elif choice == "lookup" and not self.reliable:
            self.addresses = []

    async def _break_engine(self, transformer: SimulatedTransformer) -> None:
        await asyncio.sleep(self.random.uniform(0, LOAD_SECONDS))
        if self.random.random() < 0.1:
            self.note("the engine's thread ends at its next forward pass")
            transformer.dies = True

    # The report.

    def fail(self, sentence: str) -> None:
        """Record that something did not hold."""
        self.report.failures.append(f"{sentence} (at {self.loop.time():.3f})")
        self.note(f"FAILURE: {sentence}")

    def note(self, event: str) -> None:
        """Record an event, for people."""
        self.report.log.append(f"{self.loop.time():10.4f} {event}")

    def unfinished(self) -> str:
        """Return what has not ended."""
        requests = [f"{r.client} since {r.started:.2f}" for r in self.requests.values()]
        counts = {name: count for name, count in self._counts().items() if count}
        return f"unfinished requests {requests}, counts {counts}"


class WatchedServer(PoolServer):
    """A server of the pool, which checks that nothing comes from it that is known to be wrong."""

    simulation: Simulation
    server: Server
    known_wrong = False
    checked_life = 0
    opened_at = 0.0

    async def _send(self, texts: Any, adapters: Any, *arguments: Any, **options: Any) -> Any:
        vectors = await super()._send(texts, adapters, *arguments, **options)
        if texts is not self._golden.probes and float(np.linalg.norm(vectors, axis=1).max()) > 1.5:
            late = self.simulation.loop.time() - self.server.wrong_since
            if self.known_wrong:
                self.simulation.fail(f"an answer of {self.name}, which is known to be wrong")
            elif not self.serving and self.server.life != self.checked_life:
                self.simulation.fail(f"an answer of {self.name}, started again and not checked")
            elif late > CHECK_SECONDS + CALL_SECONDS + 3.0:
                self.simulation.fail(f"{self.name} has been wrong for {late:.1f} s")
        return vectors

    def _doubt(self, error: ServerCallError) -> None:
        if error.outcome is CallOutcome.WRONG and self.server.wrong:
            self._know()
        super()._doubt(error)

    def _record_failure(self, error: ServerCallError) -> None:
        self.simulation.note(f"a call to {self.name}: {error.outcome}, {error.message}")
        super()._record_failure(error)

    def _set_state(self, state: ServerState, reason: str) -> None:
        if state is not ServerState.CLOSED and self.serving:
            self.opened_at = self.simulation.loop.time()
        if state is ServerState.CLOSED:
            if self.server.wrong and self.server.wrong_since < self.opened_at:
                self.simulation.fail(f"{self.name} is used again without a check")
            self.known_wrong, self.checked_life = False, self.server.life
            self.simulation.known_wrong_at.pop(self.server.index, None)
        if state is ServerState.REFUSED and self.server.wrong:
            self._know()
        if (state, reason) != (self.state, self.reason):
            self.simulation.note(f"{self.name} is {state}: {reason}")
        super()._set_state(state, reason)

    def _know(self) -> None:
        self.known_wrong = True
        self.simulation.known_wrong_at.setdefault(self.server.index, self.simulation.loop.time())
