"""Where the time of one request goes: stages that follow one another."""

from __future__ import annotations

import time
from typing import NamedTuple

STAGES = ("tokenize", "cache", "queue", "engine", "encode")
"""In the order in which a request goes through them; ``cache`` only where there is one."""


class Stage(NamedTuple):
    """One stage that is over; ``began`` is on the clock of ``time.perf_counter``, in seconds."""

    name: str
    began: float
    seconds: float


class Stages:
    """The stages of one request; of one that fails, those that happened.

    Attributes:
        over: the stages that have ended, in order.
    """

    __slots__ = ("_began", "_name", "over")

    def __init__(self) -> None:
        self.over: list[Stage] = []
        self._name: str | None = None
        self._began = 0.0

    def begin(self, name: str) -> None:
        """Begin a stage; the one before it, if any, ends."""
        now = time.perf_counter()
        if self._name is not None:
            self.over.append(Stage(self._name, self._began, now - self._began))
        self._name, self._began = name, now

    def entered(self) -> None:
        """The engine's stage begins, if the request still waits for it; from any thread."""
        if self._name == "queue":
            self.begin("engine")

    def end(self) -> None:
        """End the present stage, if any."""
        if self._name is not None:
            self.over.append(Stage(self._name, self._began, time.perf_counter() - self._began))
            self._name = None

    def embedded(self, queued: float, computed: float) -> None:
        """The engine has answered: it knows better than this clock how the wait was spent."""
        self._name = None
        while self.over and self.over[-1].name in {"queue", "engine"}:
            self.over.pop()
        began = time.perf_counter() - computed - queued
        self.over.append(Stage("queue", began, queued))
        self.over.append(Stage("engine", began + queued, computed))
