"""Every class of failure as clients see it: one body for all, and what says when to retry."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
import pytest
from structlog.testing import capture_logs

from conftest import fake_service
from fakes import FakeEngine
from taskvec.api import cohere, gemini
from taskvec.api.errors import ErrorRenderer, error_response
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.engines.base import EngineHealth, EngineResult, EngineState, TokenBatch
from taskvec.errors import (
    ALL_ERRORS,
    CheckpointError,
    QueueFullError,
    TaskvecError,
    UnavailableError,
)

PATH = "/v1/embeddings"
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    431: "invalid_request_error",
    429: "rate_limit_error",
    500: "internal_error",
    503: "service_unavailable",
    504: "timeout_error",
}
"""The contract's table."""


class RaisingEngine(FakeEngine):
    """Ready, and raises whatever it is told to when asked to embed."""

    failure: Exception = RuntimeError("secret: /etc/weights, CUDA error 719")

    async def embed(self, batch: TokenBatch) -> EngineResult:  # noqa: ARG002 - the protocol's
        raise self.failure


class NotFiniteEngine(FakeEngine):
    """Gives vectors that are no numbers."""

    async def embed(self, batch: TokenBatch) -> EngineResult:
        vectors = np.full((len(batch.ids), self.model.dimension), np.nan, np.float32)
        return EngineResult(vectors, queued=0.0, computed=0.0)


class SlowStartEngine(FakeEngine):
    """Is starting until it is stopped."""

    async def start(self) -> None:
        self._stopped = asyncio.Event()
        await self._stopped.wait()

    async def stop(self) -> None:
        self._stopped.set()
        await super().stop()


class DrainingEngine(FakeEngine):
    """Has begun to stop."""

    async def start(self) -> None:
        self._health = EngineHealth(EngineState.STOPPING, "it is shutting down")


