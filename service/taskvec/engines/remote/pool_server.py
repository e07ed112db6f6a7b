"""One server of the pool: checks, circuit breaker, and calls."""

from __future__ import annotations

import asyncio
import enum
import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath
from typing import Protocol

import aiohttp
import structlog

from taskvec.checkpoint.backbone import ModelCard
from taskvec.checkpoint.golden import GoldenVectors
from taskvec.concurrency import CancelScope, keep_running
from taskvec.engines.base import CallOutcome, QueueObserver, TokenIds
from taskvec.engines.remote.batcher import CallBatcher
from taskvec.engines.remote.client import (
    OPENS_CIRCUIT,
    HttpRequest,
    ServerCallError,
    ServerClient,
)
from taskvec.engines.remote.protocols import (
    MAX_LISTING_BYTES,
    DistinctVectors,
    ServerProtocol,
    Vectors,
    detect_protocol,
    find_unusable,
    read_vectors,
)
from taskvec.errors import TaskvecError
from taskvec.priority import Priority

log = structlog.get_logger(__name__)

MAX_BATCHED_TEXTS = 8
"""Requests of up to this many texts may share a call with others."""

MAX_BULK_CALLS = 4
"""Concurrent bulk calls to one server: enough to keep it busy, and few enough that interactive
calls do not wait long behind them in a queue without priorities, such as vLLM's."""

MAX_ERRORS = 3
"""Consecutive failed calls that open the circuit."""

MIN_RETRY_SECONDS, MAX_RETRY_SECONDS = 0.25, 5.0
"""Delay until the checks are repeated while the circuit is open; it grows by half each time."""


HEARTBEAT_SECONDS = 2.0
"""While calls wait without any answer for this long, the server must answer a request that needs no
engine."""

HEARTBEAT_TIMEOUT_SECONDS = 5.0
"""Time for that answer, without delays of this process."""

LISTING_SECONDS = 10.0
"""Time for the list of models when a server is checked, which needs no engine."""


CONNECT_SECONDS = 2.0
"""A call that is older than this has its connection, or does not get one."""


class ServerState(enum.StrEnum):
    """State of the circuit breaker of a server; only a closed circuit allows calls."""

    JOINING = "joining"
    CLOSED = "closed"
    OPEN = "open"
    REFUSED = "refused"


class PoolObserver(QueueObserver, Protocol):
    """Observer of a pool; notified from the event loop of the pool."""

    def server_changed(self, server: str, *, serving: bool) -> None:
        """A server may now be called, or no longer."""

    def server_left(self, server: str) -> None:
        """A server was removed from the pool."""

    def call_ended(self, server: str, outcome: str, seconds: float) -> None:
        """A call to a server ended."""

    def call_retried(self) -> None:
        """A failed call was sent again."""

    def lookup_failed(self) -> None:
        """A DNS lookup failed."""


@dataclass(eq=False, slots=True)
class _Call:
    """A call in progress.

    Attributes:
        started: ``time.monotonic()`` of its start.
        trusted: whether its answer is used.
        probing: whether it is a check of the server.
        scope: ends the wait for its answer; None when there is none.
    """

    started: float
    probing: bool
    trusted: bool = True
    scope: CancelScope | None = None


