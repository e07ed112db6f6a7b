"""Client connections: uvicorn's HTTP protocol, with limits on headers, pipelining and reading."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, NamedTuple, Protocol

import httptools
import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from taskvec.api.errors import error_response
from taskvec.errors import (
    HeadersTooLargeError,
    InvalidRequestError,
    SlowRequestError,
    TaskvecError,
    UnavailableError,
)

PROBE_PATHS = frozenset({"/health/live", "/health/ready", "/metrics"})
"""Routes answered even above the connection limit, so that a full server does not look dead."""

FIRST_REQUEST_SECONDS = 0.2
"""Time that an accepted connection has for its request while the server shuts down."""

MAX_PIPELINED = 32
"""Requests that may be sent ahead of their responses; known clients send one at a time."""

WARN_INTERVAL = 10.0
"""Seconds between two warnings that connections are closed for lack of slots."""

log = structlog.get_logger(__name__)


class ConnectionLimits(NamedTuple):
    """Limits on the connections of one process.

    Attributes:
        header_seconds: time for a request's headers, from their first byte or from the
            connection's start.
        header_bytes: maximum size of a request's headers, and of a body's trailers.
        answer_seconds: time in which a client must read a response.
        connections: maximum number of connections.
    """

    header_seconds: float
    header_bytes: int
    answer_seconds: float
    connections: int


class Closable(Protocol):
    """An idle connection."""

    def close(self) -> None:
        """Close it and free its slot at once."""


class ConnectionSlots:
    """Connection slots of one process, and its idle connections, longest idle first.

    A connection is idle until its first request is complete, and between requests.
    """

    def __init__(self, limits: ConnectionLimits) -> None:
        """Start without connections."""
        self.limits = limits
        self._idle: dict[Closable, None] = {}
        self._warned_at = -WARN_INTERVAL

    def mark_idle(self, connection: Closable) -> None:
        """Append a connection to the idle ones."""
        self._idle.pop(connection, None)
        self._idle[connection] = None

    def mark_busy(self, connection: Closable) -> None:
        """Remove a connection that has a request in progress, or is closed."""
        self._idle.pop(connection, None)

    def evict_idle(self) -> bool:
        """Close the connection that has been idle longest.

        In a slow-request attack, the longest idle connections are the attacker's: a client that
        sends complete requests has only just become idle.

        Returns:
            False if no connection is idle.
        """
        now = time.monotonic()
        if now - self._warned_at >= WARN_INTERVAL:
            self._warned_at = now
            log.warning("too_many_connections", limit=self.limits.connections)
        if not self._idle:
            return False
        next(iter(self._idle)).close()
        return True


class Timer:
    """Runs a callback once, a fixed time after it is started, unless it is stopped."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, seconds: float, callback: Callable[[], None]
    ) -> None:
        """Prepare; nothing runs before ``start``."""
        self._loop = loop
        self._seconds = seconds
        self._callback = callback
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Start; no effect while it runs."""
        if self._handle is None:
            self._handle = self._loop.call_later(self._seconds, self._callback)

    def stop(self) -> None:
        """Stop; it can be started again."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


