"""How much may wait: a budget in tokens and requests, and an honest guess when there is room."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from taskvec.engines.base import Engine, TokenBatch
from taskvec.errors import QueueFullError
from taskvec.priority import Priority

NO_LIMIT = 1 << 62

MEMORY_SECONDS = 30.0
"""How far back the measured rate reaches."""

LONGEST_RETRY = 120.0
"""OpenAI's SDK obeys Retry-After up to this many seconds."""

LEAST_BUDGET = 16_384
"""Tokens that may wait however slow the engine is; before its speed is known, a larger request is
bulk."""

FIRST_BUDGET = 1 << 20
"""Tokens that may wait before the engine's speed is known."""

BULK_SECONDS = 1.0
"""A request of more than so much of the engine's time is bulk, whatever it says."""

DEEP_SECONDS = 1.0
"""An engine shows its speed only while at least so much work waits for it."""

REOPEN = 0.9
"""Share of the budget at which requests are let in again after one was refused: until then they
are refused before they cost any work."""


class Admission:
    """Admits requests while they and their tokens fit the budget; belongs to one event loop.

    Each class has a budget of its own, so that bulk keeps nobody else out. Tokens are the engine's
    time; short texts fill a process before they fill its engine, and are counted as requests.
    """

    def __init__(
        self,
        max_tokens: int = 0,
        seconds: float = 30.0,
        max_requests: int = NO_LIMIT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start empty.

        Args:
            max_tokens: most tokens admitted and not yet answered; 0 for what the engine does in
                ``seconds``. A request larger than that is admitted when nothing else is: its size
                is bounded elsewhere.
            seconds: of the engine's time that may be queued, where ``max_tokens`` is 0.
            max_requests: most requests of a class admitted and not yet answered.
            clock: seconds.
        """
        self._max = max_tokens
        self._seconds = seconds
        self._max_requests = max_requests
        self._clock = clock
        self._answered = 0.0
        self._busy = 0.0
        self._since = 0.0
        self._open = dict.fromkeys(Priority, True)
        self._held = dict.fromkeys(Priority, 0)
        self._requests = dict.fromkeys(Priority, 0)

    @property
    def tokens(self) -> int:
        """Admitted and not yet answered, of both classes."""
        return sum(self._held.values())

    @property
    def open(self) -> bool:
        """True where no class has refused a request and waits for room since."""
        return all(self._open.values())

    @property
    def derived(self) -> bool:
        """True where the budget follows the engine's speed."""
        return not self._max

    @property
    def budget(self) -> int:
        """Most tokens of a class that may be admitted and not yet answered."""
        known = max(LEAST_BUDGET, int(self._seconds * self.rate)) if self.rate else FIRST_BUDGET
        return self._max or known

    @property
    def rate(self) -> float:
        """Tokens a second that the engine answers when it has enough to do; 0 where unknown."""
        return self._answered / self._busy if self._busy else 0.0

    def learn(self, tokens: int, seconds: float) -> None:
        """The engine was seen to embed so many tokens in so many seconds, with nothing else."""
        self._answered, self._busy = float(tokens), seconds

    def class_of(self, tokens: int, asked: Priority) -> Priority:
        """The class that a request of so many tokens belongs to."""
        few = BULK_SECONDS * self.rate if self.rate else LEAST_BUDGET
        return Priority.BULK if tokens > few else asked

    def require_room(self, priority: Priority) -> None:
        """Refuse at once while requests that came before are being refused for lack of room.

        Raises:
            QueueFullError: there was no room a moment ago; says when there should be.
        """
        if not self._open[priority] and self._held[priority]:
            raise self._full(0, priority)

    @contextmanager
    def admit(self, tokens: int, priority: Priority) -> Iterator[None]:
        """Hold room for a request of a class while it is worked on.

        Raises:
            QueueFullError: there is no room; says when there should be.
        """
        held, requests = self._held[priority], self._requests[priority]
        if (held and held + tokens > self.budget) or requests >= self._max_requests:
            self._open[priority] = False
            raise self._full(tokens, priority)
        if not self.tokens:
            self._since = self._clock()
        self._held[priority] += tokens
        self._requests[priority] += 1
        finished = False
        try:
            yield
            finished = True
        finally:
            self._learn(tokens if finished else 0)
            self._held[priority] -= tokens
            self._requests[priority] -= 1
            if self._has_room(priority):
                self._open[priority] = True

    def _has_room(self, priority: Priority) -> bool:
        """Whether some more fit, and not just the next one."""
        return (
            self._held[priority] <= REOPEN * self.budget
            and self._requests[priority] <= REOPEN * self._max_requests
        )

    def _full(self, tokens: int, priority: Priority) -> QueueFullError:
        held, requests = self._held[priority], self._requests[priority]
        if requests > REOPEN * self._max_requests:
            reason = (
                f"{requests} {priority} requests are queued or being embedded, and the limit is "
                f"{self._max_requests}"
            )
        else:
            reason = (
                f"{held} {priority} tokens are queued or being embedded, and {tokens or 'any'} "
                f"more would pass the limit of {self.budget}"
            )
        return QueueFullError(
            f"{reason}: send it again later.",
            retry_after=self._seconds_until_room(tokens, held),
        )

    def _learn(self, answered: int) -> None:
        now = self._clock()
        elapsed, self._since = now - self._since, now
        if self.tokens < DEEP_SECONDS * self.rate:
            return
        fade = math.exp(-elapsed / MEMORY_SECONDS)
        self._answered = self._answered * fade + answered
        self._busy = self._busy * fade + elapsed

    def _seconds_until_room(self, tokens: int, held: int) -> float:
        if not self.rate:
            return 1.0
        budget = self.budget
        surplus = min(held, max(held + tokens - budget, held - REOPEN * budget))
        return min(LONGEST_RETRY, max(1.0, surplus / self.rate))


TEXT_TOKENS = 64
FIRST_TEXTS, MOST_TEXTS = 8, 1024
ENOUGH_SECONDS = 0.25
"""A batch that takes so long tells the speed; smaller ones tell what a call costs."""


async def measure_speed(engine: Engine) -> tuple[int, float]:
    """Embed batches that grow until one takes a while.

    Args:
        engine: ready; what others send it meanwhile goes first.

    Returns:
        Tokens of the last batch, and the seconds that it took.

    Raises:
        TaskvecError: the engine cannot embed now.
    """
    card = engine.model
    adapter = card.adapters[0] if card.adapters else None
    length = min(TEXT_TOKENS, card.max_tokens)
    texts = FIRST_TEXTS
    while True:
        ids = np.arange(texts * length, dtype=np.int32) % card.vocabulary
        batch = TokenBatch(np.split(ids, texts), adapter, priority=Priority.BULK)
        begun = time.monotonic()
        await engine.embed(batch)
        seconds = time.monotonic() - begun
        if seconds >= ENOUGH_SECONDS or texts == MOST_TEXTS:
            return batch.tokens, seconds
        texts *= 2
