"""What the service says of itself: its engine's state, unless it stands still or is leaving."""

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

LOOK_EVERY = 0.5
"""Seconds between two looks at the engine's progress."""


class Inside:
    """A with block that any number may be in at a time, and how many are."""

    __slots__ = ("_enter", "count")

    def __init__(self, enter: Callable[[], None]) -> None:
        """Nobody is inside; whoever comes calls ``enter`` first, which may refuse by raising."""
        self._enter = enter
        self.count = 0

    def __enter__(self) -> None:
        self._enter()
        self.count += 1

    def __exit__(self, *_: object) -> None:
        self.count -= 1


class ServiceHealth:
    """Watches an engine work, and knows whether the service is leaving; of one event loop.

    Attributes:
        work: around a request that has come, from its first byte: what is within is answered.
            Entering raises UnavailableError where it would not be; see ``require_open``.
        waiting: around every call to the engine.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        stall_seconds: float = 60.0,
        dead_seconds: float = 300.0,
        canary_seconds: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing has been seen yet.

        Args:
            engine: whose progress is watched.
            stall_seconds: not ready when work has waited so long and nothing was finished.
            dead_seconds: not live when it has waited so long.
            canary_seconds: when nothing was finished for so long, one text is embedded to see
                whether the engine still can.
            clock: seconds.
        """
        self._engine = engine
        self._stall_seconds = stall_seconds
        self._dead_seconds = dead_seconds
        self._canary_seconds = canary_seconds
        self._clock = clock
        self._leaving = False
        self._refusing = False
        self._finished = engine.finished
        self._finished_at = self._moved_at = clock()
        self._fault = ""
        self.work = Inside(self.require_open)
        self.waiting = Inside(self._begin_to_wait)

    @property
    def stalled(self) -> float:
        """Seconds for which work has waited and nothing was finished."""
        return self._clock() - self._moved_at if self.waiting.count else 0.0

    def leave(self) -> None:
        """Stop being ready; requests that still come are answered."""
        self._leaving = True

    def refuse(self) -> None:
        """From now on requests are refused; what was admitted is answered."""
        self._leaving = self._refusing = True

    def readiness(self) -> EngineHealth:
        """Whether a load balancer should send requests here."""
        if self._leaving:
            return EngineHealth(EngineState.STOPPING, "the service is being stopped")
        return self._progress()

    def liveness(self) -> EngineHealth:
        """As ``readiness``, but dead where only a new process would help."""
        health = self._progress()
        if self.stalled >= self._dead_seconds:
            return replace(health, state=EngineState.DEAD)
        return health

    def require_open(self) -> None:
        """Refuse a request that would not be answered.

        Raises:
            UnavailableError: saying why, and when to come back.
        """
        if self._refusing:
            raise UnavailableError(
                "The service is being stopped: send the request again, to another one.",
                code="draining",
                retry_after=1,
            )
        self.require_engine()

    def require_engine(self) -> None:
        """Refuse work that the engine cannot do now.

        Raises:
            UnavailableError: saying why, and when to come back.
        """
        self._progress().require_ready()

    def _begin_to_wait(self) -> None:
        if not self.waiting.count:
            self._moved_at = self._clock()

    async def watch(self) -> None:
        """Look at the engine now and then, and try it where it was quiet; until cancelled."""
        canary: asyncio.Task[None] | None = None
        try:
            while True:
                self.look()
                quiet = self._clock() - self._finished_at >= self._canary_seconds
                if quiet and self._engine.health().ready and (canary is None or canary.done()):
                    canary = asyncio.create_task(self._try_engine())
                await asyncio.sleep(LOOK_EVERY)
        finally:
            if canary is not None:
                canary.cancel()

    def look(self) -> None:
        """Take note of what the engine has finished."""
        if self._engine.finished != self._finished:
            self._finished = self._engine.finished
            self._finished_at = self._moved_at = self._clock()
            self._fault = ""

    async def _try_engine(self) -> None:
        card = self._engine.model
        text = np.zeros(1, dtype=np.int32)
        adapter = card.adapters[0] if card.adapters else None
        deadline = time.monotonic() + self._dead_seconds
        self._finished_at = self._clock()  # the next one comes a whole pause later
        try:
            with self.waiting:
                await self._engine.embed(TokenBatch([text], adapter, deadline))
        except TaskvecError as error:
            self._fault = error.message
            log.error("canary_failed", reason=error.message)  # noqa: TRY400 - it says all

    def _progress(self) -> EngineHealth:
        health = self._engine.health()
        if health.ready:
            self.look()
            if self.stalled >= self._stall_seconds:
                return EngineHealth(
                    EngineState.UNAVAILABLE,
                    f"work waits, and nothing was finished for {self.stalled:.0f} seconds",
                )
            if self._fault:
                return EngineHealth(EngineState.UNAVAILABLE, f"it failed on a test: {self._fault}")
        return health
