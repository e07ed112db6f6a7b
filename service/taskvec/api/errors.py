"""Error responses: one JSON body that OpenAI, Jina and Voyage clients can all read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import orjson
import structlog
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from taskvec.api.context import context_of
from taskvec.concurrency import is_shortage
from taskvec.errors import (
    ALL_ERRORS,
    InvalidRequestError,
    MethodNotAllowedError,
    NotFoundError,
    OverloadedError,
    TaskvecError,
    UnavailableError,
)

log = structlog.get_logger(__name__)

ErrorRenderer = Callable[[TaskvecError, str], Response]
"""Renders an error, given the request id, in the form that clients of a route expect."""

NO_RETRY_STATUSES = frozenset({500, 504})
"""A retry would only repeat the failure, or the wait."""

MAX_MESSAGE = 1000
"""Longest message in characters; what a client sends must not come back at any length."""

MAX_PATH = 200
"""Longest part of a path, in characters, in a message or a log line."""

ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["error", "detail", "code", "request_id"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        },
        "detail": {"type": "string", "description": "The message again; always a string."},
        "code": {"type": "string"},
        "request_id": {"type": "string"},
    },
}


def error_responses(
    *statuses: int, schema: Mapping[str, Any] = ERROR_SCHEMA
) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI responses of these error statuses, whose bodies have this schema."""
    described = {kind.status: (kind.__doc__ or "").partition("\n")[0] for kind in ALL_ERRORS}
    described[429] = "Too many requests: the queue is full, or a limit of the API key is reached."
    described[500] = "A bug in the server; the message gives no internals."
    return {
        status: {
            "description": described[status],
            "content": {"application/json": {"schema": schema}},
        }
        for status in statuses
    }


def shortened(text: str, characters: int) -> str:
    """Return a text, or its beginning and an ellipsis: so many characters at most."""
    return text if len(text) <= characters else f"{text[: characters - 1]}…"


def message_with_delay(error: TaskvecError) -> str:
    """Return an error's message, which ends with the delay if a retry may help.

    For APIs whose clients do not pass on the header: LangChain.js repeats a request after a 429
    only if it finds the delay.
    """
    message = shortened(error.message, MAX_MESSAGE)
    if error.status == 429 and error.retry_after is not None:
        return f"{message} Retry after {max(1, math.ceil(error.retry_after))} s."
    return message


def error_response(error: TaskvecError, request_id: str) -> Response:
    """Render an error as a response; a message that repeats a long input is cut."""
    return error_with_body(error, error_body(error, request_id))


def error_body(error: TaskvecError, request_id: str) -> dict[str, Any]:
    """Return the body of an error; see ``ERROR_SCHEMA``."""
    message = shortened(error.message, MAX_MESSAGE)
    return {
        "error": {
            "message": message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        },
        "detail": message,
        "code": error.code,
        "request_id": request_id,
    }


def error_with_body(error: TaskvecError, body: Mapping[str, Any]) -> Response:
    """Return an error's response with a body in the form of another API."""
    return Response(
        orjson.dumps(body),
        error.status,
        headers=error_headers(error),
        media_type="application/json",
    )


def error_headers(error: TaskvecError) -> dict[str, str]:
    """Return the headers of an error response, whatever the form of its body."""
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
        headers["retry-after-ms"] = str(max(1, round(error.retry_after * 1000)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.status in NO_RETRY_STATUSES:
        headers["x-should-retry"] = "false"
    if error.status in (408, 413) or error.code == "draining":
        # The rest of the body is not worth reading, or another server should be asked.
        headers["connection"] = "close"
    return headers


def unexpected_error(error: Exception, request_id: str) -> TaskvecError:
    """Log an exception that no code expected, and return the error that a client sees.

    A failed allocation is a shortage, not a bug: its traceback is not logged.
    """
    if is_shortage(error):
        log.error("memory_ran_out", request_id=request_id, reason=repr(error))
        return OverloadedError("The server's memory is used up: try again later.", retry_after=1)
    log.error("unhandled_error", request_id=request_id, exc_info=error)
    return TaskvecError("Internal error; the server's log has it under this request id.")


def not_answered() -> TaskvecError:
    """Return the error of an admitted request that the end of the service interrupts."""
    return UnavailableError(
        "The service was stopped before the request was answered: retry on another instance.",
        code="draining",
        retry_after=1,
    )


def wrong_method(request: Request, allowed: str, render: ErrorRenderer) -> Response:
    """Return the response to a request whose method its route does not answer."""
    context = context_of(request.scope)
    error = MethodNotAllowedError(
        f"{_path(request)} does not answer {shortened(request.method, 20)}; use {allowed}."
    )
    context.code = error.code
    response = render(error, context.request_id)
    response.headers["allow"] = allowed
    return response


def _path(request: Request) -> str:
    return shortened(request.scope["path"], MAX_PATH)


def install_error_handlers(app: FastAPI, forms: Mapping[str, ErrorRenderer]) -> None:
    """Answer unknown routes in the same form as the routes' own errors.

    Args:
        app: gets the handler.
        forms: form of the errors of paths that begin with a segment; of others it is OpenAI's.
    """

    async def unrouted(request: Request, error: Exception) -> Response:
        error = cast("HTTPException", error)
        translated: TaskvecError
        if error.status_code == 404:
            translated = NotFoundError(f"There is no route {_path(request)}; see /docs.")
        else:
            translated = InvalidRequestError(str(error.detail))
        context = context_of(request.scope)
        context.code = translated.code
        form = forms.get(request.scope["path"].split("/")[1], error_response)
        response = form(translated, context.request_id)
        response.headers.update(error.headers or {})
        return response

    app.add_exception_handler(HTTPException, unrouted)
