"""The queue of an engine: two classes share its time, and the requests of a class take turns.

Within a class: fair queueing in tokens by virtual time (Demers, Keshav and Shenker, 1989). Every
request has a tag, the tokens that it has had; a new one begins where the class's clock stands, and
the clock goes on by what an equal share of the service is. The least tag is served next: one that
is new goes before those that have had more, and none starves, however many new ones come.
Between the classes: stride scheduling (Waldspurger and Weihl, 1995) of the engine's seconds; a
batch holds one class only, so that a short text does not wait for a long forward to which it was
added.
"""

from __future__ import annotations

import heapq
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from taskvec.priority import Priority

T = TypeVar("T")

WEIGHTS = {Priority.INTERACTIVE: 4.0, Priority.BULK: 1.0}
"""Shares of the engine's time while both classes wait."""

SAVED = {Priority.INTERACTIVE: 1.0, Priority.BULK: 0.0}
"""Seconds of the engine that a class may save up while nothing of it waits: people come and go,
and those who come should not pay for those who were quick."""


@dataclass(eq=False, slots=True)
class Turn(Generic[T]):
    """One request in the queue.

    Attributes:
        request: whatever the engine keeps of it.
        costs: tokens of each text, in the order in which they are to be taken.
        tag: where the clock of its class stood when it came, and the tokens it has had since.
        number: of its arrival; decides between equal tags.
        taken: how many texts have left the queue.
    """

    request: T
    costs: list[int]
    tag: float
    number: int
    taken: int = 0

    def __lt__(self, other: Turn[T]) -> bool:
        """Whether it comes first."""
        return (self.tag, self.number) < (other.tag, other.number)

    @property
    def done(self) -> bool:
        """True when no text is left."""
        return self.taken == len(self.costs)


@dataclass(eq=False, slots=True)
class _ClassQueue(Generic[T]):
    """The requests of one class.

    Attributes:
        turns: a heap.
        clock: virtual time: the tokens that a request would have had that was there all the time.
        arrivals: how many requests have come.
        spent: engine seconds that this class has had, over its weight.
    """

    turns: list[Turn[T]] = field(default_factory=list)
    clock: float = 0.0
    arrivals: int = 0
    spent: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.turns)

    def push(self, request: T, costs: list[int]) -> None:
        """Add a request."""
        self.arrivals += 1
        heapq.heappush(self.turns, Turn(request, costs, self.clock, self.arrivals))

    def take(self, quantum: int, budget: int) -> tuple[list[tuple[T, int]], int, list[T]]:
        """See ``FairQueue.take``; also the tokens taken, and the requests that are done."""
        batch: list[tuple[T, int]] = []
        done: list[T] = []
        room = budget
        full = False
        while self.turns and not full:
            turn = self.turns[0]
            self.clock = max(self.clock, turn.tag)
            had = 0
            while not turn.done and had < quantum:
                cost = turn.costs[turn.taken]
                full = cost > room and bool(batch)
                if full:
                    break
                batch.append((turn.request, turn.taken))
                turn.taken += 1
                had += cost
                room -= cost
            self.clock += had / len(self.turns)
            turn.tag += had
            if turn.done:
                done.append(heapq.heappop(self.turns).request)
            else:
                heapq.heapreplace(self.turns, turn)
        return batch, budget - room, done

    def drop(self, leaves: Callable[[T], bool]) -> list[Turn[T]]:
        """See ``FairQueue.drop``."""
        dropped = [turn for turn in self.turns if leaves(turn.request)]
        if dropped:
            left = set(self.turns).difference(dropped)
            self.turns = sorted(left)  # a sorted list is a heap
        return dropped


class FairQueue(Generic[T]):
    """Requests with texts that wait; not thread-safe, its owner locks.

    Attributes:
        quantum: tokens after which the next request has its turn.
        texts: texts that wait.
        tokens: tokens that wait.
    """

    def __init__(self, quantum: int) -> None:
        """An empty queue."""
        self.quantum = quantum
        self.texts = 0
        self.tokens = 0
        self._rings: dict[Priority, _ClassQueue[T]] = {
            priority: _ClassQueue() for priority in WEIGHTS
        }
        self._served = Priority.INTERACTIVE
        self._by_age: OrderedDict[int, T] = OrderedDict()

    def __iter__(self) -> Iterator[T]:
        return (turn.request for ring in self._rings.values() for turn in ring.turns)

    @property
    def oldest(self) -> T | None:
        """The request that has waited longest, of those with a text that waits."""
        return next(iter(self._by_age.values()), None)

    def push(self, request: T, costs: list[int], priority: Priority = Priority.INTERACTIVE) -> None:
        """Queue a request whose texts cost so many tokens each."""
        ring = self._rings[priority]
        if not ring:
            saved = SAVED[priority] / WEIGHTS[priority]
            others = [other.spent - saved for other in self._rings.values() if other]
            ring.spent = max([ring.spent, *others])
        ring.push(request, costs)
        self._by_age[id(request)] = request
        self.texts += len(costs)
        self.tokens += sum(costs)

    def drop(self, leaves: Callable[[T], bool]) -> list[tuple[T, int]]:
        """Remove the requests that leave; each with the number of its texts that still waited."""
        dropped = []
        for ring in self._rings.values():
            for turn in ring.drop(leaves):
                del self._by_age[id(turn.request)]
                waiting = turn.costs[turn.taken :]
                self.texts -= len(waiting)
                self.tokens -= sum(waiting)
                dropped.append((turn.request, len(waiting)))
        return dropped

    def take(self, budget: int) -> list[tuple[T, int]]:
        """The next batch: (request, index of its text in ``costs``), at most ``budget`` tokens.

        It holds one class only. A text longer than the budget is taken alone.
        """
        waiting = [priority for priority, ring in self._rings.items() if ring]
        if not waiting:
            return []
        self._served = min(waiting, key=lambda priority: self._rings[priority].spent)
        batch, tokens, done = self._rings[self._served].take(self.quantum, budget)
        self.texts -= len(batch)
        self.tokens -= tokens
        for request in done:
            del self._by_age[id(request)]
        return batch

    def spend(self, seconds: float) -> None:
        """The engine has spent so long on the batch that was taken last."""
        self._rings[self._served].spent += seconds / WEIGHTS[self._served]


LEAST_TOKENS = 64
"""A budget is not lowered further: less memory than that takes is no engine's."""

FIRST_PAUSE, LONGEST_PAUSE = 30.0, 3600.0
"""Seconds without an out-of-memory error after which the budget is doubled; the pause doubles
with every error, so that memory which is gone for good costs little."""


class TokenBudget:
    """The budget of one engine; used by its worker thread.

    Attributes:
        whole: tokens of a forward while memory suffices.
        tokens: tokens of a forward now.
    """

    def __init__(self, whole: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Everything may be used."""
        self.whole = self.tokens = whole
        self._clock = clock
        self._pause = FIRST_PAUSE
        self._grows_at = 0.0

    def shrink(self, failed: int) -> None:
        """A forward of so many tokens did not fit: half of them may."""
        self.tokens = min(self.tokens, max(LEAST_TOKENS, failed // 2))
        self._grows_at = self._clock() + self._pause
        self._pause = min(LONGEST_PAUSE, 2 * self._pause)

    def grow(self) -> None:
        """Use more again where nothing has failed for long enough."""
        if self.tokens < self.whole and self._clock() >= self._grows_at:
            self.tokens = min(self.whole, 2 * self.tokens)
            self._grows_at = self._clock() + self._pause
