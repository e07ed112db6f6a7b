"""Client connections: uvicorn's HTTP protocol, with limits on all that precedes a response."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, NamedTuple, NoReturn, Protocol, cast

import httptools
import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from taskvec.api.context import context_if_any
from taskvec.api.errors import error_response
from taskvec.api.middleware import without_trailing_slash
from taskvec.concurrency import is_shortage
from taskvec.core.memory_budget import MemoryHold
from taskvec.errors import (
    HeadersTooLargeError,
    InvalidRequestError,
    MethodNotAllowedError,
    OverloadedError,
    SlowRequestError,
    TaskvecError,
    UnavailableError,
)
from taskvec.server.lingering import MAX_LINGERING, LingeringClose

PROBE_PATHS = frozenset({"/health/live", "/health/ready", "/metrics"})
"""Routes answered even above the connection limit, so that a full server does not look dead."""

FIRST_REQUEST_SECONDS = 0.2
"""Time that an accepted connection has for its request while the server shuts down."""

MAX_PIPELINED = 32
"""Requests that may be sent ahead of their responses; known clients send one at a time."""

MAX_URL_BYTES = 8192
"""Size of a request's URL. Decoding one takes a microsecond per ten bytes; ours are short."""

MAX_HEADERS = 128
"""Headers of a request, and trailers of its body. Each costs microseconds; clients and proxies
together send a few dozen."""

FREE_PIECES, BYTES_PER_PIECE = 4096, 64
"""Pieces in which a body may arrive: a number of any size, and one more for each of these bytes.
Each chunk costs the event loop a microsecond; a chunk for each of 2,048 short texts and each comma
between them is still accepted."""

MAX_UNCOUNTED_BYTES = 16_384
"""What a client has not read of a response counts against the memory budget beyond this."""

MAX_KEPT_REST = 65_536
"""If more than this of a request's body has not arrived when it is answered, its connection is
closed; a shorter rest is read and the connection kept. A client that sees ``Connection: close`` may
stop sending."""

TRANSFER_CODING = b"transfer-encoding"

TLS_CLOSE_SECONDS = 1.0
"""Time that a client has to answer the end of a TLS connection, once everything was sent."""

ALLOWED_METHODS = "GET, HEAD, POST"
"""Methods of all routes together."""

MAX_HANDSHAKE_SHARE = 0.25
"""If TLS handshakes have a larger share of the connections, the oldest one is evicted first."""

WARN_INTERVAL = 10.0
"""Seconds between two warnings that connections are closed for lack of slots."""

log = structlog.get_logger(__name__)


class ConnectionLimits(NamedTuple):
    """Limits on the connections of one process.

    Attributes:
        header_seconds: time for a request's headers, from their first byte or from the
            connection's start, its TLS handshake included.
        header_bytes: maximum size of a request's headers, and of a body's trailers.
        answer_seconds: time in which a client must read a response.
        connections: maximum number of connections.
        discarded_bytes: maximum number of bytes that are discarded after a refused request.
    """

    header_seconds: float
    header_bytes: int
    answer_seconds: float
    connections: int
    discarded_bytes: int


class Closable(Protocol):
    """A connection without a request in progress."""

    @property
    def flushed(self) -> bool:
        """Whether nothing that was written remains to be sent."""

    def close(self) -> None:
        """Close it and free its slot at once."""


