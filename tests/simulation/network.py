"""Engine servers and the connections to them, in memory and in virtual time.

The client side is aiohttp's own, above ``Connector``: its pool of connections, its parser, and what
it does when a call is cancelled.
"""

from __future__ import annotations

import asyncio
import enum
import hashlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import aiohttp
import numpy as np
import orjson
from aiohttp.connector import HIGH_LEVEL_SCHEMA_SET
from numpy.typing import NDArray

from simulation.loop import SimulatedLoop
from taskvec.checkpoint.backbone import ModelCard
from taskvec.engines.base import TokenIds
from taskvec.engines.wire import ADAPTERS_HEADER, WIRE_PATH, unpack_texts

CARD = ModelCard(
    name="simulated",
    revision=None,
    architecture="qwen3",
    dimension=8,
    max_tokens=2048,
    vocabulary=30_000,
    matryoshka=(),
    adapters=("retrieval", "clustering", "classification"),
    parameters=1,
)

Vectors = NDArray[np.float32]


def right_vector(ids: TokenIds, adapter: str | None) -> Vectors:
    """Return the vector of a text, of length 1: another one for other ids or another adapter."""
    digest = hashlib.blake2b(ids.tobytes(), digest_size=32, key=(adapter or "").encode()).digest()
    values = np.frombuffer(digest, dtype="<i4").astype(np.float32)
    return values / np.float32(np.linalg.norm(values))


class Fault(enum.Enum):
    """What a server does wrong to some of its calls, so that each of them can be told."""

    GARBLED = "garbled"
    FAILING = "failing"
    BUSY = "busy"
    RESETTING = "resetting"


class Network:
    """Knows the servers by address.

    Attributes:
        open: connections that are open, from the client's side.
    """

    def __init__(self, loop: SimulatedLoop, servers: Sequence[Server]) -> None:
        """Connect to servers."""
        self.loop = loop
        self.servers = {server.address: server for server in servers}
        self.open = 0

    async def connect(self, address: str, protocol: aiohttp.client_proto.ResponseHandler) -> None:
        """Open a connection.

        Raises:
            OSError: the server does not listen.
        """
        server = self.servers[address]
        await asyncio.sleep(self.loop.random.choice((0.0, 1e-4, 2e-3)))
        if server.vanished:
            await asyncio.sleep(130)  # as long as Linux tries
        if not server.up:
            raise ConnectionRefusedError(111, "Connection refused")
        protocol.connection_made(Connection(self, server, protocol))


class Connector(aiohttp.BaseConnector):
    """aiohttp's pool of connections, over a simulated network."""

    allowed_protocol_schema_set = HIGH_LEVEL_SCHEMA_SET

    def __init__(self, network: Network, keepalive_timeout: float) -> None:
        """Have as many connections as are asked for."""
        super().__init__(limit=0, keepalive_timeout=keepalive_timeout, loop=network.loop)
        self._network = network

    async def _create_connection(self, req: Any, traces: Any, timeout: Any) -> Any:  # noqa: ARG002, ASYNC109
        protocol = self._factory()
        try:
            await self._network.connect(req.url.host, protocol)
        except OSError as error:
            raise aiohttp.ClientConnectorError(req.connection_key, error) from error
        return protocol


