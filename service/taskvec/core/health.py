"""Health of the service: the engine's state, unless it is stalled or the service is draining."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import structlog

from taskvec.engines.base import Engine, EngineHealth, EngineState, TokenBatch
from taskvec.errors import TaskvecError, UnavailableError

log = structlog.get_logger(__name__)

CHECK_INTERVAL = 0.5
"""Seconds between two checks of the engine's progress."""


class GuardedCounter:
    """Context manager that counts how often it is entered at the same time."""

    __slots__ = ("_on_enter", "count")

    def __init__(self, on_enter: Callable[[], None]) -> None:
        """Start at 0.

        Args:
            on_enter: called before each entry; may refuse it by raising.
        """
        self._on_enter = on_enter
        self.count = 0

    def __enter__(self) -> None:
        self._on_enter()
        self.count += 1

    def __exit__(self, *_: object) -> None:
        self.count -= 1


class ServiceHealth:
    """Watches the engine's progress, and knows whether the service is draining.

    Belongs to one event loop.

    Attributes:
        work: counts the requests in progress; a shutdown waits for them. Entering it raises
            UnavailableError if the service does not accept requests; see ``require_open``.
        waiting: counts the calls of the engine in progress.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        stall_seconds: float = 60.0,
        dead_seconds: float = 300.0,
        canary_seconds: float = 30.0,
        memory_used_up: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start with nothing observed.

        Args:
            engine: engine to watch.
            stall_seconds: not ready if work has waited this long and nothing was finished.
            dead_seconds: not live if it has waited this long.
            canary_seconds: if nothing was finished for this long, one text is embedded as a test.
            memory_used_up: whether requests are refused for lack of memory; not ready then.
            clock: returns seconds.
        """
        self._engine = engine
        self._stall_seconds = stall_seconds
        self._dead_seconds = dead_seconds
        self._canary_seconds = canary_seconds
        self._memory_used_up = memory_used_up
        self._clock = clock
        self._draining = False
        self._refusing = False
        self._finished = engine.finished
        self._finished_at = self._progress_at = clock()
        self._canary_error = ""
        self._defect = ""
        self.work = GuardedCounter(self.require_open)
        self.waiting = GuardedCounter(self._start_waiting)

    @property
    def stalled_seconds(self) -> float:
        """Seconds for which work has waited and nothing was finished."""
        return self._clock() - self._progress_at if self.waiting.count else 0.0

    @property
    def draining(self) -> bool:
        """Whether the service is being stopped."""
        return self._draining

    def start_draining(self) -> None:
        """Stop being ready; requests are still answered."""
        self._draining = True

    def stop_accepting(self) -> None:
        """Refuse new requests from now on; admitted ones are still answered."""
        self._draining = self._refusing = True

    def report_defect(self, reason: str) -> None:
        """Stop being ready until the process ends; requests are still answered."""
        self._defect = reason

    def readiness(self) -> EngineHealth:
        """Return whether a load balancer should send requests here."""
        if self._draining:
            return EngineHealth(EngineState.STOPPING, "the service is being stopped")
        if self._defect:
            return EngineHealth(EngineState.UNAVAILABLE, self._defect)
        if self._memory_used_up():
            return EngineHealth(EngineState.UNAVAILABLE, "the process's memory is used up")
        return self._engine_health()

    def liveness(self) -> EngineHealth:
        """Return the engine's health, dead if only a restart of the process can help."""
        health = self._engine_health()
        if self.stalled_seconds >= self._dead_seconds:
            return replace(health, state=EngineState.DEAD)
        return health

    def require_open(self) -> None:
        """Refuse a request that would not be answered.

        Raises:
            UnavailableError: states why, and when to retry.
        """
        if self._refusing:
            raise UnavailableError(
                "The service is being stopped: retry on another instance.",
                code="draining",
                retry_after=1,
            )
        self.require_engine()

    def require_engine(self) -> None:
        """Refuse work that the engine cannot do now.

        Raises:
            UnavailableError: states why, and when to retry.
        """
        self._engine_health().require_ready()

    async def watch(self) -> None:
        """Check the engine's progress, and test it when it is idle; runs until cancelled."""
        canary: asyncio.Task[None] | None = None
        try:
            while True:
                self.check()
                idle = self._clock() - self._finished_at >= self._canary_seconds
                if idle and self._engine.health().ready and (canary is None or canary.done()):
                    canary = asyncio.create_task(self._run_canary())
                await asyncio.sleep(CHECK_INTERVAL)
        finally:
            if canary is not None:
                canary.cancel()

    def check(self) -> None:
        """Record whether the engine has finished anything since the last check."""
        if self._engine.finished != self._finished:
            self._finished = self._engine.finished
            self._finished_at = self._progress_at = self._clock()
            self._canary_error = ""

    def _start_waiting(self) -> None:
        if not self.waiting.count:
            self._progress_at = self._clock()

    async def _run_canary(self) -> None:
        card = self._engine.model
        text = np.zeros(1, dtype=np.int32)
        adapter = card.adapters[0] if card.adapters else None
        deadline = time.monotonic() + self._dead_seconds
        self._finished_at = self._clock()  # the next canary runs a whole interval later
        try:
            with self.waiting:
                await self._engine.embed(TokenBatch([text], adapter, deadline))
        except TaskvecError as error:
            self._canary_error = error.message
            log.error("canary_failed", reason=error.message)  # noqa: TRY400 - the message says all
        except Exception as error:
            self._canary_error = f"unexpected {type(error).__name__}"
            log.exception("canary_failed", reason=self._canary_error)

    def _engine_health(self) -> EngineHealth:
        health = self._engine.health()
        if health.ready:
            self.check()
            if self.stalled_seconds >= self._stall_seconds:
                return EngineHealth(
                    EngineState.UNAVAILABLE,
                    f"work waits, and nothing was finished for {self.stalled_seconds:.0f} seconds",
                )
            if self._canary_error:
                return EngineHealth(
                    EngineState.UNAVAILABLE, f"it failed on a test: {self._canary_error}"
                )
        return health