class PoolServer:
    """A server with a circuit breaker.

    Attributes:
        url: URL of the server.
        name: name in logs, metrics and messages.
        state: state of the circuit breaker.
        reason: why the server is not called; empty while it is.
        tokens: tokens of the calls in progress.
        proven_at: ``time.monotonic()`` when the last check that it passed began.
    """

    def __init__(
        self,
        url: str,
        session: aiohttp.ClientSession,
        card: ModelCard,
        golden: GoldenVectors,
        *,
        max_tokens: int,
        call_seconds: float,
        check_seconds: float,
        connections: asyncio.Semaphore,
        observer: PoolObserver | None,
        on_proof: Callable[[], None],
        on_failure: Callable[[], None],
    ) -> None:
        """Create a server that has not been checked.

        Args:
            url: URL of the server, without a trailing slash.
            session: connection pool and default headers.
            card: the model that it must serve.
            golden: the vectors that it must return for the probes.
            max_tokens: longest text that it will be sent, in tokens.
            call_seconds: timeout of a call, after which the server counts as hung.
            check_seconds: a server without an answer for this long is probed.
            connections: limits the concurrent calls to all servers.
            on_proof: called after each check that the server passed while it was called.
            on_failure: called when its circuit opens.
            observer: notified of every call and every change of ``serving``.
        """
        self.url = url
        self.name = f"unix:{PurePath(url).name}" if url.startswith("unix:") else url
        self.state = ServerState.JOINING
        self.reason = "it has not been checked yet"
        self.tokens = 0
        self.proven_at = 0.0
        base = "http://engine" if url.startswith("unix:") else url
        self._client = ServerClient(session, base, connections)
        self._distinct = DistinctVectors()
        self._calls: dict[_Call, None] = {}
        self._card = card
        self._golden = golden
        self._max_tokens = max_tokens
        self._call_seconds = call_seconds
        self._check_seconds = check_seconds
        self._observer = observer
        self._protocol: ServerProtocol | None = None
        self._batcher = CallBatcher(self._send_if_serving)
        self._bulk_calls = asyncio.Semaphore(MAX_BULK_CALLS)
        self._errors = 0
        self._answered_at = self._probed_at = 0.0
        self._opened = asyncio.Event()
        self._on_proof = on_proof
        self._on_failure = on_failure
        if observer is not None:
            observer.server_changed(self.name, serving=False)

    @property
    def serving(self) -> bool:
        """True while calls are allowed."""
        return self.state is ServerState.CLOSED

    async def run(self) -> None:
        """Check the server until it passes, then watch it until the circuit opens; repeat.

        After an unexpected error the server is not called until it passes its checks again.
        """
        try:
            await self._check_and_watch()
        except Exception as error:
            self._set_state(ServerState.OPEN, f"unexpected {type(error).__name__} in its check")
            raise

    async def _check_and_watch(self) -> None:
        retry_delay = MIN_RETRY_SECONDS
        while True:
            try:
                await self._check()
            except ServerCallError as error:
                wrong = error.outcome is CallOutcome.WRONG
                self._set_state(ServerState.REFUSED if wrong else ServerState.OPEN, error.message)
                await asyncio.sleep(retry_delay * random.uniform(0.75, 1.25))
                retry_delay = min(1.5 * retry_delay, MAX_RETRY_SECONDS)
                continue
            retry_delay = MIN_RETRY_SECONDS
            self._errors = 0
            self._opened.clear()
            self._set_state(ServerState.CLOSED, "")
            await self._watch()
            await asyncio.sleep(MIN_RETRY_SECONDS)

    async def close(self) -> None:
        """End the calls that nobody waits for any longer."""
        await self._batcher.close()

    def detach(self) -> None:
        """Stop reporting to the observer, because the server was removed from the pool."""
        self._observer = None

    async def call(
        self,
        ids: Sequence[TokenIds],
        adapter: str | None,
        tokens: int,
        timeout_seconds: float,
        priority: Priority,
    ) -> Vectors:
        """Embed texts on this server.

        Args:
            ids: int32 token ids [length] of each text.
            adapter: an adapter that the server serves; None for the bare backbone.
            tokens: total number of ids.
            timeout_seconds: timeout of the call.
            priority: class of the call; few bulk calls run at a time.

        Returns:
            float32 [texts, dimension], not normalised.

        Raises:
            ServerCallError: the call failed. The circuit may have been opened.
            TaskvecError: the server cannot embed one of the texts, and has passed a check since.
        """
        self.tokens += tokens
        try:
            if priority is Priority.BULK:
                return await self._send_bulk(ids, [adapter] * len(ids), timeout_seconds)
            if (
                self._protocol is None
                or not self._protocol.mixes_adapters
                or len(ids) > MAX_BATCHED_TEXTS
            ):
                return await self._send(ids, [adapter] * len(ids), timeout_seconds)
            return await self._batcher.submit(ids, adapter, timeout_seconds)
        finally:
            self.tokens -= tokens

    async def _send_bulk(
        self, texts: Sequence[TokenIds], adapters: Sequence[str | None], timeout_seconds: float
    ) -> Vectors:
        deadline = time.monotonic() + timeout_seconds
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._bulk_calls.acquire()
        except TimeoutError:
            raise ServerCallError(
                CallOutcome.TIMEOUT, f"other bulk calls took {timeout_seconds:.3g} seconds"
            ) from None
        try:
            while True:
                # The server does not cause the wait for other bulk calls. Unless the deadline of
                # the client is earlier, the call gets its full timeout, and the server counts as
                # hung after that.
                full = timeout_seconds >= self._call_seconds
                left = timeout_seconds if full else max(0.001, deadline - time.monotonic())
                try:
                    return await self._send_if_serving(texts, adapters, left, Priority.BULK)
                except ServerCallError as error:
                    retry_delay = error.retry_after
                    expires = time.monotonic() + retry_delay >= deadline
                    if error.outcome is not CallOutcome.BUSY or expires:
                        raise
                await asyncio.sleep(retry_delay)  # the request was admitted, and bulk can wait
        finally:
            self._bulk_calls.release()

    async def _send_if_serving(
        self,
        texts: Sequence[TokenIds],
        adapters: Sequence[str | None],
        timeout_seconds: float,
        priority: Priority = Priority.INTERACTIVE,
    ) -> Vectors:
        """Send texts that have waited, unless the circuit was opened meanwhile."""
        if not self.serving:
            raise ServerCallError(CallOutcome.UNREACHABLE, self.reason)
        return await self._send(texts, adapters, timeout_seconds, priority)

    async def _send(
        self,
        texts: Sequence[TokenIds],
        adapters: Sequence[str | None],
        timeout_seconds: float,
        priority: Priority = Priority.INTERACTIVE,
    ) -> Vectors:
        if self._protocol is None:
            raise ServerCallError(CallOutcome.UNREACHABLE, self.reason)
        call = _Call(time.monotonic(), probing=texts is self._golden.probes)
        outcome = CallOutcome.ABANDONED
        self._calls[call] = None
        try:
            request = self._protocol.request(texts, adapters, timeout_seconds, priority)
            answer = await self._receive(call, request, len(texts), timeout_seconds)
            await self._check_answer(call, texts, adapters, answer, call.started + timeout_seconds)
            refused = isinstance(answer, TaskvecError)
            outcome = CallOutcome.TEXT_ERROR if refused else CallOutcome.OK
        except ServerCallError as error:
            outcome = error.outcome
            if outcome is CallOutcome.TIMEOUT and timeout_seconds < self._call_seconds:
                # The client's deadline passed; the server may be fine.
                outcome = CallOutcome.ABANDONED
            elif outcome is not CallOutcome.ABANDONED:  # which would say nothing about the server
                self._record_failure(error)
            raise
        finally:
            del self._calls[call]
            if self._observer is not None:
                self._observer.call_ended(self.name, outcome, time.monotonic() - call.started)
        self._errors = 0
        self._answered_at = time.monotonic()
        if isinstance(answer, TaskvecError):
            raise answer
        return answer

    async def _receive(
        self, call: _Call, request: HttpRequest, texts: int, timeout_seconds: float
    ) -> Vectors | TaskvecError:
        """Return the vectors, or the error with which the server refuses one of the texts."""
        dimension = self._card.dimension
        before = partial(self._require_trust, call, serving=True)
        scope = call.scope = CancelScope(self._frozen)
        try:
            with scope:
                try:
                    content = await self._client.post(
                        request, texts * dimension * 4, timeout_seconds, before
                    )
                finally:
                    call.scope = None
        except TaskvecError as error:
            if error.text is None or error.text >= texts:
                raise ServerCallError(
                    CallOutcome.ERROR, f"it refused a text that it was not sent: {error.message}"
                ) from None
            self._require_trust(call, serving=False)
            return error
        self._require_trust(call, serving=False)
        return read_vectors(content, texts, dimension)

    def _require_trust(self, call: _Call, *, serving: bool) -> None:
        if not call.probing and not (call.trusted and (self.serving or not serving)):
            raise ServerCallError(CallOutcome.ABANDONED, f"it was dropped: {self.reason}")

    def _record_failure(self, error: ServerCallError) -> None:
        busy = error.outcome is CallOutcome.BUSY
        level = log.debug if busy else log.warning  # overload is part of normal operation
        level("engine_call_failed", server=self.name, outcome=error.outcome, reason=error.message)
        if busy:
            self._answered_at = time.monotonic()  # the server is alive
            return
        self._doubt(error)
        self._errors += 1
        if self.serving and (error.outcome in OPENS_CIRCUIT or self._errors >= MAX_ERRORS):
            self._set_state(ServerState.OPEN, error.message)
            self._opened.set()

    def _doubt(self, error: ServerCallError) -> None:
        """Decide which of the calls in progress may still be answered.

        A server that sent a wrong vector computes wrong ones for all of them. One that ended a
        connection may have been started again, with another model: a call that gets its connection
        only now would reach a server that nobody has checked.
        """
        wrong = error.outcome is CallOutcome.WRONG
        if wrong or error.outcome is CallOutcome.UNREACHABLE:
            oldest = -math.inf if wrong else time.monotonic() - CONNECT_SECONDS
            for call in self._calls:
                call.trusted &= call.started < oldest

    async def _check(self) -> None:
        """Check the kind of the server, its model, and the golden vectors of every adapter."""
        started = time.monotonic()
        try:
            self._protocol = await detect_protocol(
                self._client,
                self._card,
                self._max_tokens,
                min(self._call_seconds, LISTING_SECONDS),
            )
        except (TypeError, AttributeError, LookupError) as error:
            raise ServerCallError(
                CallOutcome.WRONG, f"its /v1/models has an unexpected form ({error})"
            ) from None
        for adapter in self._golden.adapters:
            await self._probe(adapter, self._call_seconds)
        self._answered_at = self._probed_at = time.monotonic()
        self.proven_at = started

    def _find_suspects(
        self,
        texts: Sequence[TokenIds],
        adapters: Sequence[str | None],
        answer: Vectors | TaskvecError,
    ) -> tuple[str, Sequence[str | None]]:
        """Return why an answer is probably wrong, empty if it is not, and the adapters to check.

        Every adapter of the call is one of them: a server may have used one for another.
        """
        if isinstance(answer, TaskvecError):
            return answer.message, adapters
        reason = find_unusable(answer)
        repeated = self._distinct.repeats(texts, adapters, answer)
        if reason is None and repeated:
            reason = "it sent equal vectors for different texts"
        if reason is None and texts is self._golden.probes:
            reason = self._golden.mismatch(adapters[0], answer)
        return reason or "", [*adapters, *repeated]

    async def _check_answer(
        self,
        call: _Call,
        texts: Sequence[TokenIds],
        adapters: Sequence[str | None],
        answer: Vectors | TaskvecError,
        deadline: float,
    ) -> None:
        """Check an answer, and the server if the answer is probably wrong.

        A client may have sent tokens whose rows in the checkpoint are equal, or not finite: the
        golden vectors decide.

        Raises:
            ServerCallError: WRONG if the call is itself a check; ABANDONED if the server failed its
                check, which is recorded as such, or could not be checked before the deadline.
        """
        reason, suspects = self._find_suspects(texts, adapters, answer)
        if not reason:
            return
        if call.probing:
            raise ServerCallError(CallOutcome.WRONG, reason)
        for adapter in dict.fromkeys(suspects):
            try:
                await self._probe_until(adapter, deadline)
            except ServerCallError as error:
                raise ServerCallError(
                    CallOutcome.ABANDONED, f"{reason}; then its check: {error.message}"
                ) from None
        self._require_trust(call, serving=False)  # another call may have found the server wrong

    async def _probe_until(self, adapter: str | None, deadline: float) -> None:
        """Probe the server, again after each 429 until the deadline."""
        while True:
            left = max(0.001, deadline - time.monotonic())
            try:
                await self._probe(adapter, min(self._call_seconds, left))
            except ServerCallError as error:
                retry_delay = max(MIN_RETRY_SECONDS, error.retry_after)
                expires = time.monotonic() + retry_delay >= deadline
                if error.outcome is not CallOutcome.BUSY or expires:
                    raise
            else:
                return
            await asyncio.sleep(retry_delay)

    async def _probe(self, adapter: str | None, timeout_seconds: float) -> None:
        probes = self._golden.probes
        await self._send(probes, [adapter] * len(probes), timeout_seconds)

    def _frozen(self) -> ServerCallError:
        return ServerCallError(
            CallOutcome.TIMEOUT,
            f"it did not answer GET /v1/models within {HEARTBEAT_TIMEOUT_SECONDS:g} seconds",
        )

    async def _watch_heartbeat(self) -> None:
        """While calls wait in silence, check that the server answers HTTP, until it does not.

        A server that computes for minutes still lists its models; one that is frozen, or whose host
        has vanished, does not, and its calls are ended, so that others take them.
        """
        while self.serving:
            started = time.monotonic()
            await asyncio.sleep(HEARTBEAT_SECONDS)
            if not self._calls or self._answered_at >= started:
                continue
            if await self._client.answers(
                "/v1/models", MAX_LISTING_BYTES, HEARTBEAT_TIMEOUT_SECONDS
            ):
                continue
            if self.serving and self._answered_at < started:
                self._set_state(ServerState.OPEN, self._frozen().message)
                self._opened.set()
                for scope in [call.scope for call in self._calls]:
                    if scope is not None:
                        scope.cancel()

    async def _watch(self) -> None:
        """Probe the server after silence and at intervals, until the circuit opens."""
        heartbeat = asyncio.create_task(
            keep_running(f"heartbeat {self.name}", self._watch_heartbeat)
        )
        try:
            await self._watch_answers()
        finally:
            heartbeat.cancel()
            await asyncio.gather(heartbeat, return_exceptions=True)

    async def _watch_answers(self) -> None:
        while self.serving:
            due = min(
                self._answered_at + self._check_seconds, self._probed_at + self._check_seconds
            )
            if time.monotonic() < due:
                with suppress(TimeoutError):
                    async with asyncio.timeout(due - time.monotonic()):
                        await self._opened.wait()
                continue
            self._probed_at = time.monotonic()
            try:
                for adapter in self._golden.adapters:
                    await self._probe(adapter, self._call_seconds)
            except ServerCallError as error:
                # Busy, or no connection or file was left here: the server need not be at fault.
                harmless = error.outcome in {CallOutcome.BUSY, CallOutcome.ABANDONED}
                if self.serving and not harmless:
                    self._doubt(error)
                    self._set_state(ServerState.OPEN, error.message)
            else:
                if self.serving:  # a call may have opened the circuit during the probes
                    self.proven_at = self._probed_at
                    self._on_proof()

    def _set_state(self, state: ServerState, reason: str) -> None:
        if (state, reason) != (self.state, self.reason):
            level = log.info if state is ServerState.CLOSED else log.warning
            level("engine_server", server=self.name, state=state, reason=reason)
        if self.serving and state is not ServerState.CLOSED:
            self._on_failure()
        self.state, self.reason = state, reason
        if self._observer is not None:
            self._observer.server_changed(self.name, serving=self.serving)