class Connection(asyncio.Transport):
    """The client's end of a connection; the server's end is ``received`` and ``answer``."""

    def __init__(self, network: Network, server: Server, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self._network = network
        self._loop = network.loop
        self._server = server
        self._protocol = protocol
        self._closing = False
        self._sent = bytearray()
        self._arrives_at = 0.0
        self._under_way: deque[Callable[[], None]] = deque()
        self.open = True
        network.open += 1
        server.connections[self] = None

    def write(self, data: Any) -> None:
        if not self._closing:
            self._later(self._received, bytes(data))

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._loop.call_soon(self._lose, None)
            self._later(self._closed_by_client)

    abort = close

    def get_extra_info(self, name: str, default: Any = None) -> Any:  # noqa: ARG002
        return default

    def pause_reading(self) -> None:
        """Do nothing: answers are small."""

    def resume_reading(self) -> None:
        """Do nothing: answers are small."""

    def answer(self, status: int, body: bytes, *, cut: bool = False) -> None:
        """Send an answer, in pieces; ``cut`` sends a part and ends the connection."""
        head = f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\n"
        head += "retry-after: 1\r\n\r\n" if status == 429 else "\r\n"
        data = head.encode() + body
        pieces = sorted(
            self._loop.random.sample(range(1, len(data)), self._loop.random.choice((0, 1, 2)))
        )
        for start, stop in zip([0, *pieces], [*pieces, len(data)], strict=True):
            if cut and stop == len(data):
                break
            self._later(self._deliver, data[start:stop])
        if cut:
            self.reset()

    def reset(self) -> None:
        """End the connection from the server's side, as the kernel does for a process that died."""
        if self.open:
            self.open = False
            self._server.connections.pop(self, None)
            self._later(self._reset_client)

    def _later(self, callback: Any, *args: Any) -> None:
        delay = self._loop.random.choice((0.0, 1e-4, 1e-3, 1e-2))
        self._arrives_at = max(self._arrives_at + 1e-9, self._loop.time() + delay)
        self._under_way.append(partial(callback, *args))
        self._loop.event(self._arrives_at - self._loop.time(), self._arrive)

    def _arrive(self) -> None:
        """Let the next thing arrive: events of one iteration are shuffled, these are not."""
        self._under_way.popleft()()

    def _deliver(self, data: bytes) -> None:
        if not self._closing:
            self._protocol.data_received(data)

    def _reset_client(self) -> None:
        if not self._closing:
            self._closing = True
            self._lose(ConnectionResetError(104, "Connection reset by peer"))

    def _lose(self, error: Exception | None) -> None:
        self._network.open -= 1
        self._protocol.connection_lost(error)

    def _closed_by_client(self) -> None:
        self.open = False
        self._server.connections.pop(self, None)

    def _received(self, data: bytes) -> None:
        self._sent += data
        head, found, body = bytes(self._sent).partition(b"\r\n\r\n")
        if not found:
            return
        request, *lines = head.decode().split("\r\n")
        headers = {n.lower(): v for n, _, v in (line.partition(": ") for line in lines)}
        if len(body) < int(headers.get("content-length", "0")):
            return
        self._sent.clear()
        self._server.receive(self, request.split()[1], headers, body)


class Server:
    """An engine server, taskvec's or vLLM's, which answers calls one after another.

    Attributes:
        address: its host in URLs.
        up: whether its process runs.
        vanished: whether its host does not answer at all.
        life: number of crashes so far.
        faults: what it does wrong with which probability.
        wrong: what it computes instead of the right vectors, which only its checks can find:
            another adapter's (``swapped``), or always the same one (``constant``); empty if it
            computes the right ones.
        connections: open ones, in the order in which they were made.
    """

    def __init__(self, loop: SimulatedLoop, index: int, *, vllm: bool) -> None:
        """Be up, without a fault."""
        self.index = index
        self.address = f"10.0.0.{index + 1}"
        self.url = f"http://{self.address}:80"
        self.up = True
        self.vanished = False
        self.faults: dict[Fault, float] = {}
        self.wrong = ""
        self.wrong_since = 0.0
        self.connections: dict[Connection, None] = {}
        self.rate = loop.random.choice((20_000.0, 100_000.0))
        self._loop = loop
        self._vllm = vllm
        self.life = 0
        self._busy_until = 0.0
        self._frozen = False
        self._waiting: list[Any] = []

    def crash(self) -> None:
        """Lose everything, as after SIGKILL."""
        self.up, self._frozen = False, False
        self.life += 1
        self._waiting.clear()
        for connection in list(self.connections):
            connection.reset()

    def start(self, wrong: str = "") -> None:
        """Start again, perhaps with another model."""
        if not self.up:
            self.up, self._busy_until, self.wrong = True, 0.0, wrong

    def freeze(self) -> None:
        """Stop, as after SIGSTOP: connections stay open, and new ones are taken by the kernel."""
        self._frozen = True

    def thaw(self) -> None:
        """Go on."""
        self._frozen = self.vanished = False
        waiting, self._waiting = self._waiting, []
        for work in waiting:
            work()

    def receive(
        self, connection: Connection, path: str, headers: Mapping[str, str], body: bytes
    ) -> None:
        """Take a request."""
        self._when_running(self.life, lambda: self._take(connection, path, headers, body))

    def _when_running(self, life: int, work: Any) -> None:
        if life != self.life or not self.up:
            return
        if self._frozen or self.vanished:
            self._waiting.append(lambda: self._when_running(life, work))
        else:
            work()

    def _take(
        self, connection: Connection, path: str, headers: Mapping[str, str], body: bytes
    ) -> None:
        if path == "/v1/models":
            self._after(1e-3, lambda: connection.answer(200, orjson.dumps(self._listing())))
            return
        texts: list[TokenIds]
        adapters: list[str | None]
        if path == WIRE_PATH:
            texts, adapters = unpack_texts(headers[ADAPTERS_HEADER], body)
            timeout = int(headers["x-request-timeout-ms"]) / 1000
        else:
            given = orjson.loads(body)
            texts = [np.array(ids, dtype=np.int32) for ids in given["input"]]
            adapters = [None if given["model"] == "base" else given["model"]] * len(texts)
            timeout = 1e9
        now = self._loop.time()
        self._busy_until = max(now, self._busy_until) + sum(map(len, texts)) / self.rate + 1e-3
        if self._busy_until > now + timeout:
            self._after(timeout, lambda: connection.answer(504, b"too late"))
            return
        self._after(self._busy_until - now, lambda: self._answer(connection, texts, adapters))

    def _after(self, seconds: float, work: Any) -> None:
        self._loop.event(seconds, self._when_running, self.life, work)

    def _listing(self) -> Any:
        if self._vllm:
            root = {"id": "base", "owned_by": "vllm", "max_model_len": CARD.max_tokens}
            adapters = [{"id": n, "owned_by": "vllm", "parent": "base"} for n in CARD.adapters]
            return {"data": [root, *adapters]}
        entry = {"id": "m", "tasks": CARD.adapters, "max_tokens": CARD.max_tokens}
        return {"data": [{**entry, "token_input": True}]}

    def _answer(
        self, connection: Connection, texts: Sequence[TokenIds], adapters: Sequence[str | None]
    ) -> None:
        if not connection.open:
            return
        random = self._loop.random
        fault = next((f for f, p in self.faults.items() if random.random() < p), None)
        if fault is Fault.FAILING:
            connection.answer(500, b"no")
        elif fault is Fault.BUSY:
            connection.answer(429, b"full")
        elif fault is Fault.RESETTING:
            connection.reset()
        else:
            vectors = np.stack(
                [self.vector(*pair) for pair in zip(texts, adapters, strict=True)]
            ).astype("<f4")
            self._spoil(connection, vectors, fault)

    def _spoil(self, connection: Connection, vectors: Vectors, fault: Fault | None) -> None:
        random = self._loop.random
        content = vectors.tobytes()
        cut = False
        if fault is Fault.GARBLED:
            kind = random.choice(("short", "long", "nan", "zeros", "cut"))
            if kind == "short":
                content = content[:-4]
            elif kind == "long":
                content += content
            elif kind == "nan":
                vectors[random.randrange(len(vectors)), 3] = np.nan
                content = vectors.tobytes()
            elif kind == "zeros":
                vectors[random.randrange(len(vectors))] = 0
                content = vectors.tobytes()
            else:
                cut = True
        connection.answer(200, content, cut=cut)

    def vector(self, ids: TokenIds, adapter: str | None) -> Vectors:
        """Return the vector that this server computes; its length shows which one was wrong."""
        if not self.wrong:
            return right_vector(ids, adapter)
        if self.wrong == "constant":
            unit = right_vector(np.zeros(1, dtype=np.int32), None)
        else:
            names = CARD.adapters
            other = names[(names.index(adapter) + 1) % len(names)] if adapter in names else names[0]
            unit = right_vector(ids, other)
        return unit * np.float32(2 + self.index)
