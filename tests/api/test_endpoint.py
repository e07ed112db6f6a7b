"""The wrapper of every route: it authenticates, sheds, limits and counts for any dialect."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.responses import JSONResponse, Response

from fakes import FakeEngine
from keyfiles import avoid_the_end_of_a_minute, entry
from processes import total
from taskvec.api.dialect import embedding_handler
from taskvec.api.endpoint import Endpoints, Route
from taskvec.api.errors import error_headers
from taskvec.api.middleware import RequestMiddleware
from taskvec.api.request import RequestLimits
from taskvec.api.response import VectorsByType
from taskvec.auth.keys import Key
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.core.job import EmbedJob
from taskvec.core.output_format import OutputFormat, OutputType
from taskvec.errors import InvalidRequestError, TaskvecError
from taskvec.service import Service, build_service
from taskvec.settings import Settings
from taskvec.telemetry.event_loop_lag import EventLoopLag

PATH = "/plain"
WEB = {"api-key": "s3cret"}
LIMITS = RequestLimits(
    body_bytes=10_000, body_seconds=10, values=1000, ids=0, texts=8, seconds=60, token_ids=False
)


class PlainDialect:
    """A list of texts in, floats and int8 out."""

    def __init__(self, service: Service) -> None:
        self._tasks = service.embedder.tasks

    def read(
        self, body: Any, headers: Mapping[str, str], key: Key | None
    ) -> tuple[EmbedJob, OutputFormat]:
        assert "content-length" in headers
        if not isinstance(body, list):
            raise InvalidRequestError("Send a list of texts.")
        job = EmbedJob(inputs=body, task=self._tasks.default, tenant=key.name if key else None)
        return job, OutputFormat(16, (OutputType.FLOAT, OutputType.INT8))

    def render(self, vectors: VectorsByType, output: OutputFormat, tokens: int) -> Response:
        assert list(vectors) == list(output.types)
        rows = {kind.value: matrix.tolist() for kind, matrix in vectors.items()}
        return JSONResponse({**rows, "tokens": tokens})


def plain_error(error: TaskvecError, request_id: str) -> Response:
    """The dialect's own form of an error."""
    body = {"message": error.message, "id": request_id}
    return JSONResponse(body, error.status, headers=error_headers(error))


@asynccontextmanager
async def served(
    checkpoint: Checkpoint, folder: Path, engine: FakeEngine, **settings: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, Service]]:
    """An application with the dialect as its only route."""
    file = folder / "keys.toml"
    file.write_text(entry("web", "s3cret", requests_per_minute=100))
    given = Settings(**({"keys_file": file, "log_requests": False} | settings))
    service = build_service(given, checkpoint=checkpoint, engine=engine)
    lag = EventLoopLag(service.metrics.loop_late)
    app = FastAPI()
    route = Route(
        method="POST",
        path=PATH,
        handler=embedding_handler(
            PlainDialect(service), service.embedder, LIMITS, service.large_work
        ),
        embeds=True,
        counted=True,
        render_error=plain_error,
    )
    app.router.routes.append(Endpoints.of(service, lag).mount(route))
    app.add_middleware(RequestMiddleware, log=None)
    async with service.running(lambda error: pytest.fail(str(error))):
        while not engine.health().ready:
            await asyncio.sleep(0.01)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client, service


@pytest.mark.anyio
async def test_a_new_dialect_is_one_route(default_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Its route is authenticated, limited and counted, and answers several output types at once."""
    avoid_the_end_of_a_minute()
    engine = FakeEngine(default_checkpoint.card)
    async with served(default_checkpoint, tmp_path, engine) as (client, service):
        refused = await client.post(PATH, json=["a"])
        assert refused.status_code == 401
        assert set(refused.json()) == {"message", "id"}
        answer = await client.post(PATH, json=["a", "b"], headers=WEB)
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert [len(row) for row in body["float"]] == [len(row) for row in body["int8"]] == [16, 16]
        assert all(isinstance(value, int) for value in body["int8"][0])
        assert answer.headers["x-ratelimit-remaining-requests"] == "99"
        assert "engine;dur=" in answer.headers["server-timing"]
        wrong = await client.post(PATH, json={"a": 1}, headers=WEB)
        assert (wrong.status_code, wrong.json()["message"]) == (400, "Send a list of texts.")
        page = service.metrics.render("ready").decode()
        assert total(page, "taskvec_key_requests_total", 'key="web",status="200"') == 1
        assert total(page, "taskvec_key_requests_total", 'key="none",status="401"') == 1
        for output in ("float", "int8"):
            assert total(page, "taskvec_answers_total", f'output="{output}",transport="numbers"')
        assert total(page, "taskvec_requests_in_flight") == 0


@pytest.mark.anyio
async def test_a_new_dialect_is_shed_and_drained(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """While the queue is full or the service drains, it is refused before its body is read."""
    engine = FakeEngine(default_checkpoint.card, delay=0.5)
    settings = {"max_queue_tokens": 10}
    async with served(default_checkpoint, tmp_path, engine, **settings) as (client, service):
        held = asyncio.create_task(client.post(PATH, json=["a b c d e f g h i j"], headers=WEB))
        while not engine.batches:
            await asyncio.sleep(0.01)
        large = ["one two three four five six seven eight"]
        assert (await client.post(PATH, json=large, headers=WEB)).status_code == 429
        shed = await client.post(PATH, content=b"{", headers=WEB)
        assert shed.status_code == 429
        assert int(shed.headers["retry-after"]) >= 1
        service.health.stop_accepting()
        drained = await client.post(PATH, content=b"{", headers=WEB)
        assert drained.status_code == 503
        assert drained.headers["connection"] == "close"
        assert (await held).status_code == 200


@pytest.mark.anyio
async def test_a_bug_is_an_error_without_internals(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """An unexpected exception is a 500 in the dialect's form, which says nothing of the inside."""
    engine = FakeEngine(default_checkpoint.card)
    async with served(default_checkpoint, tmp_path, engine) as (client, _):
        answer = await client.post(PATH, json=[17], headers=WEB)
        assert answer.status_code == 500
        assert answer.json()["message"].startswith("Internal error")
        assert answer.headers["x-should-retry"] == "false"


@pytest.mark.anyio
async def test_a_wrong_method_is_counted(default_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """405 comes in the dialect's form with the allowed method, without a key, and is counted."""
    engine = FakeEngine(default_checkpoint.card)
    async with served(default_checkpoint, tmp_path, engine) as (client, service):
        answer = await client.get(PATH)
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
        assert set(answer.json()) == {"message", "id"}
        page = service.metrics.render("ready").decode()
        assert total(page, "taskvec_rejected_total", 'code="method_not_allowed"') == 1
        assert total(page, "taskvec_requests_total", 'status="405"') == 1


@pytest.mark.anyio
async def test_a_bug_outside_the_handler_is_an_error_as_well(
    default_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that cannot be rendered is the contract's 500 with its id, and counted as one."""

    def broken(error: TaskvecError, request_id: str) -> Response:
        raise ValueError(request_id, error)

    monkeypatch.setitem(globals(), "plain_error", broken)
    engine = FakeEngine(default_checkpoint.card)
    async with served(default_checkpoint, tmp_path, engine) as (client, service):
        answer = await client.post(PATH, json={"a": 1}, headers=WEB)
        assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
        assert answer.json()["request_id"] == answer.headers["x-request-id"]
        page = service.metrics.render("ready").decode()
        assert total(page, "taskvec_requests_total", 'status="500"') == 1
        assert total(page, "taskvec_requests_total", 'status="499"') == 0
