"""HTTP client for one prepared request, which takes little CPU time from the server.

aiohttp takes 500 microseconds per request on a busy machine, a tenth of two cores at the rates of
the overload benchmark; this client takes a fifth of that.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple


class Answer(NamedTuple):
    """A response; ``head`` is in lower case."""

    status: int
    head: bytes
    body: bytes


class _Connection(asyncio.Protocol):
    """Keep-alive connection, for one request at a time."""

    def __init__(self) -> None:
        self._received = bytearray()
        self._answer: asyncio.Future[Answer] | None = None
        self._transport: asyncio.Transport | None = None
        self.open = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self.open = False
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionResetError(str(error or "closed")))

    def data_received(self, data: bytes) -> None:
        self._received += data
        end = self._received.find(b"\r\n\r\n")
        if end < 0 or self._answer is None:
            return
        head = bytes(self._received[:end]).lower()
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        if len(self._received) < end + 4 + length:
            return
        body = bytes(self._received[end + 4 : end + 4 + length])
        self._received.clear()
        self._answer.set_result(Answer(int(head[9:12]), head, body))

    async def exchange(self, request: bytes) -> Answer:
        assert self._transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        assert self._transport is not None
        self._transport.close()


class Sender:
    """Sends one prepared request repeatedly; opens one connection per concurrent request."""

    def __init__(self, port: int, body: bytes) -> None:
        """Prepare a POST of a JSON body to /v1/embeddings of a server on this machine."""
        self._port = port
        self._request = (
            b"POST /v1/embeddings HTTP/1.1\r\nhost: 127.0.0.1\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )
        self._idle: list[_Connection] = []

    async def send(self) -> Answer:
        """Send the request and return the response.

        Raises:
            OSError: the connection failed.
        """
        while self._idle and not self._idle[-1].open:
            self._idle.pop()
        if self._idle:
            connection = self._idle.pop()
        else:
            loop = asyncio.get_running_loop()
            _, connection = await loop.create_connection(_Connection, "127.0.0.1", self._port)
        answer = await connection.exchange(self._request)
        if b"connection: close" not in answer.head:
            self._idle.append(connection)
        return answer

    def close(self) -> None:
        """Close the idle connections."""
        for connection in self._idle:
            connection.close()
