"""A real HTTP server for tests of the pool, with behaviour that a test can change."""

from __future__ import annotations

import asyncio
import atexit
import shutil
import ssl
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from aiohttp import web
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from conftest import free_port
from fakes import hashed_vector
from taskvec.api.errors import error_response
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.checkpoint.golden import golden_vectors
from taskvec.engines.base import EngineResult, TokenBatch, TokenIds
from taskvec.engines.remote.batcher import MAX_CALLS
from taskvec.engines.remote.discovery import Resolve, resolve_host
from taskvec.engines.remote.engine import RemoteEngine, RemoteOptions
from taskvec.engines.wire import ADAPTERS_HEADER, WIRE_PATH, WIRE_TYPE, unpack_texts
from taskvec.errors import TaskvecError
from taskvec.metrics.registry import Metrics

BROKEN = ("truncated", "endless", "silent", "closing")
POISON = 6543
"""A token without a usable vector, as a damaged row of a checkpoint."""

TEXT_CODES = {"nan": "vector_not_finite", "large": "out_of_memory"}
"""What a taskvec server answers to a text with this token, by the behaviour."""

APPLIED = {
    "swapped": {"retrieval": "clustering", "clustering": "retrieval"},
    "merged": {"clustering": "retrieval"},
}
"""The adapters that a server applies for others, by the behaviour."""
Vectors = NDArray[np.float32]


