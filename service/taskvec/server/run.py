"""``taskvec serve`` with one gateway: settings to a running uvicorn server."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import uvicorn

from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.checkpoint.golden import file_versions
from taskvec.checkpoint.open import open_checkpoint
from taskvec.concurrency import SWITCH_INTERVAL
from taskvec.engines.process.client import ProcessEngine
from taskvec.engines.process.launcher import EngineLauncher
from taskvec.malloc import SERVING, tune_malloc
from taskvec.open_files import divide_open_files
from taskvec.server.certificate import check_certificate
from taskvec.server.engine_process import engine_launcher
from taskvec.server.listen import bind, trusted_proxies
from taskvec.server.protocol import ConnectionLimits, ConnectionSlots, HttpProtocol
from taskvec.server.shutdown import GracefulServer, on_hangup
from taskvec.service import build_service, task_table
from taskvec.settings import EngineKind, Settings
from taskvec.telemetry.logs import RequestLog


def serve(settings: Settings, request_log: RequestLog) -> None:
    """Serve until a signal: the gateway in this process, the packed engine in one of its own.

    vLLM has processes of its own, and a pool's servers are elsewhere, so those engines are driven
    from this process.

    Args:
        settings: how to serve.
        request_log: log of requests.

    Raises:
        StartError: the service cannot start, or its engine process has ended for good.
    """
    tune_malloc(SERVING)
    with on_hangup(None):
        if settings.in_process or settings.engine is not EngineKind.PACKED:
            _run(settings, request_log)
            return
        checkpoint = open_checkpoint(settings.model, settings.revision)
        files = file_versions(checkpoint)
        launcher = engine_launcher(settings, checkpoint)
        launcher.launch()  # it loads while this process imports
        try:
            _run(settings, request_log, checkpoint, launcher, files)
        finally:
            launcher.kill()


def _run(
    settings: Settings,
    request_log: RequestLog,
    checkpoint: Checkpoint | None = None,
    launcher: EngineLauncher | None = None,
    files: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Run the gateway; with a launcher, the engine is in the process that it owns."""
    # Imports prometheus_client, which workers must not import before they share a folder.
    from taskvec.api.app import create_app  # noqa: PLC0415
    from taskvec.metrics.registry import Metrics  # noqa: PLC0415

    failures: list[BaseException] = []

    def stop_serving(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    if checkpoint is None or launcher is None:
        service = build_service(settings, request_log=request_log)
    else:
        metrics = Metrics(task_table(checkpoint).names)
        engine = ProcessEngine(
            checkpoint.card,
            launcher,
            metrics,
            launches=True,
            silent_seconds=settings.stall_timeout,
            files=files,
        )
        launcher.on_restart(metrics.process_restarted)
        engine.on_end(stop_serving)
        service = build_service(
            settings,
            checkpoint=checkpoint,
            metrics=metrics,
            engine=engine,
            request_log=request_log,
        )
    app = create_app(service, stop_serving)
    server = GracefulServer(
        uvicorn.Config(app, host=settings.host, port=settings.port, **server_options(settings))
    )
    server.run(bind(settings.host, settings.port))
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
        check_certificate(certificate, key)
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
        "forwarded_allow_ips": trusted_proxies(settings.forwarded_allow_ips),
        "timeout_keep_alive": settings.keep_alive_timeout,
        "timeout_graceful_shutdown": settings.drain_timeout,
    }
