"""Health for orchestrators, metrics for Prometheus."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, Response
from fastapi.params import Depends

from taskvec.engines.base import Engine, EngineState
from taskvec.errors import UnavailableError
from taskvec.http.errors import error_responses
from taskvec.telemetry.metrics import Metrics

PROMETHEUS_TEXT = "text/plain; version=0.0.4; charset=utf-8"


def probes_router(
    engine: Engine, metrics: Metrics, metrics_guards: Sequence[Depends] = ()
) -> APIRouter:
    """/health/live, /health/ready and /metrics.

    Args:
        engine: whose health is told.
        metrics: what is shown.
        metrics_guards: what a request for the metrics has to pass.
    """
    router = APIRouter(tags=["operations"])

    @router.get(
        "/health/live", summary="Can this process serve at all?", responses=error_responses(503)
    )
    async def live() -> dict[str, str]:
        health = engine.health()
        if health.state is EngineState.DEAD:
            raise UnavailableError(f"The engine is dead: {health.reason}.", retry_after=1)
        return {"status": "live"}

    @router.get(
        "/health/ready",
        summary="Would a request be answered now?",
        responses=error_responses(503),
    )
    async def ready() -> dict[str, str]:
        engine.health().require_ready()
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
        return Response(
            metrics.render(ready=engine.health().ready),
            headers={"content-type": PROMETHEUS_TEXT},
        )

    return router
