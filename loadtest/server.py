"""A server that a benchmark starts: where it listens, and when it is ready."""

from __future__ import annotations

import socket
import time

import httpx

READY_WITHIN = 60.0
"""Seconds after which a start has failed."""


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_ready(port: int) -> None:
    """Until /health/ready says so."""
    url = f"http://127.0.0.1:{port}/health/ready"
    limit = time.monotonic() + READY_WITHIN
    while time.monotonic() < limit:
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.01)
    raise TimeoutError(url)
