"""The application on a real socket, and requests as raw bytes."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.client import HTTPResponse
from typing import Any, NamedTuple

import httpx
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from conftest import fake_application
from fakes import FakeEngine
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.server.run import server_options
from taskvec.settings import Settings

PATH = "/v1/embeddings"
TIMEOUT = 20.0
"""Seconds after which a test gives up waiting for something that should take milliseconds."""


class Served(NamedTuple):
    """A running service and its port."""

    port: int
    engine: FakeEngine
    server: uvicorn.Server

    def connect(self) -> closing[socket.socket]:
        return closing(socket.create_connection(("127.0.0.1", self.port), timeout=TIMEOUT))

    def connections(self) -> int:
        """Return the number of open connections."""
        return len(self.server.server_state.connections)

    def sample(self, series: str, **labels: str) -> float:
        """Return the sum of a series over all labels that are not given."""
        page = httpx.get(f"http://127.0.0.1:{self.port}/metrics").text
        return sum(
            sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
            if sample.name == series and labels.items() <= sample.labels.items()
        )


@contextmanager
def served(
    checkpoint: Checkpoint, delay: float = 0.0, keep_alive: float | None = None, **settings: Any
) -> Iterator[Served]:
    """Serve the application with a fake engine by uvicorn in a thread.

    Args:
        checkpoint: model.
        delay: seconds that the engine takes.
        keep_alive: seconds that an idle connection is kept; None for the server's own.
        settings: of the service.
    """
    engine = FakeEngine(checkpoint.card, delay=delay)
    failures: list[BaseException] = []
    app = fake_application(checkpoint, engine, failures, **settings)
    options = server_options(Settings(drain_timeout=5, **settings))
    if keep_alive is not None:
        options["timeout_keep_alive"] = keep_alive
    server = uvicorn.Server(uvicorn.Config(app, port=0, **options))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started and engine.health().ready)
        yield Served(server.servers[0].sockets[0].getsockname()[1], engine, server)
    finally:
        server.should_exit = True
        thread.join(TIMEOUT)
    assert not thread.is_alive()
    assert not failures


def wait_for(condition: Callable[[], object]) -> None:
    """Poll until a condition is true; fail after a timeout."""
    limit = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < limit, "the condition did not become true"
        time.sleep(0.01)


def head(*lines: str) -> bytes:
    """Return the head of a request with further header lines."""
    fixed = [f"POST {PATH} HTTP/1.1", "Host: test", "Content-Type: application/json"]
    return "\r\n".join([*fixed, *lines, "", ""]).encode()


def whole(body: dict[str, Any]) -> bytes:
    """Return a complete request."""
    content = json.dumps(body).encode()
    return head(f"Content-Length: {len(content)}") + content


def answer(connection: socket.socket) -> tuple[HTTPResponse, Any]:
    """Read the response from a connection, and its JSON."""
    with closing(HTTPResponse(connection)) as response:
        response.begin()
        return response, json.loads(response.read())


def hung_up(connection: socket.socket) -> bool:
    """Return True once the server has closed the connection."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True  # closed while data from us was unread
