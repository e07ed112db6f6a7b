"""Measure the overhead of the gateway: the full path of a request with a null engine.

The baseline is a bare FastAPI route that parses the same body with pydantic and sends the same
bytes: ``bare`` sends prepared bytes, ``bare-encoding`` encodes vectors with the standard library's
base64. The gateway runs with a fixed list of token ids as its tokeniser; ``gateway-tokenizing`` has
the real one. ``gateway`` has no API keys and no log lines; ``gateway-everything`` has API keys with
three limits each, a log line per request and limited connections, as in ``taskvec serve``. wrk (a
Debian package) sends the load over 32 connections to one side after the other.

    python loadtest/gateway.py --rounds 5
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import uvicorn
from fastapi import FastAPI, Response
from pydantic import BaseModel, SecretStr

from report import ratio, spread, write_result
from server import free_port, wait_ready
from taskvec.api.app import create_app
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.checkpoint.open import DEFAULT_MODEL, open_checkpoint
from taskvec.core.tokenizer import TextTokenizer
from taskvec.engines.base import EngineHealth, EngineResult, EngineState, TokenBatch, TokenIds
from taskvec.malloc import SERVING, tune_malloc
from taskvec.priority import Priority
from taskvec.server.run import server_options
from taskvec.service import build_service, build_tokenizer
from taskvec.settings import Settings
from taskvec.telemetry.logs import RequestLog, configure_logs

DIMENSION = 1024
TEXT = "How do I find out which process listens on a port, and stop it without losing its work?"
SIDES = ("bare", "bare-encoding", "gateway", "gateway-everything", "gateway-tokenizing")
KEYS = "web=tv-benchmark,jobs=tv-other"
SECRET = KEYS.partition("=")[2].partition(",")[0]


class NullEngine:
    """Engine that returns prepared vectors at once."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.model = replace(checkpoint.card, dimension=DIMENSION)
        self._vectors = np.random.default_rng(0).standard_normal((2048, DIMENSION), np.float32)
        self.finished = 0
        self.batch_tokens = 16_384

    async def start(self) -> None:
        pass

    async def embed(self, batch: TokenBatch) -> EngineResult:
        self.finished += len(batch.ids)
        return EngineResult(self._vectors[: len(batch.ids)], 0.0, 0.0)

    async def stop(self) -> None:
        pass

    def health(self) -> EngineHealth:
        return EngineHealth(EngineState.READY)


class FixedTokens:
    """Tokeniser that always returns the same twenty ids, without a thread."""

    max_tokens = 2048
    _ids = np.arange(20, dtype=np.int32)

    async def encode(
        self, texts: Sequence[str], *, prompt: str, truncate: bool, priority: Priority
    ) -> list[TokenIds]:
        assert prompt
        assert priority is Priority.INTERACTIVE
        assert not truncate
        return [self._ids] * len(texts)

    def close(self) -> None:
        pass


class Body(BaseModel):
    """Request body of the bare route."""

    input: str | list[str]
    model: str | None = None
    encoding_format: str = "float"


def serve(side: str, port: int) -> None:
    """Serve one side until the process is killed."""
    everything = side == "gateway-everything"
    log = configure_logs("info" if everything else "error")
    settings = with_keys() if everything else Settings()
    options: dict[str, Any] = {"log_config": None, "access_log": False}
    if everything:
        options = server_options(settings)
    if side.startswith("bare"):
        app = bare_app(encoding=side == "bare-encoding")
    else:
        tune_malloc(SERVING)
        app = gateway_app(settings, log, tokenizing=side == "gateway-tokenizing")
    uvicorn.run(app, port=port, **options)


def with_keys() -> Settings:
    """Return settings with API keys and limits that are never reached."""
    return Settings(
        api_keys=SecretStr(KEYS),
        key_requests_per_minute=100_000_000,
        key_tokens_per_minute=1_000_000_000,
        key_concurrency=1000,
    )


def bare_app(*, encoding: bool) -> FastAPI:
    """Return the bare application, which parses with pydantic and sends or encodes vectors."""
    app = FastAPI()
    answers = {texts: answer_bytes(texts) for texts in (1, 32)}
    vectors = np.random.default_rng(0).standard_normal((32, DIMENSION), np.float32)

    def encoded(texts: int) -> bytes:
        rows = [base64.b64encode(vector).decode() for vector in vectors[:texts]]
        data = [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)]
        usage = {"prompt_tokens": 20 * texts, "total_tokens": 20 * texts}
        return orjson.dumps({"object": "list", "model": "m", "data": data, "usage": usage})

    @app.post("/v1/embeddings")
    async def embeddings(body: Body) -> Response:
        texts = 1 if isinstance(body.input, str) else len(body.input)
        content = encoded(texts) if encoding else answers[texts]
        return Response(content, media_type="application/json")

    @app.get("/health/ready")
    async def ready() -> dict[str, str]:
        return {"status": "ready"}

    return app


