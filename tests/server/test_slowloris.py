"""A thousand clients that send a byte at a time, and others that want to work meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from itertools import cycle
from pathlib import Path

import httpx
import numpy as np
import pytest

from processes import EXACT, Served, served, wait_for
from taskvec.open_files import MAX_CONNECTING

pytestmark = pytest.mark.full("failures, restarts and several processes of running servers")

PATH = "/v1/embeddings"
SLOW = 1000
"""Slow connections at a time; each that is closed is opened again."""

SECONDS = 6.0
EVERY = 0.2
"""Seconds between two bytes of one connection."""

HEAD = f"POST {PATH} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n".encode()
SLOW_HEAD = HEAD + b"X-Long: "
SLOW_BODY = HEAD + b'Content-Length: 100000\r\n\r\n{"input": "'
LIMITS = ("--header-timeout", "2", "--body-timeout", "2", "--log-level", "error")


@pytest.mark.parametrize(
    ("connections", "may_fail"), [(4096, 0.0), (400, 0.5)], ids=["room for all", "too few places"]
)
def test_slow_clients_do_not_stop_others(connections: int, may_fail: float) -> None:
    """Others go on getting right answers, and what the slow ones took is given back."""
    with served(*EXACT, *LIMITS, "--max-connections", str(connections)) as server:
        truth = embed(httpx.post(f"{server.url}{PATH}", json={"input": "a text"}))
        asyncio.run(work(server, truth, seconds=1.0))
        files, memory = open_files(server), resident_megabytes(server)
        asyncio.run(attack(server, truth, files, min(SLOW, connections), may_fail))
        wait_for(lambda: open_files(server) <= files, seconds=10)
        assert resident_megabytes(server) < memory + 40
        shown = httpx.get(f"{server.url}/metrics").text
        assert "taskvec_requests_in_flight 0.0" in shown


async def attack(
    server: Served, truth: list[float], files: int, places: int, may_fail: float
) -> None:
    """Work while slow clients have all the places that they can get."""
    async with slow_clients(server) as seen:
        while open_files(server) < files + places * 0.8:
            await asyncio.sleep(0.05)
        answered, failed, slowest = await work(server, truth, SECONDS)
        assert open_files(server) <= files + places + MAX_CONNECTING + 30
    assert answered > 50
    assert failed <= answered * may_fail
    assert slowest < 3
    assert seen["opened"] >= 2 * SLOW, seen  # the first ones were all thrown out


@asynccontextmanager
async def slow_clients(server: Served) -> AsyncIterator[Counter[str]]:
    """A thousand connections, half in their headers and half in their bodies."""
    seen: Counter[str] = Counter()
    starts = cycle([SLOW_HEAD, SLOW_BODY])
    tasks = [
        asyncio.create_task(slow_client(server.port, next(starts), seen, n / SLOW))
        for n in range(SLOW)
    ]
    try:
        yield seen
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def slow_client(port: int, start: bytes, seen: Counter[str], delay: float) -> None:
    """Send a beginning, then a byte now and then; begin again when hung up on."""
    await asyncio.sleep(delay)
    while True:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            seen["opened"] += 1
            try:
                writer.write(start)
                while not reader.at_eof():
                    await asyncio.sleep(EVERY)
                    writer.write(b"a")
                    await writer.drain()
            finally:
                writer.transport.abort()


async def work(server: Served, truth: list[float], seconds: float) -> tuple[int, int, float]:
    """How many requests of four clients are answered, each rightly, and how many are not.

    Also the seconds of the slowest that was answered.
    """
    answered, failed, slowest = 0, 0, 0.0
    limit = time.monotonic() + seconds

    async def client(*, keep: bool) -> None:
        nonlocal answered, failed, slowest
        headers = {} if keep else {"connection": "close"}
        async with httpx.AsyncClient(base_url=server.url, timeout=20, headers=headers) as session:
            while time.monotonic() < limit:
                began = time.monotonic()
                try:
                    vector = embed(await session.post(PATH, json={"input": "a text"}))
                except httpx.TransportError:
                    failed += 1  # its place was taken
                    continue
                slowest = max(slowest, time.monotonic() - began)
                np.testing.assert_allclose(vector, truth, atol=1e-5)
                answered += 1

    async with asyncio.TaskGroup() as group:
        for keep in (True, True, False, False):
            group.create_task(client(keep=keep))
    return answered, failed, slowest


def embed(answer: httpx.Response) -> list[float]:
    vector: list[float] = answer.raise_for_status().json()["data"][0]["embedding"]
    return vector


def open_files(server: Served) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


def resident_megabytes(server: Served) -> float:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
    return int(kilobytes) / 1024


def test_fewer_files_than_connections() -> None:
    """Where the process may open few files, it takes as few connections, and goes on."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400));"
        "from taskvec.cli.main import main; main()"
    )
    with served(*EXACT, "--log-level", "error", run=("-c", code)) as server, ExitStack() as stack:
        for _ in range(500):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=5))
        answer = httpx.post(f"{server.url}{PATH}", json={"input": "a text"})
        assert len(embed(answer)) > 0
        assert open_files(server) < 400
