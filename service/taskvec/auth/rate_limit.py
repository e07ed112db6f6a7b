"""RequestLimits a minute, counted in this process, or in Redis by the ``limits`` library."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol, Self

from limits import RateLimitItemPerMinute
from limits.aio.storage import RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from limits.errors import StorageError

from taskvec.errors import InvalidRequestError, RateLimitError, UnavailableError
from taskvec.redis import ANSWER_SECONDS, PAUSE, CircuitBreaker, connection_pool

Kind = Literal["requests", "tokens"]
"""What is counted; no enumeration, whose members would be hashed in Python, for every request."""


class Window(NamedTuple):
    """How much of a limit is left; ``reset`` is in seconds from now."""

    limit: int
    remaining: int
    reset: float


class LimitObserver(Protocol):
    """Who is told of limits that could not be checked."""

    def limit_unchecked(self) -> None:
        """Redis was down."""


class Limiter:
    """Counts what each key takes."""

    def __init__(self, url: str | None, *, open_when_down: bool, observer: LimitObserver) -> None:
        """Prepare; no connection is opened yet.

        Args:
            url: ``redis://``, ``rediss://``, ``valkey://`` or ``valkeys://`` where all processes
                count together; None to count in this process.
            open_when_down: True lets requests pass while Redis is down, False refuses them.
            observer: told of what could not be checked.

        Raises:
            StartError: the URL cannot be used.
        """
        self._pool = None if url is None else connection_pool(url, "--limits-url")
        self._local = LocalWindows()
        if self._pool is not None:
            self._storage = RedisStorage(
                "async+redis://",
                wrap_exceptions=True,
                implementation="redispy",
                connection_pool=self._pool,  # type: ignore[arg-type] # handed on as it is
            )
            self._windows = SlidingWindowCounterRateLimiter(self._storage)
        self._open_when_down = open_when_down
        self._observer = observer
        self._outage = CircuitBreaker("limits", open=open_when_down)

    async def take(self, name: str, kind: Kind, limit: int, amount: int) -> Window | None:
        """Count an amount against a key's limit a minute.

        Args:
            name: the key's.
            kind: what is counted.
            limit: most in a minute.
            amount: how much is wanted.

        Returns:
            What is left; None where it could not be checked.

        Raises:
            InvalidRequestError: more than the limit at once: waiting cannot help.
            LimitReachedError: no room now.
            UnavailableError: Redis is down and requests are refused then.
        """
        if amount > limit:
            raise InvalidRequestError(
                f"The request has {amount} {kind} and the API key {name} may have {limit} a "
                "minute: send fewer texts at once.",
                code="too_many_tokens",
            )
        identity = (name, kind)
        if self._pool is None:
            counted: tuple[bool, Usage] | None = self._local.take(identity, limit, amount)
        else:
            counted = await self._count(identity, limit, amount)
        if counted is None:
            return None
        taken, usage = counted
        window = Window(limit, max(0, limit - usage.used), usage.seconds_until(0))
        if not taken:
            raise LimitReachedError(name, kind, window, usage.seconds_until(limit - amount))
        return window

    async def close(self) -> None:
        """Close the connections."""
        if self._pool is not None:
            await self._pool.aclose()

    async def _count(
        self, identity: tuple[str, str], limit: int, amount: int
    ) -> tuple[bool, Usage] | None:
        if self._outage.pausing:
            self._unchecked()
            return None
        item = RateLimitItemPerMinute(limit, namespace="taskvec")
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                taken = await self._windows.hit(item, *identity, cost=amount)
                held = await self._storage.get_sliding_window(
                    item.key_for(*identity), item.get_expiry()
                )
        except (StorageError, OSError, TimeoutError) as error:
            self._outage.failed(error)
            self._unchecked()
            return None
        self._outage.over()
        return taken, Usage.of(*held)

    def _unchecked(self) -> None:
        self._observer.limit_unchecked()
        if not self._open_when_down:
            raise UnavailableError(
                "The limits cannot be checked now: send it again later.",
                code="limits_unavailable",
                retry_after=PAUSE,
            )


class LimitReachedError(RateLimitError):
    """A key's limit a minute is used up; ``window`` says how far."""

    def __init__(self, name: str, kind: Kind, window: Window, seconds: float) -> None:
        super().__init__(
            f"The API key {name} may have {window.limit} {kind} a minute, and has used them: send "
            f"it again in {seconds:.3g} seconds.",
            retry_after=seconds,
        )
        self.kind = kind
        self.window = window


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
