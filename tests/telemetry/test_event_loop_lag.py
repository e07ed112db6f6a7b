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
