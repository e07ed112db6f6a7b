"""The longest hold of the interpreter lock: what holds it is seen, a busy machine is not."""

from __future__ import annotations

import os
import time

from sockets import wait_for
from taskvec.telemetry.interpreter_lock import InterpreterLockMonitor

DIGITS = 150_000


def test_a_long_operation_shows() -> None:
    """An operation that keeps the lock is reported with most of its length."""
    reported: list[float] = []
    with InterpreterLockMonitor(reported.append):
        wait_for(lambda: reported)
        number = 3**DIGITS
        for _ in range(20):  # an operation may begin and end while the monitor sleeps
            began = time.thread_time()
            number * number * number
            held = time.thread_time() - began
            reports = len(reported)
            wait_for(lambda: len(reported) > reports + 1)  # noqa: B023 - called at once
            if max(reported) >= held / 3:
                break
            number *= number
    assert max(reported) >= held / 3


def test_other_processes_do_not_show() -> None:
    """Processes that take all cores delay the monitor, and hold no lock of this one."""
    reported: list[float] = []
    children = []
    for _ in range(4 * (os.cpu_count() or 1)):
        child = os.fork()
        if not child:
            until = time.monotonic() + 1.5
            while time.monotonic() < until:
                pass
            os._exit(0)
        children.append(child)
    with InterpreterLockMonitor(reported.append):
        for child in children:
            os.waitpid(child, 0)
    assert reported
    assert max(reported) < 0.05


def test_the_thread_ends() -> None:
    """Nothing is reported after the end."""
    reported: list[float] = []
    with InterpreterLockMonitor(reported.append):
        wait_for(lambda: reported)
    reports = len(reported)
    time.sleep(0.4)
    assert len(reported) == reports
