"""Event loop of the server: uvloop, with a second accept callback for busy times."""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from collections.abc import Callable
from socket import socket
from typing import Any

import uvloop

IDLE_SECONDS = 2.0
"""Time since the last callback above which the loop counts as idle rather than busy."""

SECONDS_PER_CONNECTION = 0.00025
"""One more connection is accepted for each such interval of the last loop iteration."""

RETRY_SECONDS = 1.0
"""Pause in accepting after the process ran out of file descriptors."""

ProtocolFactory = Callable[[], asyncio.BaseProtocol]


class BatchAcceptLoop(uvloop.Loop):
    """uvloop's loop, which accepts more connections the longer its last iteration took.

    libuv accepts one connection per iteration (since libuv/libuv pull request 3696). An iteration
    with many requests in progress takes tens of milliseconds: new connections then wait for
    seconds, and are lost when the kernel's queue is full. An idle loop still accepts one at a time,
    so that several processes on one socket share a burst.
    """

    async def create_server(  # type: ignore[override]
        self,
        protocol_factory: ProtocolFactory,
        *address: Any,
        ssl: ssl.SSLContext | None = None,
        **options: Any,
    ) -> asyncio.AbstractServer:
        """Listen, as ``asyncio.loop.create_server`` does; starts serving at once."""
        server = await super().create_server(protocol_factory, *address, ssl=ssl, **options)
        return _BatchAcceptServer(self, server, protocol_factory, ssl)


class _BatchAcceptServer(asyncio.AbstractServer):
    """uvloop's server, plus a reader callback on each of its sockets."""

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
        self._connecting: set[asyncio.Task[Any]] = set()
        # libuv polls its own file descriptor: a duplicate can be polled besides.
        duplicates = [socket(fileno=os.dup(each.fileno())) for each in server.sockets]
        self._called_at = dict.fromkeys(duplicates, 0.0)
        for listening in duplicates:
            self._add_reader(listening)

    def close(self) -> None:
        for listening in self._called_at:
            self._loop.remove_reader(listening)
            listening.close()
        self._called_at.clear()
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

    def _add_reader(self, listening: socket) -> None:
        if listening in self._called_at:
            self._loop.add_reader(listening, self._accept, listening)

    def _accept(self, listening: socket) -> None:
        now = time.monotonic()
        elapsed, self._called_at[listening] = now - self._called_at[listening], now
        if elapsed > IDLE_SECONDS:
            return
        for _ in range(int(elapsed / SECONDS_PER_CONNECTION)):
            try:
                connection, _address = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:
                self._loop.remove_reader(listening)
                self._loop.call_later(RETRY_SECONDS, self._add_reader, listening)
                return
            connection.setblocking(False)
            connecting = self._loop.create_task(self._connect(connection))
            self._connecting.add(connecting)
            connecting.add_done_callback(self._connecting.discard)

    async def _connect(self, connection: socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._factory, connection, ssl=self._context)
        except OSError:  # the client is gone, or does not speak TLS
            connection.close()
