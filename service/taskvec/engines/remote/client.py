"""One exchange with a server, with a limit on time and size, and one name for each way to fail."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from http import HTTPStatus
from typing import NamedTuple

import aiohttp

from taskvec.engines.base import Outcome as Outcome  # noqa: PLC0414 - exported from here
from taskvec.telemetry.tracing import current_span

_LONGEST_COMPLAINT, _SHOWN = 4096, 300
_KEY_WANTED = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)


class Call(NamedTuple):
    """What is posted."""

    path: str
    body: bytes
    headers: Mapping[str, str]


class Connection:
    """The way to one server."""

    def __init__(self, session: aiohttp.ClientSession, base: str) -> None:
        """Nothing is opened yet.

        Args:
            session: whose connections are used.
            base: the server's URL, without a trailing slash.
        """
        self._session = session
        self._base = base

    async def get(self, path: str, most_bytes: int, seconds: float) -> bytes:
        """The body of the answer to a GET; see ``post``."""
        return await self._exchange("GET", Call(path, b"", {}), most_bytes, seconds)

    async def post(self, call: Call, most_bytes: int, seconds: float) -> bytes:
        """The body of a 200, or one byte more than ``most_bytes`` of it.

        Raises:
            ServerFault: no connection, another status, or no whole answer in time.
        """
        span = current_span.get()
        if span is None:
            return await self._exchange("POST", call, most_bytes, seconds)
        with span.call(self._base + call.path) as headers:
            traced = call._replace(headers={**call.headers, **headers})
            return await self._exchange("POST", traced, most_bytes, seconds)

    async def _exchange(self, method: str, call: Call, most_bytes: int, seconds: float) -> bytes:
        url = self._base + call.path
        try:
            async with (
                asyncio.timeout(seconds),
                self._session.request(
                    method, url, data=call.body or None, headers=call.headers, allow_redirects=False
                ) as response,
            ):
                if response.status == HTTPStatus.OK:
                    return await _read(response.content, most_bytes)
                complaint = await _read(response.content, _LONGEST_COMPLAINT)
                said = self._without_key(complaint.decode(errors="replace"))[:_SHOWN]
        except TimeoutError:
            raise ServerFault(Outcome.TIMEOUT, f"no answer within {seconds:.3g} seconds") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise ServerFault(Outcome.UNREACHABLE, f"{type(error).__name__}: {error}") from None
        busy = response.status == HTTPStatus.TOO_MANY_REQUESTS
        hint = " (see TASKVEC_ENGINE_API_KEY)" if response.status in _KEY_WANTED else ""
        raise ServerFault(
            Outcome.BUSY if busy else Outcome.ERROR,
            f"status {response.status}{hint}: {said}",
            _seconds(response.headers.get("retry-after", "")),
        )

    def _without_key(self, complaint: str) -> str:
        """Some servers repeat the key that they refuse."""
        key = self._session.headers.get("authorization", "").removeprefix("Bearer ")
        return complaint.replace(key, "***") if key else complaint


def _seconds(retry_after: str) -> float:
    """A Retry-After header's seconds; one where it has none that we read."""
    return float(retry_after) if retry_after.isdecimal() and len(retry_after) < 6 else 1.0


async def _read(stream: aiohttp.StreamReader, most_bytes: int) -> bytes:
    parts, size = [], 0
    async for part in stream.iter_any():
        parts.append(part)
        size += len(part)
        if size > most_bytes:
            break
    return b"".join(parts)[: most_bytes + 1]


OPENS_AT_ONCE = frozenset({Outcome.UNREACHABLE, Outcome.TIMEOUT, Outcome.WRONG})
"""After one of these a server gets no further call until it has proven itself again."""


class ServerFault(Exception):  # noqa: N818 - no error of ours: another server may do better
    """One call to one server failed.

    Attributes:
        outcome: how.
        message: what happened, after the server's name and a colon.
        retry_after: seconds after which a busy server wants to be asked again.
    """

    def __init__(self, outcome: Outcome, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.outcome = outcome
        self.message = message
        self.retry_after = retry_after
