"""Health routes for orchestrators, metrics for Prometheus."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from taskvec.api.endpoint import Route
from taskvec.api.errors import error_responses
from taskvec.engines.base import EngineState
from taskvec.errors import UnavailableError
from taskvec.service import Service

PROMETHEUS_TEXT = "text/plain; version=0.0.4; charset=utf-8"

STATUS = {
    "application/json": {
        "schema": {"type": "object", "additionalProperties": {"type": "string"}},
    }
}
"""OpenAPI content of a health response."""


def routes(service: Service) -> list[Route]:
    """Return /health/live, /health/ready and /metrics."""
    health, metrics = service.health, service.metrics

    async def live(_: Request) -> Response:
        state = health.liveness()
        if state.state is EngineState.DEAD:
            raise UnavailableError(f"The engine is dead: {state.reason}.", retry_after=1)
        return JSONResponse({"status": "live"})

    async def ready(_: Request) -> Response:
        health.readiness().require_ready()
        return JSONResponse({"status": "ready"})

    async def series(_: Request) -> Response:
        state = health.readiness().state.value
        text = await asyncio.to_thread(metrics.render, state)  # reads files, /proc among them
        return Response(text, headers={"content-type": PROMETHEUS_TEXT})

    success: dict[int | str, dict[str, Any]] = {
        200: {"description": "Successful Response", "content": STATUS}
    }
    text = {"text/plain": {"schema": {"type": "string"}}}
    return [
        Route(
            path="/health/live",
            handler=live,
            public=True,
            summary="Liveness: whether this process can serve at all",
            tags=("operations",),
            responses={**success, **error_responses(503)},
        ),
        Route(
            path="/health/ready",
            handler=ready,
            public=True,
            summary="Readiness: whether a request would be answered now",
            tags=("operations",),
            responses={**success, **error_responses(503)},
        ),
        Route(
            path="/metrics",
            handler=series,
            public=service.settings.metrics_without_key,
            summary="Prometheus series",
            tags=("operations",),
            responses={200: {"description": "Successful Response", "content": text}},
        ),
    ]
