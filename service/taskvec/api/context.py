"""State of one HTTP request, carried in its ASGI scope from the middleware to the log line."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Scope

from taskvec.auth.keys import Key
from taskvec.core.job import JobContext
from taskvec.core.output_format import OutputFormat
from taskvec.errors import ClientClosedError

CONTEXT_KEY = "taskvec.context"
"""Key of the context in the ASGI scope."""


@dataclass(slots=True, kw_only=True)
class RequestContext(JobContext):
    """What is known of a request so far; each part fills in what it learns.

    Attributes:
        request_id: from the client, or generated.
        started: ``time.perf_counter()`` when the request arrived, in seconds.
        status: HTTP status of the response; 0 until it has started.
        task: name of the task; None until the body has been read.
        texts: number of inputs.
        tokens: number of tokens embedded.
        output: format of the vectors; None until the body has been read.
        code: error code of the response; None for a success.
        trace_id: 32 hexadecimal digits; None if the request is not traced.
        key: API key of the request; None without one.
        headers: further response headers, sent with any response.
    """

    request_id: str
    started: float = field(default_factory=time.perf_counter)
    status: int = 0
    task: str | None = None
    texts: int = 0
    tokens: int = 0
    output: OutputFormat | None = None
    code: str | None = None
    trace_id: str | None = None
    key: Key | None = None
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)

    def finish(self) -> float:
        """Close the last stage; a request without a response was closed by its client.

        Returns:
            Seconds since the request arrived.
        """
        if not self.status:
            self.status, self.code = ClientClosedError.status, ClientClosedError.default_code
            self.stages.end()
        return time.perf_counter() - self.started


def context_of(scope: Scope) -> RequestContext:
    """Return the context of the request with this scope."""
    context: RequestContext = scope[CONTEXT_KEY]
    return context


def context_if_any(scope: Mapping[str, Any]) -> RequestContext | None:
    """Return the context of a request; None if no application has seen it."""
    return scope.get(CONTEXT_KEY)
