"""TLS connections are counted and timed from the moment they are accepted."""

from __future__ import annotations

import json
import signal
import socket
import ssl
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
import trustme
import uvicorn
from cryptography.x509 import load_pem_x509_certificate
from fastapi import FastAPI

from conftest import wait_until
from processes import EXACT, started, total
from sockets import Served, answer, head, hung_up, served, wait_for, whole
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.server.protocol import TLS_CLOSE_SECONDS
from taskvec.server.run import server_options
from taskvec.server.shutdown import GracefulServer
from taskvec.settings import Settings

LIVE = b"GET /health/live HTTP/1.1\r\nHost: test\r\n\r\n"
FILES = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from taskvec.cli.main import main
main()
"""


class Certificate(NamedTuple):
    """A server's files, and a client's context that trusts them."""

    settings: dict[str, Path]
    trusting: ssl.SSLContext


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    issued.private_key_pem.write_to_path(folder / "key.pem")
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    return Certificate({"tls_cert": folder / "cert.pem", "tls_key": folder / "key.pem"}, trusting)


def secure(stack: ExitStack, certificate: Certificate, port: int) -> ssl.SSLSocket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    return stack.enter_context(
        certificate.trusting.wrap_socket(connection, server_hostname="127.0.0.1")
    )


def slow_reader(stack: ExitStack, certificate: Certificate, port: int) -> ssl.SSLSocket:
    """Connect with a small receive buffer, so that responses stay in the server."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(20)
    connection.connect(("127.0.0.1", port))
    return stack.enter_context(
        certificate.trusting.wrap_socket(connection, server_hostname="127.0.0.1")
    )


def held(service: Served, certificate: Certificate) -> float:
    """Return the bytes that requests hold of the memory budget."""
    url = f"https://127.0.0.1:{service.port}/metrics"
    return total(httpx.get(url, verify=certificate.trusting).text, "taskvec_memory_held_bytes")


LARGE = {"input": ["a"] * 2048}
"""A request whose response is larger than what the kernel buffers."""

FILE = b"GET /docs/files/swagger-ui-bundle.js HTTP/1.1\r\nHost: test\r\n\r\n"
"""A request for the largest file; the kernel buffers more than one response."""


def test_requests_are_answered(default_checkpoint: Checkpoint, certificate: Certificate) -> None:
    """Several requests on a connection, the first of which comes with the handshake's end."""
    with served(default_checkpoint, **certificate.settings) as service, ExitStack() as stack:
        connection = secure(stack, certificate, service.port)
        for _ in range(3):
            connection.sendall(whole({"input": "a"}))
            response, body = answer(connection)
            assert (response.status, len(body["data"])) == (200, 1)
        assert service.connections() == 1
        connection.close()
        wait_for(lambda: service.connections() == 0)


def issue(folder: Path, authority: trustme.CA) -> int:
    """Write a certificate as new files that replace the old ones; return its serial number."""
    issued = authority.issue_cert("127.0.0.1")
    (folder / "new-cert.pem").write_bytes(issued.cert_chain_pems[0].bytes())
    (folder / "new-key.pem").write_bytes(issued.private_key_pem.bytes())
    (folder / "new-key.pem").rename(folder / "key.pem")
    (folder / "new-cert.pem").rename(folder / "cert.pem")
    return load_pem_x509_certificate(issued.cert_chain_pems[0].bytes()).serial_number


def serial(port: int) -> int:
    """Return the serial number of the certificate that a new connection gets."""
    return load_pem_x509_certificate(
        ssl.get_server_certificate(("127.0.0.1", port), timeout=20).encode()
    ).serial_number


@pytest.mark.parametrize("options", [["--in-process"], ["--workers", "2"]], ids=str)
def test_a_renewed_certificate_is_used(tmp_path: Path, options: list[str]) -> None:
    """New handshakes get the new certificate; a broken one leaves the old one, and is logged."""
    authority = trustme.CA()
    first = issue(tmp_path, authority)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    files = ["--tls-cert", str(tmp_path / "cert.pem"), "--tls-key", str(tmp_path / "key.pem")]
    with started(*files, *options, *EXACT) as server, ExitStack() as stack:
        ready = f"https://127.0.0.1:{server.port}/health/ready"
        wait_until(ready, server.process, verify=trusting)
        before = stack.enter_context(httpx.Client(verify=trusting, timeout=20))
        assert before.get(ready).status_code == 200
        assert serial(server.port) == first
        second = issue(tmp_path, authority)
        wait_for(lambda: {serial(server.port) for _ in range(8)} == {second})
        assert before.get(ready).status_code == 200, "an open connection goes on"
        (tmp_path / "key.pem").write_text("no key")
        server.process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        # Each process looks for itself, and the kernel chooses one for each connection.
        assert serial(server.port) in ({second} if len(options) == 1 else {first, second})
        third = issue(tmp_path, authority)
        wait_for(lambda: {serial(server.port) for _ in range(8)} == {third})
        server.process.terminate()
        errors = server.process.communicate(timeout=60)[1].decode()
    assert "certificate_not_reloaded" in errors
    assert "key.pem" in errors


def test_a_certificate_renewed_during_the_start_is_used(tmp_path: Path) -> None:
    """Uvicorn reads the files before it loads the application, which takes a while."""
    authority = trustme.CA()
    issue(tmp_path, authority)
    renewed: list[int] = []

    def load() -> FastAPI:
        renewed.append(issue(tmp_path, authority))
        return FastAPI()

    options = server_options(
        Settings(tls_cert=tmp_path / "cert.pem", tls_key=tmp_path / "key.pem", drain_timeout=5)
    )
    server = GracefulServer(uvicorn.Config(load, factory=True, port=0, **options))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        wait_for(lambda: serial(port) == renewed[0])
    finally:
        server.should_exit = True
        thread.join()


