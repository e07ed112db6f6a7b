"""The health check that runs inside a container."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import trustme

from conftest import free_port


@contextmanager
def server(status: int, tls: ssl.SSLContext | None = None) -> Iterator[int]:
    """Serve /health/ready with a status, and 404 for all else; yields the port."""

    class Ready(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b'{"detail": "it is loading the model"}'
            self.send_response(status if self.path == "/health/ready" else 404)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Discard the access log."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Ready) as listening:
        if tls:
            listening.socket = tls.wrap_socket(listening.socket, server_side=True)
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield listening.server_port
        listening.shutdown()


def check(**environment: str) -> subprocess.CompletedProcess[str]:
    """Run the health check with further environment variables."""
    return subprocess.run(
        [sys.executable, "-m", "taskvec.healthcheck"],
        env=os.environ | {"http_proxy": "http://127.0.0.1:9"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_ready_server_is_healthy() -> None:
    """The exit code is 0 for a server on all addresses or on one; a proxy setting is ignored."""
    with server(200) as port:
        for host in ("0.0.0.0", "127.0.0.1", "[127.0.0.1]", ""):  # noqa: S104
            done = check(TASKVEC_HOST=host, TASKVEC_PORT=str(port))
            assert (done.returncode, done.stderr) == (0, "")


def test_a_server_that_is_not_ready_is_not_healthy() -> None:
    """The exit code is 1, and the server's reason is printed."""
    with server(503) as port:
        done = check(TASKVEC_PORT=str(port))
    assert done.returncode == 1
    assert "503" in done.stderr
    assert "it is loading the model" in done.stderr


def test_no_server_is_not_healthy() -> None:
    """If nothing listens, the exit code is 1 and the address is printed, without a traceback."""
    port = free_port()
    done = check(TASKVEC_PORT=str(port))
    assert done.returncode == 1
    assert done.stderr.startswith(f"127.0.0.1:{port} does not answer")
    assert "Traceback" not in done.stderr


def test_over_tls_the_certificate_need_not_fit(tmp_path: Path) -> None:
    """With TLS configured the check uses HTTPS and does not verify the certificate's names."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("api.example.com").configure_cert(tls)
    with server(200, tls) as port:
        done = check(TASKVEC_PORT=str(port), TASKVEC_TLS_CERT=str(tmp_path / "cert.pem"))
        assert (done.returncode, done.stderr) == (0, "")
        assert check(TASKVEC_PORT=str(port)).returncode == 1
