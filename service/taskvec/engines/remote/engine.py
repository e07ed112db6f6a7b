"""The remote engine: splits requests into calls, balances them over servers, and retries."""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import aiohttp
import numpy as np
import structlog

from taskvec.checkpoint.backbone import ModelCard
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.checkpoint.golden import GoldenVectors, golden_vectors
from taskvec.concurrency import gather_or_cancel, keep_running
from taskvec.engines.base import (
    CallOutcome,
    EngineHealth,
    EngineResult,
    EngineState,
    TokenBatch,
    TokenIds,
)
from taskvec.engines.inflight import InFlight
from taskvec.engines.remote.client import ServerCallError
from taskvec.engines.remote.discovery import Resolve, expand, resolve_host
from taskvec.engines.remote.pool_server import PoolObserver, PoolServer
from taskvec.engines.remote.protocols import Vectors
from taskvec.errors import (
    DeadlineExceededError,
    QueueFullError,
    StartError,
    TaskvecError,
    UnavailableError,
)
from taskvec.open_files import MAX_ENGINE_CONNECTIONS
from taskvec.permissions import read_failure

log = structlog.get_logger(__name__)

MAX_CALL_TEXTS, MAX_CALL_TOKENS = 64, 16_384
"""A larger request is split into concurrent calls, which may go to several servers."""

MAX_ATTEMPTS = 3
"""Maximum number of times that one call is sent; each time to another server if possible."""

KEEPALIVE_SECONDS = 3.0
"""Idle connections are closed after this time, before vLLM closes them after five seconds."""

RETRY_RATIO = 0.2
"""Retries that each call deposits in the retry budget."""

