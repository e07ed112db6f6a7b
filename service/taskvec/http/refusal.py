"""Answers to what never becomes a request: the same errors, without an application."""

from __future__ import annotations

import os
from http import HTTPStatus

from starlette.responses import Response

from taskvec.errors import (
    HeadersTooLargeError,
    InvalidRequestError,
    SlowRequestError,
    TaskvecError,
    UnavailableError,
)
from taskvec.http.errors import error_response


def no_http() -> TaskvecError:
    """Not a request at all."""
    return InvalidRequestError(
        "What the client sent is not well-formed HTTP/1.1: does it speak TLS, or to a proxy?",
        code="invalid_http",
    )


def too_many_ahead() -> TaskvecError:
    """Too many requests on one connection before their answers."""
    return InvalidRequestError("Too many requests are pipelined: wait for the answers.")


def headers_too_large(limit: int) -> TaskvecError:
    """A head, or trailers, of more than so many bytes."""
    return HeadersTooLargeError(
        f"The request's headers are larger than {limit} bytes: send fewer or shorter ones."
    )


def headers_too_slow(seconds: float) -> TaskvecError:
    """A head that takes more than so many seconds."""
    return SlowRequestError(
        f"The request's headers did not arrive within {seconds:g} seconds.", code="header_timeout"
    )


def no_place(limit: int) -> TaskvecError:
    """More than so many connections, each with a request in work."""
    return UnavailableError(
        f"The server has as many connections as it takes, {limit}: try again later.",
        code="too_many_connections",
        retry_after=1,
    )


def last_response(error: TaskvecError) -> Response:
    """An error's answer, and its connection's last; with an id of its own."""
    request_id = os.urandom(16).hex()
    response = error_response(error, request_id)
    response.headers["x-request-id"] = request_id
    response.headers["connection"] = "close"
    return response


def as_bytes(error: TaskvecError) -> bytes:
    """``last_response`` as it travels."""
    response = last_response(error)
    lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}".encode()]
    lines += [name + b": " + value for name, value in response.raw_headers]
    return b"\r\n".join([*lines, b"", bytes(response.body)])
