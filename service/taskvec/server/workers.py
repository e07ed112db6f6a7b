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
from pathlib import Path
from socket import socket

import structlog
import uvicorn
from fastapi import FastAPI
from uvicorn.supervisors import multiprocess

from taskvec.checkpoint.golden import golden_vectors
from taskvec.engines.base import EngineState
from taskvec.errors import StartError
from taskvec.malloc import SERVING, tune_malloc
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
        if self._server is None:
            self._server = GracefulServer(self.config)
        return self._server


class Gateways(multiprocess.Multiprocess):
    """Gateway processes on one socket; a process that dies is replaced."""

    def __init__(self, settings: Settings) -> None:
        """Bind the socket and install signal handlers; no process is started.

        Raises:
            StartError: the address cannot be bound.
        """
        # Every process reads its settings from the environment, as the first one did.
        os.environ |= settings.model_copy(update={"workers": 1}).environment()
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
    with _shared_metrics_folder() as folder:
        if settings.engine is EngineKind.REMOTE:
            build_service(settings, Role.GATEWAY)  # report what cannot be served, in this process
            Gateways(settings).run()
        else:
            _serve_engine_and_gateways(settings, folder)


def _serve_engine_and_gateways(settings: Settings, folder: Path) -> None:
    """Run the engine in this process, behind a Unix socket, and gateways in their own processes."""
    from taskvec.api.app import create_app  # noqa: PLC0415 - after the metrics folder is set

    failures: list[BaseException] = []
    path = folder / "engine.sock"

    def stop_all(error: BaseException) -> None:
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
    shares = divide_open_files(engine_settings.max_connections, remote=False)
    os.environ[ENGINE_PROCESS] = settings.engine.value
    os.environ[ENGINE_CONNECTIONS] = str(
        max(
            1,
            min(
                shares.clients // settings.workers,
                divide_open_files(settings.max_connections, remote=True).engines,
            ),
        )
    )
    remote = {"engine": EngineKind.REMOTE, "engine_url": (f"unix://{path}",)}
    gateways = Gateways(settings.model_copy(update=remote))
    app = create_app(service, stop_all)
    server = uvicorn.Server(uvicorn.Config(app, uds=str(path), **server_options(engine_settings)))
    stopped = threading.Event()

    def watch() -> None:
        while not stopped.wait(POLL_INTERVAL):
            health = service.engine.health()
            if health.state is EngineState.DEAD and not failures:
                stop_all(RuntimeError(f"The engine died: {health.reason}."))

    threads = [
        threading.Thread(target=server.run, name="engine-server"),
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


def gateway_app() -> FastAPI:
    """Create the application of one gateway process, from the environment."""
    from taskvec.api.app import create_app  # noqa: PLC0415

    settings = Settings()
    request_log = configure_logs(settings.log_level)
    tune_malloc(SERVING)

    def end(error: BaseException) -> None:
        log.error("gateway_failed", reason=str(error))
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


@contextmanager
def _shared_metrics_folder() -> Iterator[Path]:
    """Make a private folder in which all processes keep their metrics, named in the environment."""
    with tempfile.TemporaryDirectory(prefix="taskvec-") as folder:
        series = Path(folder) / "series"
        series.mkdir()
        os.environ[METRICS_FOLDER] = str(series)
        yield Path(folder)
