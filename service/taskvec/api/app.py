"""The ASGI application of a service: routes, middleware, lifespan."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from taskvec import __version__
from taskvec.api.endpoint import Endpoints
from taskvec.api.errors import install_error_handlers
from taskvec.api.middleware import RequestMiddleware
from taskvec.api.routes import all_routes, forms_by_segment
from taskvec.service import STATE_KEY, Service
from taskvec.telemetry.event_loop_lag import EventLoopLag


def create_app(service: Service, on_failure: Callable[[BaseException], None]) -> FastAPI:
    """Create the application.

    Args:
        service: what is served; started and stopped with the application.
        on_failure: see ``Service.running``; health routes answer until the process ends.
    """
    settings = service.settings
    lag = EventLoopLag(service.metrics.loop_late)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
        lag.start()
        try:
            async with service.running(on_failure):
                yield {STATE_KEY: service}
        finally:
            lag.stop()

    app = FastAPI(
        title="taskvec",
        version=__version__,
        summary="Text embeddings with a task adapter selected per request.",
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,  # a proxy may have another scheme, host or path: see the middleware
        # FastAPI's own telemetry would report exceptions and requests a second time.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
        openapi_url=None,  # api.openapi serves it, behind the API key
    )
    endpoints = Endpoints.of(service, lag)
    routes = all_routes(service, app, endpoints.auth)
    for route in routes:
        app.router.routes.append(endpoints.mount(route))
    install_error_handlers(app, forms_by_segment(routes))
    app.add_middleware(RequestMiddleware, log=service.request_log)
    if settings.cors_origins:
        app.add_middleware(  # outermost: scripts may read every answer, including errors
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    return app
