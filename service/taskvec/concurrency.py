"""Structured concurrency for asyncio (gather, cancel scopes, background tasks), and threads."""

from __future__ import annotations

import asyncio
import errno
import os
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Executor
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TypeVar

import structlog

log = structlog.get_logger(__name__)

T = TypeVar("T")

SWITCH_INTERVAL = 0.0005
"""Seconds for which a thread of a server waits for the interpreter lock before it asks for it; a
tenth of Python's default. The engine's thread needs the lock at each of a forward pass's thousand
calls, and would wait that long at each while the event loop is busy (docs/adr/0018)."""

NO_THREAD = ("can't start new thread", "can't allocate lock")
"""Messages of the RuntimeError that Python raises for lack of memory or threads."""


async def gather_or_cancel(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run coroutines concurrently and return their results in order.

    The first error, or a cancellation of the caller, cancels the other coroutines. Returns or
    raises only after all of them have ended. Raises that first error itself; ``asyncio.TaskGroup``
    would wrap it in an exception group.
    """
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def is_shortage(error: BaseException | None) -> bool:
    """Return whether memory could not be allocated, or a thread not be started for lack of it."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and str(error) in NO_THREAD
    )


async def run_in_thread(
    function: Callable[..., T], *args: Any, executor: Executor | None = None
) -> T:
    """Run a function that blocks for some milliseconds, and return its result.

    It runs in a thread; where the system has none left, in the calling one: what must be done
    under a shortage is done late instead of never.

    Args:
        function: the function.
        args: its arguments.
        executor: has the threads; None for the event loop's own, where it may have to wait.
    """
    loop = asyncio.get_running_loop()
    try:
        running = loop.run_in_executor(executor, function, *args)
    except RuntimeError as error:
        if not is_shortage(error):
            raise
        return function(*args)
    return await running


class CancelScope:
    """Context manager that can be cancelled, by a timeout or by a call, and then raises an error.

    Follows the rules of ``asyncio.timeout``: a cancellation of the task by anyone else stays a
    ``CancelledError``. ``asyncio.timeout`` itself supports timeouts only, and takes 1.5 times as
    long; every request enters two or three scopes.
    """

    __slots__ = ("_before", "_cancelled", "_error", "_seconds", "_task", "_timer")

    def __init__(self, error: Callable[[], Exception], seconds: float | None = None) -> None:
        """Create a scope, which can be entered once.

        Args:
            error: makes the exception that the scope raises if it was cancelled.
            seconds: timeout; None for no timeout.
        """
        self._error = error
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None
        self._cancelled = False

    def __enter__(self) -> Self:
        """Enter the scope in the current task and start the timeout."""
        task: asyncio.Task[Any] | None = asyncio.current_task()
        if task is None:
            raise RuntimeError("a cancel scope must be entered in a task")
        self._task = task
        self._before = task.cancelling()
        if self._seconds is not None:
            loop = task.get_loop()
            self._timer = loop.call_later(max(0.0, self._seconds), self.cancel)
        return self

    def cancel(self) -> None:
        """Cancel the block; must not be called after the scope has been left."""
        self._cancelled = True
        self._task.cancel()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the scope; raise the error if nothing else than this scope ended the block."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._cancelled:
            return
        others = self._task.uncancel() > self._before
        if kind is asyncio.CancelledError and not others:
            raise self._error() from None


LARGE_BYTES = 1 << 20
"""Work on more bytes than this does not keep smaller work waiting."""


class LargeWork:
    """Runs what would block the event loop: one thread for large work, one for smaller.

    Parsing and writing hold the interpreter lock most of the time. Of several threads that wait for
    the lock, the operating system chooses the next: with six of them, as the loop's default
    executor has on two cores, the event loop waited for several others whenever it needed the lock.
    """

    def __init__(self) -> None:
        """Start with nothing running."""
        self._small, self._large = asyncio.Semaphore(1), asyncio.Semaphore(1)

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """Return what ``work`` returns; work is done in the order of its arrival.

        Args:
            size: bytes that it reads or writes.
            work: called in a thread; goes on if the call is cancelled.
        """
        async with self._large if size > LARGE_BYTES else self._small:
            return await asyncio.get_running_loop().run_in_executor(None, work)


TICKS = 5
"""Ticks of a ``ResponsiveTimeout``."""

LATE_SECONDS = 0.01
"""A tick that is later than this shows that the event loop was busy with other work."""


