"""A real server under ``ulimit -v``: clients that try to use up its memory do not end it."""

from __future__ import annotations

import resource
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack

import httpx

from conftest import free_port, wait_until
from processes import total
from sockets import head, wait_for

ADDRESS_SPACE = 1600 << 20
"""The server maps about 980 MB for itself."""

ATTACK_SECONDS = 4.0
ATTACKERS = 8


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
