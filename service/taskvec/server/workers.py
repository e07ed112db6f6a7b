"""``taskvec serve --workers N``: several gateway processes before one engine process or a pool."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import parent_process as multiprocessing_parent
from pathlib import Path
from socket import AF_UNIX, socket
from types import FrameType
from typing import TYPE_CHECKING, cast

import structlog
import uvicorn
from uvicorn.supervisors import multiprocess

from taskvec.checkpoint.golden import file_versions
from taskvec.checkpoint.open import open_checkpoint
from taskvec.concurrency import BackgroundTaskError
from taskvec.core.memory_budget import default_budget
from taskvec.engines.base import EngineState
from taskvec.engines.process.client import EngineSocket, ProcessEngine
from taskvec.engines.process.launcher import EngineLauncher, describe_end
from taskvec.errors import StartError
from taskvec.malloc import SERVING, tune_malloc
from taskvec.memory_limits import MemoryLimits
from taskvec.server.engine_process import METRICS_FOLDER, ORPHAN_SECONDS, engine_launcher
from taskvec.server.run import bound_sockets, server_options
from taskvec.server.shutdown import STOP_AT_ONCE, GracefulServer, on_hangup
from taskvec.service import START_WAIT, Role, build_service
from taskvec.settings import EngineKind, Settings
from taskvec.telemetry.logs import configure_logs

if TYPE_CHECKING:
    from fastapi import FastAPI

GATEWAY_APP = "taskvec.server.workers:gateway_app"
ENGINE_SOCKET = "TASKVEC_ENGINE_SOCKET"
"""Environment variable with the path of the engine process's socket; not set without one."""

SERIES = "series"
"""Folder of the metrics in the temporary folder."""

METRICS_BYTES = 8 << 20
"""Space for the metrics of one process: at most seven files of one megabyte, and some more."""

MAX_SOCKET_PATH = 103 if sys.platform == "darwin" else 107
"""Longest path of a Unix socket, in bytes; with the final zero, 104 on macOS and 108 on Linux."""

ORPHANED = 1
"""Exit code of a gateway that did not end within ``ORPHAN_SECONDS`` after the main process."""

START_FAILED = 3
"""Exit code after which uvicorn does not restart a process."""

MAX_FAILED_STARTS = 5
"""Gateways in a row that end before they serve, after which the service ends."""

RESTART_SECONDS = 0.5
"""Pause before another gateway is started after a failed start; doubled for each further one."""

POLL_INTERVAL = 0.05
"""Seconds between two checks of the engine, or of gateways that end."""

END_SECONDS = 3.0
"""Time in which a gateway ends after ``STOP_AT_ONCE``, or is killed."""

PING_TIMEOUT = 15
"""Seconds in which a gateway process must answer uvicorn's ping, or be replaced. A new process
imports its modules before it answers, which takes seconds on a busy machine."""

log = structlog.get_logger(__name__)


class GatewayProcess(multiprocess.Process):
    """A gateway process, which drains before it stops.

    Attributes:
        has_served: it was seen to listen.
        counted: this has been taken into account.
        ended: its end has been logged.
    """

    has_served = counted = ended = False

    def target(self, sockets: list[socket] | None = None) -> None:
        """Run the gateway in its process."""
        # Before uvicorn starts the thread that answers its pings, which reads the server as well.
        self._server = GracefulServer(self.config, supervised=True)
        end_with_parent()
        super().target(sockets)

    def ping(self, timeout: float = 5) -> bool:
        """Return whether the process answers in time; note whether it has served."""
        started = self._healthcheck(timeout)
        self.has_served |= started is True
        return started is not None

    def start(self) -> None:
        """Start the process, in which SIGHUP is ignored until it has a handler of its own."""
        with on_hangup(None):
            super().start()

    def read_again(self) -> None:
        """Let the process read its keys and its certificate again."""
        with suppress(ProcessLookupError):
            if self.pid is not None and self.exitcode is None:
                os.kill(self.pid, signal.SIGHUP)


