"""Reading a JSON body within its limit, and noticing when the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, NamedTuple, TypeVar

import orjson
from starlette.types import Receive, Scope

from taskvec.auth.keys import Key
from taskvec.concurrency import CancelScope
from taskvec.errors import (
    ClientClosedError,
    InvalidRequestError,
    PayloadTooLargeError,
    SlowRequestError,
    UnsupportedMediaTypeError,
)
from taskvec.priority import Priority

T = TypeVar("T")

PARSE_INLINE = 1 << 16
"""Up to so many bytes are parsed in the event loop: a millisecond at most."""

MOST_DIGITS = 18
"""Of a Content-Length worth reading as a number."""

WATCH_AFTER = 0.02
"""Seconds before a request's connection is watched: most are answered sooner, and a watching task
costs as much as everything else that is done for a small request."""


async def read_json(
    receive: Receive, headers: Mapping[str, str], limits: RequestLimits, read: Callable[[Any], T]
) -> T:
    """What ``read`` makes of the parsed body; in a thread where that would block the event loop.

    Args:
        receive: gives the body, of which nothing was read yet.
        headers: of the request.
        limits: of the body.
        read: from the parsed body to what is wanted of it.

    Raises:
        UnsupportedMediaTypeError: declared as something other than JSON, or as compressed.
        SlowRequestError: not there in time; the rest is not read.
        PayloadTooLargeError: over the limit; the rest is not read.
        ClientClosedError: the client left while sending.
        InvalidRequestError: not JSON: also NaN, lone surrogates, nesting beyond 1,024 levels, and
            more values than the limit.
    """
    declared = headers.get("content-type", "application/json")
    kind = declared.partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise UnsupportedMediaTypeError(
            f"The body is declared as {kind[:80]!r}: send JSON with the header Content-Type: "
            "application/json."
        )
    body = await read_bytes(receive, headers, limits)
    if len(body) <= PARSE_INLINE:
        return read(parse(body, limits.values))
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(None, lambda: read(parse(body, limits.values)))


async def read_bytes(receive: Receive, headers: Mapping[str, str], limits: RequestLimits) -> bytes:
    """The body as it came.

    Args:
        receive: gives the body, of which nothing was read yet.
        headers: of the request.
        limits: a body over ``body_bytes`` is refused by its header, or as soon as it passes it.

    Raises:
        UnsupportedMediaTypeError: declared as compressed.
        SlowRequestError: not there in time; the rest is not read.
        PayloadTooLargeError: over the limit; the rest is not read.
        ClientClosedError: the client left while sending.
    """
    coding = headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("identity", ""):
        raise UnsupportedMediaTypeError(
            f"The body is declared as compressed ({coding[:80]!r}): send it as it is, without the "
            "header Content-Encoding.",
            code="unsupported_content_encoding",
        )
    limit = limits.body_bytes
    length = headers.get("content-length", "0")
    if length.isdecimal() and (len(length) > MOST_DIGITS or int(length) > limit):
        raise _too_large(limit)
    with CancelScope(lambda: _too_slow(limits.body_seconds), limits.body_seconds):
        return await _read(receive, limit)


async def _read(receive: Receive, limit: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientClosedError("The client left while sending its body.")
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


async def cancel_on_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The work's result; the work is cancelled once the client is gone.

    Raises:
        ClientClosedError: the client left first.
    """
    leaving = CancelScope(_client_left)
    watcher: asyncio.Task[None] | None = None

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        leaving.cancel()

    def start_watching() -> None:
        nonlocal watcher
        watcher = asyncio.create_task(watch())

    timer = asyncio.get_running_loop().call_later(WATCH_AFTER, start_watching)
    with leaving:
        try:
            return await work
        finally:
            timer.cancel()
            if watcher is not None:
                watcher.cancel()


def _client_left() -> ClientClosedError:
    return ClientClosedError("The client left before its answer.")


def _too_slow(seconds: float) -> SlowRequestError:
    return SlowRequestError(
        f"The body did not arrive within {seconds:g} seconds: send fewer texts at once."
    )


def _too_large(limit: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(
        f"The body is larger than {limit} bytes: send fewer texts at once, or shorter ones."
    )


def header_dict(scope: Scope) -> dict[str, str]:
    """The headers by their names in lower case; of one that was sent twice, the first."""
    sent = scope["headers"]
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(sent)}


TIMEOUT_HEADER = "x-request-timeout-ms"
PRIORITY_HEADER = "x-priority"


class RequestLimits(NamedTuple):
    """The limits of a route that embeds.

    Attributes:
        body_bytes: most bytes of a body.
        body_seconds: how long a body may take to arrive.
        values: most JSON values in a body, whatever they are.
        texts: most texts of a request.
        seconds: how long a request may take once its body is there.
        token_ids: whether ids are taken in place of text.
    """

    body_bytes: int
    body_seconds: float
    values: int
    texts: int
    seconds: float
    token_ids: bool


def request_timeout(headers: Mapping[str, str], most: float) -> float:
    """How long a request may take: what the client asks for, at most what the server allows.

    Raises:
        InvalidRequestError: the client's header is no number of milliseconds.
    """
    asked = headers.get(TIMEOUT_HEADER)
    if asked is None:
        return most
    if not asked.isdecimal() or not 0 < len(asked) < 12 or int(asked) == 0:
        raise InvalidRequestError(
            f"The header {TIMEOUT_HEADER} must be a whole number of milliseconds above 0.",
            code="invalid_timeout",
            param=TIMEOUT_HEADER,
        )
    return min(most, int(asked) / 1000)


def request_priority(headers: Mapping[str, str], key: Key | None) -> Priority:
    """The class that the client puts its request into; where it says nothing, that of its key.

    Raises:
        InvalidRequestError: there is no such class.
    """
    asked = headers.get(PRIORITY_HEADER)
    if asked is None:
        return Priority.INTERACTIVE if key is None else key.priority
    try:
        return Priority(asked)
    except ValueError:
        raise InvalidRequestError(
            f"The header {PRIORITY_HEADER} must be one of {', '.join(Priority)}.",
            code="invalid_priority",
            param=PRIORITY_HEADER,
        ) from None


def parse(body: bytes, limit: int) -> Any:
    """The parsed body.

    Args:
        body: any bytes.
        limit: most values; keys count too.

    Raises:
        InvalidRequestError: not JSON: also NaN, lone surrogates and nesting beyond 1,024 levels; or
            more values than the limit.
    """
    if len(body) > limit and has_more_values(body, limit):
        raise InvalidRequestError(
            f"The body has more than {limit} JSON values: send fewer texts at once.",
            code="too_many_values",
        )
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(
            f"The body is not valid JSON: {error}.", code="invalid_json"
        ) from None


def has_more_values(body: bytes, limit: int) -> bool:
    """Whether JSON has more values than a limit; takes milliseconds a megabyte.

    Before each value and key, but for the outermost, stands a comma, a colon or an opening bracket.
    """
    if b"\\" in body:  # what is escaped ends no string
        body = body.replace(rb"\\", b"").replace(rb"\"", b"")
    if body.count(b'"') > 2 * limit + 2:
        return True
    outside = b"".join(body.split(b'"')[::2])
    return sum(map(outside.count, (b",", b":", b"[", b"{"))) > limit