@pytest.mark.parametrize("hello", [b"", b"\x16\x03\x01\x02\x00\x01"], ids=["silent", "slow"])
def test_a_handshake_is_timed(
    default_checkpoint: Checkpoint, certificate: Certificate, hello: bytes
) -> None:
    """A handshake that is not over within the header timeout is the end of its connection."""
    with (
        served(default_checkpoint, header_timeout=0.4, **certificate.settings) as service,
        service.connect() as connection,
    ):
        began = time.monotonic()
        for byte in hello:
            connection.sendall(bytes([byte]))
            time.sleep(0.02)
        assert hung_up(connection)
        assert 0.3 < time.monotonic() - began < 5
        wait_for(lambda: service.connections() == 0)


def test_what_is_not_tls_gives_its_slot_back(
    default_checkpoint: Checkpoint, certificate: Certificate
) -> None:
    """A failed handshake is no connection any more."""
    with (
        served(default_checkpoint, **certificate.settings) as service,
        service.connect() as connection,
    ):
        connection.sendall(LIVE)
        wait_for(lambda: service.connections() == 0)


def test_handshakes_are_evicted_first(
    default_checkpoint: Checkpoint, certificate: Certificate
) -> None:
    """At the limit the oldest handshake is closed, and a connection that was idle longer is not."""
    with (
        served(default_checkpoint, max_connections=4, **certificate.settings) as service,
        ExitStack() as stack,
    ):
        idle = secure(stack, certificate, service.port)
        idle.sendall(LIVE)
        assert answer(idle)[0].status == 200
        silent = [stack.enter_context(service.connect()) for _ in range(3)]
        wait_for(lambda: service.connections() == 4)
        late = secure(stack, certificate, service.port)
        assert hung_up(silent[0])
        for connection in (late, idle):
            connection.sendall(LIVE)
            assert answer(connection)[0].status == 200


def test_silent_connections_do_not_use_up_the_files(certificate: Certificate) -> None:
    """600 connections that say nothing, in a process with 256 files: others are answered."""
    options = [f"--{name.replace('_', '-')}={file}" for name, file in certificate.settings.items()]
    with started(*options, *EXACT, run=("-c", FILES)) as server, ExitStack() as stack:
        live = f"https://127.0.0.1:{server.port}/health/live"
        wait_until(live, server.process, verify=certificate.trusting)
        address = ("127.0.0.1", server.port)
        for _ in range(600):
            stack.enter_context(socket.create_connection(address, timeout=10))
        for _ in range(10):
            assert httpx.get(live, verify=certificate.trusting, timeout=10).status_code == 200


@pytest.mark.parametrize("request_bytes", [whole(LARGE), 3 * FILE], ids=["vectors", "file"])
def test_an_unread_response_is_counted_and_timed(
    default_checkpoint: Checkpoint, certificate: Certificate, request_bytes: bytes
) -> None:
    """It counts against the memory budget until the answer timeout, which ends its connection."""
    with (
        served(default_checkpoint, answer_timeout=3, **certificate.settings) as service,
        ExitStack() as stack,
    ):
        slow_reader(stack, certificate, service.port).sendall(request_bytes)
        wait_for(lambda: held(service, certificate) > 5e5)
        wait_for(lambda: service.connections() == 0)
        wait_for(lambda: held(service, certificate) == 0)


def test_a_response_that_is_read_in_time_is_complete(
    default_checkpoint: Checkpoint, certificate: Certificate
) -> None:
    """A client with ``Connection: close`` may pause longer than the end of TLS may take."""
    content = json.dumps(LARGE).encode()
    request = head(f"Content-Length: {len(content)}", "Connection: close") + content
    with served(default_checkpoint, **certificate.settings) as service, ExitStack() as stack:
        connection = slow_reader(stack, certificate, service.port)
        connection.sendall(request)
        wait_for(lambda: held(service, certificate) > 1e6)
        time.sleep(1.5 * TLS_CLOSE_SECONDS)
        response, body = answer(connection)
        assert (response.status, len(body["data"])) == (200, len(LARGE["input"]))
        wait_for(lambda: held(service, certificate) == 0)


def test_a_client_that_does_not_answer_the_end_of_tls(
    default_checkpoint: Checkpoint, certificate: Certificate
) -> None:
    """Its connection is closed soon after its response was sent."""
    with served(default_checkpoint, **certificate.settings) as service, ExitStack() as stack:
        connection = secure(stack, certificate, service.port)
        connection.sendall(LIVE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert answer(connection)[0].status == 200
        began = time.monotonic()
        wait_for(lambda: service.connections() == 0)
        assert time.monotonic() - began < TLS_CLOSE_SECONDS + 5


def test_an_unread_response_is_not_evicted(
    default_checkpoint: Checkpoint, certificate: Certificate
) -> None:
    """At the limit an idle connection is closed, not one that was answered earlier and reads."""
    with (
        served(default_checkpoint, max_connections=2, **certificate.settings) as service,
        ExitStack() as stack,
    ):
        reading = slow_reader(stack, certificate, service.port)
        reading.sendall(whole(LARGE))
        reading.recv(1)
        idle = secure(stack, certificate, service.port)
        idle.sendall(LIVE)
        assert answer(idle)[0].status == 200
        late = secure(stack, certificate, service.port)
        assert hung_up(idle)
        late.sendall(LIVE)
        assert answer(late)[0].status == 200
        received = 1
        while received < 6e6:
            received += len(reading.recv(1 << 20))
