"""One server of the pool: proven before it is used, dropped when it fails, proven again."""

from __future__ import annotations

import asyncio
import enum
import itertools
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import PurePath
from typing import Protocol

import aiohttp
import structlog

from taskvec.checkpoint.backbone import ModelCard
from taskvec.checkpoint.golden import GoldenVectors
from taskvec.engines.base import QueueObserver, TokenIds
from taskvec.engines.remote.batcher import CallBatcher
from taskvec.engines.remote.client import OPENS_AT_ONCE, Connection, Outcome, ServerFault
from taskvec.engines.remote.protocols import Dialect, Vectors, read_vectors, recognise
from taskvec.priority import Priority

log = structlog.get_logger(__name__)

SMALL_CALL = 8
"""Requests of up to so many texts may share a call with others."""

BULK_CALLS = 4
"""Bulk calls under way to one server: enough to keep it busy, too few to make others wait long
behind them in a queue that knows no classes, such as vLLM's."""

ERRORS_TO_OPEN = 3
"""So many failed calls in a row and a server is dropped."""

PROBES_APART = 6
"""Even a busy server is probed once in so many check intervals."""

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 5.0
"""Seconds until a dropped server is tried again; grows by half each time."""


class ServerState(enum.StrEnum):
    """A server's circuit: only a closed one gets calls."""

    JOINING = "joining"
    CLOSED = "closed"
    OPEN = "open"
    REFUSED = "refused"


class PoolObserver(QueueObserver, Protocol):
    """What a pool reports while it works; called from its event loop."""

    def server_changed(self, server: str, *, serving: bool) -> None:
        """A server may now be called, or no longer."""

    def server_left(self, server: str) -> None:
        """A server is no longer listed."""

    def call_ended(self, server: str, outcome: str, seconds: float) -> None:
        """A call to a server ended."""

    def call_retried(self) -> None:
        """A failed call was sent again."""

    def lookup_failed(self) -> None:
        """A name could not be resolved."""


