"""Reading requests: body within its limits, headers, JSON, client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, NamedTuple, TypeVar

import orjson
from starlette.types import Receive, Scope

from taskvec.api.json_pieces import (
    InvalidJsonError,
    TooManyValuesError,
    has_more_values,
    parse_in_pieces,
)
from taskvec.auth.keys import Key
from taskvec.concurrency import CancelScope, LargeWork
from taskvec.core.memory_budget import MemoryHold
from taskvec.errors import (
    ClientClosedError,
    InvalidRequestError,
    PayloadTooLargeError,
    SlowRequestError,
    UnsupportedMediaTypeError,
)
from taskvec.priority import Priority

T = TypeVar("T")

TIMEOUT_HEADER = "x-request-timeout-ms"
PRIORITY_HEADER = "x-priority"

PARSE_COPIES = 3
"""Copies of a large body in memory while it is parsed: its own, the parser's, and the texts."""

PARSE_INLINE_BYTES = 1 << 16
"""Largest body that is parsed in the event loop: at most a millisecond."""

PARSE_AT_ONCE_BYTES = 1 << 20
"""Largest body that is parsed in one call, which holds the interpreter lock: two milliseconds."""

MAX_LENGTH_DIGITS = 18
"""Longest Content-Length and timeout that are converted to a number."""

WATCH_DELAY = 0.02
"""Seconds before a request's connection is watched for a disconnect. Most requests are answered
sooner, and a watching task costs as much as all other work for a small request."""


class RequestLimits(NamedTuple):
    """Limits of one embedding request.

    Attributes:
        body_bytes: maximum size of a body.
        body_seconds: time in which a body must arrive.
        values: maximum number of JSON values and keys in a body, without token ids.
        ids: maximum number of token ids; 0 if they are not accepted.
        texts: maximum number of inputs.
        seconds: maximum time for a request after its body was read.
        token_ids: accept token ids as inputs.
    """

    body_bytes: int
    body_seconds: float
    values: int
    ids: int
    texts: int
    seconds: float
    token_ids: bool


def header_dict(scope: Scope) -> dict[str, str]:
    """Return the headers by lower-case name; the first value of a repeated header."""
    pairs = scope["headers"]
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(pairs)}


def request_timeout(headers: Mapping[str, str], limit: float) -> float:
    """Return the seconds that a request may take: the client's limit, at most the server's.

    Raises:
        InvalidRequestError: the client's header is not a positive number of milliseconds.
    """
    value = headers.get(TIMEOUT_HEADER)
    if value is None:
        return limit
    if not value.isdecimal() or not value.strip("0"):
        raise InvalidRequestError(
            f"The header {TIMEOUT_HEADER} must be a whole number of milliseconds above 0; the "
            f"service's own limit is {1000 * limit:.0f}.",
            code="invalid_timeout",
            param=TIMEOUT_HEADER,
        )
    if len(value.lstrip("0")) > MAX_LENGTH_DIGITS:
        return limit
    return min(limit, int(value) / 1000)


def request_priority(headers: Mapping[str, str], key: Key | None) -> Priority:
    """Return the priority class that a request names, or else that of its key.

    Raises:
        InvalidRequestError: there is no such class.
    """
    value = headers.get(PRIORITY_HEADER)
    if value is None:
        return Priority.INTERACTIVE if key is None else key.priority
    try:
        return Priority(value)
    except ValueError:
        raise InvalidRequestError(
            f"The header {PRIORITY_HEADER} must be one of {', '.join(Priority)}.",
            code="invalid_priority",
            param=PRIORITY_HEADER,
        ) from None


async def read_json(
    receive: Receive,
    headers: Mapping[str, str],
    limits: RequestLimits,
    memory: MemoryHold | None,
    read: Callable[[Any], T],
    *,
    large_work: LargeWork,
) -> T:
    """Read a JSON body and interpret it; in a thread if that would block the event loop.

    Args:
        receive: ASGI receive of the request; nothing of the body has been read yet.
        headers: request headers.
        limits: limits of the body.
        memory: holds the body, and what parsing it takes; None if it is not counted.
        read: interprets the parsed body.
        large_work: runs what would block the event loop.

    Returns:
        What ``read`` returns.

    Raises:
        UnsupportedMediaTypeError: declared as something other than JSON, or as compressed.
        SlowRequestError: not complete in time; the rest is not read.
        PayloadTooLargeError: over the limit; the rest is not read.
        ClientClosedError: the client disconnected while sending.
        QueueFullError: all bodies together are too large.
        InvalidRequestError: see ``parse``; or raised by ``read``.
    """
    declared = headers.get("content-type", "application/json")
    media_type = declared.partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedMediaTypeError(
            f"The body is declared as {media_type[:80]!r}: send JSON with the header Content-Type: "
            "application/json."
        )
    chunks, size = await read_chunks(receive, headers, limits, memory)
    if size <= PARSE_INLINE_BYTES:
        return read(parse(joined(chunks), limits.values, limits.ids))
    if memory is not None:
        memory.resize(PARSE_COPIES * size)
    return await large_work.run(
        size, lambda: read(parse(joined(chunks), limits.values, limits.ids))
    )


