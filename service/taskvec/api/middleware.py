"""One pass around every request: its id, its time, its log line, its metrics."""

from __future__ import annotations

import random
import re
import time
from typing import Any

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from taskvec.api.context import CONTEXT_KEY, RequestContext
from taskvec.api.errors import error_response
from taskvec.api.load_shedding import LoadShedder
from taskvec.engines.wire import WIRE_PATH
from taskvec.errors import ClientClosedError, TaskvecError
from taskvec.metrics.registry import Metrics
from taskvec.telemetry.logs import request_log
from taskvec.telemetry.tracing import RequestSpan, Tracer, current_span

EMBED_PATHS = frozenset({"/v1/embeddings"})
"""Routes that embed: only they count as embedding requests."""

TRACED_PATHS = EMBED_PATHS | {WIRE_PATH}

_dice = random.Random()
_CLIENT_ID = re.compile(rb"[\x21-\x7e]{1,128}")

log = structlog.get_logger(__name__)


class RequestMiddleware:
    """Pure ASGI middleware; sits outside everything but CORS."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics | None,
        *,
        log_requests: bool,
        door: LoadShedder,
        tracer: Tracer | None = None,
    ) -> None:
        """Wrap an application.

        Args:
            app: what answers.
            door: refuses what need not reach it.
            metrics: None where another process counts the requests.
            log_requests: whether each request gets a line.
            tracer: None where nobody asked for traces.
        """
        self._app = app
        self._metrics = metrics
        self._log_requests = log_requests
        self._door = door
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestContext(_request_id(scope))
        scope[CONTEXT_KEY] = record
        metrics = self._metrics if scope["path"] in EMBED_PATHS else None

        async def send_traced(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                record.stages.end()
                message["headers"] = [*message.get("headers", ()), *_trace_headers(record)]
            await send(message)

        if metrics is not None:
            metrics.request_started()
        span = self._span(scope, record)
        try:
            refusal = self._door.refusal(scope, record)
            if refusal is None:
                await self._app(scope, receive, send_traced)
            else:
                record.code = refusal.code
                await error_response(refusal, record.request_id)(scope, receive, send_traced)
        except Exception:
            log.exception("unhandled_error", request_id=record.request_id)
            if record.status:
                raise  # half an answer is out: only closing the connection tells the client
            hidden = TaskvecError("Internal error; the server's log has it under this request id.")
            record.code = hidden.code
            await error_response(hidden, record.request_id)(scope, receive, send_traced)
        finally:
            if not record.status:
                record.status, record.code = (
                    ClientClosedError.status,
                    ClientClosedError.default_code,
                )
                record.stages.end()
            self._report(scope, record, metrics, span)

    def _report(
        self,
        scope: Scope,
        record: RequestContext,
        metrics: Metrics | None,
        span: RequestSpan | None,
    ) -> None:
        seconds = time.perf_counter() - record.started
        stages = record.stages.over
        if metrics is not None:
            metrics.request_ended(
                record.task,
                record.status,
                texts=record.texts,
                tokens=record.tokens,
                seconds=seconds,
                stages=stages,
                output=record.output,
                code=record.code,
                key=record.key.name if record.key is not None else None,
            )
        if span is not None:
            span.end(record.status, record.code, stages, _attributes(record))
        if self._log_requests:
            request_log.write(_line(record, scope, seconds))

    def _span(self, scope: Scope, record: RequestContext) -> RequestSpan | None:
        if self._tracer is None or scope["path"] not in TRACED_PATHS:
            return None
        span = self._tracer.begin(scope["method"], scope["path"], scope["headers"])
        record.trace_id = span.trace_id
        current_span.set(span)
        return span


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _CLIENT_ID.fullmatch(value):
            text: str = value.decode("ascii")
            return text
    return f"{_dice.getrandbits(128):032x}"


def _line(record: RequestContext, scope: Scope, seconds: float) -> dict[str, Any]:
    """What the log tells of a request: nothing that it sent, but its id."""
    line = {
        "request_id": record.request_id,
        "method": scope["method"],
        "path": scope["path"],
        "status": record.status,
        "task": record.task,
        "texts": record.texts,
        "tokens": record.tokens,
        "ms": round(seconds * 1000, 2),
    }
    if record.key is not None:
        line["key"] = record.key.name
    for stage in record.stages.over:
        line[f"{stage.name}_ms"] = round(stage.seconds * 1000, 2)
    if record.code is not None:
        line["code"] = record.code
    if record.trace_id is not None:
        line["trace_id"] = record.trace_id
    return line


def _attributes(record: RequestContext) -> dict[str, str | int]:
    """What a span tells of a request: the same."""
    told: dict[str, str | int] = {
        "taskvec.request_id": record.request_id,
        "taskvec.texts": record.texts,
        "taskvec.tokens": record.tokens,
    }
    if record.task is not None:
        told["taskvec.task"] = record.task
    return told


def _trace_headers(record: RequestContext) -> list[tuple[bytes, bytes]]:
    milliseconds = (time.perf_counter() - record.started) * 1000
    headers = [
        *record.headers,
        (b"x-request-id", record.request_id.encode("ascii")),
        (b"openai-processing-ms", b"%d" % milliseconds),
    ]
    if record.stages.over:
        timing = ", ".join(f"{name};dur={s * 1000:.2f}" for name, _, s in record.stages.over)
        headers.append((b"server-timing", timing.encode("ascii")))
    return headers
