"""Bookkeeping of unanswered requests: reports to the observer, and waiting until idle."""

from __future__ import annotations

import asyncio
import time

import pytest

from taskvec.engines.inflight import InFlight


class Reports:
    """An observer that records its notifications."""

    def __init__(self) -> None:
        self.received: list[tuple[int, int, float | None]] = []

    def queue_changed(self, texts: int, tokens: int, oldest: float | None) -> None:
        self.received.append((texts, tokens, oldest))


def test_texts_and_tokens_are_reported_until_they_are_answered() -> None:
    """Each change is reported with the sums and the start of the oldest unanswered texts."""
    reports = Reports()
    in_flight = InFlight(reports)
    before = time.monotonic()
    first, second = in_flight.queued(2, 30), in_flight.queued(1, 5)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    sums = [(texts, tokens) for texts, tokens, _ in reports.received]
    assert sums == [(2, 30), (3, 35), (1, 5), (0, 0)]
    first_start, oldest_of_two, second_start, none = (oldest for *_, oldest in reports.received)
    assert none is None
    assert first_start is not None
    assert second_start is not None
    assert oldest_of_two == first_start
    assert before <= first_start <= second_start <= time.monotonic()


def test_failed_texts_are_no_longer_reported() -> None:
    """An exception ends a request like an answer."""
    reports = Reports()
    in_flight = InFlight(reports)
    with pytest.raises(ZeroDivisionError), in_flight.request(), in_flight.queued(2, 30):
        raise ZeroDivisionError
    assert reports.received[-1] == (0, 0, None)


@pytest.mark.anyio
async def test_idle_waits_for_every_request() -> None:
    """``wait_idle`` returns when the last request is answered, and at once without requests."""
    in_flight = InFlight(None)
    await in_flight.wait_idle()
    release = [asyncio.Event(), asyncio.Event()]

    async def answer(event: asyncio.Event) -> None:
        with in_flight.request(), in_flight.queued(1, 1):
            await event.wait()

    answers = [asyncio.create_task(answer(event)) for event in release]
    idle = asyncio.create_task(in_flight.wait_idle())
    await asyncio.sleep(0.01)
    release[0].set()
    await asyncio.sleep(0.01)
    assert not idle.done()
    release[1].set()
    await asyncio.wait_for(idle, 5)
    await asyncio.gather(*answers)
