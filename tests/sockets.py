"""The application behind real sockets, and requests byte by byte."""

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
PATIENCE = 20.0
"""Seconds that a test waits for what should take milliseconds."""


class Served(NamedTuple):
    """A service on a port of its own."""

    port: int
    engine: FakeEngine
    server: uvicorn.Server

    def connect(self) -> closing[socket.socket]:
        return closing(socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE))

    def connections(self) -> int:
        """How many are open."""
        return len(self.server.server_state.connections)

    def sample(self, series: str, **labels: str) -> float:
        """The sum over a series' labels that are not given."""
        page = httpx.get(f"http://127.0.0.1:{self.port}/metrics").text
        return sum(
            sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
            if sample.name == series and labels.items() <= sample.labels.items()
        )


@contextmanager
def served(checkpoint: Checkpoint, delay: float = 0.0, **settings: Any) -> Iterator[Served]:
    """The application in front of a fake engine, served by uvicorn in a thread."""
    engine = FakeEngine(checkpoint.card, delay=delay)
    failures: list[BaseException] = []
    app = fake_application(checkpoint, engine, failures, **settings)
    options = server_options(Settings(drain_timeout=5, **settings))
    server = uvicorn.Server(uvicorn.Config(app, port=0, **options))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started and engine.health().ready)
        yield Served(server.servers[0].sockets[0].getsockname()[1], engine, server)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
    assert not thread.is_alive()
    assert not failures


def wait_for(condition: Callable[[], object]) -> None:
    """Poll until it holds, or fail."""
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < limit, "it never became true"
        time.sleep(0.01)


def head(*lines: str) -> bytes:
    """A request's head with these further header lines."""
    fixed = [f"POST {PATH} HTTP/1.1", "Host: test", "Content-Type: application/json"]
    return "\r\n".join([*fixed, *lines, "", ""]).encode()


def whole(body: dict[str, Any]) -> bytes:
    """A whole request."""
    content = json.dumps(body).encode()
    return head(f"Content-Length: {len(content)}") + content


def answer(connection: socket.socket) -> tuple[HTTPResponse, Any]:
    """The one answer on a connection, and its JSON."""
    with closing(HTTPResponse(connection)) as response:
        response.begin()
        return response, json.loads(response.read())


def hung_up(connection: socket.socket) -> bool:
    """True once the server has closed its side."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True  # the same, where what we sent was still unread
