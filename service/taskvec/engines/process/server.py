"""Serves an engine to gateways: the side of the engine process."""

from __future__ import annotations

import asyncio
import math
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import structlog

from taskvec.concurrency import is_shortage
from taskvec.engines.base import Engine, EngineObserver, EngineState
from taskvec.engines.process.frames import (
    Body,
    FrameProtocol,
    Kind,
    pack_error,
    pack_frame,
    pack_json,
    pack_result,
    unpack_call,
)
from taskvec.errors import OverloadedError, StartError, TaskvecError
from taskvec.malloc import trim_malloc
from taskvec.memory_limits import MemoryLimits

log = structlog.get_logger(__name__)

STATUS_INTERVAL = 0.05
"""Seconds between two looks at the engine's state, and at most from an event to its gateway's
knowledge of it. An event for each result would make its gateway, or the next forward pass, wait."""

HEARTBEAT_SECONDS = 1.0
"""Seconds between two states that are sent although nothing has changed: they show that the event
loop runs."""

MEMORY_INTERVAL = 1.0
"""Seconds between two readings of the memory of this process."""

LIMIT_INTERVAL = 0.1
"""Seconds between two readings of its use of the address space, if that is limited."""

IDLE_TRIM_SECONDS = 2.0
"""Free memory is returned to the system once nothing was embedded for this long."""

MAX_EVENTS = 10_000
"""Events kept for a gateway that does not read them; older ones are dropped."""

MAX_UNREAD = 1 << 20
"""Bytes of unread frames beyond which events wait."""


CLOSE_SECONDS = 1.0
"""Time for the last frames to be read."""

NO_MEMORY = pack_error(
    OverloadedError(
        "The engine's process has no memory left for the request: send it again later.",
        retry_after=1,
    )
)
"""Body of an error frame; made while there is memory."""


class ProcessObserver(EngineObserver, Protocol):
    """Observer of an engine and of the process that runs it."""

    def process_memory(self, resident: int) -> None:
        """The engine's process has this many bytes of memory (RSS)."""

    def process_loop_late(self, seconds: float) -> None:
        """The event loop of the engine's process was late by so much; see ``EventLoopLag``."""

    def process_lock_held(self, seconds: float) -> None:
        """The interpreter lock of the engine's process was held for so long; from a thread."""


