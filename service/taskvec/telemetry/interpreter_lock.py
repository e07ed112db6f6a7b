"""Measures for how long the interpreter lock is held in one go.

While a thread holds the lock, no other thread runs Python: the event loop answers nobody. A monitor
thread sleeps for a few milliseconds at a time. To return from its sleep it needs the lock, so if it
returns late, another thread held the lock for that time, or the machine had no free core. From the
delay, the time that the thread waited for a core (schedstat) is subtracted; what is left counts at
most as much as the process's threads have computed meanwhile.

A hold is measured from the moment that the monitor wakes, so it may be longer than reported by an
interval, and a single hold that is shorter than an interval may be missed; those that recur are
seen.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Self

INTERVAL = 0.015
"""Seconds of a sleep: each wake-up takes about 40 microseconds of a core, 0.3 % in all."""

REPORT_INTERVAL = 0.25
"""Seconds between two reports."""

NEGLIGIBLE = 0.0005
"""Delays below this are the timer's own."""


class InterpreterLockMonitor:
    """A thread that measures; a context manager that ends it."""

    def __init__(self, report: Callable[[float], None]) -> None:
        """Prepare; entering starts the thread.

        Args:
            report: called four times a second, in the thread, with the longest hold since the last
                report, in seconds.
        """
        self._report = report
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lock-monitor", daemon=True)

    def __enter__(self) -> Self:
        """Start measuring; a system that has no thread left goes without."""
        with suppress(RuntimeError):
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop; the thread ends within an interval."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        with _WaitForCore() as waited:
            core_before, cpu_before = waited.seconds(), time.process_time()
            longest, report_at = 0.0, time.monotonic() + REPORT_INTERVAL
            before = time.monotonic()
            while not self._stopped.is_set():
                time.sleep(INTERVAL)
                now = time.monotonic()
                late = now - before - INTERVAL
                core, cpu = waited.seconds(), time.process_time()
                if late > NEGLIGIBLE:
                    held = min(late - (core - core_before), cpu - cpu_before)
                    longest = max(longest, held)
                core_before, cpu_before = core, cpu
                if now >= report_at:
                    self._report(longest)
                    longest, report_at = 0.0, now + REPORT_INTERVAL
                before = time.monotonic()


class _WaitForCore:
    """Reads how long the current thread has been ready to run without a core."""

    def __init__(self) -> None:
        self._file = -1

    def __enter__(self) -> Self:
        with suppress(OSError):  # not Linux, or a kernel without these statistics
            self._file = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file >= 0:
            os.close(self._file)

    def seconds(self) -> float:
        """Return the seconds so far; 0 if the system does not say."""
        if self._file < 0:
            return 0.0
        try:
            return int(os.pread(self._file, 64, 0).split()[1]) / 1e9
        except (OSError, ValueError, IndexError):
            return 0.0
