"""The pool behind the Engine protocol: splits, balances, retries."""

from __future__ import annotations

import asyncio
import itertools
import random
import ssl
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import numpy as np
import structlog

from taskvec.checkpoint.backbone import ModelCard
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.checkpoint.golden import GoldenVectors, golden_vectors
from taskvec.concurrency import gather_or_cancel
from taskvec.engines.base import EngineHealth, EngineResult, EngineState, TokenBatch, TokenIds
from taskvec.engines.remote.client import Outcome, ServerFault
from taskvec.engines.remote.discovery import Resolve, expand, resolve_host
from taskvec.engines.remote.protocols import Vectors
from taskvec.engines.remote.server import PoolObserver, Server
from taskvec.errors import (
    CheckpointError,
    DeadlineExceededError,
    QueueFullError,
    TaskvecError,
    UnavailableError,
)
from taskvec.priority import Priority

log = structlog.get_logger(__name__)

TEXTS_A_CALL, TOKENS_A_CALL = 64, 16_384
"""A larger request is split into calls that run side by side, perhaps on several servers."""

ATTEMPTS = 3
"""How often one call is sent, each time to another server where there is one."""

CONNECTIONS_A_SERVER = 512
IDLE_SECONDS = 3.0
"""Connections are closed after so long: before vLLM closes them after five seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteOptions:
    """How the pool runs.

    Attributes:
        urls: ``http://host:port``, ``https://host:port``, ``unix:///path``, or ``dns://name:port``
            for every address behind a name.
        api_key: sent to every server as a bearer token; None for none.
        ca: file with the certificates that vouch for https servers; None for the system's.
        max_tokens: longest text that is sent; 0 for the model's own limit.
        call_seconds: how long one call may take before another server is asked.
        check_seconds: a server that answered nothing for so long is checked with a probe.
        lookup_seconds: how often names are resolved again.
        reports_queue: False where the one server does, to the same series.
    """

    urls: tuple[str, ...]
    api_key: str | None = None
    ca: Path | None = None
    max_tokens: int = 0
    call_seconds: float = 120.0
    check_seconds: float = 10.0
    lookup_seconds: float = 5.0
    reports_queue: bool = True


class RemoteEngine:
    """Embeds on other servers; each is proven before it is used."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        cache: Path,
        options: RemoteOptions,
        observer: PoolObserver | None = None,
        resolve: Resolve = resolve_host,
    ) -> None:
        """Prepare; no connection is opened yet.

        Args:
            checkpoint: what the servers must serve.
            cache: folder for the golden vectors.
            options: which servers, and how they are treated.
            observer: told of calls, servers, and what is not answered yet.
            resolve: how names are looked up.

        Raises:
            CheckpointError: the certificates cannot be read.
        """
        self._checkpoint = checkpoint
        self._cache = cache
        self._options = options
        self._observer = observer
        self._resolve = resolve
        self._budget = RetryBudget()
        self._servers: dict[str, tuple[Server, asyncio.Task[None]]] = {}
        self._sessions: dict[str, aiohttp.ClientSession] = {}
        self._finder: asyncio.Task[None] | None = None
        self._trusted = _trust(options.ca)
        self._state = EngineState.STARTING
        self._golden: GoldenVectors | None = None
        self._lookup_faults: list[str] = []
        self._finished = 0
        self._calls = 0
        self._texts = 0
        self._tokens = 0
        self._numbers = itertools.count()
        self._since: OrderedDict[int, float] = OrderedDict()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def model(self) -> ModelCard:
        """See ``Engine.model``."""
        return self._checkpoint.card

    @property
    def finished(self) -> int:
        """See ``Engine.finished``: calls to servers."""
        return self._finished

    def health(self) -> EngineHealth:
        """See ``Engine.health``; ready while at least one server is."""
        if self._state not in (EngineState.STARTING, EngineState.READY):
            return EngineHealth(self._state, "it finishes what was admitted")
        if self._serving():
            self._state = EngineState.READY
            return EngineHealth(EngineState.READY)
        faults = [f"{server.name}: {server.reason}" for server, _ in self._servers.values()]
        reason = "; ".join(faults + self._lookup_faults) or "no server is known yet"
        starting = self._state is EngineState.STARTING
        state = EngineState.STARTING if starting else EngineState.UNAVAILABLE
        return EngineHealth(state, f"no engine server can be used: {reason}")

    async def start(self) -> None:
        """See ``Engine.start``; servers may come up later."""
        loop = asyncio.get_running_loop()
        self._golden = await loop.run_in_executor(
            None, golden_vectors, self._checkpoint, self._cache
        )
        if self._state is EngineState.STARTING:
            self._sessions["tcp"] = self._session(
                aiohttp.TCPConnector(
                    limit=0,
                    limit_per_host=CONNECTIONS_A_SERVER,
                    keepalive_timeout=IDLE_SECONDS,
                    ssl=self._trusted,
                )
            )
            self._finder = asyncio.create_task(self._find_servers())

    async def embed(self, batch: TokenBatch) -> EngineResult:
        """See ``Engine.embed``."""
        self.health().require_ready()
        begun = time.monotonic()
        self._calls += 1
        self._idle.clear()
        batch.entered()
        try:
            vectors = await self._embed_split(batch)
        finally:
            self._calls -= 1
            if not self._calls:
                self._idle.set()
        # The servers' queues are inside: from here all of it is computing.
        return EngineResult(vectors, queued=0.0, computed=time.monotonic() - begun)

    async def stop(self) -> None:
        """See ``Engine.stop``."""
        self._state = EngineState.STOPPING
        await self._idle.wait()
        self._state = EngineState.DEAD
        tasks = [keeper for _, keeper in self._servers.values()]
        tasks += [self._finder] if self._finder else []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for session in self._sessions.values():
            await session.close()

    async def _embed_split(self, batch: TokenBatch) -> Vectors:
        parts = split(batch.ids, servers=len(self._serving()))
        # A server sees only a part: what is bulk for its size must be told.
        priority = batch.priority if batch.tokens <= TOKENS_A_CALL else Priority.BULK
        if len(parts) == 1:
            return await self._embed_part(batch, parts[0], priority)
        return np.concatenate(
            await gather_or_cancel(self._embed_part(batch, part, priority) for part in parts)
        )

    async def _embed_part(self, batch: TokenBatch, part: slice, priority: Priority) -> Vectors:
        ids = batch.ids[part]
        tokens = sum(map(len, ids))
        with self._queued(len(ids), tokens):
            return await self._send(batch, ids, tokens, priority)

    async def _send(
        self, batch: TokenBatch, ids: Sequence[TokenIds], tokens: int, priority: Priority
    ) -> Vectors:
        tried: list[Server] = []
        faults: list[str] = []
        waits: list[float] = []
        self._budget.earn()
        server = self._choose(tried)
        while server is not None:
            left = self._options.call_seconds
            if batch.deadline is not None:
                left = min(left, batch.deadline - time.monotonic())
                if left <= 0:
                    break
            try:
                vectors = await server.call(ids, batch.adapter, tokens, left, priority)
            except ServerFault as fault:
                busy = fault.outcome is Outcome.BUSY
                tried.append(server)
                faults.append(f"{server.name}: {fault.message}")
                waits += [fault.retry_after] if busy else []
            else:
                self._finished += 1
                return vectors
            server = self._choose(tried)
            passed = batch.deadline is not None and time.monotonic() >= batch.deadline
            if passed or server is None or (busy and server in tried) or len(tried) >= ATTEMPTS:
                break
            if not self._budget.spend():
                break
            if self._observer is not None:
                self._observer.call_retried()
        if len(waits) == len(tried) > 0:
            raise QueueFullError(
                "The engine servers have no room for more: send it again later.",
                retry_after=min(waits),
            )
        raise _given_up(batch, faults)

    @contextmanager
    def _queued(self, texts: int, tokens: int) -> Iterator[None]:
        """Around what is to be sent until it is answered: servers do not tell when it waits."""
        number = next(self._numbers)
        self._since[number] = time.monotonic()
        self._count(texts, tokens)
        try:
            yield
        finally:
            del self._since[number]
            self._count(-texts, -tokens)

    def _count(self, texts: int, tokens: int) -> None:
        self._texts += texts
        self._tokens += tokens
        if self._observer is not None and self._options.reports_queue:
            oldest = next(iter(self._since.values()), None)
            self._observer.queue_changed(self._texts, self._tokens, oldest)

    def _serving(self) -> list[Server]:
        return [server for server, _ in self._servers.values() if server.serving]

    def _choose(self, tried: Sequence[Server]) -> Server | None:
        """The less loaded of two at random; one that has failed this call only as the last."""
        serving = self._serving()
        fresh = [server for server in serving if server not in tried] or serving
        if len(fresh) > 2:
            fresh = random.sample(fresh, 2)
        random.shuffle(fresh)
        return min(fresh, key=lambda server: server.tokens, default=None)

    async def _find_servers(self) -> None:
        dynamic = any(url.startswith("dns:") for url in self._options.urls)
        while True:
            urls, self._lookup_faults = await expand(self._options.urls, self._resolve)
            for fault in self._lookup_faults:
                log.warning("engine_lookup_failed", reason=fault)
                if self._observer is not None:
                    self._observer.lookup_failed()
            for url in urls:
                if url not in self._servers:
                    self._join(url)
            if not self._lookup_faults:  # without an answer nobody is known to have left
                for url in [url for url in self._servers if url not in urls]:
                    self._leave(url)
            if not dynamic:
                return
            await asyncio.sleep(self._options.lookup_seconds)

    def _join(self, url: str) -> None:
        key = url if url.startswith("unix:") else "tcp"
        if key not in self._sessions:
            path = url.removeprefix("unix://")
            self._sessions[key] = self._session(
                aiohttp.UnixConnector(
                    path, limit=CONNECTIONS_A_SERVER, keepalive_timeout=IDLE_SECONDS
                )
            )
        assert self._golden is not None  # noqa: S101 - start() made it
        longest = self.model.max_tokens
        server = Server(
            url,
            self._sessions[key],
            self.model,
            self._golden,
            max_tokens=min(self._options.max_tokens or longest, longest),
            call_seconds=self._options.call_seconds,
            check_seconds=self._options.check_seconds,
            observer=self._observer,
        )
        self._servers[url] = (server, asyncio.create_task(server.keep()))

    def _leave(self, url: str) -> None:
        """No new calls; those in flight end as they would."""
        server, keeper = self._servers.pop(url)
        keeper.cancel()
        server.leave()
        log.info("engine_server", server=server.name, state="left")
        if self._observer is not None:
            self._observer.server_left(server.name)

    def _session(self, connector: aiohttp.BaseConnector) -> aiohttp.ClientSession:
        key = self._options.api_key
        return aiohttp.ClientSession(
            connector=connector,
            headers={"authorization": f"Bearer {key}"} if key else None,
            timeout=aiohttp.ClientTimeout(),  # each call has a limit of its own
            trust_env=False,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        )


