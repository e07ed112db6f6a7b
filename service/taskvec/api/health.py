"""Health routes for orchestrators, metrics for Prometheus."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from taskvec.api.auth import ApiKeyAuth
from taskvec.api.endpoint import Route
from taskvec.api.errors import error_responses
from taskvec.engines.base import EngineState
from taskvec.errors import AuthenticationError, UnavailableError
from taskvec.service import Service

PROMETHEUS_TEXT = "text/plain; version=0.0.4; charset=utf-8"

RENDERINGS_PER_SECOND = 1.0
"""Renderings of /metrics on average; each takes milliseconds in which Python does little else."""

RENDERINGS_AT_ONCE = 20
"""Renderings in a row, after as many seconds without one: for several scrapers and a person."""

STATUS = {
    "application/json": {
        "schema": {"type": "object", "additionalProperties": {"type": "string"}},
    }
}
"""OpenAPI content of a health response."""


class Renderer(Protocol):
    """What ``MetricsPage`` needs of the metrics."""

    def render(self, state: str) -> bytes:
        """See ``Metrics.render``."""


class MetricsPage:
    """The text of /metrics, rendered in a thread; beyond the rate above the last one is repeated.

    Requests that come while it is rendered share that rendering.
    """

    def __init__(self, metrics: Renderer) -> None:
        """Render these metrics."""
        self._metrics = metrics
        self._rendering: asyncio.Task[bytes] | None = None
        self._renderings = float(RENDERINGS_AT_ONCE)
        self._asked_at = time.monotonic()

    async def read(self, state: str) -> bytes:
        """Return the text.

        Args:
            state: the engine's state, a value of ``EngineState``.
        """
        now = time.monotonic()
        earned = (now - self._asked_at) * RENDERINGS_PER_SECOND
        self._renderings = min(RENDERINGS_AT_ONCE, self._renderings + earned)
        self._asked_at = now
        task = self._rendering
        if task is None or (task.done() and self._renderings >= 1):
            self._renderings -= 1
            # Reads files, /proc among them.
            work = asyncio.to_thread(self._metrics.render, state)
            task = self._rendering = asyncio.create_task(work)
        return await asyncio.shield(task)


def routes(service: Service, auth: ApiKeyAuth | None) -> list[Route]:
    """Return /health/live, /health/ready and /metrics.

    Args:
        service: what is served.
        auth: None if the service has no API keys.
    """
    health, page = service.health, MetricsPage(service.metrics)

    async def live(_: Request) -> Response:
        state = health.liveness()
        if state.state is EngineState.DEAD:
            raise UnavailableError(f"The engine is dead: {state.for_clients}.", retry_after=1)
        return JSONResponse({"status": "live"})

    async def ready(request: Request) -> Response:
        state = health.readiness()
        if not state.ready:
            state.require_ready(for_operator=auth is not None and _has_key(auth, request))
        return JSONResponse({"status": "ready"})

    async def series(_: Request) -> Response:
        text = await page.read(health.readiness().state.value)
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
            probe=True,
            summary="Liveness: whether this process can serve at all",
            tags=("operations",),
            responses={**success, **error_responses(503)},
        ),
        Route(
            path="/health/ready",
            handler=ready,
            public=True,
            probe=True,
            summary="Readiness: whether a request would be answered now",
            tags=("operations",),
            responses={**success, **error_responses(503)},
        ),
        Route(
            path="/metrics",
            handler=series,
            public=service.settings.metrics_without_key,
            probe=True,
            summary="Prometheus series",
            tags=("operations",),
            responses={200: {"description": "Successful Response", "content": text}},
        ),
    ]


def _has_key(auth: ApiKeyAuth, request: Request) -> bool:
    try:
        auth.authenticate(request.scope)
    except AuthenticationError:
        return False
    return True
