"""HTTP client for one server, with limits on time and size, and one error class."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import NamedTuple

import aiohttp

from taskvec.concurrency import ResponsiveTimeout
from taskvec.engines.base import CallOutcome, do_nothing
from taskvec.engines.wire import read_text_error
from taskvec.open_files import FILE_RETRY_SECONDS, out_of_files
from taskvec.telemetry.tracing import current_span

_MAX_ERROR_BYTES = 4096
"""Bytes that are read of the body of an error response."""

_MAX_ERROR_CHARACTERS = 300
"""Characters of an error response that messages contain."""

_KEY_REQUIRED = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)


OPENS_CIRCUIT = frozenset({CallOutcome.UNREACHABLE, CallOutcome.TIMEOUT, CallOutcome.WRONG})
"""Outcomes that open the circuit of a server at once, until it passes its checks again."""


class ServerCallError(Exception):
    """One call to one server failed; another server may succeed.

    It never leaves the remote engine, so it is not a TaskvecError.

    Attributes:
        outcome: kind of the failure.
        message: reason, without the name of the server.
        retry_after: seconds after which a busy server accepts calls again.
    """

    def __init__(self, outcome: CallOutcome, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.outcome = outcome
        self.message = message
        self.retry_after = retry_after


class _OutOfFilesError(Exception):
    """This process had no file left for a connection."""


class HttpRequest(NamedTuple):
    """Path, body and headers of a request."""

    path: str
    body: bytes
    headers: Mapping[str, str]


class ServerClient:
    """HTTP client for one server."""

    def __init__(
        self, session: aiohttp.ClientSession, base: str, connections: asyncio.Semaphore
    ) -> None:
        """Create the client; no connection is opened yet.

        Args:
            session: connection pool and default headers.
            base: URL of the server, without a trailing slash.
            connections: limits the concurrent calls to all servers.
        """
        self._session = session
        self._base = base
        self._connections = connections

    async def get(self, path: str, max_bytes: int, timeout_seconds: float) -> bytes:
        """Send a GET request; see ``post``."""
        return await self._exchange("GET", HttpRequest(path, b"", {}), max_bytes, timeout_seconds)

    async def answers(self, path: str, max_bytes: int, timeout_seconds: float) -> bool:
        """Return whether the server answers a GET request in time, with any status.

        Needs no free slot of ``connections``. Delays of this process do not count, and without a
        free file the result is True.
        """
        request = HttpRequest(path, b"", {})
        try:
            with ResponsiveTimeout(TimeoutError, timeout_seconds):
                await self._attempt("GET", request, max_bytes, 10 * timeout_seconds)
        except TimeoutError:
            return False
        except _OutOfFilesError:
            return True
        except ServerCallError as error:
            return error.outcome is not CallOutcome.UNREACHABLE
        return True

    async def post(
        self,
        request: HttpRequest,
        max_bytes: int,
        timeout_seconds: float,
        before: Callable[[], None] = do_nothing,
    ) -> bytes:
        """Send a POST request.

        Args:
            request: what to send.
            max_bytes: expected size of the response.
            timeout_seconds: time for the response.
            before: called when a connection is free and the request is about to be sent; may raise.

        Returns:
            The body of the response. If it is longer than ``max_bytes``, its first
            ``max_bytes + 1`` bytes.

        Raises:
            ServerCallError: the connection failed, the status is not 200, or the response was not
                complete in time. ABANDONED: this process had no connection or file left in time,
                which says nothing about the server.
            TaskvecError: the server cannot embed one of the texts; the error names it.
        """
        span = current_span.get()
        if span is None:
            return await self._exchange("POST", request, max_bytes, timeout_seconds, before)
        with span.call(self._base + request.path) as headers:
            traced = request._replace(headers={**request.headers, **headers})
            return await self._exchange("POST", traced, max_bytes, timeout_seconds, before)

    async def _exchange(
        self,
        method: str,
        request: HttpRequest,
        max_bytes: int,
        timeout_seconds: float,
        before: Callable[[], None] = do_nothing,
    ) -> bytes:
        deadline = time.monotonic() + timeout_seconds
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._connections.acquire()
        except TimeoutError:
            raise _no_connection(timeout_seconds) from None
        try:
            while True:
                before()
                # The server gets its whole time, whatever the wait for a connection was.
                try:
                    return await self._attempt(method, request, max_bytes, timeout_seconds)
                except _OutOfFilesError:
                    if time.monotonic() + FILE_RETRY_SECONDS >= deadline:
                        raise _no_connection(timeout_seconds) from None
                await asyncio.sleep(FILE_RETRY_SECONDS)
        finally:
            self._connections.release()

    async def _attempt(
        self, method: str, request: HttpRequest, max_bytes: int, timeout_seconds: float
    ) -> bytes:
        url = self._base + request.path
        try:
            async with (
                asyncio.timeout(timeout_seconds),
                self._session.request(
                    method,
                    url,
                    data=request.body or None,
                    headers=request.headers,
                    allow_redirects=False,
                ) as response,
            ):
                if response.status == HTTPStatus.OK:
                    return await _read(response.content, max_bytes)
                error_body = await _read(response.content, _MAX_ERROR_BYTES)
                text = self._without_key(error_body.decode(errors="replace"))
        except TimeoutError:
            raise ServerCallError(
                CallOutcome.TIMEOUT, f"no answer within {timeout_seconds:.3g} seconds"
            ) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            if out_of_files(error):
                raise _OutOfFilesError from None
            raise ServerCallError(
                CallOutcome.UNREACHABLE, f"{type(error).__name__}: {error}"
            ) from None
        if response.status == HTTPStatus.INTERNAL_SERVER_ERROR:
            text_error = read_text_error(text)
            if text_error is not None:
                raise text_error
        busy = response.status == HTTPStatus.TOO_MANY_REQUESTS
        hint = " (see TASKVEC_ENGINE_API_KEY)" if response.status in _KEY_REQUIRED else ""
        raise ServerCallError(
            CallOutcome.BUSY if busy else CallOutcome.ERROR,
            f"status {response.status}{hint}: {text[:_MAX_ERROR_CHARACTERS]}",
            _retry_after_seconds(response.headers.get("retry-after", "")),
        )

    def _without_key(self, text: str) -> str:
        """Mask the API key, which some servers repeat in error responses."""
        key = self._session.headers.get("authorization", "").removeprefix("Bearer ")
        return text.replace(key, "***") if key else text


def _no_connection(seconds: float) -> ServerCallError:
    return ServerCallError(
        CallOutcome.ABANDONED, f"this process had no connection left for {seconds:.3g} seconds"
    )


def _retry_after_seconds(header: str) -> float:
    """Return the seconds of a Retry-After header; 1 if it is missing or has another form."""
    return float(header) if header.isdecimal() and len(header) < 6 else 1.0


async def _read(stream: aiohttp.StreamReader, max_bytes: int) -> bytes:
    chunks, size = [], 0
    async for chunk in stream.iter_any():
        chunks.append(chunk)
        size += len(chunk)
        if size > max_bytes:
            break
    return b"".join(chunks)[: max_bytes + 1]
