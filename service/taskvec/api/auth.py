"""API keys on HTTP requests: authentication, and the limits of each key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from functools import lru_cache, partial
from ipaddress import IPv4Address, ip_address
from typing import Any, TypeVar, get_args
from urllib.parse import parse_qs

from starlette.types import Scope

from taskvec.api.context import RequestContext
from taskvec.auth.keys import Key, WatchedKeys
from taskvec.auth.rate_limit import Kind, LimitReachedError, RateLimiter, Window
from taskvec.errors import AuthenticationError, RateLimitError

T = TypeVar("T")
R = TypeVar("R")

KEY_HEADERS = (b"api-key", b"x-api-key", b"x-goog-api-key")
"""Headers that carry a key, besides Authorization: Bearer."""

RATE_LIMIT_HEADERS = {
    kind: [f"x-ratelimit-{what}-{kind}".encode() for what in ("limit", "remaining", "reset")]
    for kind in get_args(Kind)
}
"""Names of OpenAI's rate limit headers."""

CONCURRENCY_RETRY_SECONDS = 1.0
"""Retry-After of a request beyond its key's concurrency limit."""


class ApiKeyAuth:
    """Finds the API key of a request."""

    security: tuple[dict[str, list[str]], ...] = ({"bearer": []}, {"api-key": []})
    """OpenAPI security requirement: one of the two schemes."""

    schemes: dict[str, Any] = {  # noqa: RUF012 - OpenAPI document, never modified
        "bearer": {
            "type": "http",
            "scheme": "bearer",
            "description": "Authorization: Bearer and the API key.",
        },
        "api-key": {
            "type": "apiKey",
            "in": "header",
            "name": "api-key",
            "description": "The API key; the headers x-api-key and x-goog-api-key work as well.",
        },
    }
    """OpenAPI security schemes."""

    def __init__(self, keys: WatchedKeys) -> None:
        self._keys = keys

    def authenticate(self, scope: Scope, *, in_query: bool = False) -> Key:
        """Return the API key of a request.

        Args:
            scope: ASGI scope of the request.
            in_query: look for a key in the URL as well, under ``key``, where no header has one.

        Raises:
            AuthenticationError: no key, or an unknown one.
        """
        secret = _secret(scope["headers"])
        if secret is None and in_query:
            secret = _secret_in_query(scope["query_string"])
        if secret is None:
            raise AuthenticationError(
                "This server requires an API key: send it as Authorization: Bearer KEY, or in the "
                "header api-key, x-api-key or x-goog-api-key.",
                code="missing_api_key",
            )
        key = self._keys.find(secret)
        if key is None:
            raise AuthenticationError("Unknown API key: check it, or ask the operator for one.")
        return key


class KeyRateLimiter:
    """Enforces the limits of API keys: requests and tokens per minute, concurrent requests."""

    def __init__(self, limiter: RateLimiter) -> None:
        """Count with ``limiter``; concurrency is counted in this process."""
        self._limiter = limiter
        self._running: Counter[str] = Counter()

    async def run(
        self,
        key: Key,
        context: RequestContext,
        handler: Callable[[T], Awaitable[R]],
        request: T,
    ) -> R:
        """Call a handler within the limits of a key.

        Args:
            key: key of the request.
            context: gets the rate limit headers, and the charge for tokens.
            handler: answers the request.
            request: its argument.

        Raises:
            RateLimitError: a limit is reached; states when to retry.
            UnavailableError: the limits cannot be checked, and are configured to fail closed.
        """
        if not any(key.limits):
            return await handler(request)
        take = partial(self._take, context, key.name)
        self._enter(key)
        try:
            if key.limits.requests_per_minute:
                await take("requests", key.limits.requests_per_minute, 1)
            if key.limits.tokens_per_minute:
                context.charge = partial(take, "tokens", key.limits.tokens_per_minute)
            return await handler(request)
        finally:
            self._running[key.name] -= 1
            context.charge = None  # breaks the reference cycle with the context

    def _enter(self, key: Key) -> None:
        if key.limits.concurrency and self._running[key.name] >= key.limits.concurrency:
            raise RateLimitError(
                f"The API key {key.name} has reached its limit of {key.limits.concurrency} "
                "concurrent requests: retry when one has finished.",
                retry_after=CONCURRENCY_RETRY_SECONDS,
            )
        self._running[key.name] += 1

    async def _take(
        self, context: RequestContext, name: str, kind: Kind, limit: int, amount: int
    ) -> None:
        try:
            window = await self._limiter.take(name, kind, limit, amount)
        except LimitReachedError as reached:
            context.headers += _rate_limit_headers(kind, reached.window)
            raise
        context.headers += _rate_limit_headers(kind, window)


def client_name(scope: Scope, key: Key | None) -> str:
    """Return who sent a request: the name of its key, or else its address.

    The address is that of the connection, or the one that a proxy forwards if uvicorn trusts it
    (the setting ``forwarded_allow_ips``; by default only this machine).
    """
    if key is not None:
        return f"key {key.name}"
    client = scope.get("client")
    return _network(client[0]) if client else ""


@lru_cache(maxsize=1024)
def _network(address: str) -> str:
    """Return an IPv4 address, or the network that one customer of a provider has in IPv6."""
    try:
        parsed = ip_address(address)
    except ValueError:  # a forwarded address may be any text
        return "no address"
    if isinstance(parsed, IPv4Address):
        return str(parsed)
    return str(parsed.ipv4_mapped or parsed.exploded[:19])


def _secret_in_query(query: bytes) -> bytes | None:
    """Return the key in a URL; parsed as text, for Python parses only ASCII from bytes."""
    values = parse_qs(query.decode("latin-1"), encoding="latin-1").get("key")
    return values[0].encode("latin-1") if values else None


def _secret(headers: list[tuple[bytes, bytes]]) -> bytes | None:
    """Return the key that a request carries; a bearer token, if not empty, takes precedence."""
    secret = None
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            token = value[7:].strip()
            if token:  # Open WebUI sends an empty one where it has no key
                return token
        if name in KEY_HEADERS and secret is None:
            secret = value
    return secret


def _rate_limit_headers(kind: Kind, window: Window) -> Iterator[tuple[bytes, bytes]]:
    values = b"%d" % window.limit, b"%d" % window.remaining, b"%.2fs" % window.reset
    return zip(RATE_LIMIT_HEADERS[kind], values, strict=True)
