"""A server that a benchmark starts: where it listens, and when it is ready."""

from __future__ import annotations

import socket
import subprocess
import time
from http.client import HTTPException
from urllib.request import urlopen

READY_WITHIN = 60.0
"""Seconds after which a start has failed."""


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_ready(
    port: int,
    path: str = "/health/ready",
    within: float = READY_WITHIN,
    process: subprocess.Popen[bytes] | None = None,
) -> None:
    """Until a path of a server on this machine answers with 200.

    The standard library asks: httpx does not import where locust has replaced ``select``.

    Raises:
        TimeoutError: it did not within so many seconds.
        ChildProcessError: the process has ended.
    """
    url = f"http://127.0.0.1:{port}{path}"
    limit = time.monotonic() + within
    while time.monotonic() < limit:
        if process is not None and process.poll() is not None:
            raise ChildProcessError(f"{url}: the server ended with code {process.returncode}")
        try:
            with urlopen(url):
                return
        except (OSError, HTTPException):  # not listening yet, or not ready: HTTPError is an OSError
            time.sleep(0.01)
    raise TimeoutError(url)