class ConnectionSlots:
    """Connection slots of one process, and its idle connections, longest idle first.

    A connection is idle until its first request is complete, and between requests. During its TLS
    handshake it is listed apart, as it is while it lingers: it was answered and is to be closed.
    """

    def __init__(self, limits: ConnectionLimits) -> None:
        """Start without connections."""
        self.limits = limits
        self._idle: dict[Closable, None] = {}
        self._handshakes: dict[Closable, None] = {}
        self._lingering: dict[Closable, None] = {}
        self._warned_at = -WARN_INTERVAL

    def mark_handshake(self, connection: Closable) -> None:
        """Append a connection to those in their TLS handshake."""
        self._handshakes[connection] = None

    def mark_idle(self, connection: Closable) -> None:
        """Append a connection to the idle ones."""
        self.mark_busy(connection)
        self._idle[connection] = None

    def mark_lingering(self, connection: Closable) -> None:
        """Append a connection to the lingering ones; beyond their limit, close the oldest."""
        self.mark_busy(connection)
        self._lingering[connection] = None
        if len(self._lingering) > MAX_LINGERING:
            next(iter(self._lingering)).close()

    @property
    def lingering(self) -> int:
        """Number of lingering connections."""
        return len(self._lingering)

    def mark_busy(self, connection: Closable) -> None:
        """Remove a connection that has a request in progress, or is closed."""
        self._idle.pop(connection, None)
        self._handshakes.pop(connection, None)
        self._lingering.pop(connection, None)

    def evict_idle(self) -> bool:
        """Close a lingering connection, the longest idle one, or the oldest of many TLS handshakes.

        A lingering connection has its answer.
        In a slow-request attack, the longest idle connections are the attacker's: a client that
        sends complete requests has only just become idle. A handshake takes milliseconds: where
        they hold a large share of the slots, the oldest ones are an attacker's as well.

        Returns:
            False if every connection has a request in progress, or a response to send.
        """
        now = time.monotonic()
        if now - self._warned_at >= WARN_INTERVAL:
            self._warned_at = now
            log.warning("too_many_connections", limit=self.limits.connections)
        many = len(self._handshakes) > self.limits.connections * MAX_HANDSHAKE_SHARE
        order = (self._handshakes, self._idle) if many else (self._idle, self._handshakes)
        for connections in (self._lingering, *order):
            for connection in connections:
                if connection.flushed:
                    connection.close()
                    return True
        return False


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


