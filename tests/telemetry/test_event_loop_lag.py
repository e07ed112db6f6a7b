"""The lag of the event loop: a long turn is reported, whatever becomes of the report."""

from __future__ import annotations

import asyncio
import time

from taskvec.telemetry.event_loop_lag import EventLoopLag


def test_a_long_turn_is_reported() -> None:
    """A turn of the loop is reported with its length, less the interval of the measurement."""
    reported: list[float] = []

    async def block() -> None:
        lag = EventLoopLag(reported.append)
        lag.start()
        await asyncio.sleep(0.1)
        time.sleep(0.3)  # noqa: ASYNC251 - it is to block
        while not reported:
            await asyncio.sleep(0.01)
        lag.stop()

    asyncio.run(block())
    assert 0.28 <= max(reported) < 3


def test_standing_delay() -> None:
    """The delay counts from the first of the late iterations, and ends with one that is in time."""

    async def measure() -> list[float]:
        lag = EventLoopLag(lambda _: None)
        lag.start()
        delays = []
        for _ in range(3):
            time.sleep(0.3)  # noqa: ASYNC251 - it is to block
            delays.append(lag.standing_delay)
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        delays.append(lag.standing_delay)
        time.sleep(0.3)  # noqa: ASYNC251 - it is to block
        delays.append(lag.standing_delay)
        return delays

    first, second, third, in_time, again = asyncio.run(measure())
    assert 0.28 <= first < second - 0.29 < third - 0.58
    assert in_time == 0
    assert 0.28 <= again < third


def test_an_error_of_the_report_does_not_end_the_measurement() -> None:
    """A report that fails, as without memory, is followed by others, and the lag stays small."""
    reports = 0

    def fail(_: float) -> None:
        nonlocal reports
        reports += 1
        raise MemoryError

    async def measure() -> float:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        lag = EventLoopLag(fail)
        lag.start()
        while reports < 2:
            await asyncio.sleep(0.01)
        return lag.seconds

    assert asyncio.run(asyncio.wait_for(measure(), 30)) < 5
