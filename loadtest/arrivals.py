"""Open-loop and closed-loop load: requests that start by a schedule, or after the previous one.

Locust's users are a closed loop: each waits for a response before it sends the next request,
whatever its wait time (constant_throughput only keeps a rate while responses are fast). A server
that stalls then gets fewer requests, and those that would have met the stall are never measured:
coordinated omission. Users of a search box do not wait for each other. So one locust user follows a
schedule that was drawn in advance, and starts a greenlet at each arrival. Latency counts from the
scheduled time, so it includes every delay, also that of the load generator.
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
"""Sends a request and waits for the response; the second argument is the scheduled time, by
``time.perf_counter``."""


def poisson(rate: float, seconds: float, rng: random.Random) -> list[float]:
    """Return the arrival times of a Poisson process, in seconds after the start.

    Args:
        rate: mean arrivals per second.
        seconds: duration.
        rng: source of randomness; the same seed gives the same times.
    """
    times = []
    due = rng.expovariate(rate)
    while due < seconds:
        times.append(due)
        due += rng.expovariate(rate)
    return times


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """Open loop: sends each request at its time, in seconds after the start, ascending."""

    requests: Sequence[Request]
    times: Sequence[float]

    def drive(self, send: Send) -> None:
        """Send all requests; return when the last response has arrived."""
        running = Group()
        started = time.perf_counter()
        for request, due in zip(self.requests, self.times, strict=True):
            gevent.sleep(max(0.0, started + due - time.perf_counter()))
            running.spawn(send, request, started + due)
        running.join()


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """Closed loop: each client sends its next request after a response; finds the capacity."""

    requests: Iterable[Request]
    clients: int
    seconds: float

    def drive(self, send: Send) -> None:
        """Send requests for the duration; return when the last response has arrived."""
        until = time.perf_counter() + self.seconds
        waiting = iter(self.requests)

        def client() -> None:
            while (now := time.perf_counter()) < until:
                send(next(waiting), now)

        running = Group()
        for _ in range(self.clients):
            running.spawn(client)
        running.join()
