"""Large work runs in one thread at a time, and does not keep small work waiting."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from taskvec.concurrency import LARGE_BYTES, LargeWork

BOTH = [LARGE_BYTES, LARGE_BYTES + 1]


@pytest.mark.anyio
@pytest.mark.parametrize("size", BOTH)
async def test_one_thread_at_a_time(size: int) -> None:
    """Work of a size is done in the order of its arrival, never two at once."""
    work, running, order = LargeWork(), threading.Semaphore(1), list[int]()

    def count(number: int) -> int:
        assert running.acquire(blocking=False)
        time.sleep(0.005)
        order.append(number)
        running.release()
        return number

    calls = [work.run(size, lambda number=number: count(number)) for number in range(8)]
    assert await asyncio.gather(*calls) == order == list(range(8))


@pytest.mark.anyio
@pytest.mark.parametrize("size", BOTH)
async def test_large_and_small_work_do_not_wait_for_each_other(size: int) -> None:
    """Either is done while the other one is busy."""
    work, release = LargeWork(), threading.Event()
    (other,) = set(BOTH) - {size}
    busy = asyncio.create_task(work.run(other, lambda: release.wait(20)))
    assert await asyncio.wait_for(work.run(size, lambda: "done"), 10) == "done"
    assert not busy.done()
    release.set()
    assert await busy


@pytest.mark.anyio
async def test_an_error_and_a_cancellation_let_the_next_one_start() -> None:
    """Neither keeps the turn."""
    work, release = LargeWork(), threading.Event()
    with pytest.raises(ZeroDivisionError):
        await work.run(1, lambda: 1 // 0)
    left = asyncio.create_task(work.run(1, lambda: release.wait(20)))
    await asyncio.sleep(0.05)
    left.cancel()
    assert await asyncio.wait_for(work.run(1, lambda: "done"), 10) == "done"
    release.set()
