"""An event loop with virtual time: waiting takes no time, and one seed gives one course of events.

What asyncio leaves open is drawn from the seed: the order of events that arrive in one iteration,
whether they come before the timers (as in asyncio) or after them (as in uvloop), the order of
timers with the same time, and how long an iteration takes. Now and then an iteration is slow, so
that an answer and its timeout are seen together. Callbacks of ``call_soon`` keep their order, which
asyncio promises.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
import zlib
from collections.abc import Callable
from typing import Any

START = 1000.0
"""Virtual time at the start, in seconds."""

SLOW_ITERATIONS = 0.002
"""Share of the iterations in which the process gets no processor time for up to a second."""


class StuckError(Exception):
    """Virtual time ran out, or nothing is left that could happen."""


class SimulatedLoop(asyncio.BaseEventLoop):
    """Event loop with virtual time, seeded order, and simulated threads.

    Attributes:
        random: the only source of chance.
        limit: virtual time at which the loop gives up.
        course: checksum of the course of events: equal for equal courses.
        errors: what was reported to the exception handler.
        thread: simulated thread that runs now; None while the loop does.
    """

    def __init__(self, seed: int, limit: float) -> None:
        """Start at ``START``.

        Args:
            seed: of all that is left open.
            limit: virtual seconds after which the loop gives up.
        """
        super().__init__()
        self.random = random.Random(seed)
        self.limit = START + limit
        self.course = 0
        self.errors: list[str] = []
        self.thread: Any = None
        self.jobs: Callable[[Callable[[], None]], None] | None = None
        self._now = START
        self._numbers = itertools.count()
        self._events: list[tuple[float, int, asyncio.Handle]] = []
        self.set_exception_handler(self._record)

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self._now

    def pass_time(self, seconds: float) -> None:
        """Let time pass in the running callback, as a slow one would."""
        self._now += seconds

    def event(self, seconds: float, callback: Callable[..., None], *args: Any) -> asyncio.Handle:
        """Let something happen outside the loop: a packet arrives, a thread has computed."""
        handle = asyncio.Handle(callback, args, self)
        heapq.heappush(self._events, (self._now + seconds, next(self._numbers), handle))
        return handle

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        """Run a function in a simulated thread."""
        assert executor is None
        assert self.jobs is not None
        future = self.create_future()

        def work() -> None:
            try:
                result = func(*args)
            except BaseException as error:  # noqa: BLE001 - the caller gets it
                self.call_soon_threadsafe(_resolve, future, None, error)
            else:
                self.call_soon_threadsafe(_resolve, future, result, None)

        self.jobs(work)
        return future

    def _run_once(self) -> None:
        self._remove_cancelled()
        if self.random.random() < SLOW_ITERATIONS:
            self._now += self.random.uniform(0.05, 1.0)
        else:
            self._now += self.random.random() * 1e-5
        if not self._ready and not self._stopping:
            waiting = [heap[0] for heap in (self._scheduled, self._events) if heap]
            if not waiting:
                raise StuckError("nothing is left that could happen")
            times = [first[0] if isinstance(first, tuple) else first.when() for first in waiting]
            self._now = max(self._now, min(times))
        if self._now > self.limit:
            raise StuckError(f"{self.limit - START:g} virtual seconds were not enough")
        self._collect_due()
        self.course = zlib.crc32(b"%d %.9f" % (len(self._ready), self._now), self.course)
        for _ in range(len(self._ready)):
            handle = self._ready.popleft()
            if not handle.cancelled():
                handle._run()

    def _collect_due(self) -> None:
        events = []
        while self._events and self._events[0][0] <= self._now:
            events.append(heapq.heappop(self._events)[2])
        timers: list[asyncio.TimerHandle] = []
        while self._scheduled and self._scheduled[0].when() <= self._now:
            timers.append(heapq.heappop(self._scheduled))
            timers[-1]._scheduled = False
        if len(events) > 1:
            self.random.shuffle(events)
        if len(timers) > 1:
            order = {id(timer): self.random.random() for timer in timers}
            timers.sort(key=lambda timer: (timer.when(), order[id(timer)]))
        both = [events, timers]
        if events and timers and self.random.random() < 0.5:
            both.reverse()
        for handles in both:
            self._ready.extend(handles)

    def _remove_cancelled(self) -> None:
        while self._scheduled and self._scheduled[0].cancelled():
            heapq.heappop(self._scheduled)._scheduled = False
        while self._events and self._events[0][2].cancelled():
            heapq.heappop(self._events)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Do nothing: cancelled timers are removed when they are due."""

    def _write_to_self(self) -> None:
        """Do nothing: there is no selector to wake."""

    def _process_events(self, event_list: Any) -> None:
        """Do nothing: there is no selector."""

    def _record(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self.errors.append(f"{context['message']}: {error!r}")


def _resolve(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