@cache
def golden_cache() -> Path:
    """A cache folder in which golden vectors are kept until the process ends.

    They take a tenth of a second of two processors, for each engine and each peer.
    """
    folder = tempfile.mkdtemp(prefix="golden-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


class Peer:
    """A vLLM or taskvec server: golden vectors for the probes, hashed vectors for other texts.

    Attributes:
        behaviour: honest, swapped, merged, base, missing, wrong dimension, nan, nan text,
            large text, swapped nan text, zeros, huge, equal, constant, twins, refusing, misnaming,
            wrong count, truncated, endless, silent, closing, slow, no list, or a status; applies
            to new calls.
        calls: texts and adapters of each received call, without probes.
        posts: number of received calls, including probes.
        closed: number of calls that the client cancelled.
        keys: the received authorization headers.
        deadlines: the received deadlines in milliseconds.
        priorities: the received classes.
        released: calls other than probes wait until this is set.
        probes_released: probes wait until this is set.
        probe_statuses: the statuses of the next probes, instead of the true responses.
        listing: response of /v1/models instead of the true one, if not None.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        protocol: str = "vllm",
        behaviour: str = "honest",
        max_tokens: int | None = None,
    ) -> None:
        self.card = checkpoint.card
        self.protocol = protocol
        self.behaviour = behaviour
        self.max_tokens = max_tokens or self.card.max_tokens
        self.calls: list[tuple[list[TokenIds], list[str | None]]] = []
        self.posts = 0
        self.closed = 0
        self.keys: list[str | None] = []
        self.deadlines: list[int] = []
        self.priorities: list[str] = []
        self.released = asyncio.Event()
        self.released.set()
        self.probes_released = asyncio.Event()
        self.probes_released.set()
        self.probe_statuses: list[int] = []
        self.listing: Any = None
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._runner: web.AppRunner | None = None
        self._golden = golden_vectors(checkpoint, golden_cache())
        self._probes = {probe.tobytes(): i for i, probe in enumerate(self._golden.probes)}

    async def start(self, *, socket: Path | None = None, tls: ssl.SSLContext | None = None) -> None:
        """Listen on the port of this peer, or on a socket."""
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/embeddings", self._embeddings)
        app.router.add_post(WIRE_PATH, self._wire)
        # A handler is cancelled when the client closes the connection.
        self._runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=0.05
        )
        await self._runner.setup()
        site: web.BaseSite
        if socket is not None:
            self.url = f"unix://{socket}"
            site = web.UnixSite(self._runner, socket)
        else:
            scheme = "http" if tls is None else "https"
            self.url = f"{scheme}://127.0.0.1:{self.port}"
            site = web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=tls)
        await site.start()

    async def stop(self) -> None:
        """Stop listening and close all connections."""
        if self._runner is not None:
            runner, self._runner = self._runner, None
            await runner.cleanup()

    async def _models(self, request: web.Request) -> web.StreamResponse:
        self.keys.append(request.headers.get("authorization"))
        if self.behaviour == "no list":
            return web.Response(text="<html>Welcome to nginx!</html>")
        if self.behaviour in BROKEN or self.behaviour.isdigit():
            return await self._misbehave(request, b"{}")
        if self.listing is not None:
            return web.json_response(self.listing)
        missing = "retrieval" if self.behaviour == "missing" else ""
        names = [name for name in self.card.adapters if name != missing]
        if self.protocol == "vllm":
            root = {"id": "base", "owned_by": "vllm", "max_model_len": self.max_tokens}
            adapters = [{"id": name, "owned_by": "vllm", "parent": "base"} for name in names]
            return web.json_response({"object": "list", "data": [root, *adapters]})
        tasks = [f"{name}.query" if name == "retrieval" else name for name in names]
        entry = {"id": "mini", "tasks": tasks, "max_tokens": self.max_tokens, "token_input": True}
        return web.json_response({"object": "list", "data": [entry]})

    async def _embeddings(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        assert body["encoding_format"] == "bytes_only"
        name = None if body["model"] == "base" else body["model"]
        texts = [np.array(ids, dtype=np.int32) for ids in body["input"]]
        return await self._answer(request, texts, [name] * len(texts))

    async def _wire(self, request: web.Request) -> web.StreamResponse:
        self.deadlines.append(int(request.headers["x-request-timeout-ms"]))
        self.priorities.append(request.headers["x-priority"])
        texts, adapters = unpack_texts(request.headers[ADAPTERS_HEADER], await request.read())
        return await self._answer(request, texts, adapters)

    async def _answer(
        self, request: web.Request, texts: list[TokenIds], adapters: list[str | None]
    ) -> web.StreamResponse:
        self.posts += 1
        try:
            if not all(text.tobytes() in self._probes for text in texts):
                self.calls.append((texts, adapters))
                await self.released.wait()
            else:
                await self.probes_released.wait()
                if self.probe_statuses:
                    status = self.probe_statuses.pop(0)
                    return web.Response(status=status, headers={"retry-after": "0"})
            if self.behaviour == "slow":
                await asyncio.sleep(0.2)
            error = self._text_error(texts)
            if error is not None:
                body = bytes(error_response(error, "a-request").body)
                return web.Response(status=500, body=body, content_type="application/json")
            return await self._misbehave(request, self._vectors(texts, adapters).tobytes())
        except asyncio.CancelledError:
            self.closed += 1
            raise

    def _text_error(self, texts: Sequence[TokenIds]) -> TaskvecError | None:
        """Return the error of a taskvec server for the first text that it cannot embed."""
        kind, _, rest = self.behaviour.removeprefix("swapped ").partition(" ")
        poisoned = [i for i, text in enumerate(texts) if POISON in text]
        if self.behaviour in ("refusing", "misnaming"):
            kind, poisoned = "nan", [0 if self.behaviour == "refusing" else len(texts)]
        elif self.protocol != "taskvec" or rest != "text" or not poisoned:
            return None
        where = f"input[{poisoned[0]}]"
        return TaskvecError(f"Not {where}: sorry.", code=TEXT_CODES[kind], param=where)

    def _vectors(self, texts: Sequence[TokenIds], adapters: Sequence[str | None]) -> Vectors:
        rows = [self._vector(*pair) for pair in zip(texts, adapters, strict=True)]
        if self.behaviour == "nan":
            rows[0][3] = np.nan
        if self.behaviour == "zeros":
            rows[0][:] = 0
        if self.behaviour == "huge":
            rows[0][3] = 3e38
        if self.behaviour == "equal":
            rows = rows[:1] * len(rows)
        if self.behaviour.endswith("nan text"):
            for row, text in zip(rows, texts, strict=True):
                row[3] = np.nan if POISON in text else row[3]
        if self.behaviour == "twins" and texts[0].tobytes() not in self._probes:
            rows = rows[:1] * len(rows)
        if self.behaviour == "constant":
            rows = [np.ones_like(row) for row in rows]
        if self.behaviour == "wrong count":
            rows = rows[:-1]
        vectors = np.stack(rows) if rows else np.empty((0, self.card.dimension), dtype="<f4")
        return vectors[:, :-1] if self.behaviour == "wrong dimension" else vectors

    def _vector(self, text: TokenIds, adapter: str | None) -> Vectors:
        applied = APPLIED.get(self.behaviour.partition(" ")[0], {})
        adapter = applied.get(adapter or "", adapter)
        if self.behaviour == "base":
            adapter = None
        probe = self._probes.get(text.tobytes())
        if probe is not None:
            return 3 * self._golden.vectors[adapter][probe]
        return hashed_vector(text, adapter, self.card.dimension)

    async def _misbehave(self, request: web.Request, content: bytes) -> web.StreamResponse:
        """Respond as the current behaviour demands."""
        assert request.transport is not None
        if self.behaviour.isdigit():
            return web.Response(status=int(self.behaviour), text="no, sorry")
        if self.behaviour == "closing":
            request.transport.abort()
        if self.behaviour == "silent":
            await asyncio.Event().wait()
        if self.behaviour in ("truncated", "endless"):
            answer = web.StreamResponse()
            if self.behaviour == "truncated":
                answer.content_length = len(content) + 2
            await answer.prepare(request)
            await answer.write(content)
            if self.behaviour == "truncated":
                request.transport.abort()
                return answer
            while True:
                await answer.write(b"\0" * 65_536)
        return web.Response(body=content, content_type=WIRE_TYPE)


@asynccontextmanager
async def listening(*peers: Peer, **address: Any) -> AsyncIterator[None]:
    """Let peers listen; the arguments are those of ``Peer.start``."""
    try:
        for peer in peers:
            await peer.start(**address)
        yield
    finally:
        for peer in peers:
            peer.released.set()
            peer.probes_released.set()
            await peer.stop()


@asynccontextmanager
async def pool(
    checkpoint: Checkpoint,
    folder: Path,
    *peers: Peer,
    wait_for: int | None = None,
    resolve: Resolve = resolve_host,
    **options: Any,
) -> AsyncIterator[tuple[RemoteEngine, Metrics]]:
    """Run an engine for peers, after ``wait_for`` of them (default: all) are serving.

    The engine's cache is ``folder``, with the golden vectors that the peers have computed.
    """
    shutil.copytree(golden_cache(), folder, dirs_exist_ok=True)
    metrics = Metrics(checkpoint.card.adapters)
    given = {"urls": tuple(peer.url for peer in peers), "call_seconds": 5.0} | options
    engine = RemoteEngine(checkpoint, folder, RemoteOptions(**given), metrics, resolve)
    wanted = len(peers) if wait_for is None else wait_for
    try:
        await engine.start()
        await until(lambda: serving(metrics) == wanted)
        yield engine, metrics
    finally:
        for peer in peers:
            peer.released.set()
            peer.probes_released.set()
        await engine.stop()


async def until(condition: Callable[[], object], seconds: float = 20) -> None:
    """Wait until a condition is true."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def samples(registry: CollectorRegistry, name: str) -> dict[Mapping[str, str] | Any, float]:
    """Return the values of a metric, by the values of its labels."""
    return {
        tuple(sample.labels.values()): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == name
    }


def serving(metrics: Metrics) -> int:
    """Return the number of serving servers."""
    return int(sum(samples(metrics.registry, "taskvec_engine_server_serving").values()))


def ended(metrics: Metrics, outcome: str, peer: Peer | None = None) -> int:
    """Return the number of calls with an outcome, to one peer or to all."""
    calls = samples(metrics.registry, "taskvec_engine_calls_total")
    return int(
        sum(
            count
            for labels, count in calls.items()
            if outcome in labels and (peer is None or peer.url in labels)
        )
    )


def retried(metrics: Metrics) -> int:
    """Return the number of retries."""
    return int(sum(samples(metrics.registry, "taskvec_engine_retries_total").values()))


def batch(texts: int, adapter: str = "retrieval", *, start: int = 1, length: int = 3) -> TokenBatch:
    """Return a batch of different texts, which depend on ``start``."""
    ids = [np.arange(i, i + length, dtype=np.int32) for i in range(start, start + texts)]
    return TokenBatch(ids, adapter)


async def joined(
    engine: RemoteEngine, peer: Peer, *batches: TokenBatch
) -> list[EngineResult | BaseException]:
    """Let a taskvec server receive batches in one call, and return their results."""
    peer.released.clear()
    received = len(peer.calls)
    first = []
    for i in range(MAX_CALLS):  # the others wait for these
        first.append(asyncio.create_task(engine.embed(batch(1, start=1000 + i))))
        await until(lambda: len(peer.calls) == received + len(first))
    others = [asyncio.create_task(engine.embed(each)) for each in batches]
    await asyncio.sleep(0.05)
    peer.released.set()
    results = await asyncio.gather(*others, return_exceptions=True)
    await asyncio.gather(*first, return_exceptions=True)
    assert len(peer.calls[received + MAX_CALLS][0]) == sum(len(each.ids) for each in batches)
    return results


def truth(asked: TokenBatch, dimension: int) -> Vectors:
    """Return the vectors of an honest peer."""
    return np.stack([hashed_vector(ids, asked.adapter, dimension) for ids in asked.ids])
