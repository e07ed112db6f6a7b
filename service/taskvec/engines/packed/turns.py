"""The queue of an engine: requests take turns, so that a big one never blocks a small one.

Deficit round robin (Shreedhar and Varghese, 1995) in tokens, with newcomers served first for one
turn, as fq_codel does for new flows (RFC 8290, section 4.1).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


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
class TurnQueue(Generic[T]):
    """Requests with texts that wait; not thread-safe, its owner locks.

    Attributes:
        quantum: tokens a request may take in one turn.
        texts: texts that wait.
        tokens: tokens that wait.
    """

    quantum: int
    texts: int = 0
    tokens: int = 0
    _new: deque[Turn[T]] = field(default_factory=deque)
    _old: deque[Turn[T]] = field(default_factory=deque)
    _by_age: OrderedDict[int, T] = field(default_factory=OrderedDict)

    def __iter__(self) -> Iterator[T]:
        yield from (turn.request for turn in (*self._new, *self._old))

    @property
    def oldest(self) -> T | None:
        """The request that has waited longest, of those with a text that waits."""
        return next(iter(self._by_age.values()), None)

    def push(self, request: T, costs: list[int]) -> None:
        """Queue a request whose texts cost so many tokens each."""
        self._new.append(Turn(request, costs))
        self._by_age[id(request)] = request
        self.texts += len(costs)
        self.tokens += sum(costs)

    def drop(self, leaves: Callable[[T], bool]) -> list[tuple[T, int]]:
        """Remove the requests that leave; each with the number of its texts that still waited."""
        dropped = []
        for ring in (self._new, self._old):
            for turn in [turn for turn in ring if leaves(turn.request)]:
                ring.remove(turn)
                del self._by_age[id(turn.request)]
                waiting = turn.costs[turn.taken :]
                self.texts -= len(waiting)
                self.tokens -= sum(waiting)
                dropped.append((turn.request, len(waiting)))
        return dropped

    def take(self, budget: int) -> list[tuple[T, int]]:
        """The next batch: (request, index of its text in ``costs``), at most ``budget`` tokens.

        A text longer than the budget is taken alone.
        """
        batch: list[tuple[T, int]] = []
        room = budget
        while self._new or self._old:
            turn = (self._new or self._old).popleft()
            turn.deficit += self.quantum
            while not turn.done and turn.costs[turn.taken] <= turn.deficit:
                cost = turn.costs[turn.taken]
                if cost > room and batch:
                    turn.deficit -= self.quantum
                    self._old.appendleft(turn)
                    return batch
                batch.append((turn.request, turn.taken))
                turn.taken += 1
                turn.deficit -= cost
                room -= cost
                self.texts -= 1
                self.tokens -= cost
            if turn.done:
                del self._by_age[id(turn.request)]
            else:
                self._old.append(turn)
        return batch
