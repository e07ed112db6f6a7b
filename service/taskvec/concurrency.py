"""Several things at once, all or nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")


async def gather_or_cancel(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results in order; the first failure, or being cancelled, cancels the rest.

    Returns only when nothing of it runs any more. The failure is raised as it is, not in a group.
    """
    tasks = [asyncio.create_task(part) for part in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


class CancelScope:
    """A with block that can be interrupted; it then raises an error of its own.

    As ``asyncio.timeout``, whose rules it follows: a cancellation from elsewhere stays one. That
    knows times only, and takes half as long again: every request has two or three of these.
    """

    __slots__ = ("_before", "_error", "_seconds", "_task", "_timer", "_used")

    def __init__(self, error: Callable[[], Exception], seconds: float | None = None) -> None:
        """Prepare for one use.

        Args:
            error: makes what the block raises when it was interrupted.
            seconds: after which it is, unless it is over; None for never by itself.
        """
        self._error = error
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None
        self._used = False

    def __enter__(self) -> Self:
        """Begin, in the task that will be interrupted."""
        task: asyncio.Task[Any] | None = asyncio.current_task()
        if task is None:
            raise RuntimeError("only a task can be interrupted")
        self._task = task
        self._before = task.cancelling()
        if self._seconds is not None:
            loop = task.get_loop()
            self._timer = loop.call_later(max(0.0, self._seconds), self.interrupt)
        return self

    def interrupt(self) -> None:
        """End the block; only before it is left."""
        self._used = True
        self._task.cancel()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave; raises the error where this interruption, and nothing else, ended the block."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._used:
            return
        others = self._task.uncancel() > self._before
        if kind is asyncio.CancelledError and not others:
            raise self._error() from None
