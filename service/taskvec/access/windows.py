"""Sliding minutes, counted in this process.

The same count as the ``limits`` library's sliding window counter, which Redis is asked through: the
minute before counts as far as it reaches into the last sixty seconds. Its count in memory goes
through locks and coroutines and takes 90 microseconds a request, a quarter of the gateway's whole
time; this takes two.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple, Self

MINUTE = 60.0


class Usage(NamedTuple):
    """What a sliding window holds: the last minute counts as far as it reaches into this one.

    Attributes:
        before: used in the minute before; it fades until ``fades`` seconds from now.
        now: used in this one; it begins to fade when it ends, ``ends`` seconds from now.
    """

    before: int
    fades: float
    now: int
    ends: float

    @classmethod
    def of(cls, before: int, fades: float, now: int, expires: float) -> Self:
        """From what ``limits`` stores: a minute's count is kept for one more minute."""
        return cls(before, fades, now, max(0.0, expires - MINUTE))

    @property
    def used(self) -> int:
        """What counts at this moment."""
        return faded(self.before, self.fades) + self.now

    def seconds_until(self, room: int) -> float:
        """When at most ``room`` will be used, if nothing is added."""
        if self.now > room:
            return self.ends + MINUTE * (1 - room / self.now)
        if self.used <= room:
            return 0.0
        return self.fades - (room - self.now) * MINUTE / self.before


def faded(before: int, fades: float) -> int:
    """What still counts of the minute before, ``fades`` seconds before it is forgotten."""
    return int(before * fades / MINUTE)


class LocalWindows:
    """One window for each identity; the minutes are the clock's."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """Nothing is used; the clock is in seconds."""
        self._clock = clock
        self._counts: dict[tuple[str, str], tuple[int, int, int]] = {}

    def take(self, identity: tuple[str, str], limit: int, amount: int) -> tuple[bool, Usage]:
        """Count an amount, if it fits under the limit; and what is used then."""
        minute, into = divmod(self._clock(), MINUTE)
        counted, before, now = self._counts.get(identity, (0, 0, 0))
        if counted != minute:
            before, now = (now if counted == minute - 1 else 0), 0
        left = MINUTE - into
        taken = faded(before, left) + now + amount <= limit
        if taken:
            now += amount
        self._counts[identity] = (int(minute), before, now)
        return taken, Usage(before, left, now, left)
