"""How long a call keeps other threads from running Python."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def short_switch_interval() -> Iterator[None]:
    """Let threads that run Python give way at once: what is left are calls that do not."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def longest_hold(work: Callable[[], object]) -> float:
    """Return the seconds for which work in another thread kept this one from running."""
    longest = 0.0

    def wait_and_work() -> None:
        time.sleep(0.002)
        work()

    with short_switch_interval():
        thread = threading.Thread(target=wait_and_work)
        thread.start()
        last = time.perf_counter()
        while thread.is_alive():
            time.sleep(0.0002)
            now = time.perf_counter()
            longest = max(longest, now - last)
            last = now
    return longest
