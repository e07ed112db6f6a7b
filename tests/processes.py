"""Real ``taskvec serve`` processes, their child processes, and load on them."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import httpx

from conftest import free_port, wait_until

TASKS = ["retrieval.query", "retrieval.passage", "text-matching", "clustering", "classification"]
TEXTS = ["one", "two words", "and a text that is rather longer than the others " * 3]
EXACT = ("--dtype", "float32", "--log-level", "error")
NOT_MEASURED = ("--max-queue-tokens", "1000000")
"""With a fixed limit the engine's speed is not measured: all its work is that of the test."""

MODULE = ("-m", "taskvec")


class Served:
    """A ``taskvec serve`` process, its URL and its child processes."""

    def __init__(self, *options: str, port: int = 0, run: tuple[str, ...] = MODULE) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, *run, "serve", "--port", str(self.port), *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE)

    def descendants(self) -> set[int]:
        """Return the ids of all descendant processes."""
        found: set[int] = set()
        new = {self.process.pid}
        while new:
            found |= new
            new = {child for parent in new for child in children(parent)} - found
        return found - {self.process.pid}

    def engine(self) -> int:
        """Return the id of the engine process."""
        (engine,) = (p for p in self.descendants() if "engine_process" in command_of(p))
        return engine

    def gateways(self) -> set[int]:
        """Return the ids of the gateway processes, which multiprocessing has spawned."""
        return {process for process in self.descendants() if "spawn_main" in command_of(process)}


@contextmanager
def started(*options: str, **kwargs: Any) -> Iterator[Served]:
    """Start a server, which may not listen yet; terminate it at the end."""
    server = Served(*options, **kwargs)
    try:
        yield server
    finally:
        server.process.terminate()
        server.process.communicate(timeout=60)


@contextmanager
def served(*options: str, probe: str = "ready", **kwargs: Any) -> Iterator[Served]:
    """Start a server and wait until its readiness (or another) probe succeeds."""
    with started(*options, **kwargs) as server:
        wait_until(f"{server.url}/health/{probe}", server.process)
        yield server


def ended(server: Served) -> tuple[int, str]:
    """Wait for a server to exit; return its exit code and errors. Kill it after 30 seconds."""
    try:
        errors = server.process.communicate(timeout=30)[1]
    except subprocess.TimeoutExpired:
        processes = server.descendants()
        server.process.kill()
        for process in processes:
            os.kill(process, signal.SIGKILL)
        errors = server.process.communicate()[1]
        raise AssertionError(f"it did not end: {errors.decode()[-2000:]}") from None
    return server.process.returncode, errors.decode()


class Load:
    """Sends requests, each on a new connection, until stopped; counts the outcomes.

    Attributes:
        stop: set it to stop sending.
        seen: number of requests by outcome: a status, ``refused``, or an exception.
    """

    def __init__(self, url: str, max_requests: int = 200, seconds: float = 20) -> None:
        self.stop = threading.Event()
        self.seen: dict[str, int] = {"200": 0}
        self._url = url
        self._numbers = count()
        self._max_requests = max_requests
        self._until = time.monotonic() + seconds
        self._lock = threading.Lock()

    def run(self) -> None:
        while not self.stop.is_set() and time.monotonic() < self._until:
            number = next(self._numbers)
            if number >= self._max_requests:
                return
            try:
                filler = " word" * 60  # long enough to be still in flight when a signal arrives
                body = {"input": [f"text {number} {n}{filler}" for n in range(16)]}
                reply = httpx.post(
                    f"{self._url}/v1/embeddings",
                    json=body | {"task": TASKS[number % 5]},
                    headers={"connection": "close"},
                    timeout=60,
                )
                outcome = str(reply.status_code)
                if outcome == "200":
                    assert len(reply.json()["data"]) == 16
            except httpx.ConnectError:
                outcome = "refused"
                time.sleep(0.05)
            except httpx.TransportError as error:
                outcome = repr(error)
            with self._lock:
                self.seen[outcome] = self.seen.get(outcome, 0) + 1

    def hold(self) -> None:
        """Stop sending and wait until the server has accepted all connections.

        The kernel resets connections still in the accept queue when the last process closes the
        socket.
        """
        self.stop.set()
        time.sleep(0.05)

    def wait_for(self, answered: int) -> None:
        wait_for(lambda: self.seen["200"] >= answered)


def embed(url: str, body: dict[str, Any], accept: str = "application/json") -> httpx.Response:
    """Send a request on a new connection and return the response."""
    return httpx.post(
        f"{url}/v1/embeddings", json=body, headers={"accept": accept}, timeout=60
    ).raise_for_status()


def answers(url: str) -> bool:
    """Return whether a new connection gets an answer soon."""
    try:
        return httpx.post(f"{url}/v1/embeddings", json={"input": "x"}, timeout=3).is_success
    except httpx.TransportError:
        return False


def connects(port: int) -> bool:
    """Return whether the port accepts connections."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


def total(shown: str, name: str, label: str = "") -> float:
    """Return the sum of a series in Prometheus text, optionally only of lines with a label."""
    values = [
        float(line.rpartition(" ")[2])
        for line in shown.splitlines()
        if re.match(rf"{name}[{{ ]", line) and label in line
    ]
    assert values, f"no series {name} {label}"
    return sum(values)


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Poll until a condition is true; fail after a timeout."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, f"not within {seconds} s"
        time.sleep(0.02)


def children(process: int) -> list[int]:
    """Return the ids of a process's children, of all threads; empty if it has ended."""
    try:
        lists = [file.read_text() for file in Path(f"/proc/{process}/task").glob("*/children")]
    except OSError:
        return []
    return [int(child) for listed in lists for child in listed.split()]


def command_of(process: int) -> str:
    """Return a process's command line; empty if it has ended."""
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return ""
