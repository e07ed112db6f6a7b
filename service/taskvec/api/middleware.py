"""ASGI middleware around every request: request id, path, timing headers, one log line."""

from __future__ import annotations

import random
import re
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from taskvec.api.context import CONTEXT_KEY, RequestContext
from taskvec.api.errors import MAX_PATH, error_response, shortened, unexpected_error
from taskvec.telemetry.logs import RequestLog

_random = random.Random()
_CLIENT_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class RequestMiddleware:
    """Creates the request's context and reports it when the response is out."""

    def __init__(self, app: ASGIApp, log: RequestLog | None) -> None:
        """Wrap an application.

        Args:
            app: answers the requests.
            log: gets one line per request; None writes none.
        """
        self._app = app
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection scope."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = RequestContext(request_id=_request_id(scope))
        scope[CONTEXT_KEY] = context
        scope["path"] = without_trailing_slash(scope["path"])

        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                context.status = message["status"]
                context.stages.end()
                message["headers"] = [*message.get("headers", ()), *_response_headers(context)]
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception as failure:
            error = unexpected_error(failure, context.request_id)
            if started:
                raise  # only closing the connection can show the client that its answer is cut off
            context.code = error.code
            await error_response(error, context.request_id)(scope, receive, send_with_headers)
        finally:
            seconds = context.finish()
            if self._log is not None:
                self._log.write(_log_line(context, scope, seconds))


def without_trailing_slash(path: str) -> str:
    """Return a route's path, with or without a slash at its end: both are answered, not redirected.

    A redirect would name the scheme and host that this process sees, which behind a proxy are not
    those of the client, and clients do not repeat a POST to another address.
    """
    return path.rstrip("/") or "/"


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _CLIENT_ID.fullmatch(value):
            text: str = value.decode("ascii")
            return text
    return f"{_random.getrandbits(128):032x}"


def _log_line(context: RequestContext, scope: Scope, seconds: float) -> dict[str, Any]:
    """Return the log fields of a request; never any of its content."""
    line = {
        "request_id": context.request_id,
        "method": scope["method"],
        "path": shortened(scope["path"], MAX_PATH),
        "status": context.status,
        "task": context.task,
        "texts": context.texts,
        "tokens": context.tokens,
        "ms": round(seconds * 1000, 2),
    }
    if context.key is not None:
        line["key"] = context.key.name
    for stage in context.stages.finished:
        line[f"{stage.name}_ms"] = round(stage.seconds * 1000, 2)
    if context.code is not None:
        line["code"] = context.code
    if context.trace_id is not None:
        line["trace_id"] = context.trace_id
    return line


def _response_headers(context: RequestContext) -> list[tuple[bytes, bytes]]:
    milliseconds = (time.perf_counter() - context.started) * 1000
    headers = [
        *context.headers,
        (b"x-request-id", context.request_id.encode("ascii")),
        (b"openai-processing-ms", b"%d" % milliseconds),
    ]
    if context.stages.finished:
        timing = ", ".join(f"{name};dur={s * 1000:.2f}" for name, _, s in context.stages.finished)
        headers.append((b"server-timing", timing.encode("ascii")))
    return headers