def answer_bytes(texts: int) -> bytes:
    """Return the gateway's response to a request with this number of texts."""
    app = gateway_app(Settings(), RequestLog(), tokenizing=False)

    async def ask() -> bytes:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://in-process") as client:
            return (await client.post("/v1/embeddings", content=request_body(texts))).content

    return asyncio.run(ask())


def gateway_app(settings: Settings, log: RequestLog, *, tokenizing: bool) -> FastAPI:
    """Return the real application with the null engine."""
    checkpoint = open_checkpoint(DEFAULT_MODEL)
    engine = NullEngine(checkpoint)
    checkpoint = replace(checkpoint, card=engine.model)
    tokenizer: Any = None if tokenizing else FixedTokens()
    service = build_service(
        settings, checkpoint=checkpoint, engine=engine, tokenizer=tokenizer, request_log=log
    )
    return create_app(service, print)


def request_body(texts: int) -> bytes:
    """Return the request body that wrk sends."""
    inputs: str | list[str] = TEXT if texts == 1 else [TEXT] * texts
    return orjson.dumps({"input": inputs, "model": "taskvec-mini", "encoding_format": "base64"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.port)
        return
    figures: dict[str, Any] = {"vector": f"{DIMENSION} dimensions, base64", "connections": 32}
    for texts in (1, 32):
        rates: dict[str, list[float]] = {side: [] for side in SIDES}
        for _ in range(options.rounds):
            for side in SIDES:
                rates[side].append(measured(side, texts, options.seconds))
                print(f"{side}, {texts} texts: {rates[side][-1]:.0f} requests/s", flush=True)
        figures[f"{texts} text" + ("s" if texts > 1 else "")] = {
            "requests_per_second": {side: spread(values, 0) for side, values in rates.items()},
            "gateway_over_bare": ratio(rates["gateway"], rates["bare"]),
            "gateway_over_bare_encoding": ratio(rates["gateway"], rates["bare-encoding"]),
            "everything_over_gateway": ratio(rates["gateway-everything"], rates["gateway"]),
            "gateway_tokenizing_over_bare": ratio(rates["gateway-tokenizing"], rates["bare"]),
        }
    figures["tokenizer_texts_per_second"] = spread(tokenizer_rates(options.rounds), 0)
    figures["tokenizer_text"] = f"{len(TEXT)} characters, 32 texts a call, all threads"
    write_result("gateway", figures)


def measured(side: str, texts: int, seconds: int) -> float:
    """Start a server and return its requests per second."""
    port = free_port()
    command = [sys.executable, __file__, "--serve", side, "--port", str(port)]
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stderr=log) as server,
        script(texts) as lua,
    ):
        try:
            wait_ready(port)
            url = f"http://127.0.0.1:{port}/v1/embeddings"
            wrk(lua, url, 1)
            report = wrk(lua, url, seconds)
        finally:
            server.terminate()
    assert "Non-2xx" not in report, report
    found = re.search(r"Requests/sec:\s+([\d.]+)", report)
    assert found is not None, report
    return float(found[1])


def wrk(lua: Path, url: str, seconds: int) -> str:
    """Run wrk and return its report."""
    command = ["wrk", "-t1", "-c32", f"-d{seconds}s", "-s", str(lua), url]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@contextmanager
def script(texts: int) -> Any:
    """Write a wrk script that posts the body."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "post.lua"
        body = json.dumps(request_body(texts).decode())
        file.write_text(
            'wrk.method = "POST"\n'
            'wrk.headers["Content-Type"] = "application/json"\n'
            f'wrk.headers["Authorization"] = "Bearer {SECRET}"\n'
            f"wrk.body = {body}\n"
        )
        yield file


def tokenizer_rates(rounds: int) -> list[float]:
    """Return the texts per second of the tokeniser alone."""
    tokenizer: TextTokenizer = build_tokenizer(
        open_checkpoint(DEFAULT_MODEL), max_tokens=0, threads=1
    )
    rates = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(200):
            tokenizer.encode_now([TEXT] * 32, prompt="Document: ", truncate=False)
        rates.append(200 * 32 / (time.perf_counter() - started))
    return rates


if __name__ == "__main__":
    main()
