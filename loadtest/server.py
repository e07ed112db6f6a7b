"""Find a port for a server, wait until it is ready, and read its metrics."""

from __future__ import annotations

import socket
import subprocess
import time
from http.client import HTTPException
from urllib.request import urlopen

START_TIMEOUT = 60.0
"""Timeout of a start in seconds."""

PAUSES = {
    "longest_turn_ms": "taskvec_event_loop_longest_turn_seconds",
    "longest_lock_hold_ms": "taskvec_interpreter_lock_longest_hold_seconds",
    "engine_longest_turn_ms": "taskvec_engine_process_event_loop_longest_turn_seconds",
    "engine_longest_lock_hold_ms": "taskvec_engine_process_interpreter_lock_longest_hold_seconds",
}
"""Names in results -> series of /metrics."""


def free_port() -> int:
    """Return a port that is not in use."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_ready(
    port: int,
    path: str = "/health/ready",
    timeout: float = START_TIMEOUT,
    process: subprocess.Popen[bytes] | None = None,
) -> None:
    """Poll a path of a server on this machine until its status is 200.

    Uses the standard library, because httpx cannot be imported after locust has patched ``select``.

    Raises:
        TimeoutError: the server was not ready within the timeout.
        ChildProcessError: the process has ended.
    """
    url = f"http://127.0.0.1:{port}{path}"
    limit = time.monotonic() + timeout
    while time.monotonic() < limit:
        if process is not None and process.poll() is not None:
            raise ChildProcessError(f"{url}: the server ended with code {process.returncode}")
        try:
            with urlopen(url):
                return
        except (OSError, HTTPException):  # not listening yet, or not ready: HTTPError is an OSError
            time.sleep(0.01)
    raise TimeoutError(url)


def longest_pauses(port: int) -> dict[str, float]:
    """Return the longest turn of each event loop and hold of each interpreter lock, milliseconds.

    They are of the last minute; empty if the server does not measure them.
    """
    with urlopen(f"http://127.0.0.1:{port}/metrics") as page:
        return pauses_of(page.read().decode())


def pauses_of(page: str) -> dict[str, float]:
    """See ``longest_pauses``; ``page`` is the text of /metrics."""
    values = dict(line.rsplit(" ", 1) for line in page.splitlines() if line and line[0] != "#")
    return {
        name: round(1e3 * float(values[series]), 1)
        for name, series in PAUSES.items()
        if series in values
    }
