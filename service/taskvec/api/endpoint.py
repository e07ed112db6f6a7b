"""Routes and the one wrapper around every route: authenticate, shed, limit, count, trace."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from taskvec.api.auth import ApiKeyAuth, KeyRateLimiter, client_name
from taskvec.api.context import RequestContext, context_of
from taskvec.api.errors import (
    ERROR_SCHEMA,
    ErrorRenderer,
    error_response,
    error_responses,
    not_answered,
    unexpected_error,
    wrong_method,
)
from taskvec.api.load_shedding import LoadShedder
from taskvec.core.client_shares import current_client
from taskvec.core.health import ServiceHealth
from taskvec.core.memory_budget import MemoryBudget, MemoryHold
from taskvec.core.memory_pressure import MemoryPressure
from taskvec.dialects import DialectName
from taskvec.errors import TaskvecError
from taskvec.metrics.registry import Metrics
from taskvec.service import Service
from taskvec.telemetry.event_loop_lag import EventLoopLag
from taskvec.telemetry.tracing import RequestSpan, Tracer, current_span

Handler = Callable[[Request], Awaitable[Response]]
"""Answers a request; raises TaskvecError for a failure that the client is to see."""

SENT_AT_ONCE_BYTES = 1 << 20
"""A request that holds no more than this keeps it until its response is sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One route and what applies to it.

    Attributes:
        path: as Starlette writes it; may have parameters.
        handler: answers requests.
        method: HTTP method; HEAD is answered as GET, without the body.
        other_methods: methods that other routes of the same path answer, for errors.
        public: needs no API key.
        embeds: submits work to the engine, or only to the tokenizer: it is refused under overload
            and while draining, counts against the key's limits, and is traced.
        counted: requests appear in the request metrics.
        dialect: API that the requests are counted under; None if the route is of no dialect.
        key_in_query: the parameter ``key`` of the URL may carry the API key.
        render_error: form of error bodies.
        error_schema: JSON schema of that form.
        summary: one line of the OpenAPI document.
        tags: group in the OpenAPI document.
        responses: OpenAPI responses by status, beyond 401.
        openapi: further members of the OpenAPI operation.
        documented: appears in the OpenAPI document.
        probe: answered however little memory is left.
    """

    path: str
    handler: Handler
    method: str = "GET"
    other_methods: tuple[str, ...] = ()
    public: bool = False
    embeds: bool = False
    counted: bool = False
    dialect: DialectName | None = None
    key_in_query: bool = False
    render_error: ErrorRenderer = error_response
    error_schema: Mapping[str, Any] = field(default_factory=lambda: ERROR_SCHEMA)
    summary: str = ""
    tags: tuple[str, ...] = ()
    responses: Mapping[int | str, dict[str, Any]] = field(default_factory=dict)
    openapi: Mapping[str, Any] = field(default_factory=dict)
    documented: bool = True
    probe: bool = False

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that the route answers."""
        return ("GET", "HEAD") if self.method == "GET" else (self.method,)


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Makes the wrapped ASGI route of each ``Route``.

    Attributes:
        health: tells whether embedding requests are accepted.
        budget: memory that requests hold.
        pressure: refuses requests when memory is short.
        shedder: refuses embedding requests under overload.
        auth: None if the service has no API keys.
        limiter: None if the service has no API keys.
        metrics: count the requests.
        tracer: None if traces are off.
    """

    health: ServiceHealth
    budget: MemoryBudget
    pressure: MemoryPressure
    shedder: LoadShedder
    auth: ApiKeyAuth | None
    limiter: KeyRateLimiter | None
    metrics: Metrics
    tracer: Tracer | None

    @classmethod
    def of(cls, service: Service, lag: EventLoopLag) -> Self:
        """Take the parts of a service.

        Args:
            service: what is served.
            lag: measures the event loop.
        """
        return cls(
            health=service.health,
            budget=service.budget,
            pressure=service.pressure,
            shedder=LoadShedder(service.health, service.admission, lag, service.pressure),
            auth=None if service.keys is None else ApiKeyAuth(service.keys),
            limiter=None if service.limiter is None else KeyRateLimiter(service.limiter),
            metrics=service.metrics,
            tracer=service.tracer,
        )

    def mount(self, route: Route) -> RawRoute:
        """Wrap a route's handler and describe the route."""
        responses, openapi = dict(route.responses), dict(route.openapi)
        # Other methods reach the first route of a path. HEAD would be described where routes are.
        methods = list(route.methods) if not route.documented else [route.method]
        if self.auth is not None and not route.public:
            responses |= error_responses(401, schema=route.error_schema)
            openapi["security"] = self.auth.security
        mounted = RawRoute(
            route.path,
            route.handler,
            methods=methods,
            summary=route.summary or None,
            tags=list(route.tags),
            responses=responses,
            openapi_extra=openapi,
            include_in_schema=route.documented,
            response_model=None,
            response_class=Response,
        )
        # A name in a path may be any text, line breaks too: the route refuses it in its own form.
        mounted.path_regex = re.compile(mounted.path_regex.pattern, re.DOTALL)
        mounted.app = Endpoint(route, self)
        return mounted


