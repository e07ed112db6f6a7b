"""Rate limits per minute, counted in this process, or in Redis by the ``limits`` library.

Both count in sliding windows, by the same formula: the count of the current minute, plus that of
the previous minute, weighted by the fraction of that minute that is less than 60 seconds ago
(https://limits.readthedocs.io/en/stable/strategies.html#sliding-window-counter).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, Self

from taskvec.errors import InvalidRequestError, RateLimitError, UnavailableError

if TYPE_CHECKING:
    from taskvec.auth.shared_windows import SharedWindows

MINUTE = 60.0
"""Seconds of a window."""

RETRY_SECONDS = 1.0
"""Retry-After of a request that is rejected because Redis is down."""

Kind = Literal["requests", "tokens"]
"""What is counted. Not an enum: its members would be hashed in Python on every request."""


class Window(NamedTuple):
    """State of a key's limit.

    Attributes:
        limit: maximum per minute.
        remaining: amount left now.
        reset: seconds until the whole limit is available again.
    """

    limit: int
    remaining: int
    reset: float


class LimitReachedError(RateLimitError):
    """A key's limit per minute is used up; ``window`` holds its state."""

    def __init__(self, name: str, kind: Kind, window: Window, seconds: float) -> None:
        super().__init__(
            f"The API key {name} has used its {window.limit} {kind} per minute: send the request "
            f"again in {seconds:.3g} seconds.",
            retry_after=seconds,
        )
        self.window = window


class LimitObserver(Protocol):
    """Callback for the metrics of limits."""

    def limit_unchecked(self) -> None:
        """Record one limit that could not be checked in Redis."""


class RateLimiter:
    """Counts requests and tokens of each key against its limits per minute."""

    def __init__(self, url: str | None, *, open_when_down: bool, observer: LimitObserver) -> None:
        """Prepare a limiter; no connection is opened yet.

        Args:
            url: ``redis://``, ``rediss://``, ``valkey://`` or ``valkeys://``, in which all
                processes count together; None to count in this process.
            open_when_down: while Redis is down, True counts in this process, False rejects
                requests.
            observer: notified of limits that could not be checked in Redis.

        Raises:
            StartError: the URL cannot be used.
        """
        self._local = SlidingWindows()
        self._shared: SharedWindows | None = None
        if url is not None:
            from taskvec.auth.shared_windows import (  # noqa: PLC0415 - redis is slow to import
                SharedWindows,
            )

            self._shared = SharedWindows(url, open_when_down=open_when_down)
        self._open_when_down = open_when_down
        self._observer = observer

    async def take(self, name: str, kind: Kind, limit: int, amount: int) -> Window:
        """Count an amount against a key's limit per minute.

        Args:
            name: name of the key.
            kind: what is counted.
            limit: maximum per minute.
            amount: number of requests or tokens to count; nothing is counted if it does not fit.

        Returns:
            State of the limit; that of this process alone if Redis is down.

        Raises:
            InvalidRequestError: the amount exceeds the whole limit, so a retry cannot succeed.
            LimitReachedError: the amount does not fit now.
            UnavailableError: Redis is down, and requests are rejected while it is.
        """
        if amount > limit:
            raise InvalidRequestError(
                f"The request has {amount} {kind}, and the limit of the API key {name} is {limit} "
                "per minute: send fewer texts in one request.",
                code="too_many_tokens",
            )
        identity = (name, kind)
        if self._shared is None:
            taken, usage = self._local.take(identity, limit, amount)
        else:
            taken, usage = await self._take_shared(self._shared, identity, limit, amount)
        window = Window(limit, max(0, limit - usage.used), usage.seconds_until(0))
        if not taken:
            raise LimitReachedError(name, kind, window, usage.seconds_until(limit - amount))
        return window

    async def close(self) -> None:
        """Close the connections."""
        if self._shared is not None:
            await self._shared.close()

    async def _take_shared(
        self, shared: SharedWindows, identity: tuple[str, str], limit: int, amount: int
    ) -> tuple[bool, Usage]:
        """Count in Redis; while it is down, count in this process, or reject, as configured."""
        counted = await shared.take(identity, limit, amount)
        if counted is not None:
            if counted[0]:
                self._local.add(identity, amount)  # so that an outage does not start at zero
            return counted
        self._observer.limit_unchecked()
        if self._open_when_down:
            return self._local.take(identity, limit, amount)
        raise UnavailableError(
            "The rate limits cannot be checked now: send the request again later.",
            code="limits_unavailable",
            retry_after=RETRY_SECONDS,
        )


class SlidingWindows:
    """Sliding windows in this process, one for each identity; minutes are those of the clock."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """Create empty windows; ``clock`` returns seconds."""
        self._clock = clock
        self._counts: dict[tuple[str, str], tuple[int, int, int]] = {}

    def take(self, identity: tuple[str, str], limit: int, amount: int) -> tuple[bool, Usage]:
        """Count an amount if it fits; return whether it did, and the usage after that."""
        minute, left, previous, current = self._state(identity)
        taken = weighted(previous, left) + current + amount <= limit
        if taken:
            current += amount
        self._counts[identity] = (minute, previous, current)
        return taken, Usage(previous, left, current, left)

    def add(self, identity: tuple[str, str], amount: int) -> None:
        """Count an amount that was allowed elsewhere."""
        minute, _, previous, current = self._state(identity)
        self._counts[identity] = (minute, previous, current + amount)

    def _state(self, identity: tuple[str, str]) -> tuple[int, float, int, int]:
        """Return the minute, the seconds left of it, and the counts of the last and this minute."""
        minute, elapsed = divmod(self._clock(), MINUTE)
        counted_minute, previous, current = self._counts.get(identity, (0, 0, 0))
        if counted_minute != minute:
            previous, current = (current if counted_minute == minute - 1 else 0), 0
        return int(minute), MINUTE - elapsed, previous, current


class Usage(NamedTuple):
    """Content of a sliding window.

    Attributes:
        previous: count of the previous minute.
        previous_seconds: seconds until the previous minute no longer counts.
        current: count of the current minute.
        current_seconds: seconds until the current minute ends; its weight decreases from then.
    """

    previous: int
    previous_seconds: float
    current: int
    current_seconds: float

    @classmethod
    def from_storage(
        cls, previous: int, previous_expiry: float, current: int, current_expiry: float
    ) -> Self:
        """Convert what ``limits`` stores.

        It keeps the count of a minute for one minute after its end, so the current minute ends one
        minute before its count expires.
        """
        return cls(previous, previous_expiry, current, max(0.0, current_expiry - MINUTE))

    @property
    def used(self) -> int:
        """Amount that counts now."""
        return weighted(self.previous, self.previous_seconds) + self.current

    def seconds_until(self, amount: int) -> float:
        """Return the seconds until at most ``amount`` is used, if nothing is added."""
        if self.current > amount:
            return self.current_seconds + MINUTE * (1 - amount / self.current)
        if self.used <= amount:
            return 0.0
        return self.previous_seconds - (amount - self.current) * MINUTE / self.previous


def weighted(previous: int, seconds_left: float) -> int:
    """Return the part of the previous minute's count that still counts.

    Args:
        previous: count of the previous minute.
        seconds_left: seconds until it no longer counts.
    """
    return int(previous * seconds_left / MINUTE)
