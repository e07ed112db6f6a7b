"""CancelScope: timeouts, calls of ``cancel``, and cancellations of the task by others."""

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
    """Error that the scopes of these tests raise."""


async def sleep_in_scope(seconds: float) -> None:
    """Sleep for a minute in a scope with a timeout."""
    with CancelScope(LateError, seconds):
        await asyncio.sleep(60)


async def test_a_block_within_its_timeout() -> None:
    """A block that ends in time leaves no timer behind that could cancel the task."""
    with CancelScope(LateError, 0.01):
        await asyncio.sleep(0)
    await asyncio.sleep(0.05)


@pytest.mark.parametrize("seconds", [0.02, 0.0, -1.0])
async def test_a_block_that_exceeds_its_timeout(seconds: float) -> None:
    """The scope ends the block at the timeout, even if that is zero or negative, and raises."""
    start = time.monotonic()
    with pytest.raises(LateError), CancelScope(LateError, seconds):
        await asyncio.sleep(60)
    assert time.monotonic() - start < 30
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await asyncio.sleep(0)  # the task goes on


async def test_cancel_ends_the_block() -> None:
    """A scope without a timeout ends when ``cancel`` is called."""
    scope = CancelScope(LateError)
    asyncio.get_running_loop().call_later(0.01, scope.cancel)
    with pytest.raises(LateError), scope:
        await asyncio.sleep(60)


async def test_a_cancellation_of_the_task_is_kept() -> None:
    """A cancelled task ends with CancelledError, even if the timeout expires at the same time."""
    for seconds in (60.0, 0.0):
        task = asyncio.create_task(sleep_in_scope(seconds))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_an_error_of_the_block_is_kept() -> None:
    """An error that the block raises while it is being cancelled is not replaced."""

    async def fail_when_ended() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            raise ValueError("own")

    with pytest.raises(ValueError, match="own"), CancelScope(LateError, 0.01):
        await fail_when_ended()


async def test_nested_scopes() -> None:
    """The timeout of an inner scope does not end the outer one, and the other way round."""
    with CancelScope(ValueError, 60):
        with pytest.raises(LateError), CancelScope(LateError, 0.01):
            await asyncio.sleep(60)
        await asyncio.sleep(0)
    with pytest.raises(LateError), CancelScope(LateError, 0.01), CancelScope(ValueError, 60):
        await asyncio.sleep(60)


async def test_a_scope_in_an_asyncio_timeout() -> None:
    """A scope and a surrounding ``asyncio.timeout`` do not change each other."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await sleep_in_scope(60)
    with pytest.raises(LateError):
        async with asyncio.timeout(60):
            await sleep_in_scope(0.01)


async def test_a_scope_leaves_no_reference_cycle() -> None:
    """A scope that has ended is freed without the garbage collector: every request has one."""

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


def test_a_scope_needs_a_task() -> None:
    """Entering a scope outside of a task is an error."""
    with pytest.raises(RuntimeError), CancelScope(LateError, 1):
        pass
