"""Refuses requests before the process runs into its memory limit, where the kernel would kill it.

Envoy's overload manager does the same. Limits and use are read ten times a second; before a level
rises, free pages of the allocator are returned to the system. A level falls only when more is free
than it rose at.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import structlog

from taskvec.concurrency import run_in_thread
from taskvec.core.memory_budget import MemoryBudget
from taskvec.errors import OverloadedError, QueueFullError
from taskvec.malloc import trim_malloc
from taskvec.memory_limits import MemoryLimits, MemoryUse

T = TypeVar("T")

INTERVAL = 0.1
"""Seconds between two readings."""

TRIM_INTERVAL = 1.0
"""Seconds between two trims of the allocator, which take milliseconds each."""

STEP_SHARE, STEP_BYTES = 0.05, 256 << 20
"""A level for each 5 % of the limit that are no longer free, or for each 256 MB if that is less:
a tenth of a large container is far more than the requests of a tenth of a second take."""

HYSTERESIS = 0.6
"""A level falls when this share of a further step is free."""

LARGE_BODY_BYTES = 1 << 16
"""A request with more bytes than this is refused together with bulk requests."""

UNREADY_SECONDS = 30.0
"""A process that has refused all embedding requests for so long is not ready: a load balancer that
counts fast refusals as little load would send it everything."""

RETRY_SECONDS = 2.0
"""Retry-After of what is refused."""

log = structlog.get_logger(__name__)


class PressureLevel(enum.IntEnum):
    """What is refused; each level includes those before it."""

    NONE = 0
    BULK = 1
    EMBEDDING = 2
    ALL = 3


_FREE_STEPS = {PressureLevel.BULK: 3, PressureLevel.EMBEDDING: 2, PressureLevel.ALL: 1}
"""Level -> steps that are free when it begins: 15, 10 and 5 % of the limit."""


class PressureObserver(Protocol):
    """Notified of memory use."""

    def memory_read(self, use: MemoryUse | None, level: int, held: int) -> None:
        """Memory was read; see ``MemoryPressure``.

        Args:
            use: the tightest limit; None if there is none.
            level: what is refused, a ``PressureLevel``.
            held: bytes that requests hold of the budget.
        """


class MemoryPressure:
    """Follows the tightest memory limit; belongs to one event loop.

    Attributes:
        level: what is refused now.
    """

    def __init__(
        self,
        limits: MemoryLimits,
        budget: MemoryBudget,
        observer: PressureObserver | None = None,
        trim: Callable[[], None] = trim_malloc,
        clock: Callable[[], float] = time.monotonic,
        *,
        engine: Callable[[], MemoryUse | None] = lambda: None,
    ) -> None:
        """Start without pressure.

        Args:
            limits: of this process.
            budget: closed at the level ALL, so that unfinished bodies are refused as well.
            observer: notified after each reading.
            trim: returns free memory to the system.
            clock: returns seconds.
            engine: returns the limit of the engine's process alone, if it is one of its own.
        """
        self.level = PressureLevel.NONE
        self._limits = limits
        self._budget = budget
        self._observer = observer
        self._trim = trim
        self._clock = clock
        self._engine = engine
        self._own_level = self._engine_level = PressureLevel.NONE
        self._trimmed_at = -TRIM_INTERVAL
        self._embedding_since: float | None = None
        # A thread of its own: in those of the event loop, readings wait for large requests.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="memory-pressure")

    @property
    def unready(self) -> bool:
        """Whether a load balancer should send requests elsewhere."""
        since = self._embedding_since
        return self.level is PressureLevel.ALL or (
            since is not None and self._clock() - since >= UNREADY_SECONDS
        )

    async def watch(self) -> None:
        """Read the memory at intervals; runs until cancelled."""
        while True:
            await self.read()
            await asyncio.sleep(INTERVAL)

    def close(self) -> None:
        """End its thread; call it after ``watch`` was cancelled."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def read(self) -> None:
        """Read the memory once, and set the level."""
        use = await self._in_thread(self._limits.tightest)
        level = _level_at(use, self._own_level)
        due = self._clock() - self._trimmed_at >= TRIM_INTERVAL
        if level and (level > self._own_level or due):
            if due:
                self._trimmed_at = self._clock()
                await self._in_thread(self._trim)
            use = await self._in_thread(self._limits.tightest)
            level = _level_at(use, self._own_level)
        self._own_level = level
        engine = self._engine()
        self._engine_level = _level_at(engine, self._engine_level)
        # One less: a forward pass for which memory runs out is computed in parts.
        level = max(level, PressureLevel(max(0, self._engine_level - 1)))
        use = min((each for each in (use, engine) if each), key=lambda one: one.free, default=None)
        if level is not self.level:
            self._report(level, use)
        self.level = level
        if level < PressureLevel.EMBEDDING:
            self._embedding_since = None
        elif self._embedding_since is None:
            self._embedding_since = self._clock()
        self._budget.closed = level is PressureLevel.ALL
        if self._observer is not None:
            self._observer.memory_read(use, level, self._budget.used)

    def require_embedding(self, *, bulk: bool) -> None:
        """Refuse an embedding request.

        Args:
            bulk: a bulk request, or a large one.

        Raises:
            QueueFullError: memory is short.
        """
        if self.level >= PressureLevel.EMBEDDING or (self.level and bulk):
            raise QueueFullError(
                "The server's memory is nearly used up: send the request again later.",
                code="overloaded",
                retry_after=RETRY_SECONDS,
            )

    def require_any(self) -> None:
        """Refuse a request of whatever kind.

        Raises:
            OverloadedError: memory is very short.
        """
        if self.level is PressureLevel.ALL:
            raise OverloadedError(
                "The server's memory is used up: try again later.", retry_after=RETRY_SECONDS
            )

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await run_in_thread(function, executor=self._executor)

    def _report(self, level: PressureLevel, use: MemoryUse | None) -> None:
        write = log.info if level < self.level else log.warning
        write(
            "memory_pressure",
            refused=level.name.lower(),
            before=self.level.name.lower(),
            limit=use.name if use else None,
            limit_mb=use.limit >> 20 if use else None,
            used_mb=use.used >> 20 if use else None,
            held_by_requests_mb=self._budget.used >> 20,
        )


def _level_at(use: MemoryUse | None, before: PressureLevel) -> PressureLevel:
    """Return the level at a use; ``before`` is that of the last reading."""
    if use is None:
        return PressureLevel.NONE
    step = min(STEP_SHARE * use.limit, STEP_BYTES)
    for level in (PressureLevel.ALL, PressureLevel.EMBEDDING, PressureLevel.BULK):
        extra = HYSTERESIS if level <= before else 0.0
        if use.free < (_FREE_STEPS[level] + extra) * step:
            return level
    return PressureLevel.NONE
