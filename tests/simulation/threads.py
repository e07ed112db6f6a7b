"""Threads that run one at a time, in virtual time: a replacement for ``threading`` in a module.

Every simulated thread is a real one, but only the one whose turn it is runs, while the event loop
waits for it. A thread gives its turn back when it sleeps, waits or ends, and now and then where it
takes or gives back a lock: between these points, code that locks what it shares cannot tell
in which order threads run.
"""

from __future__ import annotations

import _thread
import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from simulation.loop import SimulatedLoop

SWITCHES = 0.1
"""Share of the lock operations at which a thread is interrupted."""


class Ended(BaseException):
    """Ends the threads that are left when a simulation ends."""


class Threads:
    """Stands for the module ``threading``, and makes executors."""

    def __init__(self, loop: SimulatedLoop) -> None:
        """Belong to a loop, whose ``run_in_executor`` gets simulated threads, too."""
        self.loop = loop
        self.all: list[_Thread] = []
        self.crashes: list[BaseException] = []
        loop.jobs = lambda work: self.Thread(target=work, name="executor").start()

    def Thread(self, **options: Any) -> _Thread:  # noqa: N802 - the names of ``threading``
        """Return a thread that is not started; takes ``threading.Thread``'s keywords."""
        return _Thread(self, **options)

    def Lock(self) -> _Lock:  # noqa: N802
        """Return a lock."""
        return _Lock(self)

    RLock = Lock

    def Condition(self, lock: _Lock | None = None) -> _Condition:  # noqa: N802
        """Return a condition."""
        return _Condition(self, lock or _Lock(self))

    def Event(self) -> _Event:  # noqa: N802
        """Return an event."""
        return _Event(self)

    def get_native_id(self) -> int:
        """Return an id that belongs to no thread."""
        return -1

    def executor(self, max_workers: int, **_: Any) -> _Executor:
        """Return an executor; it never has more jobs than ``max_workers`` here."""
        return _Executor(self, max_workers)

    def sleep(self, seconds: float) -> None:
        """Let the current simulated thread sleep, or compute."""
        thread = self.loop.thread
        assert thread is not None
        thread.wake_after(seconds)
        thread.give_back()

    def interrupt(self) -> None:
        """Let others run, now and then."""
        if self.loop.thread is not None and self.loop.random.random() < SWITCHES:
            self.sleep(self.loop.random.choice((0.0, 1e-4, 3e-3)))

    def end_all(self) -> None:
        """End the threads that are left."""
        for thread in self.all:
            if thread.is_alive() and thread.started:
                thread.ending = True
                thread.resume(thread.turns)


class _Thread:
    def __init__(
        self,
        threads: Threads,
        *,
        target: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        name: str = "",
        daemon: bool | None = None,  # noqa: ARG002 - all are
    ) -> None:
        self.name = name
        self.started = False
        self.ending = False
        self.turns = 0
        self._threads = threads
        self._run_target = lambda: target(*args, **(kwargs or {}))
        self._turn, self._back = _thread.allocate_lock(), _thread.allocate_lock()
        self._turn.acquire()
        self._back.acquire()
        self._done = False
        self._joining: list[_Thread] = []

    def start(self) -> None:
        self.started = True
        self._threads.all.append(self)
        threading.Thread(target=self._run, name=f"simulated {self.name}", daemon=True).start()
        self.wake_after(self._threads.loop.random.choice((0.0, 1e-4, 5e-3)))

    def wake_after(self, seconds: float) -> asyncio.Handle:
        """Let the thread's present wait end; without effect if that has ended before."""
        return self._threads.loop.event(seconds, self.resume, self.turns)

    def is_alive(self) -> bool:
        return not self._done

    def join(self, timeout: float | None = None) -> None:  # noqa: ARG002 - nobody limits it
        if not self._done:
            thread = self._threads.loop.thread
            self._joining.append(thread)
            thread.give_back()

    def resume(self, turns: int) -> None:
        """Let the thread run until it gives its turn back, if it has had so many turns."""
        if self._done or turns != self.turns:
            return
        self.turns += 1
        loop = self._threads.loop
        loop.thread = self
        self._turn.release()
        self._back.acquire()
        loop.thread = None

    def give_back(self) -> None:
        """Wait for the next turn; called by the thread."""
        self._back.release()
        self._turn.acquire()
        if self.ending:
            raise Ended

    def _run(self) -> None:
        self._turn.acquire()
        try:
            if not self.ending:
                self._run_target()
        except Ended:
            pass
        except BaseException as error:  # noqa: BLE001 - reported as a failure of the schedule
            self._threads.crashes.append(error)
        self._done = True
        for thread in self._joining:
            thread.wake_after(0.0)
        self._back.release()


