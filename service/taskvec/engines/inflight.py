"""Bookkeeping of unanswered requests, for engines that do not see their own forward passes."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from taskvec.engines.base import QueueObserver


class InFlight:
    """Counts of unanswered requests, texts and tokens, reported as the queue of an engine.

    Used from one event loop.
    """

    def __init__(self, observer: QueueObserver | None) -> None:
        """Start without requests.

        Args:
            observer: notified of every change of texts and tokens; None for no reports.
        """
        self._observer = observer
        self._requests = 0
        self._texts = 0
        self._tokens = 0
        self._numbers = itertools.count()
        self._started_at: OrderedDict[int, float] = OrderedDict()
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count one request: ``wait_idle`` waits until the context is left."""
        self._requests += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._requests -= 1
            if not self._requests:
                self._idle.set()

    @contextmanager
    def queued(self, texts: int, tokens: int) -> Iterator[None]:
        """Report texts as queued until the context is left."""
        number = next(self._numbers)
        self._started_at[number] = time.monotonic()
        self._change(texts, tokens)
        try:
            yield
        finally:
            del self._started_at[number]
            self._change(-texts, -tokens)

    async def wait_idle(self) -> None:
        """Wait until all requests are answered."""
        await self._idle.wait()

    def _change(self, texts: int, tokens: int) -> None:
        self._texts += texts
        self._tokens += tokens
        if self._observer is not None:
            oldest = next(iter(self._started_at.values()), None)
            self._observer.queue_changed(self._texts, self._tokens, oldest)
