"""How many tokens a forward may hold: fewer for a while after memory ran out."""

from __future__ import annotations

import time
from collections.abc import Callable

LEAST_TOKENS = 64
"""A budget is not lowered further: less memory than that takes is no engine's."""

FIRST_PAUSE, LONGEST_PAUSE = 30.0, 3600.0
"""Seconds without an out-of-memory error after which the budget is doubled; the pause doubles
with every error, so that memory which is gone for good costs little."""


class TokenBudget:
    """The budget of one engine; used by its worker thread.

    Attributes:
        whole: tokens of a forward while memory suffices.
        tokens: tokens of a forward now.
    """

    def __init__(self, whole: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Everything may be used."""
        self.whole = self.tokens = whole
        self._clock = clock
        self._pause = FIRST_PAUSE
        self._grows_at = 0.0

    def shrink(self, failed: int) -> None:
        """A forward of so many tokens did not fit: half of them may."""
        self.tokens = min(self.tokens, max(LEAST_TOKENS, failed // 2))
        self._grows_at = self._clock() + self._pause
        self._pause = min(LONGEST_PAUSE, 2 * self._pause)

    def grow(self) -> None:
        """Use more again where nothing has failed for long enough."""
        if self.tokens < self.whole and self._clock() >= self._grows_at:
            self.tokens = min(self.whole, 2 * self.tokens)
            self._grows_at = self._clock() + self._pause
