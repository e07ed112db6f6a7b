"""Traces of real servers, as an OTLP collector receives them."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from conftest import free_port
from processes import EXACT, Served, ended, served, started, wait_for

STAGES = ["tokenize", "queue", "engine", "encode"]
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CANARY, KEY = "the-canary-in-the-coal-mine", "sk-canary-key"

WITHOUT_OTEL = """
import importlib.abc
import sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter")):
            raise ModuleNotFoundError("not installed here: " + name, name=name)

sys.meta_path.insert(0, Refuse())
from taskvec.cli.main import main
main()
"""

LOADED = """
import sys
from taskvec.api.app import create_app
from taskvec.service import build_service
from taskvec.settings import Settings

create_app(build_service(Settings(engine="remote", engine_url="http://127.0.0.1:1")), print)
ours = ("opentelemetry.sdk", "opentelemetry.exporter", "taskvec.telemetry.otel")
print([name for name in sys.modules if name.startswith(ours)])  # FastAPI loads the API by itself
"""


class Collector:
    """OTLP/HTTP endpoint that stores the spans it receives."""

    def __init__(self) -> None:
        self.sent = b""
        self.spans: list[tuple[str, Span]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.keep(self.path, body)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def keep(self, path: str, body: bytes) -> None:
        assert path == "/v1/traces"
        request = ExportTraceServiceRequest.FromString(body)
        self.sent += body
        for resource in request.resource_spans:
            (service,) = (
                attribute.value.string_value
                for attribute in resource.resource.attributes
                if attribute.key == "service.name"
            )
            for scope in resource.scope_spans:
                self.spans += [(service, span) for span in scope.spans]

    def trace(self, trace_id: str, spans: int) -> list[Span]:
        """Wait until a trace has this number of spans; return them by start time."""
        found: list[Span] = []

        def complete() -> bool:
            found[:] = [span for _, span in list(self.spans) if span.trace_id.hex() == trace_id]
            return len(found) >= spans

        wait_for(complete)
        return sorted(found, key=lambda span: span.start_time_unix_nano)


@pytest.fixture(scope="module")
def collector(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collector]:
    """Run a collector and configure it for every server that is started."""
    collector = Collector()
    thread = threading.Thread(target=collector.server.serve_forever)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TASKVEC_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        yield collector
    collector.server.shutdown()
    thread.join()
    collector.server.server_close()


@pytest.fixture(scope="module")
def server(collector: Collector) -> Iterator[Served]:
    """Start a server that sends traces and accepts token ids."""
    assert collector.url
    with served("--traces", "--token-input", "accept", *EXACT) as server:
        yield server


def test_a_request_is_one_span_with_a_child_a_stage(server: Served, collector: Collector) -> None:
    """The span has the attributes of the request, and its stages are consecutive child spans."""
    answer = ask(server.url, {"input": ["one", "two"], "task": "clustering"})
    root, *stages = collector.trace(TRACE, 5)
    assert (root.name, root.kind) == ("POST /v1/embeddings", Span.SPAN_KIND_SERVER)
    assert root.parent_span_id.hex() == PARENT
    assert attributes(root) == {
        "http.request.method": "POST",
        "http.route": "/v1/embeddings",
        "http.response.status_code": 200,
        "taskvec.model": "taskvec-mini",
        "taskvec.request_id": answer.headers["x-request-id"],
        "taskvec.task": "clustering",
        "taskvec.texts": 2,
        "taskvec.tokens": answer.json()["usage"]["total_tokens"],
    }
    assert [stage.name for stage in stages] == STAGES
    assert {stage.parent_span_id for stage in stages} == {root.span_id}
    slack = 2_000_000  # two clocks
    times = [
        root.start_time_unix_nano - slack,
        *(t for stage in stages for t in (stage.start_time_unix_nano, stage.end_time_unix_nano)),
    ]
    assert all(later >= earlier - slack for earlier, later in pairwise(times))
    assert times[-1] <= root.end_time_unix_nano + slack
    assert {service for service, _ in collector.spans} == {"taskvec"}


def test_a_refusal_is_a_span_with_its_code(server: Served, collector: Collector) -> None:
    """The span of a failed request has its status and code, and the stages that were run."""
    trace = "1" * 32
    assert ask(server.url, {"input": "word " * 3000}, trace).status_code == 400
    root, *stages = collector.trace(trace, 2)
    assert attributes(root)["error.type"] == "input_too_long"
    assert attributes(root)["http.response.status_code"] == 400
    assert [stage.name for stage in stages] == ["tokenize"]


def test_a_request_without_a_trace_begins_one(server: Served, collector: Collector) -> None:
    """Without a valid traceparent the span has no parent."""
    for headers in ({}, {"traceparent": "nonsense"}):
        headers["x-request-id"] = f"new-{len(headers)}"
        httpx.post(f"{server.url}/v1/embeddings", json={"input": "x"}, headers=headers)

        def arrived(wanted: str = headers["x-request-id"]) -> list[Span]:
            spans = [span for _, span in list(collector.spans)]
            return [s for s in spans if attributes(s).get("taskvec.request_id") == wanted]

        wait_for(lambda: bool(arrived()))
        (span,) = arrived()
        assert span.parent_span_id == b""
        assert span.trace_id.hex() not in {TRACE, "0" * 32}


def test_no_text_and_no_key_is_in_a_span(server: Served, collector: Collector) -> None:
    """Spans contain neither the texts nor the API key of a request."""
    headers = {"authorization": f"Bearer {KEY}"}
    ask(server.url, {"input": [CANARY]}, "2" * 32, headers)
    ask(server.url, {"input": [CANARY, 5], "task": CANARY}, "3" * 32, headers)
    collector.trace("2" * 32, 5)
    collector.trace("3" * 32, 1)
    assert CANARY.encode() not in collector.sent
    assert KEY.encode() not in collector.sent


def test_probes_are_not_traced(server: Served, collector: Collector) -> None:
    """Requests for health, metrics and models create no spans."""
    for path in ("/health/ready", "/metrics", "/v1/models"):
        httpx.get(server.url + path, headers={"traceparent": f"00-{'4' * 32}-{PARENT}-01"})
    ask(server.url, {"input": "x"}, "5" * 32)
    collector.trace("5" * 32, 5)
    assert [span for _, span in collector.spans if span.trace_id.hex() == "4" * 32] == []


@pytest.mark.parametrize("texts", [1, 20], ids=["a shared call", "a call of its own"])
def test_a_gateway_and_its_server_make_one_trace(
    server: Served, collector: Collector, texts: int
) -> None:
    """The server's span is a child of the gateway's call, which is a child of its request."""
    options = ("--engine", "remote", "--engine-url", server.url, "--traces")
    trace = f"{texts:032x}"
    with served(*options, "--log-level", "error") as gateway:
        ask(gateway.url, {"input": ["a text"] * texts}, trace)
        assert_one_trace(collector.trace(trace, 11), server.url)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_engine_process_has_its_stages(collector: Collector, workers: str) -> None:
    """A request's span has the stages of the engine, in whichever process they were."""
    trace = f"{6 + int(workers):032x}"
    with served("--workers", workers, "--traces", *EXACT) as gateways:
        ask(gateways.url, {"input": ["a text"]}, trace)
        spans = collector.trace(trace, 5)
    (request,) = (span for span in spans if span.parent_span_id.hex() == PARENT)
    below = [span.name for span in spans if span.parent_span_id == request.span_id]
    assert below == STAGES


