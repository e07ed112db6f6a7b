"""``taskvec serve --workers N``: several gateways, in front of one engine process or a pool."""

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
from uvicorn.supervisors import Multiprocess

from taskvec.checkpoint.golden import golden_vectors
from taskvec.checkpoint.open import open_checkpoint
from taskvec.engines.base import EngineState
from taskvec.engines.remote.engine import MAX_CONNECTIONS_PER_SERVER
from taskvec.errors import CheckpointError, StartError
from taskvec.server.run import application, server_options
from taskvec.service import key_source
from taskvec.settings import EngineKind, Settings, TokenInput
from taskvec.telemetry.logs import configure_logs

GATEWAY = "taskvec.server.workers:gateway"
SHARED_SERIES = "PROMETHEUS_MULTIPROC_DIR"
ENGINE_BEHIND = "TASKVEC_ENGINE_BEHIND"
"""The variable that tells gateway processes which engine they share, for their metrics."""

BAD_START = 3
"""Exit code on which uvicorn does not start a process again."""

PATIENCE = 10.0
"""Seconds that gateways are not started while the engine is, and then do not accept connections
while they cannot reach it: of several processes on one socket none should refuse what another
would answer."""

LOOK_EVERY = 0.05
"""Seconds between two looks at an engine."""

log = structlog.get_logger(__name__)


class Gateways(Multiprocess):
    """Gateway processes on one socket; they are replaced when they die."""

    def __init__(self, settings: Settings) -> None:
        """Bind the socket and listen to signals; nothing is started.

        Raises:
            CheckpointError: the address cannot be listened on.
        """
        # Every process reads its settings as the first one did: from the environment.
        os.environ |= settings.model_copy(update={"workers": 1}).environment()
        config = uvicorn.Config(
            GATEWAY,
            factory=True,
            workers=settings.workers,
            host=settings.host,
            port=settings.port,
            **server_options(settings),
        )
        try:
            sockets: list[socket] = [config.bind_socket()]
        except SystemExit:
            raise CheckpointError(
                f"{settings.host}:{settings.port} cannot be listened on: is another server there?"
            ) from None
        super().__init__(config, sockets)

    @property
    def told_to_stop(self) -> bool:
        """True once a signal came that is not handled yet."""
        return bool(self.signal_queue)

    def terminate_all(self) -> None:
        """Stop listening, then end: what no process would take any more is refused."""
        for listening in self.sockets:
            listening.close()
        super().terminate_all()


def serve_workers(settings: Settings) -> None:
    """Serve with several gateway processes until a signal.

    Raises:
        StartError: the model cannot be served, or the keys cannot be read.
    """
    keys = key_source(settings)
    if keys is not None:
        keys.read()  # what the gateways could not read is refused before they are started
    with _shared_series() as room:
        if settings.engine is EngineKind.REMOTE:
            application(settings, _ignore)  # what cannot be served is refused before it is started
            Gateways(settings).run()
        else:
            _serve_engine_and_gateways(settings, room)


def _serve_engine_and_gateways(settings: Settings, room: Path) -> None:
    """The engine in this process, behind a Unix socket; gateways in processes of their own."""
    failures: list[BaseException] = []
    path = room / "engine.sock"

    def stop_all(error: BaseException) -> None:
        failures.append(error)
        os.kill(os.getpid(), signal.SIGTERM)

    inner = settings.model_copy(
        update={
            "token_input": TokenInput.ACCEPT,
            "tls_cert": None,
            "tls_key": None,
            "max_connections": MAX_CONNECTIONS_PER_SERVER * settings.workers,
        }
    )
    app, engine = application(inner, stop_all, behind_gateway=True)
    golden_vectors(open_checkpoint(settings.model, settings.revision), settings.cache)
    os.environ[ENGINE_BEHIND] = settings.engine.value
    outer = {"engine": EngineKind.REMOTE, "engine_url": (f"unix://{path}",)}
    gateways = Gateways(settings.model_copy(update=outer))
    server = uvicorn.Server(uvicorn.Config(app, uds=str(path), **server_options(inner)))
    over = threading.Event()

    def watch() -> None:
        while not over.wait(LOOK_EVERY):
            health = engine.health()
            if health.state is EngineState.DEAD and not failures:
                stop_all(RuntimeError(f"The engine died: {health.reason}."))

    def engine_starts() -> bool:
        return engine.health().state is EngineState.STARTING and not gateways.told_to_stop

    threads = [
        threading.Thread(target=server.run, name="engine-server"),
        threading.Thread(target=watch, name="engine-watch"),
    ]
    for thread in threads:
        thread.start()
    try:
        _wait_while(engine_starts, PATIENCE)
        gateways.run()
    finally:
        over.set()
        server.should_exit = True
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


def gateway() -> FastAPI:
    """The application of one gateway process."""
    settings = Settings()
    configure_logs(settings.log_level)

    def end(error: BaseException) -> None:
        log.error("gateway_failed", reason=str(error))
        logging.shutdown()
        os._exit(BAD_START)

    try:
        behind = os.environ.get(ENGINE_BEHIND)
        return application(settings, end, patience=PATIENCE, engine_name=behind)[0]
    except StartError as error:
        log.error("gateway_failed", reason=str(error))  # noqa: TRY400 - one sentence says it
        sys.exit(BAD_START)


def _ignore(_: BaseException) -> None:
    """For an application that is only made to see whether it can be."""


def _wait_while(condition: Callable[[], bool], seconds: float) -> None:
    limit = time.monotonic() + seconds
    while condition() and time.monotonic() < limit:
        time.sleep(LOOK_EVERY)


@contextmanager
def _shared_series() -> Iterator[Path]:
    """A private folder in which all processes keep their metrics, named in the environment."""
    with tempfile.TemporaryDirectory(prefix="taskvec-") as room:
        series = Path(room) / "series"
        series.mkdir()
        os.environ[SHARED_SERIES] = str(series)
        yield Path(room)