class EventBuffer:
    """An observer that keeps events until they are sent to a gateway, whose metrics count them."""

    def __init__(self) -> None:
        """Start without events."""
        self._events: deque[tuple[str, tuple[Any, ...]]] = deque(maxlen=MAX_EVENTS)
        self._queue: tuple[Any, ...] | None = None

    def queue_changed(self, texts: int, tokens: int, oldest: float | None) -> None:
        """Keep the latest state of the queue alone."""
        self._queue = texts, tokens, oldest

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Return a method that keeps an event; its arguments must have a form in JSON."""
        if name not in EVENTS:
            raise AttributeError(name)
        return lambda *args: self._events.append((name, args))

    def take(self) -> list[tuple[str, tuple[Any, ...]]]:
        """Return the events since the last call, and forget them."""
        taken = [self._events.popleft() for _ in range(len(self._events))]
        queue, self._queue = self._queue, None
        if queue is not None:
            taken.append(("queue_changed", queue))
        return taken


EVENTS = frozenset(name for name in dir(ProcessObserver) if not name.startswith("_"))
"""Names of the events that an engine reports."""


class EngineServer:
    """Serves one engine to any number of connections; belongs to one event loop.

    Attributes:
        stop_requested: set when the process that launched this one asks for its end.
        launcher_lost: set when the connection to that process has ended.
    """

    def __init__(
        self,
        engine: Engine,
        observer: ProcessObserver,
        events: EventBuffer | None = None,
        on_look: Callable[[], None] = lambda: None,
        *,
        stall_seconds: float = math.inf,
        limits: MemoryLimits | None = None,
        files: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """Serve an engine, which may still be loading.

        Args:
            engine: computes the vectors.
            observer: notified of the memory of this process.
            events: what to send to the launcher; None if metrics are kept in this process.
            on_look: called several times a second.
            stall_seconds: ``watch`` returns if calls have waited this long and nothing was
                finished.
            limits: memory limits; None reads those of this process.
            files: the files of the checkpoint that the engine reads; see ``file_versions``.
        """
        self.stop_requested = asyncio.Event()
        self.launcher_lost = asyncio.Event()
        self._engine = engine
        self._observer = observer
        self._events = events
        self._on_look = on_look
        self._connections: set[_Connection] = set()
        self._listener: asyncio.AbstractServer | None = None
        self._launcher: _Connection | None = None
        self._files = dict(files or {})
        self._status: dict[str, Any] = {}
        self._entered: deque[tuple[_Connection, int]] = deque()
        self._progress = _Progress(stall_seconds)
        self._limits = limits or MemoryLimits()
        self._address_space: tuple[int, int] | None = None
        self._limit_read_at = -math.inf
        self._memory_read_at = -math.inf
        self._heartbeat: asyncio.TimerHandle | None = None

    @property
    def connections(self) -> int:
        """Number of connections, the launcher's included."""
        return len(self._connections)

    @property
    def calls(self) -> int:
        """Number of calls of all connections that are not answered."""
        return sum(connection.calls for connection in self._connections)

    async def listen(self, listening: socket.socket) -> asyncio.AbstractServer:
        """Accept the connections of gateways on a Unix socket, until the returned server is closed.

        The engine process leaves it open when it ends: the one that replaces it goes on with it.
        """
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_unix_server(
            lambda: _Connection(self, self._engine), sock=listening
        )
        return self._listener

    def connect_launcher(self) -> FrameProtocol:
        """Return the protocol of the connection to the process that launched this one."""
        self._launcher = _Connection(self, self._engine)
        return self._launcher

    def report_failure(self, error: BaseException) -> None:
        """Tell the launcher that the engine did not start, and why."""
        if self._launcher is not None:
            self._launcher.send(Kind.FAILED, 0, pack_json(failure_sentence(error)))

    async def close(self) -> None:
        """Send what waits to be sent, and close all connections."""
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        limit = time.monotonic() + CLOSE_SECONDS
        for connection in self._connections:
            connection.close()
        while self._connections and time.monotonic() < limit:  # noqa: ASYNC110 - no event
            await asyncio.sleep(CLOSE_SECONDS / 100)

    def start_heartbeat(self) -> None:
        """Show all connections once a second, until ``close``, that the event loop runs."""
        loop = asyncio.get_running_loop()
        self._heartbeat = loop.call_later(HEARTBEAT_SECONDS, self.start_heartbeat)
        body = pack_json(self.status())
        for connection in self._connections:
            if not connection.unread:  # what it has not read says as much
                connection.send(Kind.STATUS, 0, body)

    async def watch(self) -> None:
        """Report the engine's state as it changes, until it is dead or stalled."""
        finished, finished_at, trimmed = 0, time.monotonic(), True
        while True:
            with suppress(MemoryError):  # the next look does what this one left out
                self._look()
            if self._engine.health().state is EngineState.DEAD:
                return
            if self._progress.stalled(self._engine.finished, waiting=self.calls > 0):
                log.error("engine_stalled", seconds=self._progress.stall_seconds)
                return
            now = time.monotonic()
            if self._engine.finished != finished:
                finished, finished_at, trimmed = self._engine.finished, now, False
            elif not trimmed and now - finished_at >= IDLE_TRIM_SECONDS:
                trimmed = True
                trim_malloc()  # in no thread: a thread takes memory, and the engine is idle
            await asyncio.sleep(STATUS_INTERVAL)

    def _look(self) -> None:
        """Report what has changed since the last look."""
        now = time.monotonic()
        if now - self._limit_read_at >= LIMIT_INTERVAL:
            self._limit_read_at = now
            use = self._limits.address_space()
            # Megabytes: the state is not sent for every page.
            self._address_space = use and (use.limit, use.used >> 20 << 20)
        self.report_status()
        self._report_entered()
        self.flush_events()
        self._on_look()
        if now - self._memory_read_at >= MEMORY_INTERVAL:
            self._memory_read_at = now
            self._observer.process_memory(resident_bytes())

    def report_status(self) -> None:
        """Send the engine's state to all connections if it has changed."""
        status = self.status()
        if status != self._status:
            self._status = status
            body = pack_json(status)
            for connection in self._connections:
                connection.send(Kind.STATUS, 0, body)

    def status(self) -> dict[str, Any]:
        """Return what a gateway knows of the engine."""
        health = self._engine.health()
        return {
            "state": health.state.value,
            "reason": health.reason,
            "public_reason": health.public_reason,
            "batch_tokens": self._engine.batch_tokens,
            "finished": self._engine.finished,
            "address_space": self._address_space,
        }

    def hello(self) -> dict[str, Any]:
        """Return the first thing that is sent on a connection: the model, its files, the state."""
        return {"model": asdict(self._engine.model), "files": self._files, **self.status()}

    def flush_events(self) -> None:
        """Send the events of the engine to the launcher, unless it does not read them."""
        launcher = self._launcher
        if self._events is None or launcher is None or launcher.unread > MAX_UNREAD:
            return
        events = self._events.take()
        if events:
            launcher.send(Kind.EVENTS, 0, pack_json(events))

    def opened(self, connection: _Connection) -> None:
        """Add a connection."""
        self._connections.add(connection)

    def closed(self, connection: _Connection) -> None:
        """Remove a connection."""
        self._connections.discard(connection)
        if connection is self._launcher:
            self.launcher_lost.set()

    def entered(self, connection: _Connection, call: int) -> None:
        """Note, from any thread, that a call entered a forward pass.

        The next look sends it to the gateway, if the call lasts that long: most do not.
        """
        self._entered.append((connection, call))

    def _report_entered(self) -> None:
        for _ in range(len(self._entered)):
            connection, call = self._entered.popleft()
            if connection.embeds(call):
                connection.send(Kind.ENTERED, call)


