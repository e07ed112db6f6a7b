"""Reading requests: body within its limits, headers, JSON, client disconnects."""

from __future__ import annotations

import asyncio
import re
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

_WEIGHT = re.compile(r"0(\.\d{0,3})?|1(\.0{0,3})?")

TIMEOUT_HEADER = "x-request-timeout-ms"
PRIORITY_HEADER = "x-priority"

PARSE_COPIES = 3
"""Copies of a large body in memory while it is parsed: its own, the parser's, and the texts."""

PARSE_INLINE_BYTES = 1 << 16
"""Largest body that is parsed in the event loop: at most a millisecond."""

PARSE_AT_ONCE_BYTES = 1 << 20
"""Largest body that is parsed in one call, which holds the interpreter lock: two milliseconds."""

LIST_HEADERS = (b"accept", b"content-encoding")
"""Headers whose values are lists: a client may send them in several lines, which count together."""

ASCII_SUPERSETS = frozenset({"utf-8", "utf8", "us-ascii", "ascii"})
"""Declared character sets of a body that is read as UTF-8."""

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
    """Return the headers by lower-case name: of a repeated header all values if it is a list.

    Of another one that is repeated, the first value.
    """
    pairs = scope["headers"]
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(pairs)}
    if len(headers) < len(pairs):
        for listed in LIST_HEADERS:
            values = [value.decode("latin-1") for name, value in pairs if name == listed]
            if values:
                headers[listed.decode("latin-1")] = ", ".join(values)
    return headers


def prefers(headers: Mapping[str, str], wanted: str, other: str) -> bool:
    """Return whether Accept names a media type, and gives it at least the weight of another one.

    Args:
        headers: of the request.
        wanted: must be named itself; a wildcard does not count, nor does a weight of 0.
        other: weighted by its own name, or else by a wildcard (RFC 9110, section 12.5.1).
    """
    accept = headers.get("accept", "").lower()
    if wanted not in accept:
        return False
    weights: dict[str, float] = {}
    for part in accept.split(","):
        media_type, *parameters = map(str.strip, part.split(";"))
        weight = next((p[2:] for p in parameters if p.startswith("q=")), "1")
        weights[media_type] = float(weight) if _WEIGHT.fullmatch(weight) else 1.0
    own = weights.get(wanted, 0.0)
    ranges = (other, f"{other.partition('/')[0]}/*", "*/*")
    return own > 0 and own >= next((weights[name] for name in ranges if name in weights), 0.0)


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
        UnsupportedMediaTypeError: declared as something other than JSON in UTF-8, or as compressed.
        SlowRequestError: not complete in time; the rest is not read.
        PayloadTooLargeError: over the limit; the rest is not read.
        ClientClosedError: the client disconnected while sending.
        QueueFullError: all bodies together are too large.
        InvalidRequestError: see ``parse``; or raised by ``read``.
    """
    declared = headers.get("content-type", "application/json")
    media_type, *parameters = (part.strip().lower() for part in declared.split(";"))
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedMediaTypeError(
            f"The body is declared as {media_type[:80]!r}: send JSON with the header Content-Type: "
            "application/json."
        )
    chunks, size = await read_chunks(receive, headers, limits, memory)
    charset = next((p[8:].strip('"') for p in parameters if p.startswith("charset=")), "utf-8")

    def read_body() -> T:
        body = joined(chunks)
        if charset not in ASCII_SUPERSETS and not body.isascii():
            # A client may name its own default for a body that is the same in all of them.
            raise UnsupportedMediaTypeError(
                f"The body is declared to be in {charset[:80]!r}: send JSON in UTF-8.",
                code="unsupported_charset",
            )
        return read(parse(body, limits.values, limits.ids))

    if size <= PARSE_INLINE_BYTES:
        return read_body()
    if memory is not None:
        memory.resize(PARSE_COPIES * size)
    return await large_work.run(size, read_body)


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
    if any(part.strip() not in ("identity", "") for part in encoding.split(",")):
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
