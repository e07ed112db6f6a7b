"""The engine process as an engine: the side of a gateway, and of whoever launched the process."""

from __future__ import annotations

import asyncio
import itertools
import math
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import structlog

from taskvec.checkpoint.backbone import ModelCard
from taskvec.concurrency import BackgroundTaskError, keep_running
from taskvec.engines.base import EngineHealth, EngineResult, EngineState, TokenBatch
from taskvec.engines.process.frames import (
    Body,
    FrameProtocol,
    Kind,
    pack_call,
    unpack_error,
    unpack_json,
    unpack_result,
)
from taskvec.engines.process.server import EVENTS, ProcessObserver
from taskvec.errors import OverloadedError, StartError, UnavailableError
from taskvec.memory_limits import MemoryUse

SILENCE_INTERVAL = 1.0
"""Seconds between two looks at whether the process has sent anything; it sends its state as often
(``server.HEARTBEAT_SECONDS``)."""

UNRESPONSIVE_SECONDS = 10.0
"""The engine is not ready if its process has been silent for so long."""

POLL_INTERVAL = 0.01
"""Seconds between two looks at the calls in progress, while the engine stops."""

RECONNECT_SECONDS = 0.2
"""Seconds between two tries to connect."""

MAX_FAILURES = 5
"""Unexpected errors in a row after which the connections are given up."""

ADDRESS_SPACE = "ulimit -v of the engine's process"
"""Name of its memory limit in logs."""

log = structlog.get_logger(__name__)


class EngineSource(Protocol):
    """Where the connections to the engine process come from."""

    async def open(self) -> socket.socket:
        """Return a connected socket to an engine process, which may still be loading.

        Raises:
            StartError: there is none and will be none.
        """

    async def ended(self, *, ready: bool) -> str:
        """Say why the last connection ended, in words that follow "it has ended".

        Args:
            ready: whether the engine was ready.
        """

    def end_silent(self, seconds: float) -> None:
        """End an engine process that has sent nothing for so long; it has been ready."""

    async def close(self) -> None:
        """Let go of the engine process; every connection has been asked to stop."""


class EngineSocket:
    """Connects to the engine process that another process launches, by its socket's path."""

    def __init__(self, path: str) -> None:
        """Take the path of a Unix socket."""
        self._path = path

    async def open(self) -> socket.socket:
        """See ``EngineSource.open``; tries until the socket can be connected."""
        loop = asyncio.get_running_loop()
        while True:
            opened = socket.socket(socket.AF_UNIX)
            opened.setblocking(False)
            try:
                await loop.sock_connect(opened, self._path)
            except OSError as error:
                opened.close()
                log.warning("engine_not_connected", reason=str(error))
                await asyncio.sleep(RECONNECT_SECONDS)
            except BaseException:
                opened.close()
                raise
            else:
                return opened

    async def ended(self, *, ready: bool) -> str:  # noqa: ARG002 - the launcher logs it
        """See ``EngineSource.ended``."""
        return "the log of the main process says why"

    def end_silent(self, seconds: float) -> None:
        """See ``EngineSource.end_silent``; does nothing, for the launcher does it."""

    async def close(self) -> None:
        """See ``EngineSource.close``; does nothing."""