class _Lock:
    """A lock that may be taken again by its holder."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._holder: Any = None
        self._depth = 0
        self._waiting: list[_Thread] = []

    def acquire(self) -> bool:
        loop = self._threads.loop
        me = loop.thread or loop
        if self._holder is not me:
            self._threads.interrupt()
            while self._holder is not None:
                assert loop.thread is not None, "the event loop would wait for a lock"
                self._waiting.append(loop.thread)
                loop.thread.give_back()
        self._holder = me
        self._depth += 1
        return True

    def release(self) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._holder = None
            waiting, self._waiting = self._waiting, []
            for thread in waiting:
                thread.wake_after(0.0)
            self._threads.interrupt()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class _Condition:
    def __init__(self, threads: Threads, lock: _Lock) -> None:
        self._threads = threads
        self._lock = lock
        self._waiting: list[_Thread] = []
        self.acquire, self.release = lock.acquire, lock.release

    def __enter__(self) -> bool:
        return self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        thread = self._threads.loop.thread
        assert thread is not None, "the event loop would wait"
        self._waiting.append(thread)
        self._lock._holder, self._lock._depth = None, 0
        for other in self._lock._waiting:
            other.wake_after(0.0)
        self._lock._waiting.clear()
        timer = None if timeout is None else thread.wake_after(max(0.0, timeout))
        thread.give_back()
        notified = thread not in self._waiting
        if not notified:
            self._waiting.remove(thread)
        elif timer is not None:
            timer.cancel()
        self._lock.acquire()
        return notified

    def wait_for(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        end = None if timeout is None else self._threads.loop.time() + timeout
        while not predicate():
            left = None if end is None else end - self._threads.loop.time()
            if left is not None and left <= 0:
                return predicate()
            self.wait(left)
        return True

    def notify(self, n: int = 1) -> None:
        loop = self._threads.loop
        for thread in self._waiting[:n]:
            thread.wake_after(loop.random.choice((0.0, 1e-4, 5e-3)))
        del self._waiting[:n]

    def notify_all(self) -> None:
        self.notify(len(self._waiting))


class _Event:
    def __init__(self, threads: Threads) -> None:
        self._condition = threads.Condition()
        self._set = False

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        with self._condition:
            self._set = True
            self._condition.notify_all()

    def clear(self) -> None:
        self._set = False

    def wait(self, timeout: float | None = None) -> bool:
        with self._condition:
            return self._condition.wait_for(self.is_set, timeout)


class _Executor:
    def __init__(self, threads: Threads, max_workers: int) -> None:
        self._threads = threads
        self._free = max_workers
        self._jobs: deque[Callable[[], None]] = deque()
        self._closed = False

    def submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        assert not self._closed, "the executor is closed"
        future: Future[Any] = Future()
        self._jobs.append(lambda: future.set_result(work(*args)))
        if self._free:
            self._free -= 1
            self._threads.Thread(target=self._run, name="worker").start()
        return future

    def shutdown(self, *, wait: bool, cancel_futures: bool) -> None:
        assert cancel_futures
        assert not wait
        self._closed = True
        self._jobs.clear()

    def _run(self) -> None:
        while self._jobs:
            self._jobs.popleft()()
        self._free += 1
