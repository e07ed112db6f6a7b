"""``taskvec serve`` with one gateway: settings to a running uvicorn server."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from socket import socket
from typing import Any, NamedTuple

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
from taskvec.server.event_loop import accept_loop
from taskvec.server.lingering import BYTES_BEYOND_BODY
from taskvec.server.listen import bind, trusted_proxies
from taskvec.server.protocol import ConnectionLimits, ConnectionSlots, HttpProtocol
from taskvec.server.shutdown import GracefulServer, on_hangup
from taskvec.service import build_service, key_source, task_table
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
    with on_hangup(None), bound_sockets(settings) as sockets:
        if settings.in_process or settings.engine is not EngineKind.PACKED:
            _run(settings, request_log, sockets)
            return
        checkpoint = open_checkpoint(settings.model, settings.revision, settings.task_name)
        files = file_versions(checkpoint)
        launcher = engine_launcher(settings, checkpoint)
        launcher.launch()  # it loads while this process imports
        try:
            _run(settings, request_log, sockets, _Launched(checkpoint, launcher, files))
        finally:
            launcher.kill()


class _Launched(NamedTuple):
    """An engine process and what it reads; ``files`` are the versions of the checkpoint's files."""

    checkpoint: Checkpoint
    launcher: EngineLauncher
    files: Mapping[str, Sequence[int]]


def _run(
    settings: Settings,
    request_log: RequestLog,
    sockets: list[socket],
    launched: _Launched | None = None,
) -> None:
    """Run the gateway; the engine is in this process, or in the one that was launched."""
    # Imports prometheus_client, which workers must not import before they share a folder.
    from taskvec.api.app import create_app  # noqa: PLC0415
    from taskvec.metrics.registry import Metrics  # noqa: PLC0415

    failures: list[BaseException] = []

    def stop_serving(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    if launched is None:
        service = build_service(settings, request_log=request_log)
    else:
        checkpoint, launcher, files = launched
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
    server.run(sockets)
    if failures:
        raise failures[0]


@contextmanager
def bound_sockets(settings: Settings) -> Iterator[list[socket]]:
    """Check the keys and the certificate and bind the address, before a model is loaded.

    The sockets listen once there is an application behind them, and are closed on exit.

    Raises:
        StartError: a file cannot be used, or the address cannot be bound.
    """
    keys = key_source(settings)
    if keys is not None:
        keys.read()
    if settings.tls_cert is not None:
        check_certificate(settings.tls_cert, settings.tls_key)
    with ExitStack() as stack:
        yield [stack.enter_context(each) for each in bind(settings.host, settings.port)]


def server_options(settings: Settings) -> dict[str, Any]:
    """Return the options of every uvicorn configuration.

    Also raises the limit of open files and shortens the interpreter's switch interval.
    """
    sys.setswitchinterval(SWITCH_INTERVAL)
    files = divide_open_files(settings.max_connections, remote=settings.engine is EngineKind.REMOTE)
    limits = ConnectionLimits(
        header_seconds=settings.header_timeout,
        header_bytes=settings.max_header_bytes,
        answer_seconds=settings.answer_timeout,
        connections=files.clients,
        discarded_bytes=settings.max_body_bytes + BYTES_BEYOND_BODY,
    )
    return {
        "ssl_certfile": settings.tls_cert,
        "ssl_keyfile": settings.tls_key,
        "http": partial(HttpProtocol, ConnectionSlots(limits)),
        "loop": partial(accept_loop, files.connecting),
        "ws": "none",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "forwarded_allow_ips": trusted_proxies(settings.forwarded_allow_ips),
        "timeout_keep_alive": settings.keep_alive_timeout,
        "timeout_graceful_shutdown": settings.drain_timeout,
    }
