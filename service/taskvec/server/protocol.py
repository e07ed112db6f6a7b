"""One client's connection: bounds on what it may take beside its requests."""

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
"""Answered on every connection, so that a full server is not taken for a dead one."""

FIRST_REQUEST_SECONDS = 0.2
"""How long, on shutdown, a connection that was taken has to send its request."""

MOST_PIPELINED = 32
"""Requests that may come ahead of their answers; known clients send one at a time."""


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's connection, with bounds on what comes before the application sees a request.

    It waits while it has no request in work: until its first one is whole, and between requests.
    """

    loop: asyncio.AbstractEventLoop

    def __init__(self, slots: ConnectionSlots, **parts: Any) -> None:
        """Wrap uvicorn's.

        Args:
            slots: shared by all connections of the process.
            parts: what uvicorn gives to each.
        """
        super().__init__(**parts)
        self._slots = slots
        self._limits = slots.limits
        self._head_timer = Timer(self.loop, self._limits.header_seconds, self._head_is_late)
        self._answer_timer = Timer(self.loop, self._limits.answer_seconds, self._abort)
        self._head_open = False
        self._request_open = False
        self._head_bytes = 0
        self._unparsed = 0
        self._refusal: TaskvecError | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a place, or another's; where all are busy, answer probes only."""
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections and not self._slots.evict_idle():
            self.app = self._only_probes
        self._slots.mark_idle(self)
        self._head_timer.start()

    def connection_lost(self, exc: Exception | None) -> None:
        """Give the place back."""
        super().connection_lost(exc)
        self._slots.mark_busy(self)
        self._head_timer.stop()
        self._answer_timer.stop()

    def close(self) -> None:
        """Close a connection that waits; its place is free at once."""
        self.connections.discard(self)
        self._slots.mark_busy(self)
        self.transport.close()

    def shutdown(self) -> None:
        """On shutdown, a connection whose request is on its way is not closed at once."""
        if self.cycle is None:
            self.loop.call_later(FIRST_REQUEST_SECONDS, super().shutdown)
        else:
            super().shutdown()

    def data_received(self, data: bytes) -> None:
        """Parse what came; refuse what is no HTTP, and a head or trailers without end."""
        self._unset_keepalive_if_required()
        self._unparsed += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._decline(data[offer.args[0] :])
        except httptools.HttpParserError:
            self._refuse(self._refusal or malformed_http())
        if self.cycle is not None and self.cycle.response_complete:
            self._time_what_follows()
        if self._unparsed > self._limits.header_bytes:
            self._refuse(headers_too_large(self._limits.header_bytes))

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._head_open = self._request_open = True
        self._head_bytes = 0

    def on_url(self, url: bytes) -> None:
        """A piece of the address."""
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, of the head or of a chunked body's trailers."""
        super().on_header(name, value)
        self._count(len(name) + len(value) + len(": \r\n"))

    def on_headers_complete(self) -> None:
        """The head is whole: the application may see the request."""
        self._unparsed = 0
        if self._is_offer():
            return
        self._head_open = False
        self._head_timer.stop()
        if len(self.pipeline) >= MOST_PIPELINED:
            self._refusal = too_many_pipelined()
            raise self._refusal
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of a body."""
        self._unparsed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole: it is in work, unless it has been refused already."""
        if self._is_offer():
            return
        super().on_message_complete()
        self._request_open = False
        if self.cycle.response_complete:
            self._head_timer.stop()
        else:
            self._slots.mark_busy(self)

    def on_response_complete(self) -> None:
        """An answer is written: the next request may come."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._answer_timer.start()
        elif self.cycle.response_complete:
            self._slots.mark_idle(self)

    def pause_writing(self) -> None:
        """The client does not read its answer as fast as it is written."""
        super().pause_writing()
        self._answer_timer.start()

    def resume_writing(self) -> None:
        """The client has read most of it."""
        super().resume_writing()
        if not self.transport.is_closing():
            self._answer_timer.stop()

    def timeout_keep_alive_handler(self) -> None:
        """No request came for long: whatever of the last answer was not read is dropped, too."""
        self._abort()

    def _is_offer(self) -> bool:
        """Whether the request offers another protocol; its body is not parsed then."""
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

    def _decline(self, rest: bytes) -> None:
        """Parse the request again, as if it had not offered another protocol.

        Java's HttpClient offers HTTP/2 with every first request, and sends the body all the same.
        """
        version = self.parser.get_http_version().encode()
        lines = [self.parser.get_method() + b" " + self.url + b" HTTP/" + version]
        lines += [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(b"\r\n".join([*lines, b"", rest]))

    async def _only_probes(self, scope: Scope, receive: Receive, send: Send) -> None:
        full = len(self.connections) > self._limits.connections
        if not full:
            self.app = self.config.loaded_app
        if not full or scope["path"] in PROBE_PATHS:
            await self.config.loaded_app(scope, receive, send)
        else:
            response = closing_response(too_many_connections(self._limits.connections))
            await response(scope, receive, send)

    def _time_what_follows(self) -> None:
        """Behind an answer: the next head, the rest of a refused body, or noise."""
        if self._request_open:
            self._head_timer.start()
        else:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _head_is_late(self) -> None:
        if self._head_open:
            self._refuse(headers_too_slow(self._limits.header_seconds))
        else:
            self.close()  # nothing came that an answer would be due to

    def _count(self, size: int) -> None:
        self._unparsed = 0
        self._head_bytes += size
        if self._head_bytes > self._limits.header_bytes:
            self._refusal = headers_too_large(self._limits.header_bytes)
            raise self._refusal  # through the parser, which hides what it is

    def _refuse(self, error: TaskvecError) -> None:
        """Answer with an error where no other answer is due, and close."""
        cycle = self.cycle
        if self.transport.is_closing():
            return
        if cycle is not None and not cycle.response_complete and not cycle.more_body:
            cycle.keep_alive = False  # the request before the one at fault is answered first
            self.flow.pause_reading()
            return
        if cycle is None or cycle.response_complete or not cycle.response_started:
            self.transport.write(closing_bytes(error))
        self.transport.close()
        self._answer_timer.start()

    def _abort(self) -> None:
        self.transport.abort()


WARN_EVERY = 10.0
"""Seconds between two warnings that connections are closed to make room."""

log = structlog.get_logger(__name__)


class ConnectionLimits(NamedTuple):
    """The limits of a process's connections.

    Attributes:
        header_seconds: a request's head takes no longer, from its first byte or the connection's.
        header_bytes: most bytes of a request's head, and of a body's trailers.
        answer_seconds: an answer that the client has not read by then is dropped.
        connections: most at a time.
    """

    header_seconds: float
    header_bytes: int
    answer_seconds: float
    connections: int


class Waiting(Protocol):
    """A connection that has no request in work."""

    def close(self) -> None:
        """Close it; its place is free at once."""


class ConnectionSlots:
    """The places of one process, and the connections that wait in them, longest first."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self._waiting: dict[Waiting, None] = {}
        self._warned = -WARN_EVERY

    def mark_idle(self, connection: Waiting) -> None:
        """Put it behind all others that wait."""
        self._waiting.pop(connection, None)
        self._waiting[connection] = None

    def mark_busy(self, connection: Waiting) -> None:
        """Its request is in work, or it is gone."""
        self._waiting.pop(connection, None)

    def evict_idle(self) -> bool:
        """Close the one that has waited longest, whether idle or in the middle of sending.

        Under attack those are the attacker's: who sends whole requests has just begun to wait.
        False where all have a request in work.
        """
        now = time.monotonic()
        if now - self._warned >= WARN_EVERY:
            self._warned = now
            log.warning("too_many_connections", limit=self.limits.connections)
        if not self._waiting:
            return False
        next(iter(self._waiting)).close()
        return True


