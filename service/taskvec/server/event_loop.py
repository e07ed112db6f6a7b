"""Event loop of the server: uvloop, with a second accept callback and visible TLS handshakes."""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from socket import socket
from typing import Any, Protocol, cast

import uvloop
from uvloop.loop import SSLProtocol  # type: ignore[attr-defined] # not in its stubs

from taskvec.open_files import MIN_CONNECTING

SECONDS_PER_CONNECTION = 0.00025
"""One more connection is accepted for each such interval of the last loop iteration."""

RETRY_SECONDS = 1.0
"""Pause in accepting after the process ran out of file descriptors."""

ProtocolFactory = Callable[[], asyncio.BaseProtocol]


class HandshakeObserver(Protocol):
    """A protocol that knows of its connection from before the TLS handshake."""

    @property
    def answer_seconds(self) -> float:
        """Time in which a client must read a response; a closed connection ends within it."""

    def handshake_started(self, transport: asyncio.Transport) -> None:
        """The connection was accepted.

        Args:
            transport: the connection without TLS; closing it ends the handshake.
        """

    def handshake_ended(self) -> None:
        """The handshake succeeded, after ``connection_made``, or failed, without it."""

    def pause_writing(self) -> None:
        """The buffer of the transport without TLS is full."""

    def resume_writing(self) -> None:
        """The buffer of the transport without TLS is empty enough."""


class BatchAcceptLoop(uvloop.Loop):
    """uvloop's loop, which accepts more connections the longer its last iteration took.

    libuv accepts one connection per iteration (since libuv/libuv pull request 3696). An iteration
    with many requests in progress takes tens of milliseconds: new connections then wait for
    seconds, and are lost when the kernel's queue is full. An idle loop still accepts one at a time,
    so that several processes on one socket share a burst.

    With TLS, the factory must make protocols that are ``HandshakeObserver``: a connection in its
    handshake takes a file and must be counted and timed like any other.

    Attributes:
        max_connecting: maximum number of connections that are accepted and not yet set up.
    """

    max_connecting = MIN_CONNECTING

    async def create_server(  # type: ignore[override]
        self,
        protocol_factory: ProtocolFactory,
        *address: Any,
        ssl: ssl.SSLContext | None = None,
        **options: Any,
    ) -> asyncio.AbstractServer:
        """Listen, as ``asyncio.loop.create_server`` does; starts serving at once."""
        if options.get("sock") is not None:  # uvloop would hide an error of this until later
            options["sock"].listen(options["backlog"])
        if ssl is None:
            server = await super().create_server(protocol_factory, *address, **options)
            return BatchAcceptServer(self, server, protocol_factory)
        tls = _TlsFactory(self, ssl, cast("Callable[[], HandshakeObserver]", protocol_factory))
        server = await super().create_server(tls, *address, **options)
        return BatchAcceptServer(self, server, tls)


def accept_loop(max_connecting: int) -> BatchAcceptLoop:
    """Return a new loop with this maximum number of connections that are being accepted."""
    loop = BatchAcceptLoop()
    loop.max_connecting = max_connecting
    return loop


class _TlsHandshake(asyncio.Protocol):
    """Protocol of an accepted connection until it has uvloop's TLS protocol."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        context: ssl.SSLContext,
        factory: Callable[[], HandshakeObserver],
    ) -> None:
        self._protocol = factory()
        self._done: asyncio.Future[None] = loop.create_future()
        # asyncio's start_tls needs a turn of the loop, in which data arrives that it never sees.
        self._tls = _TlsProtocol(loop, self._protocol, context, self._done)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._protocol.handshake_started(cast("asyncio.Transport", transport))
        self._done.add_done_callback(self._finish)
        transport.set_protocol(self._tls)
        self._tls.connection_made(transport)

    def _finish(self, done: asyncio.Future[None]) -> None:
        if not done.cancelled():
            done.exception()  # the client is gone, too slow, or does not speak TLS
        self._protocol.handshake_ended()


class _TlsFactory:
    """Makes the protocols of accepted connections; each uses the context that is set then."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        context: ssl.SSLContext,
        factory: Callable[[], HandshakeObserver],
    ) -> None:
        self.context = context
        self._loop = loop
        self._factory = factory

    def __call__(self) -> _TlsHandshake:
        return _TlsHandshake(self._loop, self.context, self._factory)