class Gateways(multiprocess.Multiprocess):
    """Gateway processes on one socket; a process that dies is replaced.

    Attributes:
        repeated_signal: the signal that arrived a second time, and ended everything at once; 0 if
            none did.
    """

    def __init__(
        self, settings: Settings, sockets: list[socket], merge_metrics: Callable[[], None]
    ) -> None:
        """Install signal handlers; no process is started.

        Args:
            settings: those of the gateways.
            sockets: bound sockets, which all gateways share.
            merge_metrics: called after processes have died.
        """
        self._merge_metrics = merge_metrics
        self._start_failed = False
        self._failed_starts = 0
        self._restart_at = 0.0
        self._last_end = ""
        self._received: set[int] = set()
        self.repeated_signal = 0
        # Every process reads its settings from the environment, as the first one did. Limits on
        # the sum of all requests are divided, so that they hold for all processes together; a
        # memory budget that was set is documented as one of each process.
        memory = settings.memory_budget or default_budget(
            MemoryLimits().total() // settings.workers
        )
        alone = {
            "workers": 1,
            "memory_budget": memory,
            "max_queue_tokens": -(-settings.max_queue_tokens // settings.workers),
        }
        os.environ |= settings.model_copy(update=alone).environment()
        config = uvicorn.Config(
            GATEWAY_APP,
            factory=True,
            workers=settings.workers,
            host=settings.host,
            port=settings.port,
            timeout_worker_healthcheck=PING_TIMEOUT,
            **server_options(settings),
        )
        multiprocess.Process = GatewayProcess  # type: ignore[misc] # uvicorn has no other hook
        super().__init__(config, sockets)

    @property
    def stop_requested(self) -> bool:
        """Whether a signal arrived that has not been handled yet."""
        return bool(self.signal_queue)

    def keep_subprocess_alive(self) -> None:
        """Replace processes that have died; log their exit codes, and merge their metrics."""
        if self.stop_requested:
            return  # a terminal signals all processes: those that have drained are not replaced
        dead = [process for process in self.processes if not process.process.is_alive()]
        self._count_failed_starts(dead)
        if self._failed_starts >= MAX_FAILED_STARTS:
            self.should_exit.set()
        self._start_failed |= any(process.exitcode == START_FAILED for process in dead)
        if dead and not self._start_failed and time.monotonic() < self._restart_at:
            return
        super().keep_subprocess_alive()
        if dead:
            self._merge_metrics()

    def _count_failed_starts(self, dead: list[multiprocess.Process]) -> None:
        """Count the gateways in a row that ended before they served, and log each end once."""
        for process in cast("list[GatewayProcess]", self.processes):
            if process.has_served and not process.counted:
                process.counted = True
                self._failed_starts = 0
        for process in cast("list[GatewayProcess]", dead):
            if process.ended:
                continue
            process.ended = True
            if process.has_served and process.exitcode == 0:  # it was signalled, and has drained
                log.info("gateway_ended", process=process.pid)
                continue
            reason = describe_end(process.exitcode or 0)
            log.error(
                "gateway_died", process=process.pid, exit_code=process.exitcode, reason=reason
            )
            if not process.has_served:
                self._restart_at = time.monotonic() + RESTART_SECONDS * 2**self._failed_starts
                self._failed_starts += 1
                self._last_end = reason

    def check_end(self) -> None:
        """Raise an error if the gateways have not ended as they should.

        Raises:
            StartError: they could not start, which has ended all of them.
            SystemExit: a signal arrived twice.
        """
        if self._start_failed:
            raise StartError("A gateway could not start: the reason is in the log above.")
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise StartError(
                f"{self._failed_starts} gateways in a row have ended before they served, the last "
                f"one because it was {self._last_end}: see its log, and the free memory."
            )
        if self.repeated_signal:
            sys.exit(128 + self.repeated_signal)

    def handle_hup(self) -> None:
        """Let all gateways read their keys and their certificate again; uvicorn restarts them."""
        for process in self.processes:
            cast("GatewayProcess", process).read_again()

    def handle_int(self) -> None:
        """Note SIGINT, and drain."""
        self._note(signal.SIGINT)
        super().handle_int()

    def handle_term(self) -> None:
        """Note SIGTERM, and drain."""
        self._note(signal.SIGTERM)
        super().handle_term()

    def join_all(self) -> None:
        """Wait for the end of all processes; the same signal again ends them at once."""
        while not self.repeated_signal and self._wait_for_end(POLL_INTERVAL):
            received, self.signal_queue[:] = list(self.signal_queue), []
            for number in received:
                if number in {signal.SIGINT, signal.SIGTERM}:
                    self._note(number)
        if self.repeated_signal:
            self._end_at_once()
        super().join_all()

    def _note(self, number: int) -> None:
        if number in self._received:
            self.repeated_signal = number
        self._received.add(number)

    def _end_at_once(self) -> None:
        log.warning("ended_by_second_signal", signal=signal.Signals(self.repeated_signal).name)
        for process in self._alive():
            os.kill(cast("int", process.pid), STOP_AT_ONCE)
        self._wait_for_end(END_SECONDS)
        for process in self._alive():
            process.process.kill()

    def _alive(self) -> list[multiprocess.Process]:
        return [process for process in self.processes if process.process.is_alive()]

    def _wait_for_end(self, seconds: float) -> bool:
        """Wait for the end of all processes, for a limited time; return whether one is left."""
        limit = time.monotonic() + seconds
        while self._alive() and time.monotonic() < limit:
            time.sleep(POLL_INTERVAL / 5)
        return bool(self._alive())

    def terminate_all(self) -> None:
        """Close the sockets, then end the processes: new connections are refused at once."""
        for listening in self.sockets:
            listening.close()
        super().terminate_all()


def serve_workers(settings: Settings) -> None:
    """Serve with several gateway processes until a signal.

    Raises:
        StartError: the model cannot be served, or the keys cannot be read.
    """
    tune_malloc(SERVING)
    with (
        on_hangup(None),
        _exit_on_sigterm(),
        bound_sockets(settings) as sockets,
        _shared_metrics_folder(settings.workers) as folder,
    ):
        from taskvec.metrics.registry import merge_dead_processes  # noqa: PLC0415 - as create_app

        merge = partial(merge_dead_processes, folder / SERIES)
        if settings.engine is EngineKind.REMOTE:
            build_service(settings, Role.GATEWAY)  # report what cannot be served, in this process
            gateways = Gateways(settings, sockets, merge)
            gateways.run()
            gateways.check_end()
        else:
            _serve_engine_and_gateways(settings, sockets, folder, merge)


def _serve_engine_and_gateways(
    settings: Settings,
    sockets: list[socket],
    folder: Path,
    merge_metrics: Callable[[], None],
) -> None:
    """Run the engine and the gateways, each in a process of its own, and watch over them."""
    failures: list[BaseException] = []

    def stop_all(error: BaseException) -> None:
        if not failures:
            failures.append(error)
            os.kill(os.getpid(), signal.SIGTERM)

    checkpoint = open_checkpoint(settings.model, settings.revision, settings.task_name)
    files = file_versions(checkpoint)
    path = _socket_path(folder)
    with socket(AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        launcher = engine_launcher(settings, checkpoint, listening)
        launcher.launch()
        try:
            engine = ProcessEngine(
                checkpoint.card,
                launcher,
                launches=True,
                silent_seconds=settings.stall_timeout,
                files=files,
            )
            engine.on_end(stop_all)
            # Report what gateways cannot serve, in this process.
            service = build_service(settings, Role.GATEWAY, checkpoint=checkpoint, engine=engine)

            def restarted() -> None:
                service.metrics.process_restarted()
                merge_metrics()  # the memory of the process that has ended counts no longer

            launcher.on_restart(restarted)
            os.environ[ENGINE_SOCKET] = str(path)
            gateways = Gateways(settings, sockets, merge_metrics)
            keeper = _EngineKeeper(engine, launcher, stop_all)
            keeper.start()
            try:
                _wait_while(lambda: _starting(engine) and not gateways.stop_requested, START_WAIT)
                gateways.run()
            finally:
                keeper.stop(at_once=bool(gateways.repeated_signal))
        finally:
            launcher.kill()
    if failures:
        raise failures[0]
    gateways.check_end()


class _EngineKeeper:
    """Keeps the engine process running from a thread; the main one watches over the gateways."""

    def __init__(
        self,
        engine: ProcessEngine,
        launcher: EngineLauncher,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._engine = engine
        self._launcher = launcher
        self._at_once = False
        self._on_failure = on_failure
        self._loop = asyncio.new_event_loop()
        self._stopped = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="engine-keeper")

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, *, at_once: bool) -> None:
        """End the engine process, after its work if not at once, and the thread."""
        self._at_once = at_once
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()

    def _run(self) -> None:
        with self._loop_closed():
            self._loop.run_until_complete(self._keep())

    @contextmanager
    def _loop_closed(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._loop.close()

    async def _keep(self) -> None:
        starting = asyncio.create_task(self._start())
        await self._stopped.wait()
        if self._at_once:
            self._launcher.kill()
        await self._engine.stop()
        await starting

    async def _start(self) -> None:
        try:
            await self._engine.start()
        except Exception as error:  # noqa: BLE001 - all processes must end, whatever the error is
            self._on_failure(error)


def _socket_path(folder: Path) -> Path:
    """Return the path of the engine's socket.

    Raises:
        StartError: it is too long for a socket.
    """
    path = folder / "engine.sock"
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise StartError(
            f"The path of a socket, {path}, would be longer than {MAX_SOCKET_PATH} bytes: set "
            "TMPDIR to a shorter folder."
        )
    return path


def gateway_app() -> FastAPI:
    """Create the application of one gateway process, from the environment."""
    from taskvec.api.app import create_app  # noqa: PLC0415

    settings = Settings()
    request_log = configure_logs(settings.log_level)
    tune_malloc(SERVING)

    def end(error: BaseException) -> None:
        log.error("gateway_failed", reason=str(error))
        if isinstance(error, BackgroundTaskError):
            os.kill(os.getpid(), signal.SIGTERM)  # it drains, and is replaced
            return
        logging.shutdown()
        os._exit(START_FAILED)

    path = os.environ.get(ENGINE_SOCKET)
    try:
        checkpoint = open_checkpoint(settings.model, settings.revision, settings.task_name)
        engine = None
        if path is not None:
            engine = ProcessEngine(
                checkpoint.card,
                EngineSocket(path),
                launches=False,
                silent_seconds=settings.stall_timeout,
                files=file_versions(checkpoint),
            )
            engine.on_end(end)
        service = build_service(
            settings, Role.GATEWAY, checkpoint=checkpoint, engine=engine, request_log=request_log
        )
    except StartError as error:
        log.error("gateway_failed", reason=str(error))  # noqa: TRY400 - the sentence says it all
        sys.exit(START_FAILED)
    return create_app(service, end)


def _starting(engine: ProcessEngine) -> bool:
    return engine.health().state is EngineState.STARTING


def _wait_while(condition: Callable[[], bool], seconds: float) -> None:
    limit = time.monotonic() + seconds
    while condition() and time.monotonic() < limit:
        time.sleep(POLL_INTERVAL)


def end_with_parent() -> None:
    """End this process soon after the one that spawned it, whatever ended that.

    A process whose parent was killed would hold the port without an engine. It drains as after
    SIGTERM, and has ``ORPHAN_SECONDS`` for that.
    """
    parent = multiprocessing_parent()
    if parent is None:
        return

    def watch() -> None:
        parent.join()  # returns when the parent's end of a pipe is closed
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHAN_SECONDS)
        os._exit(ORPHANED)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into an exit that cleans up, until another handler is installed."""

    def leave(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is leave:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _shared_metrics_folder(workers: int) -> Iterator[Path]:
    """Make a private folder in which all processes keep their metrics, named in the environment.

    Raises:
        StartError: the folder cannot be made, or its file system is too full: a process that writes
            to a mapped file for which there is no space is killed.
    """
    try:
        temporary = tempfile.TemporaryDirectory(prefix="taskvec-")
    except OSError as error:
        raise StartError(
            f"No temporary folder can be made ({error.strerror}): free some space, or set TMPDIR "
            "to another folder."
        ) from None
    with temporary as folder:
        state = os.statvfs(folder)
        free, needed = state.f_bavail * state.f_frsize, (workers + 1) * METRICS_BYTES
        if free < needed:
            raise StartError(
                f"{Path(folder).parent} has {free >> 20} MB of free space, and the metrics of "
                f"{workers} gateways need {needed >> 20} MB: free some space, or set TMPDIR to "
                "another folder."
            )
        series = Path(folder) / SERIES
        series.mkdir()
        os.environ[METRICS_FOLDER] = str(series)
        yield Path(folder)
