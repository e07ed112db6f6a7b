"""Every way a request can fail, each with the status and code that a client sees.

Raised wherever the failure is found; rendered once, in ``taskvec.api.errors``.
"""

from __future__ import annotations

from typing import ClassVar


class TaskvecError(Exception):
    """A failure that the client is told about.

    Attributes:
        status: HTTP status.
        type: the family of errors that OpenAI clients know.
        code: machine-readable reason.
        message: one sentence: what happened, where, what to do.
        param: the request field at fault, for example ``input[3]``.
        retry_after: seconds after which a retry makes sense; None where none does.
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


class InvalidRequestError(TaskvecError):
    """The request is wrong; sending it again cannot help."""

    status = 400
    type = "invalid_request_error"
    default_code = "invalid_request"


class AuthenticationError(TaskvecError):
    """No API key, or one that is not known."""

    status = 401
    type = "authentication_error"
    default_code = "invalid_api_key"


class NotFoundError(TaskvecError):
    """No such model or route."""

    status = 404
    type = "not_found_error"
    default_code = "not_found"


class MethodNotAllowedError(InvalidRequestError):
    """The route exists, the method does not."""

    status = 405
    default_code = "method_not_allowed"


class SlowRequestError(InvalidRequestError):
    """The request did not arrive in time; the rest was not read."""

    status = 408
    default_code = "body_timeout"


class PayloadTooLargeError(InvalidRequestError):
    """The body is over the limit; it was not read to its end."""

    status = 413
    default_code = "body_too_large"


class UnsupportedMediaTypeError(InvalidRequestError):
    """The body is not declared as JSON."""

    status = 415
    default_code = "unsupported_media_type"


class HeadersTooLargeError(InvalidRequestError):
    """The headers are over the limit; the request was not read."""

    status = 431
    default_code = "headers_too_large"


class QueueFullError(TaskvecError):
    """The token queue has no room; ``retry_after`` says when it should."""

    status = 429
    type = "rate_limit_error"
    default_code = "queue_full"


class RateLimitError(TaskvecError):
    """The key's limit or the token queue leaves no room; ``Retry-After`` says when."""

    status = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"


class ClientClosedError(TaskvecError):
    """The client went away; only logs and metrics ever see this."""

    status = 499
    type = "client_closed_request"
    default_code = "client_closed"


class UnavailableError(TaskvecError):
    """The service cannot embed now: it starts, drains, or its engine is down."""

    status = 503
    type = "service_unavailable"
    default_code = "engine_unavailable"


class DeadlineExceededError(TaskvecError):
    """The request's deadline passed; what was queued has been dropped."""

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
    "unsupported_content_encoding",
    "untokenizable_input",
)
"""Every code that a client may see."""


class StartError(Exception):
    """The service cannot start: one sentence that says why and names the cure."""


class CheckpointError(StartError):
    """The checkpoint cannot be served: one sentence that names the file and the cure."""
