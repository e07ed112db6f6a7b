"""One client's connection: what it may take before its request is whole, and who makes room."""

from __future__ import annotations

import asyncio
import os
import time
from http import HTTPStatus
from typing import Any, NamedTuple

import httptools
import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from taskvec.errors import (
    HeadersTooLargeError,
    InvalidRequestError,
    SlowRequestError,
    TaskvecError,
    UnavailableError,
)
from taskvec.http.errors import error_response

PROBE_PATHS = frozenset({"/health/live", "/health/ready", "/metrics"})
"""Answered on every connection, so that a full server is not taken for a dead one."""

FIRST_REQUEST_SECONDS = 0.2
"""How long, on shutdown, a connection that was taken has to send its request."""

MOST_PIPELINED = 32
"""Requests that one read may bring ahead of their answers; known clients send one at a time."""

NO_HTTP = "What the client sent is not well-formed HTTP/1.1: does it speak TLS, or through a proxy?"

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


class ClientConnections:
    """Makes the connections of one process; knows which of them wait for a request."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self.waiting: dict[ClientConnection, None] = {}
        self._warned = -WARN_EVERY

    def __call__(self, **parts: Any) -> ClientConnection:
        """What uvicorn calls for each connection that it accepts."""
        return ClientConnection(self, **parts)

    def make_room(self) -> bool:
        """Close the one that has waited longest, whether idle or in the middle of sending.

        Under attack those are the attacker's: who sends whole requests has just begun to wait.
        False where all have a request in work.
        """
        self._warn()
        if not self.waiting:
            return False
        next(iter(self.waiting)).close()
        return True

    def _warn(self) -> None:
        now = time.monotonic()
        if now - self._warned >= WARN_EVERY:
            self._warned = now
            log.warning("too_many_connections", limit=self.limits.connections)


class ClientConnection(HttpToolsProtocol):
    """uvicorn's connection, with bounds on what comes before the application sees a request.

    It waits while it has no request in work: until its first one is whole, and between requests.
    """

    loop: asyncio.AbstractEventLoop

    def __init__(self, all_: ClientConnections, **parts: Any) -> None:
        super().__init__(**parts)
        self._all = all_
        self._limits = all_.limits
        self._head_timer: asyncio.TimerHandle | None = None
        self._answer_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._unparsed = 0
        self._refusal: TaskvecError | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a place, or another's; where all are busy, answer probes only."""
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections and not self._all.make_room():
            self.app = self._only_probes
        self._all.waiting[self] = None
        self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Give the place back."""
        super().connection_lost(exc)
        self._all.waiting.pop(self, None)
        for timer in (self._head_timer, self._answer_timer):
            if timer is not None:
                timer.cancel()

    def close(self) -> None:
        """Close a connection that waits; its place is free at once."""
        self.connections.discard(self)
        self._all.waiting.pop(self, None)
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
            self._refuse(self._refusal or InvalidRequestError(NO_HTTP, code="invalid_http"))
        if self._head_timer is None and self.cycle is not None and self.cycle.response_complete:
            self._time_head()
        if self._unparsed > self._limits.header_bytes:
            self._refuse(self._too_large())

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
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
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        if len(self.pipeline) >= MOST_PIPELINED:
            raise self._refused(
                InvalidRequestError("Too many requests are pipelined: wait for the answers.")
            )
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
        if not self.cycle.response_complete:
            self._all.waiting.pop(self, None)

    def on_response_complete(self) -> None:
        """An answer is written: the next request may come."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._time_answer()
        elif self.cycle.response_complete:
            self._all.waiting.pop(self, None)
            self._all.waiting[self] = None

    def pause_writing(self) -> None:
        """The client does not read its answer as fast as it is written."""
        super().pause_writing()
        self._time_answer()

    def resume_writing(self) -> None:
        """The client has read most of it."""
        super().resume_writing()
        if self._answer_timer is not None:
            self._answer_timer.cancel()
            self._answer_timer = None

    def timeout_keep_alive_handler(self) -> None:
        """No request came for long: whatever of the last answer was not read is dropped, too."""
        self.transport.abort()

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
            return
        error = UnavailableError(
            f"The server has as many connections as it takes, {self._limits.connections}: try "
            "again later.",
            code="too_many_connections",
            retry_after=1,
        )
        response = _closing(error)
        await response(scope, receive, send)

    def _time_head(self) -> None:
        self._head_timer = self.loop.call_later(self._limits.header_seconds, self._head_is_late)

    def _head_is_late(self) -> None:
        if not self._head_bytes and not self._unparsed:
            self.close()  # it never sent anything: nobody reads an answer
            return
        self._refuse(
            SlowRequestError(
                f"The request's headers did not arrive within {self._limits.header_seconds:g} "
                "seconds.",
                code="header_timeout",
            )
        )

    def _time_answer(self) -> None:
        if self._answer_timer is None:
            self._answer_timer = self.loop.call_later(
                self._limits.answer_seconds, self.transport.abort
            )

    def _count(self, size: int) -> None:
        self._unparsed = 0
        self._head_bytes += size
        if self._head_bytes > self._limits.header_bytes:
            raise self._refused(self._too_large())

    def _too_large(self) -> TaskvecError:
        return HeadersTooLargeError(
            f"The request's headers are larger than {self._limits.header_bytes} bytes: send fewer "
            "or shorter ones."
        )

    def _refused(self, error: TaskvecError) -> TaskvecError:
        """Remember an error that is raised through the parser, which hides it."""
        self._refusal = error
        return error

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
            self.transport.write(_in_full(error))
        self.transport.close()
        self._time_answer()


def _in_full(error: TaskvecError) -> bytes:
    """An answer outside of any request: head and body."""
    response = _closing(error)
    lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}".encode()]
    lines += [name + b": " + value for name, value in response.raw_headers]
    return b"\r\n".join([*lines, b"", bytes(response.body)])


def _closing(error: TaskvecError) -> Response:
    """An error's answer, and the connection's last."""
    request_id = os.urandom(16).hex()
    response = error_response(error, request_id)
    response.headers["x-request-id"] = request_id
    response.headers["connection"] = "close"
    return response
