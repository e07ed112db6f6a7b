"""Protocols for distributed tracing, so that OpenTelemetry is imported only if it is enabled.

A call with texts of several requests belongs to the trace of the first request.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Protocol

from taskvec.errors import StartError
from taskvec.telemetry.stages import Stage

Attributes = Mapping[str, str | int]


class RequestSpan(Protocol):
    """The span of one request.

    Attributes:
        trace_id: 32 hexadecimal digits.
    """

    trace_id: str

    def call(self, url: str) -> AbstractContextManager[Mapping[str, str]]:
        """Trace a call to another server; yields the headers that propagate the trace."""

    def end(
        self, status: int, code: str | None, stages: Iterable[Stage], attributes: Attributes
    ) -> None:
        """End the span of an answered request, with a child span for each stage.

        Args:
            status: HTTP status of the answer.
            code: error code of the answer; None for a success.
            stages: the stages that the request went through.
            attributes: attributes of the span.
        """


class Tracer(Protocol):
    """Creates and exports spans."""

    def start_span(
        self, method: str, route: str, headers: Iterable[tuple[bytes, bytes]]
    ) -> RequestSpan:
        """Start the span of a request, in the trace of its headers or in a new one."""

    def close(self) -> None:
        """Export the remaining spans; takes seconds if the collector is unreachable."""


current_span: ContextVar[RequestSpan | None] = ContextVar("current_span", default=None)
"""The span of the current request; None if it is not traced."""


def make_tracer(model: str) -> Tracer:
    """Create a tracer that is configured by the standard ``OTEL_*`` variables.

    Args:
        model: the served model name.

    Raises:
        StartError: OpenTelemetry's SDK or exporter is not installed.
    """
    try:
        from taskvec.telemetry.otel import OtelTracer  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as missing:
        if not (missing.name or "").startswith("opentelemetry"):
            raise
        raise StartError("--traces needs OpenTelemetry: install taskvec[otel].") from None
    return OtelTracer(model)
