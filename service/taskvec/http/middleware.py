"""One pass around every request: its id, its time, its log line, its metrics."""

from __future__ import annotations

import os
import re
import time

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from taskvec.errors import TaskvecError
from taskvec.http.errors import error_response
from taskvec.http.record import RECORD_KEY, RequestRecord
from taskvec.telemetry.metrics import Metrics

EMBED_PATHS = frozenset({"/v1/embeddings"})
"""Routes that embed: only they count as embedding requests."""

_CLIENT_ID = re.compile(rb"[\x21-\x7e]{1,128}")

log = structlog.get_logger("taskvec.requests")


class RequestTrace:
    """Pure ASGI middleware; sits outside everything but CORS."""

    def __init__(self, app: ASGIApp, metrics: Metrics | None, *, log_requests: bool) -> None:
        """Wrap an application.

        Args:
            app: what answers.
            metrics: None where another process counts the requests.
            log_requests: whether each request gets a line.
        """
        self._app = app
        self._metrics = metrics
        self._log_requests = log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(_request_id(scope))
        scope[RECORD_KEY] = record
        metrics = self._metrics if scope["path"] in EMBED_PATHS else None

        async def send_traced(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message.get("headers", ()), *_trace_headers(record)]
            await send(message)

        if metrics is not None:
            metrics.request_started()
        try:
            await self._app(scope, receive, send_traced)
        except Exception:
            log.exception("unhandled_error", request_id=record.request_id)
            if record.status:
                raise  # half an answer is out: only closing the connection tells the client
            hidden = TaskvecError("Internal error; the server's log has it under this request id.")
            await error_response(hidden, record.request_id)(scope, receive, send_traced)
        finally:
            seconds = time.perf_counter() - record.started
            status = record.status or 499
            name = record.key.name if record.key is not None else None
            if metrics is not None:
                metrics.request_ended(
                    record.task, status, record.texts, record.tokens, seconds, key=name
                )
            if self._log_requests:
                log.info(
                    "request",
                    request_id=record.request_id,
                    method=scope["method"],
                    path=scope["path"],
                    status=status,
                    key=name,
                    task=record.task,
                    texts=record.texts,
                    tokens=record.tokens,
                    ms=round(seconds * 1000, 2),
                )


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _CLIENT_ID.fullmatch(value):
            text: str = value.decode("ascii")
            return text
    return os.urandom(16).hex()


def _trace_headers(record: RequestRecord) -> list[tuple[bytes, bytes]]:
    milliseconds = (time.perf_counter() - record.started) * 1000
    headers = [
        *record.headers,
        (b"x-request-id", record.request_id.encode("ascii")),
        (b"openai-processing-ms", b"%d" % milliseconds),
    ]
    if record.stages:
        timing = ", ".join(f"{name};dur={s * 1000:.2f}" for name, s in record.stages.items())
        headers.append((b"server-timing", timing.encode("ascii")))
    return headers