class ResponsiveTimeout(CancelScope):
    """Cancel scope whose timeout counts only time in which the event loop ran on schedule.

    A loop that is late reads an answer late: with an ordinary timeout, its own work counts as the
    silence of the other side. This timeout is divided into ticks, and a tick that comes late is
    repeated. Between two ticks the loop reads what has arrived.
    """

    __slots__ = ("_tick_seconds", "_ticked_at", "_ticks_left")

    def __init__(self, error: Callable[[], Exception], seconds: float) -> None:
        """Create a scope, which can be entered once.

        Args:
            error: makes the exception that the scope raises if it was cancelled.
            seconds: timeout, at least ``TICKS * LATE_SECONDS``.
        """
        super().__init__(error)
        self._tick_seconds = seconds / TICKS
        self._ticks_left = TICKS

    def __enter__(self) -> Self:
        """Enter the scope in the current task and start the timeout."""
        super().__enter__()
        self._start_tick()
        return self

    def _start_tick(self) -> None:
        self._ticked_at = time.monotonic()
        loop = self._task.get_loop()
        self._timer = loop.call_later(self._tick_seconds, self._end_tick)

    def _end_tick(self) -> None:
        lateness = time.monotonic() - self._ticked_at - self._tick_seconds
        if abs(lateness) < LATE_SECONDS:
            self._ticks_left -= 1
        if self._ticks_left:
            self._start_tick()
        else:
            self.cancel()


FIRST_RESTART_SECONDS, MAX_RESTART_SECONDS = 1.0, 60.0
"""Pause after an unexpected error of a background task; it doubles each time."""


MAX_FAILURES = 10
"""Unexpected errors in a row, over five minutes, after which a background task is given up."""

MAX_ENDS = 3
"""Times that a background task is started again which has returned, or which somebody cancelled."""


class BackgroundTaskError(Exception):
    """A background task cannot be kept running: the process must be replaced."""


async def keep_running(
    name: str, run: Callable[[], Coroutine[Any, Any, None]], max_failures: int | None = None
) -> None:
    """Run a coroutine function; after an unexpected error, log it and run the function again.

    Returns when the function does.

    Args:
        name: name in logs.
        run: the coroutine function.
        max_failures: errors in a row of which the last is raised; None if none is.
    """
    pause = FIRST_RESTART_SECONDS
    failures = 0
    while True:
        started = time.monotonic()
        try:
            return await run()
        except Exception:
            if time.monotonic() - started > MAX_RESTART_SECONDS:
                pause, failures = FIRST_RESTART_SECONDS, 0
            failures += 1
            if failures == max_failures:
                raise
            log.exception("background_task_failed", task=name, restart_seconds=pause)
        await asyncio.sleep(pause)
        pause = min(pause * 2, MAX_RESTART_SECONDS)


class BackgroundTasks:
    """Owns the tasks that run as long as the service, and keeps them running."""

    def __init__(self, on_end: Callable[[BackgroundTaskError], None]) -> None:
        """Start without tasks.

        Args:
            on_end: called if a task cannot be kept running that was to run until ``stop``.
        """
        self._on_end = on_end
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False

    def start(
        self, name: str, run: Callable[[], Coroutine[Any, Any, None]], *, may_end: bool = False
    ) -> None:
        """Start a task; after an unexpected error or end it is started again.

        Args:
            name: name in logs and reasons.
            run: the coroutine function.
            may_end: whether the function may return.
        """
        ends = 0

        def launch() -> None:
            task = asyncio.create_task(keep_running(name, run, MAX_FAILURES), name=name)
            self._tasks.add(task)
            task.add_done_callback(ended)

        def ended(task: asyncio.Task[None]) -> None:
            nonlocal ends
            self._tasks.discard(task)
            failed = not task.cancelled() and task.exception() is not None
            if self._stopping or (may_end and not failed and not task.cancelled()):
                return
            ends += 1
            log.error("background_task_ended", task=name, times=ends)
            if failed or ends > MAX_ENDS:
                self._on_end(
                    BackgroundTaskError(f"The background task {name!r} cannot be kept running.")
                )
            else:
                launch()

        launch()

    async def stop(self) -> None:
        """Cancel all tasks and wait for their end."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def lower_priority(niceness: int) -> None:
    """Let the kernel prefer other threads to the current one and to the threads that it starts.

    On Linux the nice value is a thread's own; elsewhere it is left as it is.

    Args:
        niceness: added to the nice value, which is at most 19.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with suppress(OSError):  # a sandbox may not allow it
            nice = os.getpriority(os.PRIO_PROCESS, thread)
            os.setpriority(os.PRIO_PROCESS, thread, min(19, nice + niceness))
