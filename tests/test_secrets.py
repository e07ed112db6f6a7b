"""No text and no API key is ever logged, at any log level."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from conftest import free_port, wait_until
from processes import EXACT, served, wait_for

CANARY = "canary-in-the-coal-mine"
CLIENT_KEY, ENGINE_KEY = "sk-of-the-client", "sk-of-the-engine"
DEBUG = ("--dtype", "float32", "--log-level", "debug")

FAILING = """
import uvicorn
from conftest import fake_application
from fakes import FakeEngine
from taskvec.checkpoint.open import DEFAULT_MODEL, open_checkpoint
from taskvec.server.run import server_options
from taskvec.settings import Settings
from taskvec.telemetry.logs import configure_logs

class Failing(FakeEngine):
    async def embed(self, batch):
        raise RuntimeError("the engine failed")

configure_logs("debug")
checkpoint = open_checkpoint(DEFAULT_MODEL)
app = fake_application(checkpoint, Failing(checkpoint.card), [], log_requests=True)
uvicorn.run(app, port=PORT, **server_options(Settings()))
"""

BODIES = [
    {"input": CANARY},
    {"input": [CANARY] * 300, "embedding_type": "int8"},
    {"input": [CANARY, 5]},
    {"input": [{"text": CANARY}, {"texts": CANARY}]},
    {"input": f"{CANARY} " * 3000},
    {"input": f"{CANARY} " * 3000, "truncate": True},
    {"input": "x", "task": CANARY},
    {"input": "x", "model": CANARY},
    {"input": "x", "encoding_format": CANARY},
    {"input": "x", "dimensions": CANARY},
    {CANARY: CANARY},
]


def test_a_server_writes_no_text_and_no_key() -> None:
    """Successful, rejected and aborted requests and broken JSON leave no content in the log."""
    with served(*DEBUG) as server:
        statuses = [post(server.url, body) for body in BODIES]
        assert {200, 400, 404} == set(statuses)
        httpx.post(f"{server.url}/v1/embeddings", content=f'{{"input": "{CANARY}'.encode())
        leaving = {"input": [f"{CANARY} {n} " * 50 for n in range(1000)]}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/embeddings", json=leaving, timeout=0.3)
        httpx.get(f"{server.url}/v1/embeddings?input={CANARY}&key={CLIENT_KEY}")
        lines = written(server.process)
    requests = [line for line in lines if line["event"] == "request"]
    assert {200, 400, 404, 405, 499} <= {line["status"] for line in requests}


def test_a_failing_engine_shows_no_text_and_no_key() -> None:
    """The log has the traceback of a bug and the status 500, but not the request's text."""
    port = free_port()
    code = FAILING.replace("PORT", str(port))
    with subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, cwd=Path(__file__).parent
    ) as process:
        url = f"http://127.0.0.1:{port}"
        try:
            wait_until(f"{url}/health/ready", process)
            assert post(url, {"input": [CANARY, CANARY]}) == 500
        finally:
            lines = written(process)
    (bug,) = (line for line in lines if line["event"] == "unhandled_error")
    assert "the engine failed" in bug["exception"]
    (request,) = (line for line in lines if line.get("status") == 500)
    assert request["request_id"] == bug["request_id"]
    assert (request["code"], request["texts"]) == ("internal_error", 2)


def test_a_gateway_without_its_server_writes_no_text_and_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway logs failed calls to a killed server without their content."""
    monkeypatch.setenv("TASKVEC_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TASKVEC_ENGINE_API_KEY", ENGINE_KEY)
    with served("--token-input", "accept", *EXACT) as server:
        options = ("--engine", "remote", "--engine-url", server.url, "--log-level", "debug")
        with served(*options) as gateway:
            assert post(gateway.url, {"input": CANARY}) == 200
            server.process.kill()
            assert post(gateway.url, {"input": CANARY}) == 503
            lines = written(gateway.process)
    assert [line for line in lines if line["event"] == "engine_call_failed"]


def test_a_server_that_echoes_the_key_is_not_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If an engine server repeats the API key in an error, log and probe show stars instead."""
    monkeypatch.setenv("TASKVEC_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TASKVEC_ENGINE_API_KEY", ENGINE_KEY)
    monkeypatch.setenv("TASKVEC_API_KEYS", "operator=tv-operator")
    operator = {"api-key": "tv-operator"}
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        options = ("--engine", "remote", "--engine-url", url, "--log-level", "debug")
        with served(*options, probe="live") as gateway:
            ready = f"{gateway.url}/health/ready"
            wait_for(lambda: "status 401" in httpx.get(ready, headers=operator).text)
            assert "not Bearer ***!" in httpx.get(ready, headers=operator).text
            assert ENGINE_KEY not in httpx.get(ready, headers=operator).text
            written(gateway.process)
        server.shutdown()


class Echo(BaseHTTPRequestHandler):
    """Server that answers 401 and repeats the Authorization header."""

    def do_GET(self) -> None:
        body = f"not {self.headers['authorization']}!".encode()
        self.send_response(401)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Discard the access log."""


def test_the_fields_of_a_request_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log line of a request has id, task, counts, status, stages and the trace id."""
    monkeypatch.setenv("TASKVEC_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    trace = "ab" * 16
    with served("--dtype", "float32", "--traces") as server:
        headers = {"x-request-id": "mine", "traceparent": f"00-{trace}-{'cd' * 8}-01"}
        body = {"input": ["a", "b"], "task": "clustering"}
        answer = httpx.post(f"{server.url}/v1/embeddings", json=body, headers=headers)
        lines = written(server.process)
    (line,) = (line for line in lines if line.get("request_id") == "mine")
    stages = [line.pop(f"{stage}_ms") for stage in ("tokenize", "queue", "engine", "encode")]
    assert 0 < sum(stages) <= line.pop("ms") + 1
    assert line.pop("timestamp")
    assert line == {
        "event": "request",
        "level": "info",
        "request_id": "mine",
        "method": "POST",
        "path": "/v1/embeddings",
        "status": 200,
        "task": "clustering",
        "texts": 2,
        "tokens": answer.json()["usage"]["total_tokens"],
        "trace_id": trace,
    }


def post(url: str, body: object) -> int:
    """Send a request with an API key and return the status."""
    headers = {"authorization": f"Bearer {CLIENT_KEY}"}
    return httpx.post(f"{url}/v1/embeddings", json=body, headers=headers, timeout=60).status_code


def written(process: subprocess.Popen[bytes]) -> list[dict[str, object]]:
    """Terminate a process and return its log lines; asserts that none contains a secret."""
    process.terminate()
    output = process.communicate(timeout=60)[1].decode()
    for secret in (CANARY, CLIENT_KEY, ENGINE_KEY):
        assert secret not in output
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]
