"""Signals: drain the service, then let uvicorn stop; read keys and certificate again."""

from __future__ import annotations

import asyncio
import gc
import math
import signal
import ssl
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from socket import socket
from types import FrameType
from typing import cast

import structlog
import uvicorn
from uvicorn.config import STARTUP_FAILURE

from taskvec.concurrency import keep_running
from taskvec.server.certificate import WatchedCertificate
from taskvec.server.event_loop import BatchAcceptServer
from taskvec.service import STATE_KEY, Service

POLL_INTERVAL = 0.02
"""Seconds between two checks of the requests still in flight."""

STOP_AT_ONCE = signal.SIGUSR1
"""Signal of a main process to its gateways: answer what is not answered with 503, and end."""

log = structlog.get_logger(__name__)


@contextmanager
def on_hangup(handler: Callable[[], None] | None) -> Iterator[None]:
    """Handle SIGHUP, which a terminal sends when it is closed and whose default ends a process.

    Args:
        handler: runs in Python's signal handler; None ignores the signal, as do processes that are
            launched meanwhile.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGHUP, (lambda *_: handler()) if handler else signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before or signal.SIG_DFL)


class GracefulServer(uvicorn.Server):
    """uvicorn's server, which drains its service before it stops.

    On the first signal the service becomes not ready. After ``drain_grace`` seconds, in which load
    balancers notice, it refuses new requests. When every admitted request is answered, or after
    ``drain_timeout`` seconds, uvicorn stops; it then has what is left of ``drain_timeout``, at
    least a second, to send the responses. The same signal again stops at once. A first
    SIGINT (Ctrl-C) skips the grace period.
    """

    def __init__(self, config: uvicorn.Config, *, supervised: bool = False) -> None:
        """Prepare, as uvicorn's server.

        Args:
            config: as uvicorn's.
            supervised: a main process forwards its signals. Where all processes get the signal, it
                arrives twice, and the second one does not end anything; ``STOP_AT_ONCE`` does.
        """
        super().__init__(config)
        self._supervised = supervised
        self._loop: asyncio.AbstractEventLoop | None = None
        self._received: set[int] = set()
        self._draining: asyncio.Task[None] | None = None
        # Before uvicorn reads the files: between that and its start it loads the application.
        self._certificate = (
            WatchedCertificate(config, self._replace_tls) if config.ssl_certfile else None
        )
        self._watching: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Start listening; from now on signals drain the service."""
        gc.freeze()  # imported modules live as long as the process: no collection need visit them
        try:
            await super().startup(sockets)
        except OSError as error:  # another process has bound the address and listened meanwhile
            log.error("cannot_listen", reason=str(error))  # noqa: TRY400 - it says all
            await self.lifespan.shutdown()
            sys.exit(STARTUP_FAILURE)
        self._loop = loop = asyncio.get_running_loop()
        if self._supervised:
            signal.signal(STOP_AT_ONCE, lambda *_: loop.call_soon_threadsafe(self._stop_at_once))
        if self._certificate is not None:
            self._watching = self._loop.create_task(
                keep_running("watch the certificate", self._certificate.watch)
            )

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """Stop, as uvicorn's server."""
        if self._watching is not None:
            self._watching.cancel()
        # uvicorn ends the connections that it knows: those that are taken only now included.
        for server in self.servers:
            server.close()
            if isinstance(server, BatchAcceptServer):
                await server.wait_connected()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Handle signals; SIGHUP does not end the process, also before it listens."""
        with super().capture_signals(), on_hangup(self._hang_up):
            yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Schedule the handling of a signal; runs in Python's signal handler."""
        if self._loop is None:
            super().handle_exit(sig, frame)
        else:
            self._loop.call_soon_threadsafe(self._drain_or_stop, signal.Signals(sig))

    def _hang_up(self) -> None:
        """Schedule the reading of keys and certificate; runs in Python's signal handler."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._read_again)

    def _read_again(self) -> None:
        service: Service = self.lifespan.state[STATE_KEY]
        log.info("reading_files_again", signal="SIGHUP")
        if service.keys is not None:
            service.keys.ask()
        if self._certificate is not None:
            self._certificate.ask()

    def _replace_tls(self, context: ssl.SSLContext) -> None:
        for server in self.servers:
            cast("BatchAcceptServer", server).replace_tls(context)

    def _drain_or_stop(self, number: signal.Signals) -> None:
        if number in self._received and self._supervised:
            return
        if number in self._received:
            super().handle_exit(signal.SIGINT, None)  # stops uvicorn
            super().handle_exit(signal.SIGINT, None)  # stops it without waiting for requests
        elif self.should_exit:
            super().handle_exit(number, None)
        elif self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._drain(number))
        self._received.add(number)

    def _stop_at_once(self) -> None:
        self.should_exit = self.force_exit = True

    async def _drain(self, number: signal.Signals) -> None:
        service: Service = self.lifespan.state[STATE_KEY]
        health, settings = service.health, service.settings
        log.info("draining", signal=number.name, working=health.work.count)
        health.start_draining()
        if number == signal.SIGTERM:
            await asyncio.sleep(settings.drain_grace)
        health.stop_accepting()
        limit = time.monotonic() + settings.drain_timeout
        while health.work.count and time.monotonic() < limit:  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(POLL_INTERVAL)
        log.info("drained", unfinished=health.work.count)
        # uvicorn starts counting its own limit only now.
        self.config.timeout_graceful_shutdown = max(1, math.ceil(limit - time.monotonic()))
        super().handle_exit(number, None)