async def read_chunks(
    receive: Receive,
    headers: Mapping[str, str],
    limits: RequestLimits,
    memory: MemoryHold | None,
) -> tuple[list[bytes], int]:
    """Read a body.

    Args:
        receive: ASGI receive of the request; nothing of the body has been read yet.
        headers: request headers.
        limits: a body over ``body_bytes`` is refused by its Content-Length, or as soon as more
            has arrived.
        memory: holds what has arrived; None if it is not counted.

    Returns:
        The body's chunks, for ``joined``, and its size.

    Raises:
        UnsupportedMediaTypeError: declared as compressed.
        SlowRequestError: not complete in time; the rest is not read.
        PayloadTooLargeError: over the limit; the rest is not read.
        ClientClosedError: the client disconnected while sending.
        QueueFullError: all bodies together are too large.
    """
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", ""):
        raise UnsupportedMediaTypeError(
            f"The body is declared as compressed ({encoding[:80]!r}): send it uncompressed, "
            "without the header Content-Encoding.",
            code="unsupported_content_encoding",
        )
    limit = limits.body_bytes
    length = headers.get("content-length", "0")
    if length.isdecimal() and (len(length) > MAX_LENGTH_DIGITS or int(length) > limit):
        raise _too_large(limit)
    with CancelScope(lambda: _too_slow(limits.body_seconds), limits.body_seconds):
        return await _receive_all(receive, limit, memory)


def joined(chunks: list[bytes]) -> bytes:
    """Return a body, the only chunk from now on; joining 32 MB takes some milliseconds."""
    if len(chunks) != 1:
        chunks[:] = [b"".join(chunks)]
    return chunks[0]


async def _receive_all(
    receive: Receive, limit: int, memory: MemoryHold | None
) -> tuple[list[bytes], int]:
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientClosedError("The client disconnected while sending its body.")
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        if memory is not None:
            memory.resize(size)
        chunks.append(chunk)
        if not message.get("more_body", False):
            break
    if len(chunks) > 1 and memory is not None:
        memory.resize(2 * size)  # while the chunks are joined
    return chunks, size


async def cancel_on_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Await work, and cancel it if the client disconnects.

    Args:
        receive: ASGI receive of the request, whose body has been read.
        work: what the client waits for.

    Raises:
        ClientClosedError: the client disconnected first.
    """
    scope = CancelScope(_client_closed)
    watcher: asyncio.Task[None] | None = None

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        scope.cancel()

    def start_watching() -> None:
        nonlocal watcher
        watcher = asyncio.create_task(watch())

    timer = asyncio.get_running_loop().call_later(WATCH_DELAY, start_watching)
    with scope:
        try:
            return await work
        finally:
            timer.cancel()
            if watcher is not None:
                watcher.cancel()


def parse(body: bytes, max_values: int, max_numbers: int = 0) -> Any:
    """Parse JSON after counting its values: parsed values take far more memory than their text.

    Args:
        body: any bytes; a large one is parsed in pieces.
        max_values: maximum number of values and keys.
        max_numbers: so many more values may be numbers.

    Raises:
        InvalidRequestError: not JSON (NaN, lone surrogates and nesting beyond 1,024 levels
            included), or more values than the limit.
    """
    try:
        if len(body) > PARSE_AT_ONCE_BYTES:
            return parse_in_pieces(body, max_values, max_numbers)
        limit = max_values + max_numbers
        if len(body) <= limit or not has_more_values(body, limit):
            return orjson.loads(body)
    except (orjson.JSONDecodeError, InvalidJsonError) as error:
        raise InvalidRequestError(
            f"The body is not valid JSON: {error}.", code="invalid_json"
        ) from None
    except TooManyValuesError:
        pass
    raise InvalidRequestError(
        f"The body has more than {max_values} JSON values: send fewer texts at once.",
        code="too_many_values",
    )


def _client_closed() -> ClientClosedError:
    return ClientClosedError("The client disconnected before its answer.")


def _too_slow(seconds: float) -> SlowRequestError:
    return SlowRequestError(
        f"The body did not arrive within {seconds:g} seconds: send fewer texts at once."
    )


def _too_large(limit: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(
        f"The body is larger than {limit} bytes: send fewer texts at once, or shorter ones."
    )
