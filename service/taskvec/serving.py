"""``taskvec serve`` in one process."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from taskvec.checkpoint.hub import open_checkpoint
from taskvec.engines.base import Engine
from taskvec.errors import StartError
from taskvec.settings import Settings

OnFailure = Callable[[BaseException], None]

FIRST_REQUEST_SECONDS = 0.2
"""How long, on shutdown, a connection that was taken has to send its request."""


def serve_alone(settings: Settings) -> None:
    """Serve in this process until a signal.

    Raises:
        StartError: the service cannot start.
    """
    failures: list[BaseException] = []

    def stop_serving(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    app, _ = application(settings, stop_serving)
    server = uvicorn.Server(
        uvicorn.Config(app, host=settings.host, port=settings.port, **server_options(settings))
    )
    server.run()
    if failures:
        raise failures[0]


def application(settings: Settings, on_failure: OnFailure, **how: Any) -> tuple[FastAPI, Engine]:
    """The application, wired as ``create_app`` says, and its engine; nothing is started.

    Raises:
        StartError: the model cannot be served, or the keys cannot be read.
    """
    # Where processes share their series, prometheus_client must not be imported before they do.
    from taskvec.app import create_app  # noqa: PLC0415
    from taskvec.telemetry.metrics import Metrics  # noqa: PLC0415
    from taskvec.wiring import make_engine, task_table  # noqa: PLC0415

    checkpoint = open_checkpoint(settings.model, settings.revision)
    metrics = Metrics(task_table(checkpoint).names)
    engine = make_engine(settings, checkpoint, metrics)
    return create_app(settings, checkpoint, engine, metrics, on_failure, **how), engine


def server_options(settings: Settings) -> dict[str, Any]:
    """What every uvicorn of the service is told.

    Raises:
        StartError: the certificate cannot be used.
    """
    certificate, key = settings.tls_cert, settings.tls_key
    if certificate is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, lambda: "")
        except (OSError, ValueError) as error:
            raise StartError(
                f"The certificate {certificate} with the key {key or certificate} cannot be used: "
                f"{error}."
            ) from None
    return {
        "ssl_certfile": certificate,
        "ssl_keyfile": key,
        "http": UnhurriedProtocol,
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "timeout_keep_alive": 75,  # longer than the idle time of common load balancers
        "timeout_graceful_shutdown": settings.drain_timeout,
    }


class UnhurriedProtocol(HttpToolsProtocol):
    """On shutdown, a connection whose request is on its way is not closed at once."""

    loop: asyncio.AbstractEventLoop

    def shutdown(self) -> None:
        """See uvicorn's own: called once for each connection."""
        if self.cycle is None:
            self.loop.call_later(FIRST_REQUEST_SECONDS, super().shutdown)
        else:
            super().shutdown()