class Timer:
    """Acts once, so many seconds after it is started, unless it is stopped."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, seconds: float, action: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._seconds = seconds
        self._action = action
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Start it; one that runs goes on."""
        if self._handle is None:
            self._handle = self._loop.call_later(self._seconds, self._action)

    def stop(self) -> None:
        """Stop it; it can be started again."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


def malformed_http() -> TaskvecError:
    """Not a request at all."""
    return InvalidRequestError(
        "What the client sent is not well-formed HTTP/1.1: does it speak TLS, or to a proxy?",
        code="invalid_http",
    )


def too_many_pipelined() -> TaskvecError:
    """Too many requests on one connection before their answers."""
    return InvalidRequestError("Too many requests are pipelined: wait for the answers.")


def headers_too_large(limit: int) -> TaskvecError:
    """A head, or trailers, of more than so many bytes."""
    return HeadersTooLargeError(
        f"The request's headers are larger than {limit} bytes: send fewer or shorter ones."
    )


def headers_too_slow(seconds: float) -> TaskvecError:
    """A head that takes more than so many seconds."""
    return SlowRequestError(
        f"The request's headers did not arrive within {seconds:g} seconds.", code="header_timeout"
    )


def too_many_connections(limit: int) -> TaskvecError:
    """More than so many connections, each with a request in work."""
    return UnavailableError(
        f"The server has as many connections as it takes, {limit}: try again later.",
        code="too_many_connections",
        retry_after=1,
    )


def closing_response(error: TaskvecError) -> Response:
    """An error's answer, and its connection's last; with an id of its own."""
    request_id = os.urandom(16).hex()
    response = error_response(error, request_id)
    response.headers["x-request-id"] = request_id
    response.headers["connection"] = "close"
    return response


def closing_bytes(error: TaskvecError) -> bytes:
    """``last_response`` as it travels."""
    response = closing_response(error)
    lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}".encode()]
    lines += [name + b": " + value for name, value in response.raw_headers]
    return b"\r\n".join([*lines, b"", bytes(response.body)])
