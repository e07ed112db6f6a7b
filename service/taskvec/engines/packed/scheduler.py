"""Fair queue of the packed engine, and the token budget of its batches.

Requests of one priority class share the engine by fair queueing in tokens (Demers, Keshav and
Shenker, 1989). Every request has a tag in virtual time: the virtual time of its class at its
arrival, plus the tokens it has received since. Virtual time advances by an equal share of the
tokens served. The request with the smallest tag is served next: a new request goes before those
that have received more, and no request starves.

The classes share the engine's seconds by stride scheduling (Waldspurger and Weihl, 1995). A batch
contains one class only, so that a forward pass of bulk texts can be paused (``lanes``).
"""

from __future__ import annotations

import heapq
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from taskvec.priority import WEIGHTS, Priority

T = TypeVar("T")

MAX_CREDIT_SECONDS = {Priority.INTERACTIVE: 1.0, Priority.BULK: 0.0}
"""Engine seconds that a class can save up while its queue is empty. Interactive requests come and
go: without credit, each new one would pay for the time that earlier ones used."""

MIN_BUDGET_TOKENS = 64
"""The budget never falls below this: an engine without memory for 64 tokens is not usable."""

MIN_RETRY_SECONDS, MAX_RETRY_SECONDS = 30.0, 3600.0
"""Seconds without an out-of-memory error before the budget is doubled. The interval doubles with
every error, so that memory which is permanently lost costs few failed forward passes."""


@dataclass(eq=False, slots=True)
class QueuedRequest(Generic[T]):
    """One request in the queue, with the position of its next text.

    Attributes:
        request: the caller's object.
        costs: tokens of each text, in the order in which they are taken.
        tag: virtual time of the class at the arrival, plus the tokens taken since.
        arrival: sequence number, which orders requests with equal tags.
        taken: number of texts that have left the queue.
    """

    request: T
    costs: list[int]
    tag: float
    arrival: int
    taken: int = 0

    def __lt__(self, other: QueuedRequest[T]) -> bool:
        """Compare by tag, then by arrival."""
        return (self.tag, self.arrival) < (other.tag, other.arrival)

    @property
    def done(self) -> bool:
        """True if all texts have left the queue."""
        return self.taken == len(self.costs)


@dataclass(eq=False, slots=True)
class _ClassQueue(Generic[T]):
    """Fair queue of the requests of one priority class.

    Attributes:
        entries: the requests, as a heap.
        virtual_time: tokens that a request present from the start would have received.
        arrivals: number of requests so far.
        weighted_seconds: engine seconds used by this class, divided by its weight.
    """

    entries: list[QueuedRequest[T]] = field(default_factory=list)
    virtual_time: float = 0.0
    arrivals: int = 0
    weighted_seconds: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.entries)

    def push(self, request: T, costs: list[int]) -> None:
        """Add a request."""
        self.arrivals += 1
        entry = QueuedRequest(request, costs, self.virtual_time, self.arrivals)
        heapq.heappush(self.entries, entry)

    def take(self, quantum: int, budget: int, batch: list[tuple[T, int]]) -> tuple[int, list[T]]:
        """Fill a batch, see ``FairQueue.take``; return its tokens, and the done requests."""
        done: list[T] = []
        left = budget
        full = False
        while self.entries and not full:
            entry = self.entries[0]
            self.virtual_time = max(self.virtual_time, entry.tag)
            tokens = 0
            while not entry.done and tokens < quantum:
                cost = entry.costs[entry.taken]
                full = cost > left and bool(batch)
                if full:
                    break
                batch.append((entry.request, entry.taken))
                entry.taken += 1
                tokens += cost
                left -= cost
            self.virtual_time += tokens / len(self.entries)
            entry.tag += tokens
            if entry.done:
                done.append(heapq.heappop(self.entries).request)
            else:
                heapq.heapreplace(self.entries, entry)
        return budget - left, done

    def drop(self, condition: Callable[[T], bool]) -> list[QueuedRequest[T]]:
        """Remove and return the requests that fulfil a condition."""
        dropped = [entry for entry in self.entries if condition(entry.request)]
        if dropped:
            remaining = set(self.entries).difference(dropped)
            self.entries = sorted(remaining)  # a sorted list is a heap
        return dropped


