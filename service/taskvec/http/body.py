"""Reading a JSON body within its limit, and noticing when the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar, cast

import orjson
from starlette.requests import Request
from starlette.types import Receive

from taskvec.errors import (
    ClientClosedError,
    InvalidRequestError,
    PayloadTooLargeError,
    SlowBodyError,
    UnsupportedMediaTypeError,
)

T = TypeVar("T")

MOST_DIGITS = 18
"""Of a Content-Length worth reading as a number."""

WATCH_AFTER = 0.02
"""Seconds before a request's connection is watched: most are answered sooner, and a watching task
costs as much as everything else that is done for a small request."""


async def read_json(request: Request, limit: int, seconds: float) -> Any:
    """The parsed body.

    Args:
        request: not yet read.
        limit: most bytes; a longer body is refused by its header, or as soon as it passes it.
        seconds: how long the body may take to arrive.

    Raises:
        UnsupportedMediaTypeError: declared as something other than JSON.
        SlowBodyError: not there in time; the rest is not read.
        PayloadTooLargeError: over the limit; the rest is not read.
        ClientClosedError: the client left while sending.
        InvalidRequestError: not JSON: also NaN, lone surrogates and nesting beyond 1,024 levels.
    """
    declared = request.headers.get("content-type", "application/json")
    kind = declared.partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise UnsupportedMediaTypeError(
            f"The body is declared as {kind[:80]!r}: send JSON with the header Content-Type: "
            "application/json."
        )
    try:
        return orjson.loads(await read_bytes(request, limit, seconds))
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(
            f"The body is not valid JSON: {error}.", code="invalid_json"
        ) from None


async def read_bytes(request: Request, limit: int, seconds: float) -> bytes:
    """The body as it came.

    Args:
        request: not yet read.
        limit: most bytes; a longer body is refused by its header, or as soon as it passes it.
        seconds: how long the body may take to arrive.

    Raises:
        SlowBodyError: not there in time; the rest is not read.
        PayloadTooLargeError: over the limit; the rest is not read.
        ClientClosedError: the client left while sending.
    """
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and (len(length) > MOST_DIGITS or int(length) > limit):
        raise _too_large(limit)
    try:
        async with asyncio.timeout(seconds):
            return await _read(request.receive, limit)
    except TimeoutError:
        raise SlowBodyError(
            f"The body did not arrive within {seconds:g} seconds: send fewer texts at once."
        ) from None


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


async def unless_client_leaves(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The work's result; the work is cancelled once the client is gone.

    Raises:
        ClientClosedError: the client left first.
    """
    task = cast("asyncio.Task[Any]", asyncio.current_task())
    left = False
    watcher: asyncio.Task[None] | None = None

    async def watch() -> None:
        nonlocal left
        while (await receive())["type"] != "http.disconnect":
            pass
        left = True
        task.cancel()

    def start_watching() -> None:
        nonlocal watcher
        watcher = asyncio.create_task(watch())

    timer = asyncio.get_running_loop().call_later(WATCH_AFTER, start_watching)
    try:
        return await work
    except asyncio.CancelledError:
        if left and task.uncancel() == 0:
            raise ClientClosedError("The client left before its answer.") from None
        raise
    finally:
        timer.cancel()
        if watcher is not None:
            watcher.cancel()


def _too_large(limit: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(
        f"The body is larger than {limit} bytes: send fewer texts at once, or shorter ones."
    )
