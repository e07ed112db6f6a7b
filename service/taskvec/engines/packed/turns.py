"""The queue of an engine: two classes share its time, and the requests of a class take turns.

Within a class: deficit round robin (Shreedhar and Varghese, 1995) in tokens, with newcomers served
first for one turn, as fq_codel does for new flows (RFC 8290, section 4.1). Between the classes:
stride scheduling (Waldspurger and Weihl, 1995) of the engine's seconds; a batch holds one class
only, so that a short text does not wait for a long forward to which it was added.
"""

from __future__ import annotations

from collections import OrderedDict, deque
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
        taken: how many texts have left the queue.
        deficit: tokens this request may still take in the present turn.
    """

    request: T
    costs: list[int]
    taken: int = 0
    deficit: int = 0

    @property
    def done(self) -> bool:
        """True when no text is left."""
        return self.taken == len(self.costs)


@dataclass(eq=False, slots=True)
class _Ring(Generic[T]):
    """The requests of one class.

    Attributes:
        new: those that have had no turn yet.
        old: those that have.
        spent: engine seconds that this class has had, over its weight.
    """

    new: deque[Turn[T]] = field(default_factory=deque)
    old: deque[Turn[T]] = field(default_factory=deque)
    spent: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.new or self.old)

    def __iter__(self) -> Iterator[Turn[T]]:
        yield from (*self.new, *self.old)

    def take(self, quantum: int, budget: int) -> tuple[list[tuple[T, int]], int, list[T]]:
        """See ``TurnQueue.take``; also the tokens taken, and the requests that are done."""
        batch: list[tuple[T, int]] = []
        done: list[T] = []
        room = budget
        while self:
            turn = (self.new or self.old).popleft()
            turn.deficit += quantum
            while not turn.done and turn.costs[turn.taken] <= turn.deficit:
                cost = turn.costs[turn.taken]
                if cost > room and batch:
                    turn.deficit -= quantum
                    self.old.appendleft(turn)
                    return batch, budget - room, done
                batch.append((turn.request, turn.taken))
                turn.taken += 1
                turn.deficit -= cost
                room -= cost
            if turn.done:
                done.append(turn.request)
            else:
                self.old.append(turn)
        return batch, budget - room, done

    def drop(self, leaves: Callable[[T], bool]) -> list[Turn[T]]:
        """See ``TurnQueue.drop``."""
        dropped = [turn for turn in self if leaves(turn.request)]
        for turn in dropped:
            (self.new if turn in self.new else self.old).remove(turn)
        return dropped


class TurnQueue(Generic[T]):
    """Requests with texts that wait; not thread-safe, its owner locks.

    Attributes:
        quantum: tokens a request may take in one turn.
        texts: texts that wait.
        tokens: tokens that wait.
    """

    def __init__(self, quantum: int) -> None:
        """An empty queue."""
        self.quantum = quantum
        self.texts = 0
        self.tokens = 0
        self._rings: dict[Priority, _Ring[T]] = {priority: _Ring() for priority in WEIGHTS}
        self._served = Priority.INTERACTIVE
        self._by_age: OrderedDict[int, T] = OrderedDict()

    def __iter__(self) -> Iterator[T]:
        return (turn.request for ring in self._rings.values() for turn in ring)

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
        ring.new.append(Turn(request, costs))
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
