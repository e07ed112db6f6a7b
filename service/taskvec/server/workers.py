"""``taskvec serve --workers N``: several gateway processes, and one engine process or a pool."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import parent_process as multiprocessing_parent
from pathlib import Path
from socket import socket
from types import FrameType

import structlog
import uvicorn
from fastapi import FastAPI
from uvicorn.supervisors import multiprocess

from taskvec.checkpoint.golden import golden_vectors
from taskvec.concurrency import BackgroundTaskError
from taskvec.core.memory_budget import default_budget
from taskvec.engines.base import EngineState
from taskvec.errors import StartError
from taskvec.malloc import SERVING, tune_malloc
from taskvec.memory_limits import MemoryLimits
from taskvec.open_files import MAX_ENGINE_CONNECTIONS, divide_open_files
from taskvec.server.run import server_options
from taskvec.server.shutdown import GracefulServer
from taskvec.service import ENGINE_CONNECTIONS, START_WAIT, Role, Service, build_service, key_source
from taskvec.settings import EngineKind, Settings, TokenInput
from taskvec.telemetry.logs import configure_logs

GATEWAY_APP = "taskvec.server.workers:gateway_app"
METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
ENGINE_PROCESS = "TASKVEC_ENGINE_BEHIND"
"""Environment variable with the kind of the engine process behind a gateway."""

SERIES = "series"
"""Folder of the metrics in the temporary folder."""

METRICS_BYTES = 8 << 20
"""Space for the metrics of one process: at most seven files of one megabyte, and some more."""

MAX_SOCKET_PATH = 107
"""Longest path of a Unix socket on Linux, in bytes (unix(7): 108 with the final zero)."""

ORPHAN_SECONDS = 5.0
"""Time in which a process ends whose parent has ended."""

ORPHANED = 1
"""Exit code of a process that did not end within that time."""

START_FAILED = 3
"""Exit code after which uvicorn does not restart a process."""

POLL_INTERVAL = 0.05
"""Seconds between two checks of the engine."""

PING_TIMEOUT = 15
"""Seconds in which a gateway process must answer uvicorn's ping, or be replaced. A new process
imports its modules before it answers, which takes seconds on a busy machine."""

log = structlog.get_logger(__name__)


class GatewayProcess(multiprocess.Process):
    """A gateway process, which drains before it stops."""

    @property
    def server(self) -> uvicorn.Server:
        """Server that runs in the process."""
        end_with_parent()
        if self._server is None:
            self._server = GracefulServer(self.config)
        return self._server


class Gateways(multiprocess.Multiprocess):
    """Gateway processes on one socket; a process that dies is replaced."""

    def __init__(self, settings: Settings, merge_metrics: Callable[[], None]) -> None:
        """Bind the socket and install signal handlers; no process is started.

        Args:
            settings: those of the gateways.
            merge_metrics: called after processes have died.

        Raises:
            StartError: the address cannot be bound.
        """
        self._merge_metrics = merge_metrics
        # Every process reads its settings from the environment, as the first one did.
        share = settings.memory_budget or default_budget(MemoryLimits().total() // settings.workers)
        alone = {"workers": 1, "memory_budget": share}
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
        try:
            sockets: list[socket] = [config.bind_socket()]
        except SystemExit:
            raise StartError(
                f"{settings.host}:{settings.port} cannot be bound: is another server using it?"
            ) from None
        multiprocess.Process = GatewayProcess  # type: ignore[misc] # uvicorn has no other hook
        super().__init__(config, sockets)

    @property
    def stop_requested(self) -> bool:
        """Whether a signal arrived that has not been handled yet."""
        return bool(self.signal_queue)

    def keep_subprocess_alive(self) -> None:
        """Replace processes that have died; log their exit codes, and merge their metrics."""
        dead = [process for process in self.processes if not process.process.is_alive()]
        for process in dead:
            log.error("gateway_died", process=process.pid, exit_code=process.exitcode)
        super().keep_subprocess_alive()
        if dead:
            self._merge_metrics()

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
    keys = key_source(settings)
    if keys is not None:
        keys.read()  # report unreadable keys before any gateway starts
    with _exit_on_sigterm(), _shared_metrics_folder(settings.workers) as folder:
        from taskvec.metrics.registry import merge_dead_processes  # noqa: PLC0415 - as create_app

        merge = partial(merge_dead_processes, folder / SERIES)
        if settings.engine is EngineKind.REMOTE:
            build_service(settings, Role.GATEWAY)  # report what cannot be served, in this process
            Gateways(settings, merge).run()
        else:
            _serve_engine_and_gateways(settings, folder, merge)


def _serve_engine_and_gateways(
    settings: Settings, folder: Path, merge_metrics: Callable[[], None]
) -> None:
    """Run the engine in this process, behind a Unix socket, and gateways in their own processes."""
    from taskvec.api.app import create_app  # noqa: PLC0415 - after the metrics folder is set

    failures: list[BaseException] = []
    path = _socket_path(folder)

    def stop_all(error: BaseException) -> None:
        if not failures:
            failures.append(error)
            os.kill(os.getpid(), signal.SIGTERM)

    engine_settings = settings.model_copy(
        update={
            "token_input": TokenInput.ACCEPT,
            "tls_cert": None,
            "tls_key": None,
            "max_connections": MAX_ENGINE_CONNECTIONS * settings.workers,
            # Clients are limited by the gateways, which merge and split their requests.
            "max_texts": max(settings.max_texts, _default("max_texts")),
            "max_body_bytes": max(settings.max_body_bytes, _default("max_body_bytes")),
        }
    )
    service = build_service(engine_settings, Role.ENGINE)
    golden_vectors(service.checkpoint, settings.cache)
    os.environ[ENGINE_PROCESS] = settings.engine.value
    os.environ[ENGINE_CONNECTIONS] = str(_connections_to_engine(settings, engine_settings))
    remote = {"engine": EngineKind.REMOTE, "engine_url": (f"unix://{path}",)}
    gateways = Gateways(settings.model_copy(update=remote), merge_metrics)
    app = create_app(service, stop_all)
    server = uvicorn.Server(uvicorn.Config(app, uds=str(path), **server_options(engine_settings)))
    stopped = threading.Event()

    def watch() -> None:
        while not stopped.wait(POLL_INTERVAL):
            health = service.engine.health()
            if health.state is EngineState.DEAD:
                stop_all(RuntimeError(f"The engine died: {health.reason}."))

    threads = [
        threading.Thread(target=_run_server, args=(server, stop_all), name="engine-server"),
        threading.Thread(target=watch, name="engine-watch"),
    ]
    for thread in threads:
        thread.start()
    try:
        _wait_while(lambda: _starting(service) and not gateways.stop_requested, START_WAIT)
        gateways.run()
    finally:
        stopped.set()
        server.should_exit = True
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


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


def _connections_to_engine(gateway: Settings, engine: Settings) -> int:
    """Return how many connections each gateway may open: no more than the engine process takes."""
    taken = divide_open_files(engine.max_connections, remote=False).clients // gateway.workers
    own = divide_open_files(gateway.max_connections, remote=True).engines
    return max(1, min(taken, own))


def _run_server(server: uvicorn.Server, on_failure: Callable[[BaseException], None]) -> None:
    """Run the engine's server in this thread; report if it ends unexpectedly."""
    try:
        server.run()
    except BaseException as error:  # noqa: BLE001 - uvicorn exits where it cannot listen
        on_failure(StartError(f"The engine's server has failed: {error!r}."))
    else:
        if not server.should_exit:
            on_failure(RuntimeError("The engine's server has ended."))


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

    try:
        service = build_service(
            settings,
            Role.GATEWAY,
            engine_process=os.environ.get(ENGINE_PROCESS),
            request_log=request_log,
        )
    except StartError as error:
        log.error("gateway_failed", reason=str(error))  # noqa: TRY400 - the sentence says it all
        sys.exit(START_FAILED)
    return create_app(service, end)


def _default(setting: str) -> int:
    value: int = Settings.model_fields[setting].default
    return value


def _starting(service: Service) -> bool:
    return service.engine.health().state is EngineState.STARTING


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
