"""What API keys mean on a route: who may ask, and how much."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, get_args

from fastapi.openapi.models import HTTPBearer
from fastapi.security.base import SecurityBase
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from taskvec.api.context import RequestContext, context_of
from taskvec.auth.keys import Key, WatchedKeys
from taskvec.auth.rate_limit import Kind, LimitReachedError, RateLimiter, Window
from taskvec.errors import AuthenticationError, RateLimitError

Endpoint = Callable[[Request], Awaitable[Response]]

BEARER, API_KEY = "bearer", "api-key"
"""The two ways to send a key, as the OpenAPI document names them."""

KEY_HEADERS = (b"api-key", b"x-api-key")
HEADER_NAMES = {
    kind: [f"x-ratelimit-{what}-{kind}".encode() for what in ("limit", "remaining", "reset")]
    for kind in get_args(Kind)
}
TRY_AGAIN = 1.0
"""Seconds after which a request beyond a key's concurrency may be sent again."""


class Gate(SecurityBase):
    """A dependency of routes: only a known key passes, and is noted in the request's record."""

    def __init__(self, keys: WatchedKeys) -> None:
        self._keys = keys
        self.scheme_name = BEARER
        self.model = HTTPBearer(description="Authorization: Bearer and the API key.")

    def key_of(self, scope: Scope) -> Key | None:
        """The key that a request has; None where it has none, or an unknown one."""
        secret = _secret(scope["headers"])
        return None if secret is None else self._keys.find(secret)

    async def __call__(self, request: Request) -> None:
        """Let the request pass; see ``passed``."""
        context_of(request.scope).key = self.passed(request)

    def passed(self, request: Request) -> Key:
        """The request's key.

        Raises:
            AuthenticationError: it has none, or an unknown one.
        """
        key = self.key_of(request.scope)
        if key is None:
            if _secret(request.scope["headers"]) is None:
                raise AuthenticationError(
                    "This server asks for an API key: send it as Authorization: Bearer KEY, or in "
                    "the header api-key.",
                    code="missing_api_key",
                )
            raise AuthenticationError("The API key is not known here: check it, or ask for one.")
        return key


class Access:
    """The gate, and the limits of those who passed it."""

    def __init__(self, keys: WatchedKeys, limiter: RateLimiter) -> None:
        self.gate = Gate(keys)
        self._keys = keys
        self._limiter = limiter
        self._running: Counter[str] = Counter()

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Follow the keys' file meanwhile."""
        watching = asyncio.create_task(self._keys.watch())
        try:
            yield
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
            await self._limiter.close()

    def limited(self, endpoint: Endpoint) -> Endpoint:
        """The endpoint, behind the gate and within its key's limits.

        The gate is passed here: as a dependency it would cost ten times as much.
        """

        async def within_limits(request: Request) -> Response:
            record = context_of(request.scope)
            key = record.key = self.gate.passed(request)
            if not any(key.limits):
                return await endpoint(request)
            take = partial(self._take, record, key.name)
            self._enter(key)
            try:
                if key.limits.requests_per_minute:
                    await take("requests", key.limits.requests_per_minute, 1)
                if key.limits.tokens_per_minute:
                    record.charge = partial(take, "tokens", key.limits.tokens_per_minute)
                return await endpoint(request)
            finally:
                self._running[key.name] -= 1
                record.charge = None  # it holds the record: a cycle, left to the garbage collector

        return within_limits

    def _enter(self, key: Key) -> None:
        if key.limits.concurrency and self._running[key.name] >= key.limits.concurrency:
            raise RateLimitError(
                f"The API key {key.name} may have {key.limits.concurrency} requests at a time: "
                "send it again when one was answered.",
                retry_after=TRY_AGAIN,
            )
        self._running[key.name] += 1

    async def _take(
        self, record: RequestContext, name: str, kind: Kind, limit: int, amount: int
    ) -> None:
        try:
            window = await self._limiter.take(name, kind, limit, amount)
        except LimitReachedError as reached:
            record.headers += _headers(kind, reached.window)
            raise
        if window is not None:
            record.headers += _headers(kind, window)


def with_header_scheme(document: dict[str, Any]) -> dict[str, Any]:
    """An OpenAPI document that, wherever it has a bearer token, has the header api-key, too."""
    schemes = document.get("components", {}).get("securitySchemes")
    if schemes is None:
        return document
    schemes[API_KEY] = {
        "type": "apiKey",
        "in": "header",
        "name": "api-key",
        "description": "The API key; x-api-key is taken, too.",
    }
    for path in document["paths"].values():
        for operation in path.values():
            if "security" in operation:
                operation["security"].append({API_KEY: []})
    return document


def _secret(headers: list[tuple[bytes, bytes]]) -> bytes | None:
    """The key that a request sent; a bearer token goes before the other headers."""
    secret = None
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return value[7:].strip()
        if name in KEY_HEADERS and secret is None:
            secret = value
    return secret


def _headers(kind: Kind, window: Window) -> Iterator[tuple[bytes, bytes]]:
    """OpenAI's names."""
    left = b"%d" % window.limit, b"%d" % window.remaining, b"%.2fs" % window.reset
    return zip(HEADER_NAMES[kind], left, strict=True)
