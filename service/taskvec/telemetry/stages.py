"""Timing of one request, split into consecutive stages."""

from __future__ import annotations

import time
from typing import NamedTuple

STAGES = ("tokenize", "cache", "queue", "engine", "encode")
"""Names in order; ``cache`` occurs only if the embedding cache is enabled."""


class Stage(NamedTuple):
    """One finished stage.

    Attributes:
        name: one of ``STAGES``.
        start: on the clock of ``time.perf_counter``, in seconds.
        seconds: duration.
    """

    name: str
    start: float
    seconds: float


class Stages:
    """The stages of one request; a failed request has those that it reached.

    Attributes:
        finished: the finished stages, in order.
    """

    __slots__ = ("_name", "_start", "finished")

    def __init__(self) -> None:
        self.finished: list[Stage] = []
        self._name: str | None = None
        self._start = 0.0

    def start(self, name: str) -> None:
        """Start a stage, and end the previous one."""
        now = time.perf_counter()
        if self._name is not None:
            self.finished.append(Stage(self._name, self._start, now - self._start))
        self._name, self._start = name, now

    def engine_entered(self) -> None:
        """Start the engine's stage if the request is still in the queue; called from any thread."""
        if self._name == "queue":
            self.start("engine")

    def end(self) -> None:
        """End the current stage, if there is one."""
        if self._name is not None:
            self.finished.append(Stage(self._name, self._start, time.perf_counter() - self._start))
            self._name = None

    def engine_finished(self, queued: float, computed: float) -> None:
        """Replace the queue and engine stages by the engine's own measurements.

        Args:
            queued: seconds until the first text entered a forward pass.
            computed: seconds from then to the last vector.
        """
        self._name = None
        while self.finished and self.finished[-1].name in {"queue", "engine"}:
            self.finished.pop()
        start = time.perf_counter() - computed - queued
        self.finished.append(Stage("queue", start, queued))
        self.finished.append(Stage("engine", start + queued, computed))