class _TlsProtocol(SSLProtocol):  # type: ignore[misc] # untyped
    """uvloop's TLS protocol, which also pauses its application when the socket's buffer is full.

    uvloop encrypts a response at once and passes all of it to the transport of the socket. Its own
    flow control counts what is not encrypted yet: that alone would never pause the application.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        protocol: HandshakeObserver,
        context: ssl.SSLContext,
        done: asyncio.Future[None],
    ) -> None:
        # The timeout of a shutdown includes the time in which the client reads its last response.
        seconds = protocol.answer_seconds
        super().__init__(
            loop, protocol, context, done, server_side=True, ssl_shutdown_timeout=seconds
        )
        self._protocol = protocol
        self._paused = False

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        del self._protocol  # which refers to this one: a cycle

    def pause_writing(self) -> None:
        super().pause_writing()
        self._paused = True
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._paused = False
        super().resume_writing()  # writes what was encrypted meanwhile, and may be paused again
        if not self._paused:
            self._protocol.resume_writing()


class BatchAcceptServer(asyncio.AbstractServer):
    """uvloop's server, plus a reader callback on each of its sockets."""

    def __init__(
        self,
        loop: BatchAcceptLoop,
        server: Any,
        protocol_factory: ProtocolFactory,
    ) -> None:
        self.sockets = server.sockets
        self._loop = loop
        self._server = server
        self._factory = protocol_factory
        self._connecting: set[asyncio.Task[Any]] = set()
        # libuv polls its own file descriptor: a duplicate can be polled besides.
        duplicates = [socket(fileno=os.dup(each.fileno())) for each in server.sockets]
        self._called_at: dict[socket, float | None] = dict.fromkeys(duplicates)
        for listening in duplicates:
            self._add_reader(listening)

    def replace_tls(self, context: ssl.SSLContext) -> None:
        """Use another context for the handshakes of connections that are accepted from now on.

        No effect on a server without TLS.
        """
        if isinstance(self._factory, _TlsFactory):
            self._factory.context = context

    def close(self) -> None:
        """Stop listening, after the connections that wait: the kernel would reset them."""
        for listening in self._called_at:
            self._loop.remove_reader(listening)
            with suppress(OSError):
                self._take(listening, MIN_CONNECTING)
            listening.close()
        self._called_at.clear()
        self._server.close()

    async def wait_connected(self) -> None:
        """Wait until all accepted connections have their protocols."""
        await asyncio.gather(*self._connecting, return_exceptions=True)

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
        called_at, self._called_at[listening] = self._called_at[listening], now
        # Runs at the end of the next iteration, if no further call replaces the time before.
        self._loop.call_soon(self._loop.call_soon, self._forget, listening, now)
        if called_at is None:
            return
        try:
            self._take(listening, int((now - called_at) / SECONDS_PER_CONNECTION))
        except OSError:
            self._loop.remove_reader(listening)
            self._loop.call_later(RETRY_SECONDS, self._add_reader, listening)

    def _take(self, listening: socket, connections: int) -> None:
        """Accept up to so many connections.

        Raises:
            OSError: the process has no file left for another one.
        """
        for _ in range(min(connections, self._loop.max_connecting - len(self._connecting))):
            try:
                connection, _address = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            connection.setblocking(False)
            connecting = self._loop.create_task(self._connect(connection))
            self._connecting.add(connecting)
            connecting.add_done_callback(self._connecting.discard)

    def _forget(self, listening: socket, called_at: float) -> None:
        """Forget when a callback ran, unless another one has run in the iteration after it."""
        if self._called_at.get(listening) == called_at:
            self._called_at[listening] = None

    async def _connect(self, connection: socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._factory, connection)
        except OSError:  # the client is gone
            connection.close()
