"""Open-loop schedules and closed-loop clients."""

from __future__ import annotations

import random
import statistics
import time
from itertools import pairwise

import gevent
import pytest

from arrivals import ClosedLoop, OpenLoop, poisson
from scenarios import Request

REQUESTS = [Request("query", 1, b"{}") for _ in range(20)]


def test_a_poisson_schedule_has_its_rate_and_exponential_gaps() -> None:
    """Times ascend within the duration, at the rate; mean and deviation of the gaps are equal."""
    times = poisson(50, 100, random.Random(0))
    gaps = [later - sooner for sooner, later in pairwise(times)]
    assert times == sorted(times)
    assert times[-1] < 100
    assert len(times) == pytest.approx(5000, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(statistics.mean(gaps), rel=0.1)


def test_equal_seeds_give_equal_schedules() -> None:
    """The same seed gives the same schedule, so that a run can be repeated."""
    assert poisson(5, 10, random.Random(3)) == poisson(5, 10, random.Random(3))


def test_an_open_loop_does_not_wait_for_responses() -> None:
    """All requests are sent by the schedule, before the first response arrives."""
    sent: list[float] = []

    def send(_: Request, due: float) -> None:
        sent.append(due)
        gevent.sleep(0.5)
        assert len(sent) == len(REQUESTS)

    started = time.perf_counter()
    times = [0.005 * number for number in range(len(REQUESTS))]
    OpenLoop(REQUESTS, times).drive(send)
    assert len(sent) == len(REQUESTS)
    assert time.perf_counter() - started < 10 * 0.5  # one after another they take 20 times that


def test_latency_counts_from_the_scheduled_time_even_if_the_generator_is_late() -> None:
    """A stall of the generator is part of the latency."""
    late: list[float] = []

    def send(_: Request, due: float) -> None:
        late.append(time.perf_counter() - due)
        if len(late) == 1:
            time.sleep(0.2)  # no other greenlet runs meanwhile

    OpenLoop(REQUESTS[:3], [0.0, 0.05, 0.1]).drive(send)
    assert late[1] >= 0.14
    assert late[2] >= 0.09


def test_a_closed_loop_has_one_request_in_flight_per_client() -> None:
    """Each client sends its next request after a response, until the time is over."""
    running, peak, sent = 0, 0, 0

    def send(_: Request, __: float) -> None:
        nonlocal running, peak, sent
        running += 1
        sent += 1
        peak = max(peak, running)
        gevent.sleep(0.01)
        running -= 1

    ClosedLoop(iter(REQUESTS * 1000), clients=4, seconds=0.3).drive(send)
    assert peak == 4
    assert running == 0
    assert 8 <= sent <= 4 * 31
