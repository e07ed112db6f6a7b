"""Every failure as one JSON body that OpenAI, Jina and Voyage clients can all read."""

from __future__ import annotations

import math
from typing import Any, cast

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from taskvec.api.context import context_of
from taskvec.errors import (
    ALL_ERRORS,
    InvalidRequestError,
    MethodNotAllowedError,
    NotFoundError,
    TaskvecError,
)

NO_RETRY_HELPS = frozenset({500, 504})
"""Of these a retry would only repeat the failure, or the wait."""

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


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI description of these statuses."""
    described = {kind.status: (kind.__doc__ or "").partition("\n")[0] for kind in ALL_ERRORS}
    described[500] = "A bug; nothing of the inside is told."
    return {
        status: {
            "description": described[status],
            "content": {"application/json": {"schema": ERROR_SCHEMA}},
        }
        for status in statuses
    }


def error_response(error: TaskvecError, request_id: str) -> Response:
    """Render one failure."""
    body = {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        },
        "detail": error.message,
        "code": error.code,
        "request_id": request_id,
    }
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
        headers["retry-after-ms"] = str(max(1, round(error.retry_after * 1000)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.status in NO_RETRY_HELPS:
        headers["x-should-retry"] = "false"
    if error.status in (408, 413) or error.code == "draining":
        # The rest of the body is not worth reading, or another server should be asked.
        headers["connection"] = "close"
    return Response(
        orjson.dumps(body), error.status, headers=headers, media_type="application/json"
    )


def install_error_handlers(app: FastAPI) -> None:
    """Map every failure that a route or the framework raises; bugs end in the middleware."""

    def refusal(request: Request, error: TaskvecError) -> Response:
        record = context_of(request.scope)
        record.code = error.code
        return error_response(error, record.request_id)

    async def known(request: Request, error: Exception) -> Response:
        return refusal(request, cast("TaskvecError", error))

    async def framework(request: Request, error: Exception) -> Response:
        error = cast("HTTPException", error)
        translated: TaskvecError
        if error.status_code == 404:
            translated = NotFoundError(f"There is no route {request.url.path}; see /docs.")
        elif error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "another method")
            translated = MethodNotAllowedError(
                f"{request.url.path} does not answer {request.method}; use {allowed}."
            )
        else:
            translated = InvalidRequestError(str(error.detail))
        response = refusal(request, translated)
        response.headers.update(error.headers or {})
        return response

    async def invalid(request: Request, error: Exception) -> Response:
        return refusal(request, InvalidRequestError(str(error)))

    app.add_exception_handler(TaskvecError, known)
    app.add_exception_handler(HTTPException, framework)
    app.add_exception_handler(RequestValidationError, invalid)
