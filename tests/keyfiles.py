"""Keys files and a real Redis (or Valkey) server for tests."""

from __future__ import annotations

import hashlib
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

from conftest import free_port
from programs import redis_server


def entry(name: str, secret: str, **limits: object) -> str:
    """Return one [[keys]] entry of a keys file."""
    digest = hashlib.sha256(secret.encode()).hexdigest()
    lines = ["[[keys]]", f'name = "{name}"', f'sha256 = "{digest}"']
    lines += [f"{k} = {v!r}" for k, v in limits.items()]
    return "\n".join(lines) + "\n"


def avoid_the_end_of_a_minute(seconds: float = 5) -> None:
    """Wait for the next minute of the clock if this one ends within so many seconds.

    Limits in memory count by minutes of the clock, so a test that crosses one sees other counts.
    """
    left = 60 - time.time() % 60
    if left < seconds:
        time.sleep(left)


class Redis:
    """Redis (or Valkey) process that can be stopped and started again on the same port."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", "/"]
        self.process = subprocess.Popen([redis_server(), *options], stdout=subprocess.DEVNULL)
        limit = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                assert time.monotonic() < limit, "the server does not listen"
                time.sleep(0.02)
            else:
                return

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@contextmanager
def running_redis() -> Iterator[Redis]:
    """Run a Redis (or Valkey) server on a free port."""
    redis = Redis()
    redis.start()
    try:
        yield redis
    finally:
        redis.stop()
