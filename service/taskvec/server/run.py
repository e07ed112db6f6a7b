"""``taskvec serve`` in one process."""

from __future__ import annotations

import resource
import ssl
from collections.abc import Callable
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI

from taskvec.checkpoint.open import open_checkpoint
from taskvec.engines.base import Engine
from taskvec.errors import StartError
from taskvec.malloc import SERVING, tune_malloc
from taskvec.server.protocol import ConnectionLimits, ConnectionSlots, HttpProtocol
from taskvec.settings import Settings

OnFailure = Callable[[BaseException], None]

KEEP_ALIVE_SECONDS = 75
"""Longer than the idle time of common load balancers."""

OTHER_FILES = 128
"""Open files beside client connections: weights, pipes, connections to engine servers."""


def serve(settings: Settings) -> None:
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


def application(
    settings: Settings, on_failure: OnFailure, *, engine_name: str | None = None, **how: Any
) -> tuple[FastAPI, Engine]:
    """The application, wired as ``create_app`` says, and its engine; nothing is started.

    With an ``engine_name`` that engine is in another process, and reports to the same series.

    Raises:
        StartError: the model cannot be served, the keys cannot be read, or traces not be made.
    """
    # Where processes share their series, prometheus_client must not be imported before they do.
    from taskvec.api.app import create_app  # noqa: PLC0415
    from taskvec.metrics.registry import Metrics  # noqa: PLC0415
    from taskvec.service import make_engine, served_name, task_table  # noqa: PLC0415
    from taskvec.telemetry.tracing import make_tracer  # noqa: PLC0415

    tune_malloc(SERVING)
    checkpoint = open_checkpoint(settings.model, settings.revision)
    metrics = Metrics(task_table(checkpoint).names)
    engine = make_engine(settings, checkpoint, metrics, reports_queue=engine_name is None)
    tracer = make_tracer(served_name(settings, checkpoint)) if settings.traces else None
    how |= {"engine_name": engine_name, "tracer": tracer}
    app = create_app(settings, checkpoint, engine, metrics, on_failure, **how)
    return app, engine


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
    limits = ConnectionLimits(
        header_seconds=settings.header_timeout,
        header_bytes=settings.max_header_bytes,
        answer_seconds=settings.answer_timeout,
        connections=_room_for(settings.max_connections),
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


def _room_for(connections: int) -> int:
    """So many connections, or as many as the process may have open files for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= connections + OTHER_FILES:
        return connections
    wanted = connections + OTHER_FILES
    soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, min(connections, soft - OTHER_FILES))
