"""Spans by OpenTelemetry, sent as OTLP over HTTP; imported only where traces are asked for."""

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

_NANO = 1_000_000_000


class OtelSpan:
    """See ``RequestSpan``."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        """Take over a span that has begun."""
        self._tracer = tracer
        self._span = span
        self._context = set_span_in_context(span)
        self.trace_id = f"{span.get_span_context().trace_id:032x}"

    @contextmanager
    def call(self, url: str) -> Iterator[Mapping[str, str]]:
        """See ``RequestSpan``."""
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
        """See ``RequestSpan``."""
        span = self._span
        if span.is_recording():
            clock = time.time_ns() - round(time.perf_counter() * _NANO)
            for stage in stages:
                began = clock + round(stage.began * _NANO)
                child = self._tracer.start_span(stage.name, self._context, start_time=began)
                child.end(began + round(stage.seconds * _NANO))
            span.set_attributes(attributes)
            span.set_attribute("http.response.status_code", status)
            if code is not None:
                span.set_attribute("error.type", code)
            if status >= 500:
                span.set_status(StatusCode.ERROR)
        span.end()


class OtelTracer:
    """See ``Tracer``."""

    def __init__(self, model: str) -> None:
        """Start the thread that sends.

        Args:
            model: an attribute of every request's span.
        """
        self._model = model
        self._provider = TracerProvider(resource=_resource())
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("taskvec", __version__)

    def begin(self, method: str, route: str, headers: Iterable[tuple[bytes, bytes]]) -> OtelSpan:
        """See ``Tracer``."""
        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
        span = self._tracer.start_span(
            f"{method} {route}",
            propagate.extract(carrier),
            SpanKind.SERVER,
            {"http.request.method": method, "http.route": route, "taskvec.model": self._model},
        )
        return OtelSpan(self._tracer, span)

    def close(self) -> None:
        """See ``Tracer``."""
        self._provider.shutdown()


def _resource() -> Resource:
    """What the variables say of this process; by default it is called taskvec."""
    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "taskvec"}))
    return Resource({SERVICE_VERSION: __version__}).merge(resource)