class RawRoute(APIRoute):
    """A FastAPI route described in OpenAPI, whose handler gets the bare request.

    FastAPI's dependency injection, and the context managers around it, would cost a tenth of the
    gateway's time for one text.
    """

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Match HEAD as GET: its path may also be that of a route with another method."""
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        return super().matches(scope)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand over requests of every method, so that a wrong one is counted as well."""
        await self.app(scope, receive, send)


class Endpoint:
    """ASGI application of one route."""

    def __init__(self, route: Route, shared: Endpoints) -> None:
        self._handler = route.handler
        self._methods = route.methods
        self._allowed = ", ".join((*route.methods, *route.other_methods))
        self._render_error = route.render_error
        self._dialect = route.dialect
        self._key_in_query = route.key_in_query
        self._embeds = route.embeds
        self._auth = None if route.public else shared.auth
        self._limiter = shared.limiter
        self._health = shared.health
        self._budget = shared.budget
        self._pressure = None if route.probe else shared.pressure
        self._shedder = shared.shedder
        self._metrics = shared.metrics if route.counted else None
        self._tracer = shared.tracer if route.embeds else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, count it, and end its span."""
        context = context_of(scope)
        if self._metrics is not None:
            self._metrics.request_started()
        span = self._start_span(scope, context)
        try:
            response = await self._response(Request(scope, receive, send), context)
            if context.memory is not None and context.memory.bytes > SENT_AT_ONCE_BYTES:
                context.memory.shrink(len(response.body))  # the vectors are free now
            await response(scope, receive, send)
        except Exception:
            context.status, context.code = TaskvecError.status, TaskvecError.default_code
            raise
        finally:
            if context.memory is not None and context.memory.bytes:
                context.memory.release()
            seconds = context.finish()
            if self._metrics is not None:
                _count(self._metrics, context, seconds, self._dialect)
            if span is not None:
                span.end(
                    context.status, context.code, context.stages.finished, _span_attributes(context)
                )

    async def _response(self, request: Request, context: RequestContext) -> Response:
        if request.method not in self._methods:
            return wrong_method(request, self._allowed, self._render_error)
        try:
            return await self._handle(request, context)
        except TaskvecError as error:
            context.code = error.code
            return self._render_error(error, context.request_id)
        except asyncio.CancelledError:
            if not self._health.draining:
                raise
            # The server cancels what it has not answered when its time to stop is over.
            stopped = not_answered()
            context.code = stopped.code
            return self._render_error(stopped, context.request_id)
        except Exception as error:  # noqa: BLE001 - logged there
            hidden = unexpected_error(error, context.request_id)
            context.code = hidden.code
            return self._render_error(hidden, context.request_id)

    async def _handle(self, request: Request, context: RequestContext) -> Response:
        """Call the handler, if key, load and limits allow it."""
        if self._auth is not None:
            context.key = self._auth.authenticate(request.scope, in_query=self._key_in_query)
        client = client_name(request.scope, context.key)
        context.memory = self._budget.hold(client)
        if not self._embeds:
            return await self._answer(request, context.memory)
        current_client.set(client)
        self._shedder.check(request.scope, context.key)
        with self._health.work:
            if self._limiter is not None and context.key is not None:
                return await self._limiter.run(context.key, context, self._handler, request)
            return await self._handler(request)

    async def _answer(self, request: Request, memory: MemoryHold) -> Response:
        """Call the handler of a route that does not embed; its response is held until it is sent.

        A file of a page may be shared by all its responses, but TLS encrypts each of them at once.
        """
        if self._pressure is None:
            return await self._handler(request)
        self._pressure.require_any()
        response = await self._handler(request)
        if request.method != "HEAD":
            memory.resize(len(response.body))
        return response

    def _start_span(self, scope: Scope, context: RequestContext) -> RequestSpan | None:
        if self._tracer is None:
            return None
        span = self._tracer.start_span(scope["method"], scope["path"], scope["headers"])
        context.trace_id = span.trace_id
        current_span.set(span)
        return span


def _count(
    metrics: Metrics, context: RequestContext, seconds: float, dialect: DialectName | None
) -> None:
    metrics.request_ended(
        context.task,
        context.status,
        texts=context.texts,
        tokens=context.tokens,
        seconds=seconds,
        stages=context.stages.finished,
        output=context.output,
        code=context.code,
        key=context.key.name if context.key is not None else None,
        dialect=dialect,
    )


def _span_attributes(context: RequestContext) -> dict[str, str | int]:
    attributes: dict[str, str | int] = {
        "taskvec.request_id": context.request_id,
        "taskvec.texts": context.texts,
        "taskvec.tokens": context.tokens,
    }
    if context.task is not None:
        attributes["taskvec.task"] = context.task
    return attributes