def test_requests_that_share_calls_keep_their_traces(server: Served, collector: Collector) -> None:
    """A call that batches several requests belongs to the trace of one of them."""
    options = ("--engine", "remote", "--engine-url", server.url, "--traces")
    traces = [f"{n:032x}" for n in range(1000, 1030)]
    with served(*options, "--log-level", "error") as gateway:
        threads = [
            threading.Thread(target=ask, args=(gateway.url, {"input": "a text"}, trace))
            for trace in traces
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    calls = 0  # all that the gateway had to send has been sent
    for trace in traces:
        spans = [span for _, span in collector.spans if span.trace_id.hex() == trace]
        (root,) = (span for span in spans if span.parent_span_id.hex() == PARENT)
        for call in (span for span in spans if span.kind == Span.SPAN_KIND_CLIENT):
            calls += 1
            assert root.start_time_unix_nano <= call.start_time_unix_nano
            assert call.end_time_unix_nano <= root.end_time_unix_nano + 2_000_000
    assert 1 <= calls <= len(traces)


def test_a_collector_that_is_away_harms_nothing(collector: Collector) -> None:
    """Without a collector requests are answered, and the server stops within seconds."""
    assert collector.url
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{free_port()}")
        with served("--traces", *EXACT) as server:
            assert ask(server.url, {"input": "x"}).status_code == 200
            start = time.monotonic()
            server.process.terminate()
            code, _ = ended(server)
    assert code == -signal.SIGTERM
    assert time.monotonic() - start < 15


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_missing_extra_ends_the_start(workers: str) -> None:
    """--traces without OpenTelemetry installed exits with 3 and one sentence."""
    options = ("--traces", "--workers", workers, *EXACT)
    with started(*options, run=("-c", WITHOUT_OTEL)) as server:
        code, errors = ended(server)
    assert code == 3
    assert errors == "taskvec: --traces needs OpenTelemetry: install taskvec[otel].\n"


def test_nothing_of_opentelemetry_is_loaded_without_traces() -> None:
    """An application without --traces imports neither the SDK nor the exporter."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def assert_one_trace(spans: list[Span], url: str) -> None:
    """Assert that a trace has the gateway's request and call, the server's request, all stages."""
    (gateway,) = (span for span in spans if span.parent_span_id.hex() == PARENT)
    (call,) = (span for span in spans if span.kind == Span.SPAN_KIND_CLIENT)
    (server,) = (span for span in spans if span.name == "POST /v1/engine/embed")
    assert call.parent_span_id == gateway.span_id
    assert attributes(call) == {"url.full": f"{url}/v1/engine/embed"}
    assert server.parent_span_id == call.span_id
    for above in (gateway, server):
        below = [
            span.name
            for span in spans
            if span.parent_span_id == above.span_id and span.kind == Span.SPAN_KIND_INTERNAL
        ]
        assert below == STAGES


def attributes(span: Span) -> dict[str, str | int]:
    """Return the attributes of a span."""
    return {
        attribute.key: getattr(attribute.value, attribute.value.WhichOneof("value"))
        for attribute in span.attributes
    }


def ask(
    url: str, body: dict[str, Any], trace: str = TRACE, headers: dict[str, str] | None = None
) -> httpx.Response:
    """Send a request in a trace and return the response."""
    traced = {"traceparent": f"00-{trace}-{PARENT}-01", **(headers or {})}
    return httpx.post(f"{url}/v1/embeddings", json=body, headers=traced, timeout=60)
