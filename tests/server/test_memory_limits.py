"""A real server under ``ulimit -v``: clients that try to use up its memory do not end it."""

from __future__ import annotations

import resource
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from conftest import free_port, wait_until
from processes import EXACT, Served, answers, served, total, wait_for
from sockets import head
from taskvec.core.memory_pressure import PressureLevel

pytestmark = pytest.mark.full("failures, restarts and several processes of running servers")

ADDRESS_SPACE = 1600 << 20
"""The server maps about 980 MB for itself."""

ATTACK_SECONDS = 4.0
ATTACKERS = 8

SENDERS = 4
SEND_SECONDS = 5.0

MAX_STEPS = 16
STEP_BYTES = 32 << 20
STEP_SECONDS = 1.5
"""Longer than a page of metrics is kept."""


def limit_address_space() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))


def test_large_bodies_do_not_end_a_server_with_little_memory() -> None:
    """Large bodies of many clients are refused in time, short requests are answered meanwhile."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "taskvec", "serve", "--port", str(port)]
    with ExitStack() as stack:
        server = stack.enter_context(
            subprocess.Popen(
                [*command, "--log-level", "error"],
                stderr=subprocess.PIPE,
                preexec_fn=limit_address_space,  # noqa: PLW1509 - the limit of this process is left
            )
        )
        stack.callback(server.terminate)
        wait_until(f"{url}/health/ready", server)
        page = httpx.get(f"{url}/metrics").text
        assert total(page, "taskvec_memory_limit_bytes") == ADDRESS_SPACE
        held = [socket.create_connection(("127.0.0.1", port), 20) for _ in range(20)]
        for connection in held:
            stack.callback(connection.close)
            connection.settimeout(20)
            connection.sendall(head("Content-Length: 33000000"))
        stop = threading.Event()
        seen: list[int] = []
        senders = [
            threading.Thread(target=send_bodies, args=(connection, stop)) for connection in held
        ]
        senders += [
            threading.Thread(target=post_large, args=(url, stop, seen)) for _ in range(ATTACKERS)
        ]
        for sender in senders:
            sender.start()
        timer = threading.Timer(ATTACK_SECONDS, stop.set)
        timer.start()
        answered = []
        while not stop.is_set():
            answered.append(httpx.post(f"{url}/v1/embeddings", json={"input": "a"}, timeout=60))
            assert httpx.get(f"{url}/health/live", timeout=60).status_code == 200
        for sender in senders:
            sender.join()
        assert server.poll() is None
        assert {answer.status_code for answer in answered} <= {200, 429}
        assert any(answer.status_code == 200 for answer in answered)
        assert set(seen) <= {400, 429}
        assert 429 in seen
        for connection in held:
            connection.close()
        wait_for(lambda: total(httpx.get(f"{url}/metrics").text, "taskvec_memory_held_bytes") == 0)
        wait_for(lambda: httpx.post(f"{url}/v1/embeddings", json={"input": "a"}).status_code == 200)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_engine_process_without_memory_answers(workers: str) -> None:
    """When its process has none left, requests in it and new ones get 200 or a clean refusal."""
    with served("--workers", workers, *EXACT) as server:
        time.sleep(2)  # the speed of the engine is measured
        engine = server.engine()
        hard = resource.prlimit(engine, resource.RLIMIT_AS)[1]
        with ThreadPoolExecutor(SENDERS) as threads:
            sent = [threads.submit(send_long, server.url, n) for n in range(SENDERS)]
            wait_for(lambda: shown(server, "taskvec_queue_texts") > 0)
            limit = tighten(server, engine, hard)
            assert shown(server, "taskvec_memory_limit_bytes") == limit
            seen = Counter(answer for each in sent for answer in each.result())
        assert {status for status, _ in seen} <= {200, 429, 503}, seen
        assert {code for status, code in seen if status == 503} <= {
            "overloaded",
            "engine_unavailable",
        }
        assert httpx.get(f"{server.url}/health/live").status_code == 200
        if engine in server.descendants():
            resource.prlimit(engine, resource.RLIMIT_AS, (hard, hard))
        wait_for(lambda: answers(server.url), seconds=60)
        assert server.process.poll() is None


def tighten(server: Served, engine: int, hard: int) -> int:
    """Lower the engine's limit until its gateway refuses bulk requests; return it in bytes.

    How much of its address space the allocator has free, and uses again, differs between starts.
    """
    limit = mapped(engine)
    for _ in range(MAX_STEPS):
        resource.prlimit(engine, resource.RLIMIT_AS, (limit, hard))
        time.sleep(STEP_SECONDS)
        if shown(server, "taskvec_memory_pressure") >= PressureLevel.BULK:
            return limit
        limit -= STEP_BYTES
    raise AssertionError(f"no pressure at a limit of {limit + STEP_BYTES} bytes")


def shown(server: Served, name: str) -> float:
    return total(httpx.get(f"{server.url}/metrics").text, name)


def mapped(process: int) -> int:
    """Return the bytes of address space of a process."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def send_long(url: str, sender: int) -> list[tuple[int, str]]:
    """Send large requests for a while, all texts different; return statuses and error codes."""
    seen = []
    until = time.monotonic() + SEND_SECONDS
    with httpx.Client(timeout=60) as client:
        while time.monotonic() < until:
            texts = [f"{'word ' * 300}{sender} {len(seen)} {n}" for n in range(32 << sender)]
            answer = client.post(f"{url}/v1/embeddings", json={"input": texts})
            seen.append((answer.status_code, answer.json().get("code", "")))
            if answer.status_code != 200:
                time.sleep(0.2)
    return seen


def send_bodies(connection: socket.socket, stop: threading.Event) -> None:
    """Send 30 of 33 MB of a body, or until it is refused."""
    for _ in range(30):
        if stop.is_set():
            return
        try:
            connection.sendall(b"a" * (1 << 20))
        except OSError:
            return


def post_large(url: str, stop: threading.Event, seen: list[int]) -> None:
    """Send texts of 25 MB again and again; note the statuses."""
    body = {"input": ["." * 12_200] * 2048}
    with httpx.Client(timeout=60) as client:
        while not stop.is_set():
            seen.append(client.post(f"{url}/v1/embeddings", json=body).status_code)
