"""When requests start: by the clock, or when the one before was answered.

Locust's users are a closed loop: each waits for its answer before it asks again, whatever its wait
time is (constant_throughput, too, only keeps a rate while answers are fast). So a server that
stalls is asked less, and requests that would have met the stall never count: coordinated omission.
People who use a search box do not wait for each other. So one locust user walks a schedule that was
drawn before and starts a greenlet at each arrival, answered or not; latency counts from the moment
in the schedule, so it holds what the request waited for anything, the generator included.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import gevent
from gevent.pool import Group

from scenarios import Request

Send = Callable[[Request, float], None]
"""Sends a request that is due at a time of ``time.perf_counter`` and waits for its answer."""


def poisson(rate: float, seconds: float, dice: random.Random) -> list[float]:
    """Seconds after the begin at which requests arrive that know nothing of each other.

    Args:
        rate: arrivals a second, on average.
        seconds: none arrives later.
        dice: equal dice give equal schedules.
    """
    times = []
    due = dice.expovariate(rate)
    while due < seconds:
        times.append(due)
        due += dice.expovariate(rate)
    return times


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """Each request at its time; ``times`` in seconds after the begin, ascending."""

    requests: Sequence[Request]
    times: Sequence[float]

    def drive(self, send: Send) -> None:
        """Until the last is answered."""
        running = Group()
        begun = time.perf_counter()
        for request, due in zip(self.requests, self.times, strict=True):
            gevent.sleep(max(0.0, begun + due - time.perf_counter()))
            running.spawn(send, request, begun + due)
        running.join()


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """So many clients for so long, each sending when it was answered: what a server can bear."""

    requests: Iterable[Request]
    clients: int
    seconds: float

    def drive(self, send: Send) -> None:
        """Until the time is over and the last is answered."""
        until = time.perf_counter() + self.seconds
        waiting = iter(self.requests)

        def client() -> None:
            while (now := time.perf_counter()) < until:
                send(next(waiting), now)

        running = Group()
        for _ in range(self.clients):
            running.spawn(client)
        running.join()
