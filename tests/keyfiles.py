"""Keys files, and a Redis of the tests' own."""

from __future__ import annotations

import hashlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

from conftest import free_port


def entry(name: str, secret: str, **limits: object) -> str:
    """One [[keys]] of a file."""
    digest = hashlib.sha256(secret.encode()).hexdigest()
    lines = ["[[keys]]", f'name = "{name}"', f'sha256 = "{digest}"']
    lines += [f"{k} = {v!r}" for k, v in limits.items()]
    return "\n".join(lines) + "\n"


def wait_for_a_minute_with_room() -> None:
    """In memory minutes are the clock's: what is used just before one ends soon counts less."""
    left = 60 - time.time() % 60
    if left < 5:
        time.sleep(left)


class Redis:
    """A redis-server that can be stopped and started on one port."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        program = shutil.which("redis-server")
        assert program, "redis-server is not installed: apt-get install redis-server"
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", "/"]
        self.process = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
        limit = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                assert time.monotonic() < limit, "redis-server does not listen"
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
    """A redis-server on a free port."""
    redis = Redis()
    redis.start()
    try:
        yield redis
    finally:
        redis.stop()