def check(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Check the whole form of an error; return its body."""
    body: dict[str, Any] = answer.json()
    assert (answer.status_code, body["code"]) == (status, code), body
    assert answer.headers["content-type"] == "application/json"
    assert set(body) == {"error", "detail", "code", "request_id"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert (body["error"]["type"], body["error"]["code"]) == (TYPES[status], code)
    assert isinstance(body["detail"], str)
    assert body["detail"] == body["error"]["message"]
    assert body["request_id"] == answer.headers["x-request-id"]
    assert answer.headers.get("x-should-retry") == ("false" if status in {500, 504} else None)
    return body


def check_retry_headers(answer: httpx.Response) -> None:
    """Whole seconds of at least 1, and the same in milliseconds."""
    seconds = int(answer.headers["retry-after"])
    milliseconds = int(answer.headers["retry-after-ms"])
    assert 1 <= seconds <= 120
    assert seconds - 1 < milliseconds / 1000 <= seconds


@asynccontextmanager
async def one_in_flight(
    checkpoint: Checkpoint, **settings: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, FakeEngine]]:
    """A service whose engine is busy with a request of 1,001 tokens until the block ends."""
    engine = FakeEngine(checkpoint.card, delay=60)
    async with fake_service(checkpoint, engine, token_input="accept", **settings) as service:  # noqa: S106 - a setting
        request = asyncio.create_task(service[0].post(PATH, json={"input": [7] * 1001}))
        while not engine.batches:
            await asyncio.sleep(0.005)
        yield service
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)


@pytest.mark.parametrize("kind", ALL_ERRORS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("retry_after", [None, 0.2, 1, 7.5, 120])
def test_every_class_has_one_form(kind: type[TaskvecError], retry_after: float | None) -> None:
    """Each class of error renders to the contract's body, and to Retry-After if it has one."""
    error = kind("What happened.", code="some_code", param="input[3]", retry_after=retry_after)
    answer = error_response(error, "an-id")
    assert answer.status_code == kind.status
    assert httpx.Response(200, content=bytes(answer.body)).json() == {
        "error": {
            "message": "What happened.",
            "type": kind.type,
            "param": "input[3]",
            "code": "some_code",
        },
        "detail": "What happened.",
        "code": "some_code",
        "request_id": "an-id",
    }
    if retry_after is None:
        assert "retry-after" not in answer.headers
        assert "retry-after-ms" not in answer.headers
    else:
        assert int(answer.headers["retry-after"]) >= max(1, retry_after)
        assert int(answer.headers["retry-after-ms"]) == retry_after * 1000


def test_every_class_is_of_the_contracts_table() -> None:
    """Each status has the type that the contract gives it, and a code of its own."""
    table = {kind.status: kind.type for kind in ALL_ERRORS}
    assert {status: table[status] for status in TYPES} == TYPES
    assert set(table) - set(TYPES) == {499}
    assert len({kind.default_code for kind in ALL_ERRORS}) == len(ALL_ERRORS)


@pytest.mark.anyio
async def test_vectors_that_are_not_finite_name_the_text(default_checkpoint: Checkpoint) -> None:
    """A text without a usable vector is named, so that the others can be sent without it."""
    engine = NotFiniteEngine(default_checkpoint.card)
    async with fake_service(default_checkpoint, engine) as (client, _):
        answer = await client.post(PATH, json={"input": ["my private text", "another"]})
        body = check(answer, 500, "vector_not_finite")
        assert body["error"]["param"] == "input[0]"
        assert "private" not in answer.text


@pytest.mark.anyio
@pytest.mark.parametrize("engine", [RaisingEngine])
async def test_a_bug_leaks_nothing(
    default_checkpoint: Checkpoint, engine: type[FakeEngine]
) -> None:
    """A bug in the engine is a 500 that tells only its id."""
    async with fake_service(default_checkpoint, engine(default_checkpoint.card)) as (client, _):
        answer = await client.post(PATH, json={"input": "my private text"})
        body = check(answer, 500, "internal_error")
        assert body["error"]["param"] is None
        for inner in ("secret", "/etc", "CUDA", "finite", "RuntimeError", "ValueError", "private"):
            assert inner not in answer.text
        assert (await client.get("/health/live")).status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize(
    "body",
    [
        {"input": [7] * 100},
        {"input": [[7], [7] * 99]},
        {"input": "word " * 200},
        {"input": ["word"] * 100, "task": "clustering"},
    ],
    ids=["ids", "lists of ids", "text", "texts"],
)
async def test_a_full_queue(default_checkpoint: Checkpoint, body: dict[str, Any]) -> None:
    """What does not fit beside the work in flight is a 429, alike for one text and for many."""
    async with one_in_flight(default_checkpoint, max_queue_tokens=1050) as (client, engine):
        answer = await client.post(PATH, json=body)
        check(answer, 429, "queue_full")
        check_retry_headers(answer)
        assert len(engine.batches) == 1


@pytest.mark.anyio
@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_a_long_path_is_cut(default_checkpoint: Checkpoint, method: str) -> None:
    """Neither the answer nor the log line holds more than the beginning of a path."""
    path = "/v1/models/" + 50_000 * "x" if method == "DELETE" else "/" + 50_000 * "x"
    async with fake_service(default_checkpoint, log_requests=True) as (client, _):
        with capture_logs() as lines:
            answer = await client.request(method, path)
    assert answer.status_code == {"GET": 404, "DELETE": 405}[method]
    assert path[:190] in answer.json()["detail"]
    assert len(answer.content) < 2000
    (line,) = [line for line in lines if line["event"] == "request"]
    assert line["path"] == f"{path[:199]}…"


@pytest.mark.anyio
async def test_a_long_name_is_cut(default_checkpoint: Checkpoint) -> None:
    """A message that repeats a field of the request does not repeat megabytes of it."""
    async with fake_service(default_checkpoint) as (client, _):
        for field in ("model", "task", "encoding_format", "embedding_type"):
            answer = await client.post(PATH, json={"input": "a", field: 1_000_000 * "x"})
            assert answer.status_code in {400, 404}
            assert len(answer.content) < 3000


@pytest.mark.anyio
async def test_what_fits_is_admitted(default_checkpoint: Checkpoint) -> None:
    """A request within the budget goes to the engine while another is in flight."""
    async with one_in_flight(default_checkpoint, max_queue_tokens=1050) as (client, engine):
        second = asyncio.create_task(client.post(PATH, json={"input": [7] * 49}))
        while len(engine.batches) < 2:
            await asyncio.sleep(0.005)
        check(await client.post(PATH, json={"input": [7]}), 429, "queue_full")
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)


