"""``taskvec serve`` in one process: settings to a running uvicorn server."""

from __future__ import annotations

import ssl
import sys
from functools import partial
from typing import Any

import uvicorn

from taskvec.errors import StartError
from taskvec.malloc import SERVING, tune_malloc
from taskvec.open_files import divide_open_files
from taskvec.server.protocol import ConnectionLimits, ConnectionSlots, HttpProtocol
from taskvec.server.shutdown import GracefulServer
from taskvec.service import build_service
from taskvec.settings import EngineKind, Settings
from taskvec.telemetry.logs import RequestLog

KEEP_ALIVE_SECONDS = 75
"""Longer than the idle timeout of common load balancers."""

SWITCH_INTERVAL = 0.0005
"""Seconds for which a thread waits for the interpreter lock before it asks for it; a tenth of
Python's default. The engine's thread needs the lock at each of a forward pass's thousand calls, and
would wait that long at each while the event loop is busy (docs/adr/0018)."""


def serve(settings: Settings, request_log: RequestLog) -> None:
    """Serve in this process until a signal.

    Args:
        settings: how to serve.
        request_log: log of requests.

    Raises:
        StartError: the service cannot start.
    """
    # Imports prometheus_client, which workers must not import before they share a folder.
    from taskvec.api.app import create_app  # noqa: PLC0415

    failures: list[BaseException] = []

    def stop_serving(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    tune_malloc(SERVING)
    app = create_app(build_service(settings, request_log=request_log), stop_serving)
    server = GracefulServer(
        uvicorn.Config(app, host=settings.host, port=settings.port, **server_options(settings))
    )
    server.run()
    if failures:
        raise failures[0]


def server_options(settings: Settings) -> dict[str, Any]:
    """Return the options of every uvicorn configuration.

    Also raises the limit of open files and shortens the interpreter's switch interval.

    Raises:
        StartError: the certificate cannot be used.
    """
    sys.setswitchinterval(SWITCH_INTERVAL)
    certificate, key = settings.tls_cert, settings.tls_key
    if certificate is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, lambda: "")
        except (OSError, ValueError) as error:
            raise StartError(
                f"The certificate {certificate} with the key {key or certificate} cannot be used: "
                f"{error}."
            ) from None
    limits = ConnectionLimits(
        header_seconds=settings.header_timeout,
        header_bytes=settings.max_header_bytes,
        answer_seconds=settings.answer_timeout,
        connections=divide_open_files(
            settings.max_connections, remote=settings.engine is EngineKind.REMOTE
        ).clients,
    )
    return {
        "ssl_certfile": certificate,
        "ssl_keyfile": key,
        "http": partial(HttpProtocol, ConnectionSlots(limits)),
        "loop": "taskvec.server.event_loop:BatchAcceptLoop",
        "ws": "none",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "timeout_keep_alive": KEEP_ALIVE_SECONDS,
        "timeout_graceful_shutdown": settings.drain_timeout,
    }
