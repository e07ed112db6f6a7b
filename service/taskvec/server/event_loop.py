"""The event loop of a server: uvloop's, which also takes connections while it has much to do."""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from collections.abc import Callable
from socket import socket
from typing import Any

import uvloop

LONGEST_TURN = 2.0
"""Seconds since the last look after which the loop was idle, and not busy."""

EVERY = 0.00025
"""Seconds of a turn for each of which one more connection is taken."""

RETRY_SECONDS = 1.0
"""How long nothing is taken after the system had no file left for a connection."""

ProtocolFactory = Callable[[], asyncio.BaseProtocol]


class BatchAcceptLoop(uvloop.Loop):
    """Takes as many of the connections that wait as the last turn was long.

    libuv takes one a turn (since libuv/libuv pull request 3696). A turn with many requests in
    work lasts tens of milliseconds: new connections then wait for seconds, and where the system's
    queue is full, are lost. A loop with little to do still takes one at a time, so that several
    processes on one socket share a burst.
    """

    async def create_server(  # type: ignore[override]
        self,
        protocol_factory: ProtocolFactory,
        *place: Any,
        ssl: ssl.SSLContext | None = None,
        **options: Any,
    ) -> asyncio.AbstractServer:
        """Listen, as ``asyncio.loop.create_server`` does; always serving at once."""
        server = await super().create_server(protocol_factory, *place, ssl=ssl, **options)
        return _Listening(self, server, protocol_factory, ssl)


class _Listening(asyncio.AbstractServer):
    """A server, and a second look at each of its sockets."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        server: Any,
        protocol_factory: ProtocolFactory,
        context: ssl.SSLContext | None,
    ) -> None:
        self.sockets = server.sockets
        self._loop = loop
        self._server = server
        self._factory = protocol_factory
        self._context = context
        self._opening: set[asyncio.Task[Any]] = set()
        # libuv watches a file of its own: another name for it may be watched beside that.
        copies = [socket(fileno=os.dup(one.fileno())) for one in server.sockets]
        self._looked = dict.fromkeys(copies, 0.0)
        for listening in copies:
            self._watch(listening)

    def close(self) -> None:
        for listening in self._looked:
            self._loop.remove_reader(listening)
            listening.close()
        self._looked.clear()
        self._server.close()

    async def wait_closed(self) -> None:
        await self._server.wait_closed()

    def is_serving(self) -> bool:
        return bool(self._server.is_serving())

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    async def start_serving(self) -> None:
        await self._server.start_serving()

    async def serve_forever(self) -> None:
        await self._server.serve_forever()

    def _watch(self, listening: socket) -> None:
        if listening in self._looked:
            self._loop.add_reader(listening, self._take, listening)

    def _take(self, listening: socket) -> None:
        now = time.monotonic()
        turn, self._looked[listening] = now - self._looked[listening], now
        if turn > LONGEST_TURN:
            return
        for _ in range(int(turn / EVERY)):
            try:
                connection, _address = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:
                self._loop.remove_reader(listening)
                self._loop.call_later(RETRY_SECONDS, self._watch, listening)
                return
            connection.setblocking(False)
            opening = self._loop.create_task(self._open(connection))
            self._opening.add(opening)
            opening.add_done_callback(self._opening.discard)

    async def _open(self, connection: socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._factory, connection, ssl=self._context)
        except OSError:  # it has gone already, or what it says is no TLS
            connection.close()
