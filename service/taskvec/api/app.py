"""The ASGI application of a service: its routes, its middleware, its lifespan."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from taskvec import __version__
from taskvec.api import embeddings, engine_embed, health, models, openapi
from taskvec.api.endpoint import Endpoints
from taskvec.api.errors import install_error_handlers
from taskvec.api.load_shedding import EventLoopLag
from taskvec.api.middleware import RequestMiddleware
from taskvec.api.request import RequestLimits
from taskvec.service import STATE_KEY, Service
from taskvec.settings import TokenInput

OTHER_VALUES = 1 << 18
"""JSON values that a body may have besides its texts or token ids."""


def create_app(service: Service, on_failure: Callable[[BaseException], None]) -> FastAPI:
    """Create the application.

    Args:
        service: what is served; started and stopped with the application.
        on_failure: called with the error if the engine does not start; health routes answer until
            then.
    """
    settings = service.settings
    lag = EventLoopLag(service.metrics)
    limits = _request_limits(service)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
        gc.freeze()  # imported modules live as long as the process: no collection need visit them
        async with service.running(on_failure):
            lag.start()
            yield {STATE_KEY: service}
        lag.stop()

    app = FastAPI(
        title="taskvec",
        version=__version__,
        summary="Text embeddings that pick the task adapter per request.",
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        lifespan=lifespan,
        redoc_url=None,
        # FastAPI's own telemetry would report exceptions and requests a second time.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
        openapi_url=None,  # api.openapi serves it, behind the API key
    )
    endpoints = Endpoints.of(service, lag)
    for route in (
        *engine_embed.routes(service, limits),
        *embeddings.routes(service, limits),
        *models.routes(service, token_ids=limits.token_ids),
        *health.routes(service),
        *openapi.routes(app, endpoints.auth),
    ):
        app.router.routes.append(endpoints.mount(route))
    install_error_handlers(app)
    app.add_middleware(
        RequestMiddleware,
        log=service.request_log,
    )
    if settings.cors_origins:
        app.add_middleware(  # outermost: scripts may read every answer, including errors
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    return app


def _request_limits(service: Service) -> RequestLimits:
    settings = service.settings
    token_ids = settings.token_input is TokenInput.ACCEPT
    return RequestLimits(
        body_bytes=settings.max_body_bytes,
        body_seconds=settings.body_timeout,
        values=OTHER_VALUES
        + settings.max_texts * (service.embedder.max_tokens if token_ids else 1),
        texts=settings.max_texts,
        seconds=settings.request_timeout,
        token_ids=token_ids,
    )
