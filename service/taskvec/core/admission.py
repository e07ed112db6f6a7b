"""How much may wait: a budget in tokens, and an honest guess when there will be room."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from taskvec.errors import QueueFullError

MEMORY_SECONDS = 30.0
"""How far back the measured rate reaches."""

LONGEST_RETRY = 120.0
"""OpenAI's SDK obeys Retry-After up to this many seconds."""

LEAST_BUDGET = 16_384
"""Tokens that may wait however slow the engine is, and before its speed is known."""

DEEP_SECONDS = 1.0
"""An engine shows its speed only while at least so much work waits for it."""

REOPEN = 0.9
"""Share of the budget at which requests are let in again after one was refused: until then they
are refused before they cost any work."""


class Admission:
    """Admits requests while their tokens fit the budget; belongs to one event loop.

    Attributes:
        tokens: admitted and not yet answered.
    """

    def __init__(
        self,
        max_tokens: int = 0,
        seconds: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start empty.

        Args:
            max_tokens: most tokens admitted and not yet answered; 0 for what the engine does in
                ``seconds``. A request larger than that is admitted when nothing else is: its size
                is bounded elsewhere.
            seconds: of the engine's time that may be queued, where ``max_tokens`` is 0.
            clock: seconds.
        """
        self._max = max_tokens
        self._seconds = seconds
        self._clock = clock
        self._answered = 0.0
        self._busy = 0.0
        self._since = 0.0
        self._open = True
        self.tokens = 0

    @property
    def derived(self) -> bool:
        """True where the budget follows the engine's speed."""
        return not self._max

    @property
    def budget(self) -> int:
        """Most tokens that may be admitted and not yet answered."""
        return self._max or max(LEAST_BUDGET, int(self._seconds * self.rate))

    @property
    def rate(self) -> float:
        """Tokens a second that the engine answers when it has enough to do; 0 where unknown."""
        return self._answered / self._busy if self._busy else 0.0

    def learn(self, tokens: int, seconds: float) -> None:
        """The engine was seen to embed so many tokens in so many seconds, with nothing else."""
        self._answered, self._busy = float(tokens), seconds

    def require_room(self) -> None:
        """Refuse at once while requests that came before are being refused for lack of room.

        Raises:
            QueueFullError: there was no room a moment ago; says when there should be.
        """
        if not self._open and self.tokens:
            raise self._full(0)

    @contextmanager
    def admit(self, tokens: int) -> Iterator[None]:
        """Hold room for a request while it is worked on.

        Raises:
            QueueFullError: there is no room; says when there should be.
        """
        if self.tokens and self.tokens + tokens > self.budget:
            self._open = False
            raise self._full(tokens)
        if not self.tokens:
            self._since = self._clock()
        self.tokens += tokens
        finished = False
        try:
            yield
            finished = True
        finally:
            self._learn(tokens if finished else 0)
            self.tokens -= tokens
            self._open = self._open or self.tokens <= REOPEN * self.budget

    def _full(self, tokens: int) -> QueueFullError:
        return QueueFullError(
            f"{self.tokens} tokens are queued or being embedded, and {tokens or 'any'} more would "
            f"pass the limit of {self.budget}: send it again later.",
            retry_after=self._seconds_until_room(tokens),
        )

    def _learn(self, answered: int) -> None:
        now = self._clock()
        elapsed, self._since = now - self._since, now
        if self.tokens < DEEP_SECONDS * self.rate:
            return
        fade = math.exp(-elapsed / MEMORY_SECONDS)
        self._answered = self._answered * fade + answered
        self._busy = self._busy * fade + elapsed

    def _seconds_until_room(self, tokens: int) -> float:
        if not self.rate:
            return 1.0
        held, budget = self.tokens, self.budget
        surplus = min(held, max(held + tokens - budget, held - REOPEN * budget))
        return min(LONGEST_RETRY, max(1.0, surplus / self.rate))