MAX_RETRY_BALANCE = 1000.0
"""Maximum balance of the retry budget: enough for all calls in progress on one failed server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteOptions:
    """Options of the remote engine.

    Attributes:
        urls: ``http://host:port``, ``https://host:port``, ``unix:///path``, or ``dns://name:port``
            for every address of a name.
        api_key: bearer token for every server; None for no token.
        ca: file with the CA certificates for https servers; None for those of the system.
        max_tokens: longest text that is sent, in tokens; 0 for the limit of the model.
        call_seconds: timeout of one call, after which another server is tried.
        check_seconds: a server without an answer for this long is probed.
        lookup_seconds: interval of DNS lookups.
        connections: maximum concurrent calls to all servers together; further calls wait.
    """

    urls: tuple[str, ...]
    api_key: str | None = None
    ca: Path | None = None
    max_tokens: int = 0
    call_seconds: float = 120.0
    check_seconds: float = 10.0
    lookup_seconds: float = 5.0
    connections: int = MAX_ENGINE_CONNECTIONS


class ProofObserver(Protocol):
    """Observer of the checks of all servers."""

    def servers_proven(self, since: float) -> None:
        """Every serving server passed a check that began at ``since`` or later."""

    def server_failed(self) -> None:
        """A server failed or left the pool, so its latest vectors will not be proven."""


class RetryBudget:
    """Limits retries to a fraction of the calls, as the retry budgets of Finagle and Envoy.

    Each call deposits a fraction of a retry, and each retry withdraws one. The budget starts full.
    """

    def __init__(self) -> None:
        self._balance = MAX_RETRY_BALANCE

    def deposit(self) -> None:
        """Record that a call is sent for the first time."""
        self._balance = min(MAX_RETRY_BALANCE, self._balance + RETRY_RATIO)

    def withdraw(self) -> bool:
        """Return True and withdraw one retry, or return False if the balance is below one."""
        if self._balance < 1:
            return False
        self._balance -= 1
        return True


class RemoteEngine:
    """Engine that sends texts to other servers; each server must pass checks before it is used."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        cache: Path,
        options: RemoteOptions,
        observer: PoolObserver | None = None,
        resolve: Resolve = resolve_host,
    ) -> None:
        """Create the engine; ``start`` opens connections.

        Args:
            checkpoint: the checkpoint that the servers must serve.
            cache: folder for the golden vectors.
            options: servers, timeouts and limits.
            observer: notified of calls, servers and the queue.
            resolve: resolves host names.

        Raises:
            StartError: the CA certificates cannot be read.
        """
        self._checkpoint = checkpoint
        self._cache = cache
        self._options = options
        self._observer = observer
        self._resolve = resolve
        self._retry_budget = RetryBudget()
        self._servers: dict[str, tuple[PoolServer, asyncio.Task[None]]] = {}
        self._sessions: dict[str, aiohttp.ClientSession] = {}
        self._discovery: asyncio.Task[None] | None = None
        self._ssl = _ssl_context(options.ca)
        self._state = EngineState.STARTING
        self._golden: GoldenVectors | None = None
        self._lookup_errors: list[str] = []
        self._proofs: ProofObserver | None = None
        self._connections = asyncio.Semaphore(options.connections)
        self._finished = 0
        self._in_flight = InFlight(observer)

    @property
    def model(self) -> ModelCard:
        """See ``Engine.model``."""
        return self._checkpoint.card

    @property
    def finished(self) -> int:
        """See ``Engine.finished``: the number of answered calls."""
        return self._finished

    @property
    def batch_tokens(self) -> int:
        """See ``Engine.batch_tokens``: the maximum tokens of one call."""
        return MAX_CALL_TOKENS

    def health(self) -> EngineHealth:
        """See ``Engine.health``; ready while at least one server is serving."""
        if self._state not in (EngineState.STARTING, EngineState.READY):
            return EngineHealth(self._state, "it finishes the admitted requests")
        if self._serving():
            self._state = EngineState.READY
            return EngineHealth(EngineState.READY)
        reasons = [f"{server.name}: {server.reason}" for server, _ in self._servers.values()]
        reason = "; ".join(reasons + self._lookup_errors) or "no server has been found yet"
        starting = self._state is EngineState.STARTING
        state = EngineState.STARTING if starting else EngineState.UNAVAILABLE
        return EngineHealth(
            state,
            f"no engine server can be used: {reason}",
            "no engine server can be used; the log has the reason of each",
        )

    async def start(self) -> None:
        """See ``Engine.start``; does not wait for the servers."""
        loop = asyncio.get_running_loop()
        self._golden = await loop.run_in_executor(
            None, golden_vectors, self._checkpoint, self._cache
        )
        if self._state is EngineState.STARTING:
            self._sessions["tcp"] = self._session(
                aiohttp.TCPConnector(
                    limit=0,  # the semaphore limits all calls
                    keepalive_timeout=KEEPALIVE_SECONDS,
                    ssl=self._ssl,
                )
            )
            self._discovery = asyncio.create_task(
                keep_running("find engine servers", self._discover_servers)
            )

    async def embed(self, batch: TokenBatch) -> EngineResult:
        """See ``Engine.embed``."""
        self.health().require_ready()
        started = time.monotonic()
        with self._in_flight.request():
            batch.entered()
            vectors = await self._embed_split(batch)
        # The time in the queues of the servers is not known: all of it counts as computed.
        return EngineResult(vectors, queued=0.0, computed=time.monotonic() - started)

    async def stop(self) -> None:
        """See ``Engine.stop``."""
        self._state = EngineState.STOPPING
        await self._in_flight.wait_idle()
        self._state = EngineState.DEAD
        tasks = [task for _, task in self._servers.values()]
        tasks += [self._discovery] if self._discovery else []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for server, _ in self._servers.values():
            await server.close()
        for session in self._sessions.values():
            await session.close()

    async def _embed_split(self, batch: TokenBatch) -> Vectors:
        parts = split(batch.ids, servers=len(self._serving()))
        if len(parts) == 1:
            return await self._embed_part(batch, parts[0])
        return np.concatenate(
            await gather_or_cancel(self._embed_part(batch, part) for part in parts)
        )

    async def _embed_part(self, batch: TokenBatch, part: slice) -> Vectors:
        ids = batch.ids[part]
        tokens = sum(map(len, ids))
        with self._in_flight.queued(len(ids), tokens):
            try:
                return await self._send(batch, ids, tokens)
            except TaskvecError as error:
                self._finished += error.text is not None  # a server has answered
                raise error.renumbered(range(part.start, part.stop)) from None

    async def _send(self, batch: TokenBatch, ids: Sequence[TokenIds], tokens: int) -> Vectors:
        tried: list[PoolServer] = []
        reasons: list[str] = []
        busy_delays: list[float] = []
        self._retry_budget.deposit()
        server = self._choose(tried)
        while server is not None:
            left = self._options.call_seconds
            if batch.deadline is not None:
                left = min(left, batch.deadline - time.monotonic())
                if left <= 0:
                    break
            try:
                vectors = await server.call(ids, batch.adapter, tokens, left, batch.priority)
            except ServerCallError as error:
                busy = error.outcome is CallOutcome.BUSY
                tried.append(server)
                reasons.append(f"{server.name}: {error.message}")
                busy_delays += [error.retry_after] if busy else []
            else:
                self._finished += 1
                return vectors
            server = self._choose(tried)
            expired = batch.deadline is not None and time.monotonic() >= batch.deadline
            if (
                expired
                or server is None
                or (busy and server in tried)
                or len(tried) >= MAX_ATTEMPTS
            ):
                break
            if not self._retry_budget.withdraw():
                break
            if self._observer is not None:
                self._observer.call_retried()
        if len(busy_delays) == len(tried) > 0:
            raise QueueFullError(
                "The queues of the engine servers are full: send the request again later.",
                retry_after=min(busy_delays),
            )
        raise _give_up(batch, reasons)

    def _serving(self) -> list[PoolServer]:
        return [server for server, _ in self._servers.values() if server.serving]

    def _choose(self, tried: Sequence[PoolServer]) -> PoolServer | None:
        """Choose the less loaded of two random servers; tried servers only if all were tried."""
        serving = self._serving()
        candidates = [server for server in serving if server not in tried] or serving
        if len(candidates) > 2:
            candidates = random.sample(candidates, 2)
        random.shuffle(candidates)
        return min(candidates, key=lambda server: server.tokens, default=None)

    async def _discover_servers(self) -> None:
        dynamic = any(url.startswith("dns:") for url in self._options.urls)
        while True:
            urls, self._lookup_errors = await expand(self._options.urls, self._resolve)
            for message in self._lookup_errors:
                log.warning("engine_lookup_failed", reason=message)
                if self._observer is not None:
                    self._observer.lookup_failed()
            for url in urls:
                if url not in self._servers:
                    self._add_server(url)
            if not self._lookup_errors:  # a failed lookup does not show that servers have left
                for url in [url for url in self._servers if url not in urls]:
                    self._remove_server(url)
            if not dynamic:
                return
            await asyncio.sleep(self._options.lookup_seconds)

    def _add_server(self, url: str) -> None:
        key = url if url.startswith("unix:") else "tcp"
        if key not in self._sessions:
            path = url.removeprefix("unix://")
            self._sessions[key] = self._session(
                aiohttp.UnixConnector(path, limit=0, keepalive_timeout=KEEPALIVE_SECONDS)
            )
        assert self._golden is not None  # noqa: S101 - set by start()
        model_limit = self.model.max_tokens
        server = PoolServer(
            url,
            self._sessions[key],
            self.model,
            self._golden,
            max_tokens=min(self._options.max_tokens or model_limit, model_limit),
            call_seconds=self._options.call_seconds,
            check_seconds=self._options.check_seconds,
            connections=self._connections,
            observer=self._observer,
            on_proof=self._report_proof,
            on_failure=self._report_failure,
        )
        self._servers[url] = (
            server,
            asyncio.create_task(keep_running(f"watch {server.name}", server.run)),
        )

    def _remove_server(self, url: str) -> None:
        """Send no new calls to a server; calls in progress continue."""
        server, task = self._servers.pop(url)
        task.cancel()
        server.detach()
        self._report_failure()  # it will not be checked again
        log.info("engine_server", server=server.name, state="left")
        if self._observer is not None:
            self._observer.server_left(server.name)

    def watch_proofs(self, observer: ProofObserver) -> None:
        """Notify an observer when the servers have passed checks, and when one has failed."""
        self._proofs = observer

    def _report_proof(self) -> None:
        if self._proofs is not None:
            proven = min((server.proven_at for server in self._serving()), default=0.0)
            self._proofs.servers_proven(proven)

    def _report_failure(self) -> None:
        if self._proofs is not None:
            self._proofs.server_failed()

    def _session(self, connector: aiohttp.BaseConnector) -> aiohttp.ClientSession:
        key = self._options.api_key
        return aiohttp.ClientSession(
            connector=connector,
            headers={"authorization": f"Bearer {key}"} if key else None,
            timeout=aiohttp.ClientTimeout(),  # each call has its own timeout
            trust_env=False,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        )


