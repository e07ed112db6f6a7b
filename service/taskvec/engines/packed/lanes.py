"""Lanes: worker threads of the packed engine, of which one computes at a time.

Interactive and bulk batches are computed by threads of their own. When an interactive text arrives,
its lane starts at once, and the forward pass of the bulk lane pauses at its next step. Interactive
work that has used up its share of the time waits until bulk work has caught up (``scheduler``).
A lane has at most one paused forward pass, so the memory in use is that of one batch per lane.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

from taskvec.engines.packed.scheduler import FairQueue
from taskvec.priority import Priority

T = TypeVar("T")


class Lane:
    """State of one worker thread; the lock of ``Lanes`` guards it.

    Attributes:
        classes: the priority classes that it serves.
        wake: notified when it may have something to do.
        computing: the class of each batch that is started and not finished, oldest first.
        seconds: time for which it has computed; pauses do not count.
        alone: True while it waits until no other lane computes, because memory has run out.
    """

    def __init__(self, classes: Sequence[Priority], lock: threading.Lock) -> None:
        """Create a lane with nothing to do."""
        self.classes = tuple(classes)
        self.wake = threading.Condition(lock)
        self.computing: deque[Priority] = deque()
        self.seconds = 0.0
        self.alone = False


class Lanes(Generic[T]):
    """Decides which lane computes: the first one that may, while later ones are paused."""

    def __init__(
        self,
        classes: Iterable[Sequence[Priority]],
        queue: FairQueue[T],
        lock: threading.Lock,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create the lanes.

        Args:
            classes: the priority classes of each lane; a lane pauses those after it.
            queue: the waiting requests; it is charged with the time of each class.
            lock: guards the queue and the lanes.
            clock: returns seconds.
        """
        self.lanes = [Lane(served, lock) for served in classes]
        self._queue = queue
        self._lock = lock
        self._clock = clock
        self._charged_at = clock()

    def __iter__(self) -> Iterator[Lane]:
        """Iterate over the lanes."""
        return iter(self.lanes)

    def take(self, lane: Lane, budget: int) -> list[tuple[T, int]]:
        """Take the next batch of a lane, which computes from now on; the caller holds the lock.

        Returns:
            See ``FairQueue.take``; empty if nothing waits, or if others come first.
        """
        if not self._may_start(lane):
            return []
        served = self._queue.turn(filter(self._queue.waits, lane.classes))
        if served is None:
            return []
        lane.computing.append(served)
        return self._queue.take(budget, lane.classes)

    def finish(self, lane: Lane) -> bool:
        """Record that the oldest batch of a lane is finished; the caller holds the lock.

        Returns:
            True if the batch of a later lane was paused meanwhile.
        """
        self.charge()
        lane.computing.popleft()
        self.notify()
        return any(other.computing for other in self.lanes if self._is_behind(other, lane))

    def abandon(self, lane: Lane) -> None:
        """Record that a lane computes nothing more; the caller holds the lock."""
        self.charge()
        lane.computing.clear()
        self.notify()

    def notify(self) -> None:
        """Wake all lanes; the caller holds the lock."""
        for lane in self.lanes:
            lane.wake.notify_all()

    def charge(self) -> None:
        """Charge the time since the last call to the lane that computed; the caller locks."""
        now = self._clock()
        lane = self._computing()
        if lane is not None:
            lane.seconds += now - self._charged_at
            self._queue.charge(lane.computing[0], now - self._charged_at)
        self._charged_at = now

    def step(self, lane: Lane) -> None:
        """Pause a forward pass while an earlier lane computes.

        Called between the steps of a forward pass, from each of its threads.
        """
        first = self.lanes[0]
        if lane is first or not (first.computing or any(map(self._queue.waits, first.classes))):
            return  # without the lock: the next step looks again
        with self._lock:
            while self._must_pause(lane):
                self._notify_others(lane)
                lane.wake.wait()

    def wait_alone(self, lane: Lane) -> bool:
        """Wait until no other lane computes, after memory has run out.

        Returns:
            False if no other lane computed, or if another one waits already.
        """
        others = self._others(lane)
        with self._lock:
            if not any(other.computing for other in others) or any(o.alone for o in others):
                return False
            self.charge()
            lane.alone = True
            self._notify_others(lane)
            while any(other.computing for other in others):
                lane.wake.wait()
            self.charge()
            lane.alone = False
            return True

    def _computing(self) -> Lane | None:
        """Return the lane that computes now; other lanes with a batch are paused."""
        return next((lane for lane in self.lanes if lane.computing and not lane.alone), None)

    def _may_start(self, lane: Lane) -> bool:
        """Return whether the next batch of a lane may start: it is the turn of its class."""
        others = self._others(lane)
        if any(other.alone for other in others) or self._is_behind(lane, self._computing()):
            return False
        self.charge()
        started = {priority for other in others for priority in other.computing}
        return (
            self._queue.turn(
                priority
                for priority in Priority
                if priority in started or self._queue.waits(priority)
            )
            in lane.classes
        )

    def _must_pause(self, lane: Lane) -> bool:
        if self._is_behind(lane, self._computing()):
            return True
        return any(
            any(map(self._queue.waits, other.classes)) and self._may_start(other)
            for other in self.lanes
            if self._is_behind(lane, other) and not other.computing
        )

    def _is_behind(self, lane: Lane, other: Lane | None) -> bool:
        return other is not None and self.lanes.index(other) < self.lanes.index(lane)

    def _others(self, lane: Lane) -> list[Lane]:
        return [other for other in self.lanes if other is not lane]

    def _notify_others(self, lane: Lane) -> None:
        for other in self._others(lane):
            other.wake.notify_all()