class Server:
    """A server, its circuit, and how much it has to do.

    Attributes:
        url: where it is.
        name: what logs, metrics and messages call it.
        state: its circuit.
        reason: why it is not called, where it is not.
        tokens: sent to it and not yet answered.
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
        observer: PoolObserver | None,
    ) -> None:
        """A server that has yet to prove itself.

        Args:
            url: where it is, without a trailing slash.
            session: the connections to it.
            card: the model that it must serve.
            golden: the vectors that it must give.
            max_tokens: longest text that it will be sent.
            call_seconds: how long a call may take before the server counts as hung.
            check_seconds: a server that answered nothing for so long is checked.
            observer: told of every call and change.
        """
        self.url = url
        self.name = f"unix:{PurePath(url).name}" if url.startswith("unix:") else url
        self.state = ServerState.JOINING
        self.reason = "it has not proven its adapters yet"
        self.tokens = 0
        base = "http://engine" if url.startswith("unix:") else url
        self._connection = Connection(session, base)
        self._card = card
        self._golden = golden
        self._max_tokens = max_tokens
        self._call_seconds = call_seconds
        self._check_seconds = check_seconds
        self._observer = observer
        self._dialect: Dialect | None = None
        self._courier = CallBatcher(self._send_waiting)
        self._bulk_calls = asyncio.Semaphore(BULK_CALLS)
        self._errors = 0
        self._answered_at = self._probed_at = 0.0
        self._dropped = asyncio.Event()
        self._probed = itertools.cycle(golden.adapters)
        if observer is not None:
            observer.server_changed(self.name, serving=False)

    @property
    def serving(self) -> bool:
        """True while calls may be sent."""
        return self.state is ServerState.CLOSED

    async def keep(self) -> None:
        """Prove the server, watch it, drop it, prove it again; until cancelled."""
        pause = FIRST_PAUSE
        while True:
            try:
                await self._prove()
            except ServerFault as fault:
                lies = fault.outcome is Outcome.WRONG
                self._enter(ServerState.REFUSED if lies else ServerState.OPEN, fault.message)
                await asyncio.sleep(pause * random.uniform(0.75, 1.25))
                pause = min(1.5 * pause, LONGEST_PAUSE)
                continue
            pause = FIRST_PAUSE
            self._errors = 0
            self._dropped.clear()
            self._enter(ServerState.CLOSED, "")
            await self._watch()
            await asyncio.sleep(FIRST_PAUSE)

    def leave(self) -> None:
        """It is no longer listed: what is in flight ends unreported."""
        self._observer = None

    async def call(
        self,
        ids: Sequence[TokenIds],
        adapter: str | None,
        tokens: int,
        seconds: float,
        priority: Priority,
    ) -> Vectors:
        """Embed some texts on this server.

        Args:
            ids: token ids, one int32 array [length] a text.
            adapter: one that the server has proven.
            tokens: total number of ids.
            seconds: how long it may take.
            priority: bulk calls take turns, a few at a time.

        Returns:
            float32 [texts, dimension], not normalised.

        Raises:
            ServerFault: the call failed; the server may have been dropped for it.
        """
        self.tokens += tokens
        try:
            if priority is Priority.BULK:
                return await self._send_in_turn(ids, [adapter] * len(ids), seconds)
            if self._dialect is None or not self._dialect.mixes or len(ids) > SMALL_CALL:
                return await self._send(ids, [adapter] * len(ids), seconds)
            return await self._courier.deliver(ids, adapter, seconds)
        finally:
            self.tokens -= tokens

    async def _send_in_turn(
        self, texts: Sequence[TokenIds], adapters: Sequence[str | None], seconds: float
    ) -> Vectors:
        limit = time.monotonic() + seconds
        try:
            async with asyncio.timeout(seconds):
                await self._bulk_calls.acquire()
        except TimeoutError:
            raise ServerFault(Outcome.TIMEOUT, f"no turn within {seconds:.3g} seconds") from None
        try:
            while True:
                # Waiting for a turn is no fault of the server: where no client's deadline is
                # nearer, the call has the whole of a call's time, and is a hung one after it.
                hung = seconds >= self._call_seconds
                left = seconds if hung else max(0.001, limit - time.monotonic())
                try:
                    return await self._send_waiting(texts, adapters, left, Priority.BULK)
                except ServerFault as fault:
                    pause = fault.retry_after
                    if fault.outcome is not Outcome.BUSY or time.monotonic() + pause >= limit:
                        raise
                await asyncio.sleep(pause)  # a part of a request that was admitted: it can wait
        finally:
            self._bulk_calls.release()

    async def _send_waiting(
        self,
        texts: Sequence[TokenIds],
        adapters: Sequence[str | None],
        seconds: float,
        priority: Priority = Priority.INTERACTIVE,
    ) -> Vectors:
        """``_send`` for texts that may have waited while the server was dropped."""
        if not self.serving:
            raise ServerFault(Outcome.UNREACHABLE, self.reason)
        return await self._send(texts, adapters, seconds, priority)

    async def _send(
        self,
        texts: Sequence[TokenIds],
        adapters: Sequence[str | None],
        seconds: float,
        priority: Priority = Priority.INTERACTIVE,
    ) -> Vectors:
        if self._dialect is None:
            raise ServerFault(Outcome.UNREACHABLE, self.reason)
        begun = time.monotonic()
        outcome = Outcome.ABANDONED
        dimension = self._card.dimension
        try:
            content = await self._connection.post(
                self._dialect.call(texts, adapters, seconds, priority),
                len(texts) * dimension * 4,
                seconds,
            )
            vectors = read_vectors(content, len(texts), dimension)
            outcome = Outcome.OK
        except ServerFault as fault:
            outcome = fault.outcome
            if outcome is Outcome.TIMEOUT and seconds < self._call_seconds:
                outcome = Outcome.ABANDONED  # the client's deadline, not the server's fault
            else:
                self._failed(fault)
            raise
        finally:
            if self._observer is not None:
                self._observer.call_ended(self.name, outcome, time.monotonic() - begun)
        self._errors = 0
        self._answered_at = time.monotonic()
        return vectors

    def _failed(self, fault: ServerFault) -> None:
        level = log.debug if fault.outcome is Outcome.BUSY else log.warning  # overload is no fault
        level("engine_call_failed", server=self.name, outcome=fault.outcome, reason=fault.message)
        if fault.outcome is Outcome.BUSY:
            self._answered_at = time.monotonic()  # a refusal shows that it is alive
            return
        self._errors += 1
        if self.serving and (fault.outcome in OPENS_AT_ONCE or self._errors >= ERRORS_TO_OPEN):
            self._enter(ServerState.OPEN, fault.message)
            self._dropped.set()

    async def _prove(self) -> None:
        """Every adapter is there and gives its golden vectors."""
        try:
            self._dialect = await recognise(
                self._connection, self._card, self._max_tokens, self._call_seconds
            )
        except (TypeError, AttributeError, LookupError) as error:
            raise ServerFault(
                Outcome.WRONG, f"its /v1/models is not understood ({error})"
            ) from None
        for adapter in self._golden.adapters:
            await self._probe(adapter)
        self._answered_at = self._probed_at = time.monotonic()

    async def _probe(self, adapter: str | None) -> None:
        probes = self._golden.probes
        vectors = await self._send(probes, [adapter] * len(probes), self._call_seconds)
        mismatch = self._golden.mismatch(adapter, vectors)
        if mismatch is not None:
            raise ServerFault(Outcome.WRONG, mismatch)

    async def _watch(self) -> None:
        """Until the server is dropped; one probe where it was quiet for long, and now and then."""
        while self.serving:
            due = min(
                self._answered_at + self._check_seconds,
                self._probed_at + PROBES_APART * self._check_seconds,
            )
            if time.monotonic() < due:
                with suppress(TimeoutError):
                    async with asyncio.timeout(due - time.monotonic()):
                        await self._dropped.wait()
                continue
            self._probed_at = time.monotonic()
            try:
                await self._probe(next(self._probed))
            except ServerFault as fault:
                if self.serving and fault.outcome is not Outcome.BUSY:
                    self._enter(ServerState.OPEN, fault.message)

    def _enter(self, state: ServerState, reason: str) -> None:
        if (state, reason) != (self.state, self.reason):
            level = log.info if state is ServerState.CLOSED else log.warning
            level("engine_server", server=self.name, state=state, reason=reason)
        self.state, self.reason = state, reason
        if self._observer is not None:
            self._observer.server_changed(self.name, serving=self.serving)
