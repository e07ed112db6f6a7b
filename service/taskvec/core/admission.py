"""Admission control: limits on queued tokens and requests, and the priority class of a request.

``api.load_shedding`` asks it before a request is read, ``core.embedder`` once its tokens are known.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from taskvec.core.client_shares import ClientShares, current_client
from taskvec.engines.base import Engine, TokenBatch
from taskvec.errors import QueueFullError
from taskvec.priority import Priority

NO_LIMIT = 1 << 62

RATE_WINDOW = 30.0
"""Time constant of the measured rate's moving average, in seconds."""

MAX_RETRY_AFTER = 120.0
"""Longest Retry-After, in seconds: OpenAI's SDK obeys it up to this."""

MIN_BUDGET = 16_384
"""Smallest derived token budget, however slow the engine is."""

UNMEASURED_BUDGET = 1 << 20
"""Token budget before the engine's speed is known."""

BULK_SECONDS = 1.0
"""A request that takes more than this of the engine's time is bulk work."""

BUSY_SECONDS = 1.0
"""Queued work, in seconds of the engine's time, above which answers measure the engine's speed;
below it they measure how fast requests arrive."""

REOPEN = 0.9
"""Share of the budget below which requests are admitted again after one was refused. Until then
they are refused before any work is done for them."""

PROBE_LENGTH = 64
"""Tokens of each text that measures the engine's speed."""

MIN_PROBE_TEXTS, MAX_PROBE_TEXTS = 8, 1024
PROBE_SECONDS = 0.1
"""A batch that takes this long measures the speed; shorter ones measure the cost of a call."""

QUIET_SECONDS = 0.25
"""Time without a request, after which the engine's speed is measured."""

MAX_QUIET_WAIT = 10.0
"""Longest time to wait for that."""

QUIET_POLL_INTERVAL = 0.02
"""Seconds between two checks for requests."""

CROWDED = 2
"""Duration of a batch's forward passes over their processor time, above which other processes want
the processor."""


