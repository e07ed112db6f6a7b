"""The application: every part made here and passed to those that need it."""

from __future__ import annotations

import asyncio
import gc
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import structlog
from fastapi import FastAPI

from taskvec import __version__
from taskvec.checkpoint.layout import Checkpoint
from taskvec.core.admission import Admission
from taskvec.core.calibration import measure_speed
from taskvec.core.embedder import AsyncEmbedder
from taskvec.core.health import ServiceHealth
from taskvec.core.tokens import TextTokenizer
from taskvec.engines.base import Engine, EngineState
from taskvec.engines.wire import WIRE_PATH
from taskvec.errors import TaskvecError
from taskvec.http.drain import drained_first
from taskvec.http.embeddings import EmbeddingsRoute
from taskvec.http.engine import EngineRoute
from taskvec.http.errors import error_responses, install_error_handlers
from taskvec.http.limits import Limits
from taskvec.http.middleware import RequestTrace
from taskvec.http.models import models_router
from taskvec.http.names import ServedNames
from taskvec.http.probes import probes_router
from taskvec.http.schema import request_body, response_content
from taskvec.settings import Settings, TokenInput
from taskvec.telemetry.metrics import Metrics
from taskvec.telemetry.pulse import keep_time
from taskvec.telemetry.traces import Tracer
from taskvec.wiring import served_name, task_table, text_tokenizer

OnFailure = Callable[[BaseException], None]

log = structlog.get_logger(__name__)

OTHER_VALUES = 1 << 18
"""Values that a JSON body may have beside its texts or token ids."""

LOOK_EVERY = 0.02
"""Seconds between two looks at an engine that starts."""


def create_app(
    settings: Settings,
    checkpoint: Checkpoint,
    engine: Engine,
    metrics: Metrics,
    on_failure: OnFailure,
    *,
    tokenizer: TextTokenizer | None = None,
    tracer: Tracer | None = None,
    engine_name: str | None = None,
    behind_gateway: bool = False,
    patience: float = 0.0,
) -> FastAPI:
    """Wire the service.

    Args:
        settings: how to serve.
        checkpoint: tokenizer, prompts and tasks come from here.
        engine: not started yet; the application starts and stops it.
        metrics: what the engine reports to, too.
        on_failure: called if the engine does not start; the probes answer until then.
        tokenizer: None for the checkpoint's own.
        tracer: None where nobody asked for traces; closed at the end.
        engine_name: what metrics call the engine; None for what the settings do.
        behind_gateway: True where gateways of the same service count and log the requests.
        patience: seconds that connections are not accepted while the engine starts, so that of
            several processes on one socket none refuses what another would answer.
    """
    tasks = task_table(checkpoint)
    tokenizer = tokenizer or text_tokenizer(
        checkpoint,
        max_tokens=settings.max_tokens,
        threads=settings.tokenizer_threads,
        observer=metrics,
    )
    admission = Admission(settings.max_queue_tokens, settings.queue_seconds)
    health = ServiceHealth(
        engine,
        stall_seconds=settings.stall_timeout,
        dead_seconds=settings.dead_timeout,
        canary_seconds=settings.canary_interval,
    )
    embedder = AsyncEmbedder(engine, tokenizer, tasks, admission, health)
    names = ServedNames(served_name(settings, checkpoint), settings.model_aliases)
    metrics.describe(
        version=__version__, model=names.primary, engine=engine_name or settings.engine.value
    )
    token_ids = settings.token_input is TokenInput.ACCEPT

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        gc.freeze()  # what was imported lives for ever: no collection need look at it again
        starting = asyncio.create_task(_start(engine, on_failure))
        measuring = asyncio.create_task(_measure(engine, admission))
        watching = asyncio.create_task(health.watch())
        pulse = asyncio.create_task(keep_time(metrics))
        await _until_ready(engine, patience)
        with drained_first(health, settings.drain_grace, settings.drain_timeout):
            yield
        measuring.cancel()
        watching.cancel()
        await engine.stop()
        await starting
        tokenizer.close()
        pulse.cancel()
        if tracer is not None:
            await asyncio.to_thread(tracer.close)

    app = FastAPI(
        title="taskvec",
        version=__version__,
        summary="Text embeddings that pick the task adapter per request.",
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        lifespan=lifespan,
        redoc_url=None,
        # FastAPI's own would tell of exceptions, and of requests a second time.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    limits = Limits(
        body_bytes=settings.max_body_bytes,
        body_seconds=settings.body_timeout,
        values=OTHER_VALUES + settings.max_texts * (embedder.max_tokens if token_ids else 1),
        texts=settings.max_texts,
        seconds=settings.request_timeout,
        token_ids=token_ids,
    )
    if token_ids:
        app.add_route(
            WIRE_PATH, EngineRoute(embedder, limits).__call__, ["POST"], include_in_schema=False
        )
    app.add_api_route(
        "/v1/embeddings",
        EmbeddingsRoute(embedder, names, limits).__call__,
        methods=["POST"],
        tags=["embeddings"],
        summary="Embed texts for a task",
        operation_id="create_embeddings",
        response_model=None,
        responses={
            200: {"description": "One vector a text, in order.", "content": response_content()},
            **error_responses(400, 404, 408, 413, 415, 429, 500, 503, 504),
        },
        openapi_extra={
            "requestBody": request_body(
                checkpoint.card, tasks, names, texts=settings.max_texts, token_ids=token_ids
            )
        },
    )
    app.include_router(
        models_router(checkpoint.card, embedder.max_tokens, tasks, names, token_ids=token_ids)
    )
    app.include_router(probes_router(health, metrics))
    install_error_handlers(app)
    app.add_middleware(
        RequestTrace,
        metrics=None if behind_gateway else metrics,
        log_requests=settings.log_requests and not behind_gateway,
        tracer=tracer,
    )
    return app


async def _until_ready(engine: Engine, seconds: float) -> None:
    limit = time.monotonic() + seconds
    # An engine tells by its health alone.
    while engine.health().state is EngineState.STARTING and time.monotonic() < limit:  # noqa: ASYNC110
        await asyncio.sleep(LOOK_EVERY)


async def _measure(engine: Engine, admission: Admission) -> None:
    await _until_ready(engine, math.inf)
    if admission.derived and engine.health().ready:
        try:
            tokens, seconds = await measure_speed(engine)
        except TaskvecError as error:
            log.warning("engine_not_measured", reason=error.message)
            return
        admission.learn(tokens, seconds)
        log.info(
            "engine_measured",
            tokens_per_second=round(admission.rate),
            max_queue_tokens=admission.budget,
        )


async def _start(engine: Engine, on_failure: OnFailure) -> None:
    try:
        await engine.start()
    except Exception as error:  # noqa: BLE001 - whatever it was, the process must not linger
        on_failure(error)
