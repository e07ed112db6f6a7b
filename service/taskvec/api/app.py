"""The application: every part made here and passed to those that need it."""

from __future__ import annotations

import asyncio
import gc
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext

import structlog
from fastapi import Depends, FastAPI
from starlette.middleware.cors import CORSMiddleware

from taskvec import __version__
from taskvec.api.auth import Access, Endpoint
from taskvec.api.embeddings import EmbeddingsRoute
from taskvec.api.endpoint import RawRoute
from taskvec.api.engine_embed import EngineRoute
from taskvec.api.errors import error_responses, install_error_handlers
from taskvec.api.health import probes_router
from taskvec.api.load_shedding import EventLoopLag, LoadShedder
from taskvec.api.middleware import RequestMiddleware
from taskvec.api.models import models_router
from taskvec.api.openapi import documents_router, request_body, response_content
from taskvec.api.request import RequestLimits
from taskvec.auth.keys import WatchedKeys
from taskvec.auth.rate_limit import Limiter
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.core.admission import NO_LIMIT, Admission, measure_speed
from taskvec.core.embedder import AsyncEmbedder
from taskvec.core.health import ServiceHealth
from taskvec.core.tasks import ServedNames
from taskvec.core.tokenizer import TextTokenizer
from taskvec.engines.base import Engine, EngineState
from taskvec.engines.wire import WIRE_PATH
from taskvec.errors import TaskvecError
from taskvec.metrics.registry import Metrics
from taskvec.server.shutdown import graceful_shutdown
from taskvec.service import answer_cache, key_source, served_name, task_table, text_tokenizer
from taskvec.settings import LimitsDown, Settings, TokenInput
from taskvec.telemetry.tracing import Tracer

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
        behind_gateway: True where gateways of the same service ask for keys, count and log.
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
    # Gateways admit for the engine that they share.
    room = (settings.max_queue_tokens, settings.queue_seconds, settings.max_queue_requests)
    admission = Admission(NO_LIMIT) if behind_gateway else Admission(*room)
    health = ServiceHealth(
        engine,
        stall_seconds=settings.stall_timeout,
        dead_seconds=settings.dead_timeout,
        canary_seconds=settings.canary_interval,
    )
    # Gateways keep the answers, too: they know whose they are.
    cache = None if behind_gateway else answer_cache(settings, checkpoint, metrics)
    embedder = AsyncEmbedder(engine, tokenizer, tasks, admission, health, cache=cache)
    names = ServedNames(served_name(settings, checkpoint), settings.model_aliases)
    metrics.describe(
        version=__version__, model=names.primary, engine=engine_name or settings.engine.value
    )
    access = None if behind_gateway else _access(settings, metrics)
    guards = [] if access is None else [Depends(access.gate)]
    refusals = [] if access is None else [401]
    token_ids = settings.token_input is TokenInput.ACCEPT
    pulse = EventLoopLag(metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        gc.freeze()  # what was imported lives for ever: no collection need look at it again
        starting = asyncio.create_task(_start(engine, on_failure))
        measuring = asyncio.create_task(_measure(engine, admission))
        watching = asyncio.create_task(health.watch())
        pulse.start()
        await _until_ready(engine, patience)
        with graceful_shutdown(health, settings.drain_grace, settings.drain_timeout):
            async with nullcontext() if access is None else access.watched():
                yield
        measuring.cancel()
        watching.cancel()
        await engine.stop()
        await starting
        await embedder.close()
        pulse.stop()
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
        openapi_url=None,  # documents_router has it, behind the gate
    )
    limits = RequestLimits(
        body_bytes=settings.max_body_bytes,
        body_seconds=settings.body_timeout,
        values=OTHER_VALUES + settings.max_texts * (embedder.max_tokens if token_ids else 1),
        texts=settings.max_texts,
        seconds=settings.request_timeout,
        token_ids=token_ids,
    )
    embed: Endpoint = EmbeddingsRoute(embedder, names, limits).__call__
    embed_ids: Endpoint = EngineRoute(embedder, limits).__call__
    if access is not None:
        embed, embed_ids = access.limited(embed), access.limited(embed_ids)
    if token_ids:
        app.router.add_api_route(
            WIRE_PATH,
            embed_ids,
            methods=["POST"],
            include_in_schema=False,
            route_class_override=RawRoute,
        )
    app.router.add_api_route(
        "/v1/embeddings",
        embed,
        methods=["POST"],
        tags=["embeddings"],
        summary="Embed texts for a task",
        operation_id="create_embeddings",
        response_model=None,
        route_class_override=RawRoute,
        responses={
            200: {"description": "One vector a text, in order.", "content": response_content()},
            **error_responses(400, *refusals, 404, 408, 413, 415, 429, 500, 503, 504),
        },
        openapi_extra={
            "requestBody": request_body(
                checkpoint.card, tasks, names, texts=settings.max_texts, token_ids=token_ids
            ),
            **({} if access is None else {"security": [{access.gate.scheme_name: []}]}),
        },
    )
    app.include_router(
        models_router(checkpoint.card, embedder.max_tokens, tasks, names, token_ids=token_ids),
        dependencies=guards,
        responses=error_responses(*refusals),
    )
    metrics_guards = [] if settings.metrics_without_key else guards
    app.include_router(probes_router(health, metrics, metrics_guards))
    app.include_router(documents_router(app), dependencies=guards)
    install_error_handlers(app)
    app.add_middleware(
        RequestMiddleware,
        metrics=None if behind_gateway else metrics,
        log_requests=settings.log_requests and not behind_gateway,
        door=LoadShedder(health, admission, pulse, None if access is None else access.gate),
        tracer=tracer,
    )
    if settings.cors_origins:
        app.add_middleware(  # outermost: scripts may read every answer, of a bug too
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    return app


def _access(settings: Settings, metrics: Metrics) -> Access | None:
    source = key_source(settings)
    if source is None:
        return None
    limiter = Limiter(
        settings.limits_url,
        open_when_down=settings.limits_down is LimitsDown.OPEN,
        observer=metrics,
    )
    return Access(WatchedKeys(source, metrics.keys_changed), limiter)


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