def _given_up(batch: TokenBatch, faults: list[str]) -> TaskvecError:
    if batch.deadline is not None and time.monotonic() >= batch.deadline:
        return DeadlineExceededError(
            "The request's deadline passed before an engine server answered."
        )
    log.error("engine_call_given_up", texts=len(batch.ids), faults=faults)
    return UnavailableError(
        "No engine server could embed this now: send it again later.", retry_after=1
    )


def _trust(ca: Path | None) -> ssl.SSLContext | bool:
    if ca is None:
        return True
    try:
        return ssl.create_default_context(cafile=ca)
    except (OSError, ssl.SSLError) as error:
        raise CheckpointError(
            f"--engine-ca {ca} cannot be read as certificates ({error})."
        ) from None


def split(ids: Sequence[TokenIds], servers: int) -> list[slice]:
    """A request cut into calls, in order.

    Args:
        ids: its texts.
        servers: how many could share the work.
    """
    tokens = sum(map(len, ids))
    if len(ids) <= TEXTS_A_CALL and tokens <= TOKENS_A_CALL // max(1, servers):
        return [slice(0, len(ids))]
    share = min(TOKENS_A_CALL, max(1, -(-tokens // max(1, servers))))
    parts: list[slice] = []
    start = held = 0
    for i, text in enumerate(ids):
        if i > start and (i - start == TEXTS_A_CALL or held + len(text) > share):
            parts.append(slice(start, i))
            start, held = i, 0
        held += len(text)
    return [*parts, slice(start, len(ids))]


SHARE = 0.2
"""Retries earned by each call."""

RESERVE = 1000.0
"""Most retries in hand, as many as calls may be in flight to a server that dies."""


class RetryBudget:
    """Each call earns a fifth of a retry; starts full."""

    def __init__(self) -> None:
        self._left = RESERVE

    def earn(self) -> None:
        """A call is about to be sent for the first time."""
        self._left = min(RESERVE, self._left + SHARE)

    def spend(self) -> bool:
        """True where one more retry may be sent."""
        if self._left < 1:
            return False
        self._left -= 1
        return True
