"""API keys over HTTP: who is let in where, how much each may have, and what is told of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from conftest import fake_service
from fakes import FakeEngine
from keyfiles import avoid_the_end_of_a_minute, entry, running_redis
from taskvec.api.app import create_app
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.engines.wire import WIRE_PATH
from taskvec.metrics.registry import Metrics
from taskvec.metrics.requests import STATUSES
from taskvec.service import build_service
from taskvec.settings import Settings

PATH = "/v1/embeddings"
WEB = {"authorization": "Bearer s3cret"}
GUARDED = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/taskvec-mini"),
    ("POST", PATH),
    ("POST", WIRE_PATH),
    ("GET", "/openapi.json"),
]
ACCEPT: dict[str, Any] = {"token_input": "accept"}


@asynccontextmanager
async def keyed(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    keys: str = entry("web", "s3cret"),
    engine: FakeEngine | None = None,
    **settings: Any,
) -> AsyncIterator[httpx.AsyncClient]:
    """A service with keys."""
    file = folder / "keys.toml"
    file.write_text(keys)
    async with fake_service(checkpoint, engine, keys_file=file, **settings) as (client, _):
        yield client


def check_refused(answer: httpx.Response, code: str) -> None:
    """The contract's 401."""
    body = answer.json()
    assert answer.status_code == 401
    assert (body["error"]["type"], body["error"]["code"]) == ("authentication_error", code)
    assert body["request_id"] == answer.headers["x-request-id"]
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.anyio
@pytest.mark.parametrize(("method", "path"), GUARDED)
async def test_every_route_asks_for_a_key(
    default_checkpoint: Checkpoint, tmp_path: Path, method: str, path: str
) -> None:
    """No key and a wrong key are told apart; a known key passes, in any of three headers."""
    content = {"json": {"input": "a"}} if path == PATH else {}
    async with keyed(default_checkpoint, tmp_path, **ACCEPT) as client:

        async def asked(headers: dict[str, str]) -> httpx.Response:
            return await client.request(method, path, headers=headers, **content)

        check_refused(await asked({}), "missing_api_key")
        for none in ({"authorization": "Basic s3cret"}, {"authorization": "s3cret"}):
            check_refused(await asked(none), "missing_api_key")
        for wrong in ("Bearer", "Bearer ", "Bearer S3cret", "bearer s3cret x"):
            answer = await asked({"authorization": wrong})
            assert answer.status_code == 401
        check_refused(await asked({"api-key": "wrong"}), "invalid_api_key")
        empty = await asked({"authorization": "Bearer ", "api-key": "s3cret"})
        assert empty.status_code == (415 if path == WIRE_PATH else 200)
        both = {"api-key": "s3cret", "authorization": "Bearer x"}
        check_refused(await asked(both), "invalid_api_key")
        for header in ("Authorization: Bearer s3cret", "api-key: s3cret", "x-api-key: s3cret"):
            name, _, value = header.partition(": ")
            passed = await asked({name: value})
            assert passed.status_code == (415 if path == WIRE_PATH else 200), passed.text


