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


class Admission:
    """Admits requests while their tokens fit the budget; belongs to one event loop."""

    def __init__(self, max_tokens: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Start empty.

        Args:
            max_tokens: most tokens admitted and not yet answered. A request larger than that is
                admitted when nothing else is: its size is bounded elsewhere.
            clock: seconds.
        """
        self._max = max_tokens
        self._clock = clock
        self._answered = 0.0
        self._busy = 0.0
        self._since = 0.0
        self.tokens = 0

    @contextmanager
    def admit(self, tokens: int) -> Iterator[None]:
        """Hold room for a request while it is worked on.

        Raises:
            QueueFullError: there is no room; says when there should be.
        """
        if self.tokens and self.tokens + tokens > self._max:
            raise QueueFullError(
                f"{self.tokens} tokens are queued or being embedded and {tokens} more would pass "
                f"the limit of {self._max}: send it again later.",
                retry_after=self._seconds_until_room(tokens),
            )
        if not self.tokens:
            self._since = self._clock()
        self.tokens += tokens
        finished = False
        try:
            yield
            finished = True
        finally:
            self.tokens -= tokens
            self._learn(tokens if finished else 0)

    def _learn(self, answered: int) -> None:
        now = self._clock()
        elapsed, self._since = now - self._since, now
        fade = math.exp(-elapsed / MEMORY_SECONDS)
        self._answered = self._answered * fade + answered
        self._busy = self._busy * fade + elapsed

    def _seconds_until_room(self, tokens: int) -> float:
        if not self._answered or not self._busy:
            return 1.0
        surplus = min(self.tokens + tokens - self._max, self.tokens)
        return min(LONGEST_RETRY, max(1.0, surplus * self._busy / self._answered))