class FairQueue(Generic[T]):
    """Fair queue of requests in two priority classes; not thread-safe, the caller locks.

    Attributes:
        quantum: tokens of one request after which the next request is served.
        texts: number of waiting texts.
        tokens: number of waiting tokens.
    """

    def __init__(self, quantum: int) -> None:
        """Create an empty queue."""
        self.quantum = quantum
        self.texts = 0
        self.tokens = 0
        self._classes: dict[Priority, _ClassQueue[T]] = {
            priority: _ClassQueue() for priority in WEIGHTS
        }
        self._weighted_seconds = 0.0
        self._by_age: OrderedDict[int, T] = OrderedDict()
        self._taken: list[tuple[T, int]] = []

    def __iter__(self) -> Iterator[T]:
        """Iterate over the waiting requests, in no particular order."""
        return (entry.request for queue in self._classes.values() for entry in queue.entries)

    @property
    def oldest(self) -> T | None:
        """Return the oldest request with a waiting text; None if the queue is empty."""
        return next(iter(self._by_age.values()), None)

    def push(self, request: T, costs: list[int], priority: Priority = Priority.INTERACTIVE) -> None:
        """Add a request.

        Args:
            request: the caller's object.
            costs: tokens of each text, in the order in which they are to be taken.
            priority: the class.
        """
        queue = self._classes[priority]
        if not queue:
            credit = MAX_CREDIT_SECONDS[priority] / WEIGHTS[priority]
            queue.weighted_seconds = max(queue.weighted_seconds, self._weighted_seconds - credit)
        self._by_age[id(request)] = request
        try:
            queue.push(request, costs)
        except MemoryError:
            del self._by_age[id(request)]
            raise
        self.texts += len(costs)
        self.tokens += sum(costs)

    def drop(self, condition: Callable[[T], bool]) -> list[tuple[T, int]]:
        """Remove the requests that fulfil a condition.

        Returns:
            Each removed request, and the number of its texts that were still waiting.
        """
        dropped = []
        for queue in self._classes.values():
            for entry in queue.drop(condition):
                del self._by_age[id(entry.request)]
                waiting = entry.costs[entry.taken :]
                self.texts -= len(waiting)
                self.tokens -= sum(waiting)
                dropped.append((entry.request, len(waiting)))
        return dropped

    def forget(self) -> None:
        """Forget the last batch: its taker has noted it."""
        self._taken = []

    def clear(self, classes: Iterable[Priority]) -> set[T]:
        """Remove every request of some classes, also after a ``take`` that memory ran out in.

        Returns:
            The removed requests, and those of the last batch, if it is not forgotten.
        """
        for one in classes:
            self._classes[one].entries.clear()
        entries = [entry for queue in self._classes.values() for entry in queue.entries]
        waiting = {id(entry.request) for entry in entries}
        removed = {request for number, request in self._by_age.items() if number not in waiting}
        for request in removed:
            del self._by_age[id(request)]
        self.texts = sum(len(entry.costs) - entry.taken for entry in entries)
        self.tokens = sum(sum(entry.costs[entry.taken :]) for entry in entries)
        removed.update(request for request, _ in self._taken)
        self._taken = []
        return removed

    def waits(self, priority: Priority) -> bool:
        """Return whether a class has a waiting text."""
        return bool(self._classes[priority])

    def turn(self, classes: Iterable[Priority]) -> Priority | None:
        """Return the class that has used the least time for its weight; None without classes."""
        return min(classes, key=lambda one: self._classes[one].weighted_seconds, default=None)

    def take(
        self, budget: int, classes: Collection[Priority] = tuple(Priority)
    ) -> list[tuple[T, int]]:
        """Remove and return the next batch, which contains one class only.

        Args:
            budget: maximum number of tokens. A text that is longer is taken alone.
            classes: the classes to choose from.

        Returns:
            A pair for each text: its request, and its index in ``costs``.
        """
        served = self.turn(priority for priority in classes if self._classes[priority])
        if served is None:
            return []
        batch = self._taken = []
        tokens, done = self._classes[served].take(self.quantum, budget, batch)
        self.texts -= len(batch)
        self.tokens -= tokens
        for request in done:
            del self._by_age[id(request)]
        return batch

    def charge(self, priority: Priority, seconds: float) -> None:
        """Charge the engine time of a batch to its class."""
        served = self._classes[priority]
        served.weighted_seconds += seconds / WEIGHTS[priority]
        # Where a class starts whose queue was empty: not at its own, which may be far behind.
        active = [served, *(queue for queue in self._classes.values() if queue)]
        least = min(queue.weighted_seconds for queue in active)
        self._weighted_seconds = max(self._weighted_seconds, least)


class TokenBudget:
    """Maximum tokens of a forward pass, reduced after out-of-memory errors.

    The workers of all lanes share it: who calls ``grow`` or ``shrink`` holds the queue's lock.

    Attributes:
        max_tokens: budget while memory suffices.
        tokens: current budget.
    """

    def __init__(self, max_tokens: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with the whole budget."""
        self.max_tokens = self.tokens = max_tokens
        self._clock = clock
        self._retry_seconds = MIN_RETRY_SECONDS
        self._grow_at = 0.0

    def shrink(self, failed: int) -> None:
        """Set the budget to half of a forward pass of ``failed`` tokens that ran out of memory."""
        self.tokens = min(self.tokens, max(MIN_BUDGET_TOKENS, failed // 2))
        self._grow_at = self._clock() + self._retry_seconds
        self._retry_seconds = min(MAX_RETRY_SECONDS, 2 * self._retry_seconds)

    def grow(self) -> None:
        """Double the budget if no out-of-memory error has happened for long enough."""
        if self.tokens < self.max_tokens and self._clock() >= self._grow_at:
            self.tokens = min(self.max_tokens, 2 * self.tokens)
            self._grow_at = self._clock() + self._retry_seconds