@pytest.mark.anyio
async def test_health_is_open_and_metrics_as_set(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Probes never ask for a key; the metrics do where the setting says so."""
    for open_metrics in (True, False):
        async with keyed(default_checkpoint, tmp_path, metrics_without_key=open_metrics) as client:
            for path in ("/health/live", "/health/ready"):
                assert (await client.get(path)).status_code == 200
            status = (await client.get("/metrics")).status_code
            assert status == (200 if open_metrics else 401)
            assert (await client.get("/metrics", headers=WEB)).status_code == 200


@pytest.mark.anyio
async def test_a_body_is_not_read_before_the_key(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Who has no key is refused whatever it sends: too much, or what is no JSON."""
    async with keyed(default_checkpoint, tmp_path, max_body_bytes=10) as client:
        for content in (b"{" * 100, b"{"):
            check_refused(await client.post(PATH, content=content), "missing_api_key")


@pytest.mark.anyio
async def test_without_keys_all_is_open(default_checkpoint: Checkpoint) -> None:
    """No keys: a client that sends one anyway, as OpenAI's must, is served."""
    async with fake_service(default_checkpoint) as (client, _):
        for headers in ({}, WEB):
            answer = await client.post(PATH, json={"input": "a"}, headers=headers)
            assert answer.status_code == 200
        assert "securitySchemes" not in (await client.get("/openapi.json")).text


@pytest.mark.anyio
async def test_requests_a_minute_are_limited(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Each answer says what is left; beyond it that key alone gets a 429 that says when."""
    avoid_the_end_of_a_minute()
    keys = entry("web", "s3cret", requests_per_minute=2) + entry("jobs", "other")
    async with keyed(default_checkpoint, tmp_path, keys=keys) as client:
        answers = [await client.post(PATH, json={"input": "a"}, headers=WEB) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert [a.headers["x-ratelimit-remaining-requests"] for a in answers] == ["1", "0", "0"]
        for answer in answers:
            assert answer.headers["x-ratelimit-limit-requests"] == "2"
            assert 0 < float(answer.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 120
            assert "x-ratelimit-limit-tokens" not in answer.headers
        error = answers[-1].json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 120
        assert int(answers[-1].headers["retry-after-ms"]) > 0
        assert (await client.get("/v1/models", headers=WEB)).status_code == 200
        other = await client.post(PATH, json={"input": "a"}, headers={"api-key": "other"})
        assert other.status_code == 200
        assert not [name for name in other.headers if name.startswith("x-ratelimit")]


@pytest.mark.anyio
async def test_tokens_a_minute_are_limited(default_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Tokens are counted before the engine: what does not fit never reaches it."""
    avoid_the_end_of_a_minute()
    engine = FakeEngine(default_checkpoint.card)
    keys = entry("web", "s3cret", tokens_per_minute=100)
    async with keyed(default_checkpoint, tmp_path, keys=keys, engine=engine, **ACCEPT) as client:

        async def asked(tokens: int) -> httpx.Response:
            return await client.post(PATH, json={"input": [7] * tokens}, headers=WEB)

        first = await asked(60)
        assert first.status_code == 200
        assert first.headers["x-ratelimit-limit-tokens"] == "100"
        assert first.headers["x-ratelimit-remaining-tokens"] == "40"
        refused = await asked(41)
        assert (refused.status_code, refused.json()["code"]) == (429, "rate_limit_exceeded")
        assert refused.headers["x-ratelimit-remaining-tokens"] == "40"
        too_many = await asked(101)
        assert (too_many.status_code, too_many.json()["code"]) == (400, "too_many_tokens")
        assert (await asked(40)).status_code == 200
    assert [batch.tokens for batch in engine.batches] == [60, 40]


@pytest.mark.anyio
async def test_requests_at_a_time_are_limited(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Beyond its concurrency a key gets 429; a place is free again however a request ended."""
    engine = FakeEngine(default_checkpoint.card, delay=60)
    keys = entry("web", "s3cret", concurrency=2)
    async with keyed(default_checkpoint, tmp_path, keys=keys, engine=engine) as client:

        async def asked(body: Any = None) -> httpx.Response:
            return await client.post(PATH, json=body or {"input": "a"}, headers=WEB)

        for _ in range(3):
            running = [asyncio.create_task(asked()) for _ in range(2)]
            count = len(engine.batches)
            while len(engine.batches) < count + 2:
                await asyncio.sleep(0.005)
            refused = await asked()
            assert (refused.status_code, refused.json()["code"]) == (429, "rate_limit_exceeded")
            assert refused.headers["retry-after"] == "1"
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            assert [(await asked({"input": ""})).status_code for _ in range(3)] == [400] * 3


@pytest.mark.anyio
async def test_keys_share_their_limit_over_redis(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Two services on one Redis count together; when it dies, each counts alone."""
    keys = entry("web", "s3cret", requests_per_minute=2)
    with running_redis() as redis:
        shared: dict[str, Any] = {"keys": keys, "limits_url": redis.url}
        async with (
            keyed(default_checkpoint, tmp_path, **shared) as one,
            keyed(default_checkpoint, tmp_path, **shared) as other,
        ):
            asked = [
                await client.post(PATH, json={"input": "a"}, headers=WEB)
                for client in (one, other, one, other)
            ]
            assert [answer.status_code for answer in asked] == [200, 200, 429, 429]
            redis.stop()
            answer = await one.post(PATH, json={"input": "a"}, headers=WEB)
            assert answer.status_code == 200
            assert answer.headers["x-ratelimit-remaining-requests"] == "0"
            assert "taskvec_limits_unchecked_total 1.0" in (await one.get("/metrics")).text
            answer = await one.post(PATH, json={"input": "a"}, headers=WEB)
            assert answer.status_code == 429


@pytest.mark.anyio
async def test_the_keys_name_is_told_and_never_its_secret(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Log lines and metrics have the key's name, "none" where none was valid."""
    file = tmp_path / "keys.toml"
    file.write_text(entry("web", "s3cret"))
    service = build_service(
        Settings(keys_file=file),
        checkpoint=default_checkpoint,
        engine=FakeEngine(default_checkpoint.card),
    )
    app = create_app(service, lambda _: None)
    assert series(service.metrics) == {
        (key, status): 0 for key in ("web", "none") for status in STATUSES
    }
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        await asyncio.sleep(0)
        with capture_logs() as lines:
            for headers in (WEB, {}, {"api-key": "wr0ng"}):
                await client.post(PATH, json={"input": "a"}, headers=headers)
    assert [line.get("key") for line in lines] == ["web", None, None]
    assert "s3cret" not in str(lines)
    assert "wr0ng" not in str(lines)
    counted = {labels: value for labels, value in series(service.metrics).items() if value}
    assert counted == {("web", "200"): 1, ("none", "401"): 2}


@pytest.mark.anyio
async def test_the_openapi_document_tells_of_keys(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Both ways to send a key are described, on each guarded route, with its 401."""
    async with keyed(default_checkpoint, tmp_path) as client:
        for _ in range(2):
            document = (await client.get("/openapi.json", headers=WEB)).json()
    schemes = document["components"]["securitySchemes"]
    assert (schemes["bearer"]["type"], schemes["bearer"]["scheme"]) == ("http", "bearer")
    assert (schemes["api-key"]["in"], schemes["api-key"]["name"]) == ("header", "api-key")
    for path, operations in document["paths"].items():
        for operation in operations.values():
            if path.startswith("/health/") or path == "/metrics":
                assert "security" not in operation
                assert "401" not in operation["responses"]
            else:
                assert operation["security"] == [{"bearer": []}, {"api-key": []}]
                assert "401" in operation["responses"]


@pytest.mark.anyio
async def test_scripts_of_listed_pages_may_ask(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """A preflight needs no key, and only listed origins get a yes; errors can be read, too."""
    origin = "https://app.example.com"
    asked = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,x-stainless-os",
    }
    async with keyed(default_checkpoint, tmp_path, cors_origins=origin) as client:
        yes = await client.options(PATH, headers={"origin": origin, **asked})
        assert yes.status_code == 200
        assert yes.headers["access-control-allow-origin"] == origin
        assert "x-stainless-os" in yes.headers["access-control-allow-headers"]
        no = await client.options(PATH, headers={"origin": "https://evil.example", **asked})
        assert "access-control-allow-origin" not in no.headers
        answer = await client.post(PATH, json={"input": "a"}, headers={"origin": origin})
        check_refused(answer, "missing_api_key")
        assert answer.headers["access-control-allow-origin"] == origin
    async with keyed(default_checkpoint, tmp_path) as client:
        answer = await client.get("/health/live", headers={"origin": origin})
        assert "access-control-allow-origin" not in answer.headers


def series(metrics: Metrics) -> dict[tuple[str, str], float]:
    """taskvec_key_requests_total by key and status."""
    return {
        (sample.labels["key"], sample.labels["status"]): sample.value
        for family in text_string_to_metric_families(metrics.render("ready").decode())
        for sample in family.samples
        if sample.name == "taskvec_key_requests_total"
    }
