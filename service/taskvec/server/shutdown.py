"""Graceful shutdown: drain the service on a signal, then let uvicorn stop."""

from __future__ import annotations

import asyncio
import gc
import math
import signal
import time
from socket import socket
from types import FrameType

import structlog
import uvicorn

from taskvec.service import STATE_KEY, Service

POLL_INTERVAL = 0.02
"""Seconds between two checks of the requests still in flight."""

STOP_AT_ONCE = signal.SIGUSR1
"""Signal of a main process to its gateways: answer what is not answered with 503, and end."""

log = structlog.get_logger(__name__)


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

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Start listening; from now on signals drain the service."""
        gc.freeze()  # imported modules live as long as the process: no collection need visit them
        await super().startup(sockets)
        self._loop = loop = asyncio.get_running_loop()
        if self._supervised:
            signal.signal(STOP_AT_ONCE, lambda *_: loop.call_soon_threadsafe(self._stop_at_once))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Schedule the handling of a signal; runs in Python's signal handler."""
        if self._loop is None:
            super().handle_exit(sig, frame)
        else:
            self._loop.call_soon_threadsafe(self._drain_or_stop, signal.Signals(sig))

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