class ProcessEngine:
    """Engine whose forward passes run in the engine process; belongs to one event loop.

    When the process ends, calls in progress fail and new ones are refused, both as unavailable,
    until its source has another one that is ready.
    """

    def __init__(
        self,
        model: ModelCard,
        source: EngineSource,
        observer: ProcessObserver | None = None,
        *,
        launches: bool,
        silent_seconds: float = math.inf,
        files: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """Create the engine; ``start`` connects.

        Args:
            model: the card of the model that the process must serve.
            source: where connections come from.
            observer: gets the events of the engine, if the process sends them.
            launches: the source launches the process, so that its end is the end of the process.
            silent_seconds: a process that was ready and has sent nothing for so long hangs, and is
                ended.
            files: the files of the checkpoint as this process has read them, by name; see
                ``file_versions``. A process that has read others is refused.
        """
        self._model = model
        self._files = _as_lists(files or {})
        self._source = source
        self._observer = observer
        self._launches = launches
        self._silent_seconds = silent_seconds
        self._silence = 0
        self._health = EngineHealth(EngineState.STARTING, "its process is starting")
        self._stopping = False
        self._was_ready = False
        self._process_ready = False
        self._batch_tokens = 0
        self._finished = 0
        self._connection: _Connection | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._memory: MemoryUse | None = None
        self._started: asyncio.Future[None] | None = None
        self._on_end: Callable[[BaseException], None] | None = None

    @property
    def model(self) -> ModelCard:
        """See ``Engine.model``."""
        return self._model

    @property
    def launches(self) -> bool:
        """Whether the process belongs to this one."""
        return self._launches

    @property
    def finished(self) -> int:
        """See ``Engine.finished``: the counter of the engine in the process."""
        return self._finished

    @property
    def batch_tokens(self) -> int:
        """See ``Engine.batch_tokens``: that of the engine in the process."""
        return self._batch_tokens

    @property
    def memory(self) -> MemoryUse | None:
        """The address space of the process and its limit; None if there is none or no process."""
        return self._memory

    def on_end(self, call: Callable[[BaseException], None]) -> None:
        """Call a function if the engine has ended for good after it was ready."""
        self._on_end = call

    def health(self) -> EngineHealth:
        """See ``Engine.health``."""
        return self._health

    async def start(self) -> None:
        """See ``Engine.start``."""
        self._started = asyncio.get_running_loop().create_future()
        self._tasks = [
            asyncio.create_task(keep_running(name, run))
            for name, run in (
                ("connect to the engine", self._connect_or_end),
                ("watch the engine's process", self._watch_silence),
            )
        ]
        await self._started

    async def embed(self, batch: TokenBatch) -> EngineResult:
        """See ``Engine.embed``."""
        self._health.require_ready()
        assert self._connection is not None  # noqa: S101 - it is what makes the state ready
        return await self._connection.embed(batch)

    async def stop(self) -> None:
        """See ``Engine.stop``."""
        if self._health.state is not EngineState.DEAD:
            self._health = EngineHealth(EngineState.STOPPING, "it finishes the admitted requests")
        while self._connection is not None and self._connection.calls:  # noqa: ASYNC110 - no event
            await asyncio.sleep(POLL_INTERVAL)
        self._stopping = True
        if self._connection is not None:
            self._connection.finish(stop_process=self._launches)
        await self._source.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._started is not None and not self._started.done():
            self._started.set_result(None)
        self._health = EngineHealth(EngineState.DEAD, "stopped")

    async def _connect_or_end(self) -> None:
        """Keep connected, or give up after some unexpected errors in a row."""
        name = "connect to the engine"
        try:
            await keep_running(name, self._keep_connected, MAX_FAILURES)
        except Exception as error:  # noqa: BLE001 - the process must end, whatever the error is
            if self._launches:
                self._end(
                    StartError(
                        f"The engine's process cannot be kept connected ({error!r}): the reason "
                        "is in the log above."
                    )
                )
            else:
                self._end(BackgroundTaskError(f"The background task {name!r} has failed: {error}."))

    async def _keep_connected(self) -> None:
        while not self._stopping:
            try:
                opened = await self._source.open()
            except StartError as error:
                self._end(error)
                return
            connection = await self._connect(opened)
            await connection.lost
            reason = await self._let_go(connection)
            if self._stopping:
                return
            if connection.refused:
                if self._launches or not self._was_ready:
                    return  # given up
                await asyncio.sleep(RECONNECT_SECONDS)
                continue
            failure = self._start_failure(connection, reason)
            if failure is not None:
                self._end(failure)
                return
            if self._was_ready:
                self._set_health(
                    EngineHealth(
                        EngineState.UNAVAILABLE,
                        f"its process has ended ({connection.failure or reason}) and starts again",
                        "its process has ended and starts again",
                    )
                )

    async def _let_go(self, connection: _Connection) -> str:
        """Fail the calls of a connection that has ended; return why it has ended."""
        self._connection = self._memory = None
        ready, self._process_ready = self._process_ready, False
        if not connection.refused:
            self._set_health(EngineHealth(EngineState.UNAVAILABLE, "its process has ended"))
        connection.fail()
        reason = await self._source.ended(ready=ready)
        if self._observer is not None:
            self._observer.queue_changed(0, 0, None)
            self._observer.process_memory(0)
        return reason

    def _start_failure(self, connection: _Connection, reason: str) -> StartError | None:
        """Return the error of a first start; None if the engine was ready, or may still be."""
        if self._was_ready:
            return None
        if connection.failure:
            return StartError(connection.failure)
        if self._launches:
            return StartError(f"The engine's process ended before it was ready: {reason}.")
        return None

    async def _connect(self, opened: socket.socket) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_unix_connection(
                lambda: _Connection(self), sock=opened
            )
        except BaseException:
            opened.close()
            raise
        self._connection = connection
        return connection

    async def _watch_silence(self) -> None:
        """Note when a process that was ready sends nothing, and end it if that lasts.

        Silence is counted in looks, and between two looks the event loop reads what has arrived:
        the time in which this process was stopped, or had no core, does not count.
        """
        while True:
            await asyncio.sleep(SILENCE_INTERVAL)
            if not self._process_ready or self._connection is None:
                self._silence = 0
                continue
            self._silence += 1
            seconds = self._silence * SILENCE_INTERVAL
            if seconds >= self._silent_seconds:
                self._silence = 0
                self._source.end_silent(seconds)
                if self._launches:
                    self._connection.abort()  # the kernel may not end the process at once
            elif seconds >= min(UNRESPONSIVE_SECONDS, self._silent_seconds / 2):
                self._set_health(
                    EngineHealth(EngineState.UNAVAILABLE, "its process does not respond")
                )

    def frame_arrived(self) -> None:
        """Note that the process has sent something."""
        self._silence = 0

    def refuse(self, hello: dict[str, Any]) -> bool:
        """Return whether a process cannot be used, because it has read other files than this one.

        Adapters have numbers between the two, and vectors may have been stored: those of two
        models would be mixed.

        Args:
            hello: the first thing that the process sends.
        """
        reason = self._difference(hello)
        if reason is None:
            return False
        log.error("engine_refused", reason=reason)
        self._set_health(EngineHealth(EngineState.UNAVAILABLE, reason))
        if self._launches or not self._was_ready:
            self._end(StartError(f"The engine cannot be used: {reason}"))
        return True

    def _difference(self, hello: dict[str, Any]) -> str | None:
        served, files = hello["model"], hello["files"]
        if served != _as_lists(asdict(self._model)):
            return (
                f"its process has read another checkpoint ({served.get('name')}) than this one "
                f"({self._model.name}): did its files change?"
            )
        changed = [
            n for n in files.keys() | self._files.keys() if files.get(n) != self._files.get(n)
        ]
        if changed:
            return (
                f"its process has read other files than this one ({', '.join(sorted(changed))}): "
                "restart the service after a change of its checkpoint."
            )
        return None

    def status_received(self, status: dict[str, Any]) -> None:
        """Take over what the process says of its engine."""
        self._batch_tokens = status["batch_tokens"]
        self._finished = status["finished"]
        used = status["address_space"]
        self._memory = None if used is None else MemoryUse(ADDRESS_SPACE, *used)
        state = EngineState(status["state"])
        if state is EngineState.READY:
            self._was_ready = self._process_ready = True
            if self._started is not None and not self._started.done():
                self._started.set_result(None)
        elif state is EngineState.STARTING and self._was_ready:
            return  # the reason why the one before has ended says more
        elif state in (EngineState.DEAD, EngineState.STOPPING):
            state = EngineState.UNAVAILABLE  # its process is about to end
        self._set_health(EngineHealth(state, status["reason"], status["public_reason"]))

    def finished_changed(self, finished: int) -> None:
        """Take over the counter of completed work."""
        self._finished = finished

    def events_received(self, events: list[tuple[str, list[Any]]]) -> None:
        """Hand the events of the engine to the observer."""
        if self._observer is not None:
            for name, arguments in events:
                if name in EVENTS:
                    getattr(self._observer, name)(*arguments)

    def _set_health(self, health: EngineHealth) -> None:
        if self._health.state not in (EngineState.STOPPING, EngineState.DEAD):
            self._health = health

    def _end(self, error: Exception) -> None:
        """Give up: no other process will be ready."""
        self._set_health(EngineHealth(EngineState.DEAD, str(error).rstrip(".")))
        if self._started is not None and not self._started.done():
            self._started.set_exception(error)
        elif self._on_end is not None:
            self._on_end(error)


class _Connection(FrameProtocol):
    """One connection to the engine process, with the calls that wait for their results.

    Attributes:
        lost: set when the connection has ended.
        failure: why the engine did not start, as the process says; empty if it has not said so.
        refused: the process has read other files; whatever else it says is ignored.
    """

    def __init__(self, owner: ProcessEngine) -> None:
        super().__init__()
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._adapters = (None, *owner.model.adapters)
        self._dimension = owner.model.dimension
        self._numbers = itertools.count(1)
        self._calls: dict[int, tuple[asyncio.Future[EngineResult], TokenBatch]] = {}
        self.lost: asyncio.Future[None] = self._loop.create_future()
        self.failure = ""
        self.refused = False

    @property
    def calls(self) -> int:
        """Number of calls that wait for their results."""
        return len(self._calls)

    async def embed(self, batch: TokenBatch) -> EngineResult:
        """Send a call and wait for its result."""
        number = next(self._numbers) & 0xFFFFFFFF
        answer: asyncio.Future[EngineResult] = self._loop.create_future()
        self._calls[number] = answer, batch
        try:
            self.send(Kind.EMBED, number, *pack_call(batch, self._adapters))
            return await answer
        except asyncio.CancelledError:
            self.send(Kind.CANCEL, number)
            raise
        finally:
            self._calls.pop(number, None)

    def fail(self) -> None:
        """Fail every call, because the process has ended."""
        for answer, _ in self._calls.values():
            if not answer.done():
                answer.set_exception(
                    UnavailableError(
                        "The engine's process has ended: send the request again.",
                        retry_after=1,
                    )
                )

    def finish(self, *, stop_process: bool) -> None:
        """End the connection; if asked to, the whole process, which then closes it."""
        if stop_process:
            self.send(Kind.STOP)
        elif self.transport is not None:
            self.transport.close()

    def abort(self) -> None:
        """End the connection at once."""
        if self.transport is not None:
            self.transport.abort()

    def connection_lost(self, _: Exception | None) -> None:
        if not self.lost.done():
            self.lost.set_result(None)

    def frame_lost(self, kind: int, call: int) -> None:
        if kind in (Kind.RESULT, Kind.ERROR):
            message = "This process has no memory left for the vectors: send the request again."
            self._resolve(call, OverloadedError(message, retry_after=1))

    def frame_received(self, kind: int, call: int, body: Body) -> None:
        if self.refused:
            return
        self._owner.frame_arrived()
        if kind == Kind.RESULT:
            result, finished = unpack_result(body, self._dimension)
            self._owner.finished_changed(finished)
            self._resolve(call, result)
        elif kind == Kind.ERROR:
            self._resolve(call, unpack_error(body))
        elif kind == Kind.ENTERED:
            if call in self._calls:
                self._calls[call][1].entered()
        elif kind == Kind.STATUS:
            status = unpack_json(body)
            if "model" in status and self._owner.refuse(status):
                self.refused = True
                self.finish(stop_process=self._owner.launches)
            else:
                self._owner.status_received(status)
        elif kind == Kind.EVENTS:
            self._owner.events_received(unpack_json(body))
        elif kind == Kind.FAILED:
            self.failure = unpack_json(body)

    def _resolve(self, call: int, result: EngineResult | Exception) -> None:
        if call not in self._calls:
            return  # it was cancelled
        answer, _ = self._calls[call]
        if answer.done():
            return
        if isinstance(result, Exception):
            answer.set_exception(result)
        else:
            answer.set_result(result)


def _as_lists(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields as JSON would give them back."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in fields.items()}
