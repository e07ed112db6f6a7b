"""``taskvec serve``: one process, or several gateways in front of one engine process."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from taskvec.checkpoint.golden import golden_vectors
from taskvec.checkpoint.hub import open_checkpoint
from taskvec.checkpoint.layout import Checkpoint
from taskvec.engines.base import Engine, EngineState
from taskvec.errors import CheckpointError
from taskvec.settings import EngineKind, Settings, TokenInput
from taskvec.telemetry.logs import configure_logs

OnFailure = Callable[[BaseException], None]
WORKER_APP = "taskvec.serving:worker_app"
SHARED_SERIES = "PROMETHEUS_MULTIPROC_DIR"
WORKER_PATIENCE = 10.0
"""Seconds that a gateway process waits for its engine before it accepts connections."""

LOOK_EVERY = 1.0
"""Seconds between two looks at the engine of several gateways."""


def serve(settings: Settings) -> None:
    """Serve until a signal.

    Raises:
        CheckpointError: the model cannot be served.
    """
    if settings.workers == 1:
        _serve_alone(settings)
    elif settings.engine is EngineKind.REMOTE:
        with _shared_series():
            _run_workers(settings)
    else:
        with _shared_series() as room:
            _serve_engine_and_workers(settings, room)


def _serve_alone(settings: Settings) -> None:
    failures: list[BaseException] = []

    def stop_serving(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    app, _ = _application(settings, stop_serving)
    server = uvicorn.Server(
        uvicorn.Config(app, host=settings.host, port=settings.port, **_server_options(settings))
    )
    server.run()
    if failures:
        raise failures[0]


def _serve_engine_and_workers(settings: Settings, room: Path) -> None:
    """The engine in this process, behind a Unix socket; gateways in processes of their own."""
    failures: list[BaseException] = []
    socket = room / "engine.sock"

    def stop_all(error: BaseException) -> None:
        failures.append(error)
        os.kill(os.getpid(), signal.SIGTERM)

    inner = settings.model_copy(update={"token_input": TokenInput.ACCEPT})
    app, engine = _application(inner, stop_all, behind_gateway=True)
    server = uvicorn.Server(uvicorn.Config(app, uds=str(socket), **_server_options(settings)))
    serving = threading.Thread(target=server.run, name="engine-server")
    over = threading.Event()

    def watch() -> None:
        while not over.wait(LOOK_EVERY):
            health = engine.health()
            if health.state is EngineState.DEAD and not failures:
                stop_all(RuntimeError(f"The engine died: {health.reason}."))

    watching = threading.Thread(target=watch, name="engine-watch")
    golden_vectors(open_checkpoint(settings.model, settings.revision), settings.cache)
    serving.start()
    watching.start()
    try:
        _run_workers(
            settings.model_copy(
                update={"engine": EngineKind.REMOTE, "engine_url": (f"unix://{socket}",)}
            )
        )
    finally:
        over.set()
        server.should_exit = True
        watching.join()
        serving.join()
    if failures:
        raise failures[0]


def _run_workers(settings: Settings) -> None:
    """Gateway processes that share one listening socket, until a signal."""
    os.environ |= settings.model_copy(update={"workers": 1}).environment()
    uvicorn.run(
        WORKER_APP,
        factory=True,
        workers=settings.workers,
        host=settings.host,
        port=settings.port,
        **_server_options(settings),
    )


def worker_app() -> FastAPI:
    """The application of one gateway process; its settings are in the environment."""
    settings = Settings()
    configure_logs(settings.log_level)

    def stop_serving(error: BaseException) -> None:
        raise error

    return _application(settings, stop_serving, patience=WORKER_PATIENCE)[0]


def _server_options(settings: Settings) -> dict[str, Any]:
    return {
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "timeout_keep_alive": 75,  # longer than the idle time of common load balancers
        "timeout_graceful_shutdown": settings.drain_timeout,
    }


def _application(settings: Settings, on_failure: OnFailure, **how: Any) -> tuple[FastAPI, Engine]:
    """The application, wired as ``create_app`` says, and its engine."""
    from taskvec.app import create_app  # noqa: PLC0415 - after SHARED_SERIES is set
    from taskvec.telemetry.metrics import Metrics  # noqa: PLC0415
    from taskvec.wiring import task_table  # noqa: PLC0415

    checkpoint = open_checkpoint(settings.model, settings.revision)
    metrics = Metrics(task_table(checkpoint).names)
    engine = make_engine(settings, checkpoint, metrics)
    return create_app(settings, checkpoint, engine, metrics, on_failure, **how), engine


def make_engine(settings: Settings, checkpoint: Checkpoint, observer: Any) -> Engine:
    """The engine that the settings ask for; not started.

    Raises:
        CheckpointError: what it needs is not installed.
    """
    if settings.engine is EngineKind.REMOTE:
        return _remote_engine(settings, checkpoint, observer)
    if settings.engine is EngineKind.VLLM:
        return _vllm_engine(settings, checkpoint, observer)
    return _packed_engine(settings, checkpoint, observer)


def _packed_engine(settings: Settings, checkpoint: Checkpoint, observer: Any) -> Engine:
    try:
        from taskvec.engines.packed.engine import (  # noqa: PLC0415 - torch is an extra
            PackedEngine,
            PackedOptions,
        )
    except ModuleNotFoundError as missing:
        if missing.name != "torch":
            raise
        raise CheckpointError("The packed engine needs torch: install taskvec[packed].") from None
    options = PackedOptions(
        device=settings.device,
        dtype=settings.dtype,
        adapter_mode=settings.adapter_mode,
        max_batch_tokens=settings.max_batch_tokens,
        threads=settings.threads,
    )
    return PackedEngine(checkpoint, options, observer)


def _vllm_engine(settings: Settings, checkpoint: Checkpoint, observer: Any) -> Engine:
    from taskvec.engines.vllm.arguments import VllmOptions  # noqa: PLC0415
    from taskvec.engines.vllm.engine import VllmEngine  # noqa: PLC0415

    options = VllmOptions(
        dtype=settings.dtype,
        max_tokens=settings.max_tokens,
        max_batch_tokens=settings.max_batch_tokens,
        max_batch_texts=settings.max_batch_texts,
        memory_share=settings.memory_share,
        tensor_parallel=settings.tensor_parallel,
        data_parallel=settings.data_parallel,
        extra=settings.vllm_args,
    )
    return VllmEngine(checkpoint, settings.cache, options, observer)


def _remote_engine(settings: Settings, checkpoint: Checkpoint, observer: Any) -> Engine:
    from taskvec.engines.remote.engine import RemoteEngine, RemoteOptions  # noqa: PLC0415

    key = settings.engine_api_key
    options = RemoteOptions(
        urls=settings.engine_url,
        api_key=key.get_secret_value() if key else None,
        ca=settings.engine_ca,
        max_tokens=settings.max_tokens,
        call_seconds=settings.engine_call_timeout,
    )
    return RemoteEngine(checkpoint, settings.cache, options, observer)


@contextmanager
def _shared_series() -> Iterator[Path]:
    """A private folder in which all processes keep their metrics, named in the environment."""
    with tempfile.TemporaryDirectory(prefix="taskvec-") as room:
        series = Path(room) / "series"
        series.mkdir()
        os.environ[SHARED_SERIES] = str(series)
        yield Path(room)