class ResponseTransport:
    """Transport that uvicorn writes a response to; closing it may be delayed."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        """Wrap a transport.

        Args:
            transport: of the connection.
            close: called by uvicorn after the last response.
        """
        self.write = transport.write
        self.is_closing = transport.is_closing
        self.close = close


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
        self._close_timer = Timer(self.loop, TLS_CLOSE_SECONDS, self._abort)
        self._reading_headers = False
        self._reading_request = False
        self._header_bytes = 0
        self._headers = 0
        self._unparsed_bytes = 0
        self._body_bytes = 0
        self._body_pieces = 0
        self._error: TaskvecError | None = None
        self._refused = False
        self._running: RequestResponseCycle | None = None
        self._unread: MemoryHold | None = None
        self._socket_transport: asyncio.Transport | None = None
        self._response_transport: ResponseTransport | None = None
        self._lingering: LingeringClose | None = None
        self._kept_if_read = False
        self._stopping = False

    @property
    def answer_seconds(self) -> float:
        """Time in which a client must read a response."""
        return self._limits.answer_seconds

    def handshake_started(self, transport: asyncio.Transport) -> None:
        """Take a slot before the TLS handshake, evicting another connection if needed.

        Args:
            transport: the connection without TLS.
        """
        self.transport = self._socket_transport = transport
        self._take_slot()
        self._slots.mark_handshake(self)

    def handshake_ended(self) -> None:
        """Free the slot if the TLS handshake failed."""
        if self.flow is None:  # set when the connection is made
            self.connection_lost(None)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a slot, evicting an idle connection if needed; without one, answer probes only."""
        if self not in self.connections:
            self._take_slot()
        super().connection_made(transport)
        # Over TLS, the transport above encrypts and passes on whatever is written.
        self._socket_transport = self._socket_transport or transport
        self._socket_transport.set_write_buffer_limits(high=MAX_UNCOUNTED_BYTES, low=0)
        self._response_transport = ResponseTransport(transport, self._close_after_response)
        self._slots.mark_idle(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Free the slot."""
        super().connection_lost(exc)
        if self._running is not None and not self._running.response_complete:
            self._disconnect(self._running)
        self._slots.mark_busy(self)
        self._header_timer.stop()
        self._answer_timer.stop()
        self._close_timer.stop()
        self._stop_lingering()
        self._release_unread()

    @property
    def flushed(self) -> bool:
        """Whether the response before was sent to its end."""
        return not self._unsent_bytes()

    def close(self) -> None:
        """Close an idle or lingering connection and free its slot at once."""
        self.connections.discard(self)
        self._slots.mark_busy(self)
        self._stop_lingering()
        self.transport.abort()

    def shutdown(self) -> None:
        """Shut down; while a first request, or the rest of a refused one, arrives, a bit later."""
        self._stopping = True
        if self.cycle is None or self._lingering is not None:
            self.loop.call_later(FIRST_REQUEST_SECONDS, self._shutdown)
        else:
            self._shutdown()

    def data_received(self, data: bytes) -> None:
        """Parse data; refuse malformed HTTP, and what is beyond its limit. Then parse no more."""
        if self._lingering is not None:
            self._lingering.discard(len(data), self._slots.lingering)
        if self._refused:
            return
        self._unparsed_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            shortage = is_shortage(error.__context__)
            self._refuse(self._error or (no_memory() if shortage else malformed_http()))
        if self._unparsed_bytes > self._limits.header_bytes:
            self._refuse(headers_too_large(self._limits.header_bytes))
        if self._reading_request and self.cycle is not None and self.cycle.response_complete:
            self._header_timer.start()
        elif self._reading_request and not self._reading_headers and not self._refused:
            self._close_unless_read()

    def on_message_begin(self) -> None:
        """Start reading a request; the time of an idle connection ends only here."""
        self._unset_keepalive_if_required()
        super().on_message_begin()
        self._reading_headers = self._reading_request = True
        self._header_bytes = self._headers = self._body_bytes = self._body_pieces = 0

    def on_url(self, url: bytes) -> None:
        """Count a piece of the URL."""
        self._count_header(len(url))
        super().on_url(url)
        if len(self.url) > MAX_URL_BYTES:
            self._stop_parsing(url_too_long())

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header, or a trailer of a chunked body."""
        self._headers += 1
        if self._headers > MAX_HEADERS:
            self._stop_parsing(too_many_headers())
        self._count_header(len(name) + len(value) + len(": \r\n"))
        if self._reading_headers:  # trailers must not pass for headers
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Hand the request to the application."""
        self._unparsed_bytes = 0
        if self.parser.get_method() == b"CONNECT":
            self._stop_parsing(connect_method())
        self._check_host()
        self._check_transfer_coding()
        if self._offers_upgrade():
            return
        self._reading_headers = False
        self._header_timer.stop()
        if len(self.pipeline) >= MAX_PIPELINED:
            self._stop_parsing(too_many_pipelined())
        super().on_headers_complete()
        self.cycle.transport = cast("asyncio.Transport", self._response_transport)

    def on_body(self, body: bytes) -> None:
        """Hand a piece of the body to the application."""
        self._unparsed_bytes = 0
        self._body_bytes += len(body)
        self._body_pieces += 1
        if self._body_pieces > FREE_PIECES + self._body_bytes // BYTES_PER_PIECE:
            self._stop_parsing(chunks_too_small())
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Mark the connection as busy, unless the request has been refused already."""
        if self._offers_upgrade():
            return
        super().on_message_complete()
        self._reading_request = False
        if self._kept_if_read:
            self.cycle.keep_alive = not self.cycle.response_started
            self._kept_if_read = False
        if self.cycle.response_complete:
            self._header_timer.stop()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
        else:
            self._slots.mark_busy(self)

    def on_response_complete(self) -> None:
        """Mark the connection as idle, or wait for the client to read its last response."""
        if self._lingering is not None:
            self.server_state.total_requests += 1
            return
        super().on_response_complete()
        if self.transport.is_closing():
            self._time_close()
        elif self.cycle.response_complete:
            self._slots.mark_idle(self)
            if self._reading_request:  # the next headers, or the rest of a refused body
                self._unset_keepalive_if_required()
                self._header_timer.start()

    def pause_writing(self) -> None:
        """Start the timeout of a client that reads more slowly than the response is written."""
        super().pause_writing()
        self._answer_timer.start()
        context = context_if_any(self._running.scope) if self._running is not None else None
        if self._unread is None and context is not None and context.memory is not None:
            self._unread = context.memory.unread(self._unsent_bytes())

    def resume_writing(self) -> None:
        """Stop the timeout: everything was sent."""
        super().resume_writing()
        self._release_unread()
        self._answer_timer.stop()
        if self.transport.is_closing():
            self._time_close()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection that was idle too long, with whatever it has not read."""
        self._abort()

    def _shutdown(self) -> None:
        if self._lingering is not None:
            self._end_lingering()
            return
        self._kept_if_read = False
        super().shutdown()
        if self.transport.is_closing():
            self._time_close()

    def _close_unless_read(self) -> None:
        """Close the connection after the response if it starts before the rest of the body arrives.

        The body of a client that waits for ``100 Continue`` may never come.
        """
        cycle = self.cycle
        unanswered = cycle.keep_alive and not cycle.response_started
        if unanswered and (cycle.waiting_for_100_continue or self._has_long_rest()):
            cycle.keep_alive, self._kept_if_read = False, True

    def _has_long_rest(self) -> bool:
        """Return whether more of the body is to come than is read to keep a connection."""
        lengths = [value for name, value in self.headers if name == b"content-length"]
        return not lengths or int(lengths[0]) - self._body_bytes > MAX_KEPT_REST

    def _close_after_response(self) -> None:
        """Close after the last response; linger if the client may still be sending."""
        if self._lingering is not None:
            return
        unread = self._reading_request or self._refused or self.flow.read_paused
        if unread and self._running is not None and self._running.response_complete:
            self._linger()
        else:
            self.transport.close()

    def _linger(self) -> None:
        """Half-close, and discard what the client still sends: the answer would be lost else."""
        if self.transport.is_closing():
            return
        self._refused = True
        self._header_timer.stop()
        self._unset_keepalive_if_required()
        if self.cycle is not None:
            self.cycle.body = bytearray()
        if self.transport.can_write_eof():  # not over TLS
            self.transport.write_eof()
        self._lingering = LingeringClose(
            self.loop, self.flow, self._limits.discarded_bytes, self._end_lingering
        )
        self._slots.mark_lingering(self)
        if self._stopping:
            self.loop.call_later(FIRST_REQUEST_SECONDS, self._shutdown)

    def _end_lingering(self) -> None:
        """Close; what the client has not read of earlier responses has the answer timeout."""
        self._stop_lingering()
        self.transport.close()
        self._time_close()

    def _stop_lingering(self) -> None:
        if self._lingering is not None:
            self._lingering.stop()

    def _time_close(self) -> None:
        """Limit the time for a client to read what is left, or else to answer the end of TLS."""
        (self._close_timer if self.flushed else self._answer_timer).start()

    def _unsent_bytes(self) -> int:
        """Return the size of what was written and the kernel has not taken yet."""
        transports = {self.transport, self._socket_transport}
        return sum(each.get_write_buffer_size() for each in transports if each is not None)

    def _release_unread(self) -> None:
        if self._unread is not None:
            self._unread.release()
            self._unread = None

    def _take_slot(self) -> None:
        self.connections.add(self)
        if len(self.connections) > self._limits.connections and not self._slots.evict_idle():
            self.app = self._answer_probes
        self._header_timer.start()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _offers_upgrade(self) -> bool:
        """Return whether the request offers another protocol; its body is not parsed then."""
        return bool(self.parser.should_upgrade())

    def _check_host(self) -> None:
        """Refuse a request whose Host is ambiguous: proxies and servers might read two of them."""
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts > 1 or (hosts == 0 and self.parser.get_http_version() == "1.1"):
            self._stop_parsing(wrong_hosts(hosts))

    def _check_transfer_coding(self) -> None:
        """Refuse a body that is compressed in transfer: the parser only undoes ``chunked``."""
        codings = [value.strip().lower() for name, value in self.headers if name == TRANSFER_CODING]
        if any(coding != b"chunked" for coding in codings):
            self._stop_parsing(unknown_transfer_coding())

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
        if not full or without_trailing_slash(scope["path"]) in PROBE_PATHS:
            await self.config.loaded_app(scope, receive, send)
        else:
            response = closing_response(too_many_connections(self._limits.connections))
            await response(scope, receive, send)

    def _header_timeout(self) -> None:
        if self._reading_headers:
            self._refuse(headers_too_slow(self._limits.header_seconds))
        else:
            self.close()  # nothing was sent that needs a response

    def _count_header(self, size: int) -> None:
        self._unparsed_bytes = 0
        self._header_bytes += size
        if self._header_bytes > self._limits.header_bytes:
            self._stop_parsing(headers_too_large(self._limits.header_bytes))

    def _stop_parsing(self, error: TaskvecError) -> NoReturn:
        """Leave a parser callback; the parser replaces the error with one of its own."""
        self._error = error
        raise error

    def _refuse(self, error: TaskvecError) -> None:
        """Stop reading and close: after the responses to earlier requests, or with an error."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        invalid = self.cycle if self._reading_request and not self._reading_headers else None
        if self.pipeline and self.pipeline[0][0] is invalid:
            self.pipeline.popleft()  # it waited for earlier requests
        last = self.pipeline[0][0] if self.pipeline else self._running
        if last is not None and last is not invalid and not last.response_complete:
            last.keep_alive = False
            self._header_timer.stop()
            self.flow.pause_reading()
            return
        if invalid is None or not invalid.response_started:
            self.transport.write(closing_bytes(error))
        if invalid is not None:
            self._disconnect(invalid)  # what the application still sends is not to be written
        self._linger()

    @staticmethod
    def _disconnect(cycle: RequestResponseCycle) -> None:
        cycle.disconnected = True
        cycle.waiting_for_100_continue = False
        cycle.message_event.set()

    def _abort(self) -> None:
        self.transport.abort()


def malformed_http() -> TaskvecError:
    """Return the error of bytes that are not an HTTP request."""
    return InvalidRequestError(
        "The request is not valid HTTP/1.1: check http:// or https://, and the proxy settings.",
        code="invalid_http",
    )


def no_memory() -> TaskvecError:
    """Return the error of a request that cannot be read for lack of memory."""
    return OverloadedError("The server's memory is used up: try again later.", retry_after=1)


def too_many_pipelined() -> TaskvecError:
    """Return the error of too many requests ahead of their responses."""
    return InvalidRequestError("Too many requests are pipelined: wait for the answers.")


def headers_too_large(limit: int) -> TaskvecError:
    """Return the error of headers or trailers over their limit in bytes."""
    return HeadersTooLargeError(
        f"The request's headers are larger than {limit} bytes: send fewer or shorter ones."
    )


def url_too_long() -> TaskvecError:
    """Return the error of a URL over its limit."""
    return HeadersTooLargeError(
        f"The request's URL is larger than {MAX_URL_BYTES} bytes: send texts in the body."
    )


def too_many_headers() -> TaskvecError:
    """Return the error of too many headers or trailers."""
    return HeadersTooLargeError(f"The request has more than {MAX_HEADERS} headers: send fewer.")


def chunks_too_small() -> TaskvecError:
    """Return the error of a body in very many small pieces."""
    return InvalidRequestError(
        f"The body arrives in more than {FREE_PIECES} pieces of fewer than {BYTES_PER_PIECE} bytes "
        "on average: send it in larger chunks, or with Content-Length."
    )


def connect_method() -> TaskvecError:
    """Return the error of a request for a tunnel."""
    return MethodNotAllowedError(
        "This server is not a proxy and does not answer CONNECT: check the proxy settings."
    )


def wrong_hosts(hosts: int) -> TaskvecError:
    """Return the error of a request with a number of Host headers other than one."""
    return InvalidRequestError(
        f"The request has {f'{hosts} Host headers' if hosts else 'no Host header'}: HTTP/1.1 needs "
        "exactly one.",
        code="invalid_http",
    )


def unknown_transfer_coding() -> TaskvecError:
    """Return the error of a transfer coding other than chunked."""
    return InvalidRequestError(
        "The only Transfer-Encoding that this server reads is chunked: send the body uncompressed.",
        code="unsupported_transfer_encoding",
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
    if isinstance(error, MethodNotAllowedError):
        response.headers["allow"] = ALLOWED_METHODS
    return response


def closing_bytes(error: TaskvecError) -> bytes:
    """Return ``closing_response`` as bytes of HTTP/1.1."""
    response = closing_response(error)
    lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}".encode()]
    lines += [name + b": " + value for name, value in response.raw_headers]
    return b"\r\n".join([*lines, b"", bytes(response.body)])
