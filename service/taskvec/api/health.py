"""Health for orchestrators, metrics for Prometheus."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from fastapi import APIRouter, Response
from fastapi.params import Depends

from taskvec.api.errors import error_responses
from taskvec.core.health import ServiceHealth
from taskvec.engines.base import EngineState
from taskvec.errors import UnavailableError
from taskvec.metrics.registry import Metrics

PROMETHEUS_TEXT = "text/plain; version=0.0.4; charset=utf-8"


def probes_router(
    health: ServiceHealth, metrics: Metrics, metrics_guards: Sequence[Depends] = ()
) -> APIRouter:
    """/health/live, /health/ready and /metrics.

    Args:
        health: what is told.
        metrics: what is shown.
        metrics_guards: what a request for the metrics has to pass.
    """
    router = APIRouter(tags=["operations"])

    @router.get(
        "/health/live", summary="Can this process serve at all?", responses=error_responses(503)
    )
    async def live() -> dict[str, str]:
        state = health.liveness()
        if state.state is EngineState.DEAD:
            raise UnavailableError(f"The engine is dead: {state.reason}.", retry_after=1)
        return {"status": "live"}

    @router.get(
        "/health/ready",
        summary="Would a request be answered now?",
        responses=error_responses(503),
    )
    async def ready() -> dict[str, str]:
        health.readiness().require_ready()
        return {"status": "ready"}

    @router.get(
        "/metrics",
        summary="Prometheus series",
        response_class=Response,
        dependencies=metrics_guards,
        responses={
            200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
            **(error_responses(401) if metrics_guards else {}),
        },
    )
    async def series() -> Response:
        state = health.readiness().state.value
        text = await asyncio.to_thread(metrics.render, state)  # reads files, of /proc and others
        return Response(text, headers={"content-type": PROMETHEUS_TEXT})

    return router