class _Progress:
    """Detects that an engine has work and finishes nothing.

    Only the time between two looks counts, and of a long one only its first second: while the
    process is stopped, or the machine has no core for it, its engine cannot be blamed.
    """

    def __init__(self, stall_seconds: float) -> None:
        self.stall_seconds = stall_seconds
        self._finished = 0
        self._stalled = 0.0
        self._looked_at = time.monotonic()

    def stalled(self, finished: int, *, waiting: bool) -> bool:
        """Return whether it has been so for ``stall_seconds``.

        Args:
            finished: the engine's counter of completed work.
            waiting: whether calls wait for it.
        """
        now = time.monotonic()
        elapsed, self._looked_at = now - self._looked_at, now
        if waiting and finished == self._finished:
            self._stalled += min(elapsed, 1.0)
        else:
            self._finished, self._stalled = finished, 0.0
        return self._stalled >= self.stall_seconds


class _Connection(FrameProtocol):
    """One connection of a gateway: its calls, each in a task."""

    def __init__(self, server: EngineServer, engine: Engine) -> None:
        super().__init__()
        self._server = server
        self._engine = engine
        self._adapters = (None, *engine.model.adapters)
        self._loop = asyncio.get_running_loop()
        self._calls: dict[int, asyncio.Task[None]] = {}

    @property
    def unread(self) -> int:
        """Bytes that the other side has not read."""
        return 0 if self.transport is None else self.transport.get_write_buffer_size()

    @property
    def calls(self) -> int:
        """Number of calls that are not answered."""
        return len(self._calls)

    def close(self) -> None:
        """Close the connection after what has been written."""
        if self.transport is not None:
            self.transport.close()

    def embeds(self, call: int) -> bool:
        """Return whether a call has not been answered."""
        return call in self._calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._server.opened(self)
        self.send(Kind.STATUS, 0, pack_json(self._server.hello()))

    def connection_lost(self, _: Exception | None) -> None:
        self._server.closed(self)
        for call in self._calls.values():
            call.cancel()

    def frame_received(self, kind: int, call: int, body: Body) -> None:
        if kind == Kind.EMBED:
            try:
                task = self._loop.create_task(self._embed(call, body))
                task.add_done_callback(partial(self._ended, call))
                self._calls[call] = task
            except MemoryError:
                self.frame_lost(kind, call)
        elif kind == Kind.CANCEL:
            if call in self._calls:
                self._calls[call].cancel()
        elif kind == Kind.STOP:
            self._server.stop_requested.set()

    def frame_lost(self, kind: int, call: int) -> None:
        if kind == Kind.EMBED:
            self.send(Kind.ERROR, call, NO_MEMORY)

    async def _embed(self, call: int, body: Body) -> None:
        try:
            self.send(*await self._answer(call, body))
        except MemoryError:
            self.send(Kind.ERROR, call, NO_MEMORY)
        except TaskvecError as error:  # the result is too large for a frame
            self.send(Kind.ERROR, call, pack_error(error))

    def _ended(self, call: int, _: asyncio.Task[None]) -> None:
        """Forget a call; its task may have been cancelled before its first step."""
        self._calls.pop(call, None)

    async def _answer(self, call: int, body: Body) -> tuple[Any, ...]:
        """Return the frame that answers a call."""
        try:
            batch = unpack_call(body, self._adapters, partial(self._server.entered, self, call))
            result = await self._engine.embed(batch)
        except TaskvecError as error:
            return Kind.ERROR, call, pack_error(error)
        except Exception as error:
            if is_shortage(error):
                return Kind.ERROR, call, NO_MEMORY
            log.exception("call_failed")
            hidden = TaskvecError("The engine failed on this request; see the log for the reason.")
            return Kind.ERROR, call, pack_error(hidden)
        return Kind.RESULT, call, *pack_result(result, self._engine.finished)


def as_observer(events: EventBuffer) -> ProcessObserver:
    """Return the buffer as the observer that it is, for every event."""
    return cast("ProcessObserver", events)


def failure_frame(error: BaseException) -> bytes:
    """Return the frame that says why there is no engine, before there is a server."""
    return pack_frame(Kind.FAILED, pack_json(failure_sentence(error)))


def failure_sentence(error: BaseException) -> str:
    """Return why an engine did not start; an unexpected error is logged with its traceback."""
    if isinstance(error, StartError):
        return str(error)
    log.error("engine_failed", exc_info=error)
    return f"The engine failed ({type(error).__name__}: {error}); its log has the traceback."


def resident_bytes() -> int:
    """Return the resident memory of this process; 0 where the system does not say."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
