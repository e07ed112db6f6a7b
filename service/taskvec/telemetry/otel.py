"""Spans through OpenTelemetry, exported as OTLP over HTTP; imported only if traces are enabled."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import propagate
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, set_span_in_context

from taskvec import __version__
from taskvec.telemetry.stages import Stage

_NANOSECONDS = 1_000_000_000


class OtelSpan:
    """See ``taskvec.telemetry.tracing.RequestSpan``."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        """Wrap a started span."""
        self._tracer = tracer
        self._span = span
        self._context = set_span_in_context(span)
        self.trace_id = f"{span.get_span_context().trace_id:032x}"

    @contextmanager
    def call(self, url: str) -> Iterator[Mapping[str, str]]:
        """Start a client span; see ``RequestSpan``."""
        span = self._tracer.start_span(
            "engine call", self._context, SpanKind.CLIENT, {"url.full": url}
        )
        headers: dict[str, str] = {}
        propagate.inject(headers, set_span_in_context(span, self._context))
        try:
            yield headers
        except BaseException as error:
            span.set_attribute("error.type", type(error).__name__)
            span.set_status(StatusCode.ERROR)
            raise
        finally:
            span.end()

    def end(
        self,
        status: int,
        code: str | None,
        stages: Iterable[Stage],
        attributes: Mapping[str, str | int],
    ) -> None:
        """End the span, with a child for each stage; see ``RequestSpan``."""
        span = self._span
        if span.is_recording():
            # Offset from the clock of time.perf_counter to Unix time, in nanoseconds.
            clock = time.time_ns() - round(time.perf_counter() * _NANOSECONDS)
            for stage in stages:
                start = clock + round(stage.start * _NANOSECONDS)
                child = self._tracer.start_span(stage.name, self._context, start_time=start)
                child.end(start + round(stage.seconds * _NANOSECONDS))
            span.set_attributes(attributes)
            span.set_attribute("http.response.status_code", status)
            if code is not None:
                span.set_attribute("error.type", code)
            if status >= 500:
                span.set_status(StatusCode.ERROR)
        span.end()


class OtelTracer:
    """See ``taskvec.telemetry.tracing.Tracer``."""

    def __init__(self, model: str) -> None:
        """Start the exporter's thread.

        Args:
            model: served name, an attribute of every request's span.
        """
        self._model = model
        self._provider = TracerProvider(resource=_resource())
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("taskvec", __version__)

    def start_span(
        self, method: str, route: str, headers: Iterable[tuple[bytes, bytes]]
    ) -> OtelSpan:
        """Start a server span; see ``taskvec.telemetry.tracing.Tracer``."""
        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
        span = self._tracer.start_span(
            f"{method} {route}",
            propagate.extract(carrier),
            SpanKind.SERVER,
            {"http.request.method": method, "http.route": route, "taskvec.model": self._model},
        )
        return OtelSpan(self._tracer, span)

    def close(self) -> None:
        """Export the remaining spans; see ``taskvec.telemetry.tracing.Tracer``."""
        self._provider.shutdown()


def _resource() -> Resource:
    """Return the resource from the ``OTEL_*`` variables; the default service name is taskvec."""
    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "taskvec"}))
    return Resource({SERVICE_VERSION: __version__}).merge(resource)
