"""Blocks that are ended from outside: by time, by somebody, and cancellations that are not ours."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from functools import partial

import pytest

from taskvec.concurrency import CancelScope

pytestmark = pytest.mark.anyio


class LateError(Exception):
    """What the tests' blocks raise."""


async def slowly(seconds: float) -> None:
    """Something that takes a minute, in a block of so many seconds."""
    with CancelScope(LateError, seconds):
        await asyncio.sleep(60)


async def test_a_block_in_time() -> None:
    """A block that ends by itself gives its result, and no timer is left to interrupt the task."""
    with CancelScope(LateError, 0.01):
        await asyncio.sleep(0)
    await asyncio.sleep(0.05)


@pytest.mark.parametrize("seconds", [0.02, 0.0, -1.0])
async def test_a_block_that_takes_too_long(seconds: float) -> None:
    """It ends at its time, also where that has passed already, with the error it was given."""
    begun = time.monotonic()
    with pytest.raises(LateError), CancelScope(LateError, seconds):
        await asyncio.sleep(60)
    assert time.monotonic() - begun < 30
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await asyncio.sleep(0)  # the task goes on


async def test_somebody_interrupts() -> None:
    """A block without a time ends when it is told to."""
    block = CancelScope(LateError)
    asyncio.get_running_loop().call_later(0.01, block.interrupt)
    with pytest.raises(LateError), block:
        await asyncio.sleep(60)


async def test_a_cancellation_stays_one() -> None:
    """Who cancels the task sees it cancelled, also where the time is over in the same moment."""
    for seconds in (60.0, 0.0):
        task = asyncio.create_task(slowly(seconds))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_failure_stays_one() -> None:
    """An error of the block's own is not replaced, though it comes while being interrupted."""

    async def fail_when_ended() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            raise ValueError("own")

    with pytest.raises(ValueError, match="own"), CancelScope(LateError, 0.01):
        await fail_when_ended()


async def test_blocks_in_each_other() -> None:
    """The inner block's end is not the outer's, and the other way round."""
    with CancelScope(ValueError, 60):
        with pytest.raises(LateError), CancelScope(LateError, 0.01):
            await asyncio.sleep(60)
        await asyncio.sleep(0)
    with pytest.raises(LateError), CancelScope(LateError, 0.01), CancelScope(ValueError, 60):
        await asyncio.sleep(60)


async def test_within_a_timeout() -> None:
    """It works within asyncio's own timeout, which stays what it is."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await slowly(60)
    with pytest.raises(LateError):
        async with asyncio.timeout(60):
            await slowly(0.01)


async def test_nothing_is_left_to_the_garbage_collector() -> None:
    """A block that is over holds nothing that would not go by itself: there is one a request."""

    class Holder:
        pass

    holder = Holder()
    seen = weakref.ref(holder)
    gc.disable()
    try:
        with CancelScope(partial(LateError, holder), 60):
            del holder
        assert seen() is None
    finally:
        gc.enable()


def test_without_a_task() -> None:
    """Outside of a task there is nothing to interrupt."""
    with pytest.raises(RuntimeError), CancelScope(LateError, 1):
        pass