class Admission:
    """Token and request budgets of the two priority classes; belongs to one event loop.

    Each class has its own budget, so that bulk work does not keep interactive requests out. Tokens
    stand for the engine's time. Short texts load the process before they load the engine, so
    requests are limited as well. A full class still admits a client that holds less than its share
    of it (``core.client_shares``); the client is ``current_client``.
    """

    def __init__(
        self,
        max_tokens: int = 0,
        seconds: float = 30.0,
        max_requests: int = NO_LIMIT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start with nothing admitted.

        Args:
            max_tokens: tokens of one class admitted and not yet answered; 0 derives it from the
                engine's speed and ``seconds``. A larger request is admitted when its class is
                empty: its size is limited elsewhere.
            seconds: seconds of the engine's work that may be queued, if ``max_tokens`` is 0.
            max_requests: requests of one class admitted and not yet answered.
            clock: returns seconds.
        """
        self._max_tokens = max_tokens
        self._seconds = seconds
        self._max_requests = max_requests
        self._clock = clock
        self._answered = 0.0
        self._busy = 0.0
        self._measured_at = 0.0
        self._interval = 0
        self._awaited = 0
        self._interval_tokens = 0
        self._interval_seconds = 0.0
        self._open = dict.fromkeys(Priority, True)
        self._tokens = dict.fromkeys(Priority, 0)
        self._requests = dict.fromkeys(Priority, 0)
        self._shares = {priority: ClientShares() for priority in Priority}

    @property
    def tokens(self) -> int:
        """Tokens admitted and not yet answered, of both classes."""
        return sum(self._tokens.values())

    @property
    def accepting(self) -> bool:
        """Whether both classes admit requests; False from a refusal until there is room again."""
        return all(self._open.values())

    @property
    def derived(self) -> bool:
        """Whether the token budget follows the engine's speed."""
        return not self._max_tokens

    @property
    def budget(self) -> int:
        """Token budget of a class."""
        if self._max_tokens:
            return self._max_tokens
        return max(MIN_BUDGET, int(self._seconds * self.rate)) if self.rate else UNMEASURED_BUDGET

    @property
    def rate(self) -> float:
        """Tokens per second that the engine embeds under load; 0 if not yet known."""
        return self._answered / self._busy if self._busy else 0.0

    async def wait_for_quiet(self) -> None:
        """Return after a while without requests, so that the measured batches delay none.

        Returns sooner when the queue matters: it holds more than the smallest budget. Steady
        traffic of short requests delays it at most by ``MAX_QUIET_WAIT``.
        """
        now = quiet_since = self._clock()
        limit = now + MAX_QUIET_WAIT
        while self.tokens <= MIN_BUDGET and now < limit and now - quiet_since < QUIET_SECONDS:
            await asyncio.sleep(QUIET_POLL_INTERVAL)
            now = self._clock()
            quiet_since = now if self.tokens else max(quiet_since, self._measured_at)

    def set_rate(self, tokens: int, seconds: float) -> None:
        """Set the rate from a measurement: tokens embedded, and the seconds they took."""
        self._answered, self._busy = float(tokens), seconds

    def priority_of(self, tokens: int, requested: Priority) -> Priority:
        """Return the priority class of a request: bulk if it takes more than a second of work.

        Args:
            tokens: tokens to embed.
            requested: class that the client or its key names.
        """
        limit = BULK_SECONDS * self.rate if self.rate else MIN_BUDGET
        return Priority.BULK if tokens > limit else requested

    def require_room(self, priority: Priority) -> None:
        """Refuse at once while earlier requests of a class are being refused.

        Raises:
            QueueFullError: the class is full, and the client's share; states when to retry.
        """
        if self._open[priority] or not self._tokens[priority]:
            return
        if not self._share_admits(0, priority):
            raise self._full(0, priority)

    @contextmanager
    def admit(self, tokens: int, priority: Priority) -> Iterator[None]:
        """Reserve a request's tokens while it is embedded.

        Raises:
            QueueFullError: the class is full, and the client's share; states when to retry.
        """
        held, requests = self._tokens[priority], self._requests[priority]
        full = (held and held + tokens > self.budget) or requests >= self._max_requests
        if full:
            # A request that is too large for the room that is left does not keep smaller ones out.
            self._open[priority] = self._has_room(priority)
            if not self._share_admits(tokens, priority):
                raise self._full(tokens, priority)
        if not self.tokens:
            self._measured_at = self._clock()
        self._tokens[priority] += tokens
        self._requests[priority] += 1
        interval = self._join_interval()
        finished = False
        share = self._shares[priority].hold(current_client.get(), tokens, beyond=bool(full))
        try:
            with share:
                yield
            finished = True
        finally:
            self._measure(tokens if finished else 0, interval)
            self._tokens[priority] -= tokens
            self._requests[priority] -= 1
            if self._has_room(priority):
                self._open[priority] = True

    def _share_admits(self, tokens: int, priority: Priority) -> bool:
        client = current_client.get()
        return self._shares[priority].admits(client, tokens, self.budget, self._max_requests)

    def _has_room(self, priority: Priority) -> bool:
        return (
            self._tokens[priority] <= REOPEN * self.budget
            and self._requests[priority] <= REOPEN * self._max_requests
        )

    def _full(self, tokens: int, priority: Priority) -> QueueFullError:
        held, requests = self._tokens[priority], self._requests[priority]
        if requests > REOPEN * self._max_requests:
            reason = (
                f"{requests} {priority} requests are queued or being embedded, and the limit is "
                f"{self._max_requests}"
            )
        else:
            reason = (
                f"{held} {priority} tokens are queued or being embedded, and {tokens or 'any'} "
                f"more would exceed the limit of {self.budget}"
            )
        return QueueFullError(
            f"{reason}: send it again later.",
            retry_after=self._seconds_until_room(tokens, held),
        )

    def _join_interval(self) -> int:
        """Return the number of the interval of measurement that a new request belongs to."""
        if self._awaited:
            return self._interval + 1
        self._awaited = 1
        return self._interval

    def _measure(self, answered: int, interval: int) -> None:
        """Measure the rate when a request ends.

        An interval of measurement ends with the last of the requests that were unfinished at its
        start. Shorter ones would see the time that a large request takes, with the tokens of the
        small ones that are answered meanwhile.

        Args:
            answered: tokens of the request; 0 if it failed.
            interval: what ``_join_interval`` returned for it.
        """
        now = self._clock()
        elapsed, self._measured_at = now - self._measured_at, now
        # Before the engine is measured, any work would do, and little work shows too low a rate.
        measured = self.rate or not self.derived
        if measured and self.tokens >= BUSY_SECONDS * self.rate:
            self._interval_tokens += answered
            self._interval_seconds += elapsed
        if interval <= self._interval:
            self._awaited -= 1
        if self._awaited:
            return
        decay = math.exp(-self._interval_seconds / RATE_WINDOW)
        self._answered = self._answered * decay + self._interval_tokens
        self._busy = self._busy * decay + self._interval_seconds
        self._interval_tokens, self._interval_seconds = 0, 0.0
        self._interval += 1
        self._awaited = sum(self._requests.values()) - 1

    def _seconds_until_room(self, tokens: int, held: int) -> float:
        if not self.rate:
            return 1.0
        budget = self.budget
        excess = min(held, max(held + tokens - budget, held - REOPEN * budget))
        return min(MAX_RETRY_AFTER, max(1.0, excess / self.rate))


def batch_priority(tokens: int, priority: Priority, batch_tokens: int) -> Priority:
    """Return the class in which the engine schedules a batch: bulk if it exceeds a forward pass.

    Args:
        tokens: tokens of the batch.
        priority: class of its request.
        batch_tokens: tokens of one full forward pass; 0 if not known.
    """
    return Priority.BULK if 0 < batch_tokens < tokens else priority


async def measure_speed(engine: Engine) -> tuple[int, float]:
    """Measure an engine's speed by batches that grow until one takes long enough.

    Args:
        engine: ready. The batches are bulk work, so that requests go first; on a crowded machine,
            where bulk work gets next to no processor time, they are interactive.

    Returns:
        Tokens of the last batch, and the seconds that it took, without those in which other
        processes had the processor.

    Raises:
        TaskvecError: the engine cannot embed now.
    """
    card = engine.model
    adapter = card.adapters[0] if card.adapters else None
    length = min(PROBE_LENGTH, card.max_tokens)
    texts, priority = MIN_PROBE_TEXTS, Priority.BULK
    while True:
        ids = np.arange(texts * length, dtype=np.int32) % card.vocabulary
        batch = TokenBatch(np.split(ids, texts), adapter, priority=priority)
        started = time.monotonic()
        # On a crowded machine, processor time is what the batch would take on an idle one.
        result = await engine.embed(batch)
        seconds = min(time.monotonic() - started, result.processor)
        if priority is Priority.BULK and result.forward > CROWDED * result.processor:
            priority = Priority.INTERACTIVE
            continue
        if seconds >= PROBE_SECONDS or texts == MAX_PROBE_TEXTS:
            return batch.tokens, seconds
        texts *= 2
