"""Traces of requests across servers, without OpenTelemetry where nobody asks for them.

A call that carries texts of several requests belongs to the trace of the first of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Protocol

from taskvec.errors import CheckpointError
from taskvec.telemetry.stages import Stage

Attributes = Mapping[str, str | int]


class RequestSpan(Protocol):
    """The span of one request.

    Attributes:
        trace_id: 32 hexadecimal digits.
    """

    trace_id: str

    def call(self, url: str) -> AbstractContextManager[Mapping[str, str]]:
        """A span around a call to another server; gives the headers that continue the trace."""

    def end(
        self, status: int, code: str | None, stages: Iterable[Stage], attributes: Attributes
    ) -> None:
        """The request was answered: a child span for each stage, then the end."""


class Tracer(Protocol):
    """What makes spans and sends them."""

    def begin(self, method: str, route: str, headers: Iterable[tuple[bytes, bytes]]) -> RequestSpan:
        """The span of a request, in the trace that its headers name, if any."""

    def close(self) -> None:
        """Send what is left; takes seconds where the collector is away."""


current_span: ContextVar[RequestSpan | None] = ContextVar("current_span", default=None)
"""The span of the request that is being worked on; None where it is not traced."""


def make_tracer(model: str) -> Tracer:
    """A tracer that sends to where the standard ``OTEL_*`` variables say.

    Args:
        model: the served name.

    Raises:
        CheckpointError: OpenTelemetry's SDK or exporter is not installed.
    """
    try:
        from taskvec.telemetry.otel import OtelTracer  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as missing:
        if not (missing.name or "").startswith("opentelemetry"):
            raise
        raise CheckpointError("--traces needs OpenTelemetry: install taskvec[otel].") from None
    return OtelTracer(model)