def split(ids: Sequence[TokenIds], servers: int) -> list[slice]:
    """Split a request into calls.

    Args:
        ids: token ids [length] of each text.
        servers: number of servers that can share the work.

    Returns:
        The texts of each call, in order.
    """
    tokens = sum(map(len, ids))
    if len(ids) <= MAX_CALL_TEXTS and tokens <= MAX_CALL_TOKENS // max(1, servers):
        return [slice(0, len(ids))]
    share = min(MAX_CALL_TOKENS, max(1, -(-tokens // max(1, servers))))
    parts: list[slice] = []
    start = part_tokens = 0
    for i, text in enumerate(ids):
        if i > start and (i - start == MAX_CALL_TEXTS or part_tokens + len(text) > share):
            parts.append(slice(start, i))
            start, part_tokens = i, 0
        part_tokens += len(text)
    return [*parts, slice(start, len(ids))]


def _give_up(batch: TokenBatch, reasons: list[str]) -> TaskvecError:
    """Return the error for a call that failed on every attempt."""
    if batch.deadline is not None and time.monotonic() >= batch.deadline:
        return DeadlineExceededError(
            "The request's deadline passed before an engine server answered."
        )
    log.error("engine_call_given_up", texts=len(batch.ids), faults=reasons)
    return UnavailableError(
        "No engine server could embed this request: send it again later.", retry_after=1
    )


def _ssl_context(ca: Path | None) -> ssl.SSLContext | bool:
    if ca is None:
        return True
    try:
        return ssl.create_default_context(cafile=ca)
    except PermissionError as error:
        raise StartError(f"--engine-ca {ca} cannot be read: {read_failure(ca, error)}.") from None
    except (OSError, ssl.SSLError) as error:
        raise StartError(f"--engine-ca {ca} cannot be read as certificates ({error}).") from None