@pytest.mark.anyio
async def test_room_comes_back(default_checkpoint: Checkpoint) -> None:
    """A request larger than the whole budget is answered alone, again and again."""
    async with fake_service(default_checkpoint, max_queue_tokens=2) as (client, _):
        for _ in range(3):
            answer = await client.post(PATH, json={"input": ["more than", "two tokens"]})
            assert answer.status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize("by", ["header", "setting"])
async def test_the_deadline_passes(default_checkpoint: Checkpoint, by: str) -> None:
    """The smaller of the client's and the server's limit ends a request, and the engine's work."""
    engine = FakeEngine(default_checkpoint.card, delay=60)
    limit = 0.1 if by == "setting" else 300.0
    headers = {"x-request-timeout-ms": "100" if by == "header" else "300000"}
    async with fake_service(default_checkpoint, engine, request_timeout=limit) as (client, _):
        answer = await client.post(PATH, json={"input": "a"}, headers=headers)
        check(answer, 504, "deadline_exceeded")
        assert (len(engine.batches), engine.cancelled) == (1, 1)


@pytest.mark.anyio
async def test_before_the_engine_has_started(default_checkpoint: Checkpoint) -> None:
    """While weights load, requests are a 503 starting that says when to come back."""
    engine = SlowStartEngine(default_checkpoint.card)
    async with fake_service(default_checkpoint, engine) as (client, _):
        refusals = [await client.post(PATH, json={"input": "a"}), await client.get("/health/ready")]
        for answer in refusals:
            check(answer, 503, "starting")
            check_retry_headers(answer)


@pytest.mark.anyio
@pytest.mark.parametrize("path", [PATH, "/health/ready", "/health/live"])
async def test_when_the_engine_is_dead(default_checkpoint: Checkpoint, path: str) -> None:
    """An engine that could not start is a 503 everywhere, with its reason and Retry-After."""
    engine = FakeEngine(default_checkpoint.card, error=CheckpointError("adapter is zero"))
    async with fake_service(default_checkpoint, engine) as (client, _):
        if path == PATH:
            answer = await client.post(path, json={"input": "a"})
        else:
            answer = await client.get(path)
        assert "adapter is zero" in check(answer, 503, "engine_unavailable")["detail"]
        check_retry_headers(answer)


@pytest.mark.anyio
async def test_while_draining(default_checkpoint: Checkpoint) -> None:
    """An engine that is stopping is a 503 draining, so that a client goes elsewhere."""
    engine = DrainingEngine(default_checkpoint.card)
    async with fake_service(default_checkpoint, engine) as (client, _):
        answer = await client.post(PATH, json={"input": "a"})
        check(answer, 503, "draining")
        check_retry_headers(answer)


@pytest.mark.parametrize("render", [cohere.error_response, gemini.error_response])
def test_the_delay_is_in_the_message(render: ErrorRenderer) -> None:
    """LangChain.js repeats a request to these APIs if the message of a 429 has the delay."""
    pattern = r"(?:try again in|retry after)\s+(\d+(?:\.\d+)?)\s*(?:seconds?|secs?|s)\b"  # its own
    refused = render(QueueFullError("The queue is full.", retry_after=1.5), "id").body
    found = re.search(pattern, bytes(refused).decode(), re.IGNORECASE)
    assert found is not None
    assert found[1] == "2"
    for other in (QueueFullError("Full."), UnavailableError("It starts.", retry_after=1.5)):
        assert b"etry after" not in render(other, "id").body
