"""Errors of requests, with the HTTP status and code that a client sees, and errors of the start.

A request error is raised wherever it is detected, and rendered by ``taskvec.api.endpoint``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import ClassVar

_INPUT = re.compile(r"input\[(\d{1,9})\]")
_INPUTS = re.compile(r"input\[(\d{1,9})\] to input\[(\d{1,9})\]")


class TaskvecError(Exception):
    """Base of all errors that are reported to the client.

    Attributes:
        status: HTTP status.
        type: type of the error in OpenAI's API.
        code: machine-readable reason.
        message: one sentence: what happened, where, what to do.
        param: the invalid field of the request, for example ``input[3]``.
        retry_after: seconds after which to retry; None if a retry cannot help.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "internal_error"
    default_code: ClassVar[str] = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.param = param
        self.retry_after = retry_after

    @property
    def text(self) -> int | None:
        """Index of the text that ``param`` names; None if it names none."""
        match = _INPUT.fullmatch(self.param or "")
        return None if match is None else int(match[1])

    def _range_renumbered(self, indices: Sequence[int]) -> TaskvecError:
        """Do what ``renumbered`` does, if ``param`` names the first and the last of some texts."""
        found = _INPUTS.fullmatch(self.param or "")
        if found is None:
            return self
        first, last = (indices[int(number)] for number in found.groups())
        param = f"input[{first}] to input[{last}]"
        return type(self)(
            self.message.replace(found[0], param),
            code=self.code,
            param=param,
            retry_after=self.retry_after,
        )

    def renumbered(self, indices: Sequence[int]) -> TaskvecError:
        """Return the error with the index that the text has in another request.

        Args:
            indices: the index in that request of each text.
        """
        if self.param is None or self.text is None:
            return self._range_renumbered(indices)
        param = f"input[{indices[self.text]}]"
        return type(self)(
            self.message.replace(self.param, param),
            code=self.code,
            param=param,
            retry_after=self.retry_after,
        )

    def reworded(self, text_name: Callable[[int], str], truncation: str) -> TaskvecError:
        """Return the error in the words of another API than OpenAI's.

        Args:
            text_name: returns that API's name of the text at an index.
            truncation: what a client sends instead of ``truncate: true``.
        """
        if self.param is None:
            return self
        texts = _INPUT.fullmatch(self.param) or _INPUTS.fullmatch(self.param)
        if texts is None:
            return self
        param = " to ".join(text_name(int(index)) for index in texts.groups())
        return type(self)(
            self.message.replace(self.param, param).replace("truncate: true", truncation),
            code=self.code,
            param=param,
            retry_after=self.retry_after,
        )


class InvalidRequestError(TaskvecError):
    """The request is invalid; a retry cannot help."""

    status = 400
    type = "invalid_request_error"
    default_code = "invalid_request"


class AuthenticationError(TaskvecError):
    """The API key is missing or unknown."""

    status = 401
    type = "authentication_error"
    default_code = "invalid_api_key"


class NotFoundError(TaskvecError):
    """The model or the route does not exist."""

    status = 404
    type = "not_found_error"
    default_code = "not_found"


class MethodNotAllowedError(InvalidRequestError):
    """The route does not support the method."""

    status = 405
    default_code = "method_not_allowed"


class SlowRequestError(InvalidRequestError):
    """The request did not arrive in time; the rest of it was not read."""

    status = 408
    default_code = "body_timeout"


class PayloadTooLargeError(InvalidRequestError):
    """The body exceeds the limit; the rest of it was not read."""

    status = 413
    default_code = "body_too_large"


class UnsupportedMediaTypeError(InvalidRequestError):
    """The body's media type or encoding is not supported."""

    status = 415
    default_code = "unsupported_media_type"


class HeadersTooLargeError(InvalidRequestError):
    """The headers exceed the limit; the request was not read."""

    status = 431
    default_code = "headers_too_large"


class QueueFullError(TaskvecError):
    """The queue is full; ``retry_after`` is the estimated time until it is not."""

    status = 429
    type = "rate_limit_error"
    default_code = "queue_full"


class RateLimitError(TaskvecError):
    """A rate limit of the API key is reached; ``retry_after`` is the time until it is not."""

    status = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"


class ClientClosedError(TaskvecError):
    """The client closed the connection; appears in logs and metrics only."""

    status = 499
    type = "client_closed_request"
    default_code = "client_closed"


class UnavailableError(TaskvecError):
    """The service cannot embed now: it is starting or draining, or its engine is down."""

    status = 503
    type = "service_unavailable"
    default_code = "engine_unavailable"


class OverloadedError(TaskvecError):
    """The process has no memory left for the request."""

    status = 503
    type = "service_unavailable"
    default_code = "overloaded"


class DeadlineExceededError(TaskvecError):
    """The request's deadline has passed; its queued texts were dropped."""

    status = 504
    type = "timeout_error"
    default_code = "deadline_exceeded"


ALL_ERRORS: tuple[type[TaskvecError], ...] = (
    InvalidRequestError,
    AuthenticationError,
    NotFoundError,
    MethodNotAllowedError,
    SlowRequestError,
    PayloadTooLargeError,
    UnsupportedMediaTypeError,
    HeadersTooLargeError,
    QueueFullError,
    RateLimitError,
    ClientClosedError,
    TaskvecError,
    OverloadedError,
    UnavailableError,
    DeadlineExceededError,
)


CODES: tuple[str, ...] = (
    *(error.default_code for error in ALL_ERRORS),
    "conflicting_fields",
    "draining",
    "empty_input",
    "header_timeout",
    "input_too_long",
    "invalid_body",
    "invalid_dimensions",
    "invalid_embedding_type",
    "invalid_encoding_format",
    "invalid_http",
    "invalid_input",
    "invalid_input_type",
    "invalid_json",
    "invalid_model",
    "invalid_normalize",
    "invalid_normalized",
    "invalid_priority",
    "invalid_task",
    "invalid_task_type",
    "invalid_timeout",
    "invalid_token_id",
    "invalid_truncate",
    "invalid_truncation",
    "limits_unavailable",
    "missing_api_key",
    "missing_input",
    "model_not_found",
    "out_of_memory",
    "starting",
    "token_input_rejected",
    "too_many_connections",
    "too_many_inputs",
    "too_many_tokens",
    "too_many_values",
    "unknown_adapter",
    "unknown_task",
    "unsupported_charset",
    "unsupported_content_encoding",
    "unsupported_field",
    "unsupported_transfer_encoding",
    "untokenizable_input",
    "vector_not_finite",
)
"""All error codes that a client may see."""


TEXT_CODES = frozenset({"out_of_memory", "vector_not_finite"})
"""Codes of errors that say that one text cannot be embedded, and nothing about other texts."""


class StartError(Exception):
    """The service cannot start; the message is one sentence: the reason and the remedy."""


class CheckpointError(StartError):
    """The checkpoint cannot be served; the message names the file and the remedy."""