class HttpProtocol(HttpToolsProtocol):
    """One client connection: uvicorn's protocol with timeouts and size limits before a request."""

    loop: asyncio.AbstractEventLoop

    def __init__(self, slots: ConnectionSlots, **options: Any) -> None:
        """Prepare a connection.

        Args:
            slots: shared by all connections of the process.
            options: what uvicorn passes to its own protocol.
        """
        super().__init__(**options)
        self._slots = slots
        self._limits = slots.limits
        self._header_timer = Timer(self.loop, self._limits.header_seconds, self._header_timeout)
        self._answer_timer = Timer(self.loop, self._limits.answer_seconds, self._abort)
        self._reading_headers = False
        self._reading_request = False
        self._header_bytes = 0
        self._unparsed_bytes = 0
        self._error: TaskvecError | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a slot, evicting an idle connection if needed; without one, answer probes only."""
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections and not self._slots.evict_idle():
            self.app = self._answer_probes
        self._slots.mark_idle(self)
        self._header_timer.start()

    def connection_lost(self, exc: Exception | None) -> None:
        """Free the slot."""
        super().connection_lost(exc)
        self._slots.mark_busy(self)
        self._header_timer.stop()
        self._answer_timer.stop()

    def close(self) -> None:
        """Close an idle connection and free its slot at once."""
        self.connections.discard(self)
        self._slots.mark_busy(self)
        self.transport.close()

    def shutdown(self) -> None:
        """Shut down; a connection whose first request is still arriving gets a moment longer."""
        if self.cycle is None:
            self.loop.call_later(FIRST_REQUEST_SECONDS, super().shutdown)
        else:
            super().shutdown()

    def data_received(self, data: bytes) -> None:
        """Parse data; refuse malformed HTTP, and headers or trailers beyond their limit."""
        self._unset_keepalive_if_required()
        self._unparsed_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self._refuse(self._error or malformed_http())
        if self.cycle is not None and self.cycle.response_complete:
            self._start_timer_after_response()
        if self._unparsed_bytes > self._limits.header_bytes:
            self._refuse(headers_too_large(self._limits.header_bytes))

    def on_message_begin(self) -> None:
        """Start reading a request."""
        super().on_message_begin()
        self._reading_headers = self._reading_request = True
        self._header_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Count a piece of the URL."""
        super().on_url(url)
        self._count_header(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header, or a trailer of a chunked body."""
        super().on_header(name, value)
        self._count_header(len(name) + len(value) + len(": \r\n"))

    def on_headers_complete(self) -> None:
        """Hand the request to the application."""
        self._unparsed_bytes = 0
        if self._offers_upgrade():
            return
        self._reading_headers = False
        self._header_timer.stop()
        if len(self.pipeline) >= MAX_PIPELINED:
            self._error = too_many_pipelined()
            raise self._error
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Hand a piece of the body to the application."""
        self._unparsed_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Mark the connection as busy, unless the request has been refused already."""
        if self._offers_upgrade():
            return
        super().on_message_complete()
        self._reading_request = False
        if self.cycle.response_complete:
            self._header_timer.stop()
        else:
            self._slots.mark_busy(self)

    def on_response_complete(self) -> None:
        """Mark the connection as idle, or wait for the client to read its last response."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._answer_timer.start()
        elif self.cycle.response_complete:
            self._slots.mark_idle(self)

    def pause_writing(self) -> None:
        """Start the timeout of a client that reads more slowly than the response is written."""
        super().pause_writing()
        self._answer_timer.start()

    def resume_writing(self) -> None:
        """Stop the timeout: the client has read most of the response."""
        super().resume_writing()
        if not self.transport.is_closing():
            self._answer_timer.stop()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection that was idle too long, with whatever it has not read."""
        self._abort()

    def _offers_upgrade(self) -> bool:
        """Return whether the request offers another protocol; its body is not parsed then."""
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Parse the request again without its offer of another protocol.

        Java's HttpClient offers HTTP/2 with each first request, and sends the body all the same.
        """
        version = self.parser.get_http_version().encode()
        lines = [self.parser.get_method() + b" " + self.url + b" HTTP/" + version]
        lines += [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(b"\r\n".join([*lines, b"", rest]))

    async def _answer_probes(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI application above the connection limit: health and metrics only."""
        full = len(self.connections) > self._limits.connections
        if not full:
            self.app = self.config.loaded_app
        if not full or scope["path"] in PROBE_PATHS:
            await self.config.loaded_app(scope, receive, send)
        else:
            response = closing_response(too_many_connections(self._limits.connections))
            await response(scope, receive, send)

    def _start_timer_after_response(self) -> None:
        """Limit the wait for the next headers, or for the rest of a refused body."""
        if self._reading_request:
            self._header_timer.start()
        else:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _header_timeout(self) -> None:
        if self._reading_headers:
            self._refuse(headers_too_slow(self._limits.header_seconds))
        else:
            self.close()  # nothing was sent that needs a response

    def _count_header(self, size: int) -> None:
        self._unparsed_bytes = 0
        self._header_bytes += size
        if self._header_bytes > self._limits.header_bytes:
            self._error = headers_too_large(self._limits.header_bytes)
            raise self._error  # the parser replaces it with an error of its own

    def _refuse(self, error: TaskvecError) -> None:
        """Send an error response unless another response is due, and close."""
        cycle = self.cycle
        if self.transport.is_closing():
            return
        if cycle is not None and not cycle.response_complete and not cycle.more_body:
            cycle.keep_alive = False  # the request before the invalid one is answered first
            self.flow.pause_reading()
            return
        if cycle is None or cycle.response_complete or not cycle.response_started:
            self.transport.write(closing_bytes(error))
        self.transport.close()
        self._answer_timer.start()

    def _abort(self) -> None:
        self.transport.abort()


def malformed_http() -> TaskvecError:
    """Return the error of bytes that are not an HTTP request."""
    return InvalidRequestError(
        "The request is not valid HTTP/1.1: check http:// or https://, and the proxy settings.",
        code="invalid_http",
    )


def too_many_pipelined() -> TaskvecError:
    """Return the error of too many requests ahead of their responses."""
    return InvalidRequestError("Too many requests are pipelined: wait for the answers.")


def headers_too_large(limit: int) -> TaskvecError:
    """Return the error of headers or trailers over their limit in bytes."""
    return HeadersTooLargeError(
        f"The request's headers are larger than {limit} bytes: send fewer or shorter ones."
    )


def headers_too_slow(seconds: float) -> TaskvecError:
    """Return the error of headers that are not complete in time."""
    return SlowRequestError(
        f"The request's headers did not arrive within {seconds:g} seconds.", code="header_timeout"
    )


def too_many_connections(limit: int) -> TaskvecError:
    """Return the error of a connection beyond the limit while none is idle."""
    return UnavailableError(
        f"The server has reached its limit of {limit} connections: try again later.",
        code="too_many_connections",
        retry_after=1,
    )


def closing_response(error: TaskvecError) -> Response:
    """Return the error response of a request that no application sees; it closes the connection."""
    request_id = os.urandom(16).hex()
    response = error_response(error, request_id)
    response.headers["x-request-id"] = request_id
    response.headers["connection"] = "close"
    return response


def closing_bytes(error: TaskvecError) -> bytes:
    """Return ``closing_response`` as bytes of HTTP/1.1."""
    response = closing_response(error)
    lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}".encode()]
    lines += [name + b": " + value for name, value in response.raw_headers]
    return b"\r\n".join([*lines, b"", bytes(response.body)])
