"""Health for orchestrators and series for Prometheus, in every state of the engine."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from conftest import fake_service
from fakes import FakeEngine
from taskvec.api.health import RENDERINGS_AT_ONCE, MetricsPage
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.engines.base import EngineHealth, EngineResult, EngineState, TokenBatch
from taskvec.settings import TokenInput

PATH = "/v1/embeddings"
TASKS = {"retrieval.query", "retrieval.passage", "text-matching", "clustering", "classification"}
CODES = {
    "starting": "starting",
    "stopping": "draining",
    "unavailable": "engine_unavailable",
    "dead": "engine_unavailable",
}
SERIES = {
    "taskvec_requests": "counter",
    "taskvec_texts": "counter",
    "taskvec_tokens": "counter",
    "taskvec_request_seconds": "histogram",
    "taskvec_key_requests": "counter",
    "taskvec_key_tokens": "counter",
    "taskvec_dialect_requests": "counter",
    "taskvec_limits_unchecked": "counter",
    "taskvec_requests_in_flight": "gauge",
    "taskvec_queue_texts": "gauge",
    "taskvec_queue_tokens": "gauge",
    "taskvec_queue_seconds": "histogram",
    "taskvec_batch_texts": "histogram",
    "taskvec_batch_tokens": "histogram",
    "taskvec_engine_process_event_loop_longest_turn_seconds": "gauge",
    "taskvec_engine_process_interpreter_lock_longest_hold_seconds": "gauge",
    "taskvec_engine_process_resident_bytes": "gauge",
    "taskvec_engine_process_restarts": "counter",
    "taskvec_forward_pause_seconds": "histogram",
    "taskvec_forward_seconds": "histogram",
    "taskvec_texts_dropped": "counter",
    "taskvec_engine_ready": "gauge",
    "taskvec_engine_call_seconds": "histogram",
    "taskvec_engine_calls": "counter",
    "taskvec_engine_server_serving": "gauge",
    "taskvec_engine_retries": "counter",
    "taskvec_engine_lookup_failures": "counter",
    "taskvec_answers": "counter",
    "taskvec_rejected": "counter",
    "taskvec_stage_seconds": "histogram",
    "taskvec_queue_oldest_seconds": "gauge",
    "taskvec_batch_fill_ratio": "histogram",
    "taskvec_batch_budget_tokens": "gauge",
    "taskvec_out_of_memory": "counter",
    "taskvec_cache_texts": "counter",
    "taskvec_cache_hit_tokens": "counter",
    "taskvec_cache_bytes": "gauge",
    "taskvec_cache_failures": "counter",
    "taskvec_build_info": "gauge",
    "taskvec_engine_state": "gauge",
    "taskvec_event_loop_lag_seconds": "histogram",
    "taskvec_event_loop_longest_turn_seconds": "gauge",
    "taskvec_interpreter_lock_longest_hold_seconds": "gauge",
    "taskvec_memory_budget_bytes": "gauge",
    "taskvec_memory_held_bytes": "gauge",
    "taskvec_memory_limit_bytes": "gauge",
    "taskvec_memory_pressure": "gauge",
    "taskvec_memory_used_bytes": "gauge",
    "taskvec_tokenizer_threads_busy": "gauge",
    "taskvec_tokenizer_requests_waiting": "gauge",
    "taskvec_texts_truncated": "counter",
    "taskvec_tokens_truncated": "counter",
}


class SettledEngine(FakeEngine):
    """Is in one state for good."""

    def __init__(self, checkpoint: Checkpoint, state: EngineState) -> None:
        super().__init__(checkpoint.card)
        self._health = EngineHealth(state, "of a reason")

    async def start(self) -> None:
        """Change nothing."""


class RaisingEngine(FakeEngine):
    """Has a bug."""

    async def embed(self, batch: TokenBatch) -> EngineResult:
        raise RuntimeError(len(batch.ids))


async def samples(client: httpx.AsyncClient) -> dict[tuple[str, ...], float]:
    """(series of ours, label values by label name) -> value."""
    answer = await client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
        if family.name.startswith("taskvec_")
    }


@pytest.mark.anyio
@pytest.mark.parametrize("state", list(EngineState), ids=lambda state: state.value)
async def test_health_in_each_state(default_checkpoint: Checkpoint, state: EngineState) -> None:
    """Only a dead engine is not live, only a ready one is ready; a refusal tells the reason."""
    async with fake_service(
        default_checkpoint, SettledEngine(default_checkpoint, state)
    ) as service:
        client, _ = service
        live, ready = await client.get("/health/live"), await client.get("/health/ready")
        gauge = (await samples(client))["taskvec_engine_ready",]
    assert live.status_code == (503 if state is EngineState.DEAD else 200)
    assert ready.status_code == (200 if state is EngineState.READY else 503)
    assert gauge == (1 if state is EngineState.READY else 0)
    for answer, code in ((live, "engine_unavailable"), (ready, CODES.get(state.value))):
        if answer.status_code == 503:
            assert answer.json()["code"] == code
            assert answer.json()["error"]["type"] == "service_unavailable"
            assert "of a reason" in answer.json()["detail"]


@pytest.mark.anyio
async def test_addresses_of_engines_need_a_key(default_checkpoint: Checkpoint) -> None:
    """Everybody sees readiness; only holders of a key see why an engine server is not used."""
    engine = FakeEngine(default_checkpoint.card)
    async with fake_service(default_checkpoint, engine, api_keys="web=s3cret") as (client, _):
        engine.set_health(
            EngineHealth(EngineState.UNAVAILABLE, "http://10.0.0.7 is down", "no server is up")
        )
        for headers in ({}, {"api-key": "wrong"}):
            answer = await client.get("/health/ready", headers=headers)
            assert (answer.status_code, answer.json()["code"]) == (503, "engine_unavailable")
            assert "no server is up" in answer.json()["detail"]
            assert "10.0.0.7" not in answer.text
        answer = await client.get("/health/ready", headers={"api-key": "s3cret"})
        assert answer.status_code == 503
        assert "10.0.0.7" in answer.json()["detail"]
        refused = await client.post(
            "/v1/embeddings", json={"input": "a"}, headers={"api-key": "s3cret"}
        )
        assert refused.status_code == 503
        assert "10.0.0.7" not in refused.text


class CountingMetrics:
    """Counts how often it is rendered."""

    def __init__(self) -> None:
        self.rendered = 0

    def render(self, state: str) -> bytes:
        time.sleep(0.01)
        self.rendered += 1
        return f"{state} {self.rendered}".encode()


@pytest.mark.anyio
async def test_metrics_are_rendered_rarely() -> None:
    """Concurrent scrapes share a rendering; a flood of them gets the last one again."""
    metrics = CountingMetrics()
    page = MetricsPage(metrics)
    first = await asyncio.gather(*(page.read("ready") for _ in range(50)))
    assert set(first) == {b"ready 1"}
    assert await page.read("dead") == b"dead 2"
    for _ in range(100):
        await page.read("ready")
    assert metrics.rendered == RENDERINGS_AT_ONCE
    await asyncio.sleep(1.1)
    assert await page.read("ready") == f"ready {RENDERINGS_AT_ONCE + 1}".encode()


@pytest.mark.anyio
async def test_ready_follows_the_engine(default_checkpoint: Checkpoint) -> None:
    """Readiness is asked of the engine each time: it goes when the engine does."""
    async with fake_service(default_checkpoint) as (client, engine):
        assert (await client.get("/health/ready")).json() == {"status": "ready"}
        assert (await client.get("/health/live")).json() == {"status": "live"}
        await engine.stop()
        assert (await client.get("/health/ready")).status_code == 503
        assert (await client.get("/health/live")).status_code == 503


@pytest.mark.anyio
async def test_all_series_are_there_before_any_traffic(default_checkpoint: Checkpoint) -> None:
    """Each series has its type and a question for help; each label value starts at zero."""
    async with fake_service(default_checkpoint) as (client, _):
        page = (await client.get("/metrics")).text
        found = await samples(client)
        post = (await client.get("/openapi.json")).json()["paths"][PATH]["post"]
    families = {
        family.name: family
        for family in text_string_to_metric_families(page)
        if family.name.startswith("taskvec_") and not family.name.endswith("_created")
    }
    assert {name: family.type for name, family in families.items()} == SERIES
    assert all(family.documentation.endswith("?") for family in families.values())
    statuses = {*post["responses"], "401", "499"}
    for task in (*TASKS, "none"):
        assert found["taskvec_request_seconds_count", task] == 0
        for name in ("requests", "texts", "tokens"):
            values = {
                status: found.get((f"taskvec_{name}_total", status, task)) for status in statuses
            }
            assert values == dict.fromkeys(statuses, 0), (name, task)
    for reason in ("cancelled", "expired", "failed"):
        assert found["taskvec_texts_dropped_total", reason] == 0


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("body", "task", "status"),
    [
        ({"input": ["one", "two"], "task": "clustering"}, "clustering", "200"),
        ({"input": ["one", "two"]}, "text-matching", "200"),
        ({"input": ["one", "two"], "model": "taskvec-mini:separation"}, "clustering", "200"),
        ({"input": ["one", "word " * 3000], "task": "clustering"}, "clustering", "400"),
        ({"input": ["one", ""], "task": "clustering"}, "none", "400"),
        ({"input": ["one", "two"], "task": "made-up"}, "none", "400"),
        ({"input": ["one", "two"], "model": "made-up"}, "none", "404"),
    ],
)
async def test_one_request_counts_once(
    default_checkpoint: Checkpoint, body: dict[str, Any], task: str, status: str
) -> None:
    """A request adds one to its task and status, its texts, its tokens if it was answered."""
    async with fake_service(default_checkpoint) as (client, _):
        before = await samples(client)
        answer = await client.post(PATH, json=body)
        after = await samples(client)
    assert str(answer.status_code) == status
    grown = {
        key: value - before.get(key, 0)
        for key, value in after.items()
        if value != before.get(key, 0) and key[0].endswith("_total")
    }
    expected = {
        ("taskvec_requests_total", status, task): 1,
        ("taskvec_key_requests_total", "none", status): 1,
        ("taskvec_dialect_requests_total", "openai", status): 1,
    }
    if status == "200":
        expected["taskvec_answers_total", "float", "numbers"] = 1
    else:
        expected["taskvec_rejected_total", answer.json()["code"]] = 1
    if task != "none":
        expected["taskvec_texts_total", status, task] = 2
    if status == "200":
        tokens = answer.json()["usage"]["total_tokens"]
        expected["taskvec_tokens_total", status, task] = tokens
        expected["taskvec_key_tokens_total", "none"] = tokens
    assert grown == expected
    seconds = ("taskvec_request_seconds_count", task)
    assert after[seconds] - before[seconds] == 1


@pytest.mark.anyio
async def test_a_bug_counts_as_500(default_checkpoint: Checkpoint) -> None:
    """A request that a bug ended is counted under its task, and is in flight no more."""
    async with fake_service(default_checkpoint, RaisingEngine(default_checkpoint.card)) as service:
        await service[0].post(PATH, json={"input": "a", "task": "clustering"})
        found = await samples(service[0])
    assert found["taskvec_requests_total", "500", "clustering"] == 1
    assert found["taskvec_requests_in_flight",] == 0


@pytest.mark.anyio
async def test_requests_in_flight(default_checkpoint: Checkpoint) -> None:
    """Requests being worked on are counted until they are answered; probes are not."""
    engine = FakeEngine(default_checkpoint.card, delay=0.3)
    async with fake_service(default_checkpoint, engine) as (client, _):
        requests = [asyncio.create_task(client.post(PATH, json={"input": "a"})) for _ in range(3)]
        while len(engine.batches) < 3:
            await asyncio.sleep(0.005)
        assert (await samples(client))["taskvec_requests_in_flight",] == 3
        await asyncio.gather(*requests)
        assert (await samples(client))["taskvec_requests_in_flight",] == 0


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("fields", "accept", "labels"),
    [
        ({}, "*/*", ("float", "numbers")),
        ({"encoding_format": "base64"}, "*/*", ("float", "base64")),
        ({"embedding_type": "int8"}, "*/*", ("int8", "numbers")),
        ({"output_dtype": "ubinary", "encoding_format": "base64"}, "*/*", ("ubinary", "base64")),
        ({"embedding_type": "float16"}, "application/octet-stream", ("float16", "raw")),
    ],
)
async def test_answers_count_by_output(
    default_checkpoint: Checkpoint, fields: dict[str, str], accept: str, labels: tuple[str, str]
) -> None:
    """An answer counts once, under the number type and transport of its vectors."""
    async with fake_service(default_checkpoint) as (client, _):
        body = {"input": "a", **fields}
        (await client.post(PATH, json=body, headers={"accept": accept})).raise_for_status()
        found = await samples(client)
    counted = {key[1:]: n for key, n in found.items() if key[0] == "taskvec_answers_total" and n}
    assert counted == {labels: 1}


@pytest.mark.anyio
async def test_stages_of_answers_and_failures_are_observed(default_checkpoint: Checkpoint) -> None:
    """An answer adds to all four stages, an over-long text to tokenising alone."""
    async with fake_service(default_checkpoint) as (client, _):
        await client.post(PATH, json={"input": "a"})
        await client.post(PATH, json={"input": "word " * 3000})
        await client.post(PATH, json={"input": []})
        found = await samples(client)
    counts = {
        stage: found["taskvec_stage_seconds_count", stage]
        for stage in ("tokenize", "queue", "engine", "encode")
    }
    assert counts == {"tokenize": 2, "queue": 1, "engine": 1, "encode": 1}


@pytest.mark.anyio
@pytest.mark.parametrize("text", ["word " * 2100, "word " * 30_000, [5] * 2100])
async def test_what_is_cut_off_is_counted(default_checkpoint: Checkpoint, text: object) -> None:
    """A text that truncate: true cuts counts once, with the tokens that it lost."""
    async with fake_service(default_checkpoint, token_input=TokenInput.ACCEPT) as (client, _):
        await client.post(PATH, json={"input": [text, "short"], "truncate": True})
        found = await samples(client)
    assert found["taskvec_texts_truncated_total",] == 1
    length = len(text) if isinstance(text, list) else len(text) / 5
    lost = length - default_checkpoint.card.max_tokens
    assert found["taskvec_tokens_truncated_total",] == pytest.approx(lost, rel=0.05, abs=20)


@pytest.mark.anyio
async def test_a_busy_tokenizer_shows(default_checkpoint: Checkpoint) -> None:
    """Requests that the tokenizer's one thread cannot take at once are seen to wait, then not."""
    async with fake_service(default_checkpoint, tokenizer_threads=1) as (client, _):
        body = {"input": ["some words " * 400] * 200}
        requests = [asyncio.create_task(client.post(PATH, json=body)) for _ in range(3)]
        async with asyncio.timeout(30):
            while not (await samples(client))["taskvec_tokenizer_requests_waiting",]:
                await asyncio.sleep(0.001)
        assert (await samples(client))["taskvec_tokenizer_threads_busy",] == 1
        await asyncio.gather(*requests)
        found = await samples(client)
    assert found["taskvec_tokenizer_requests_waiting",] == 0
    assert found["taskvec_tokenizer_threads_busy",] == 0


@pytest.mark.anyio
async def test_a_blocked_event_loop_shows(default_checkpoint: Checkpoint) -> None:
    """What holds the event loop for 0.6 seconds is seen as a beat that came as late."""
    async with fake_service(default_checkpoint) as (client, _):
        await asyncio.sleep(0.01)
        time.sleep(0.6)  # noqa: ASYNC251 - the fault to be seen
        await asyncio.sleep(0.5)
        found = await samples(client)
    assert found["taskvec_event_loop_lag_seconds_sum",] >= 0.3


@pytest.mark.anyio
async def test_other_routes_do_not_count(default_checkpoint: Checkpoint) -> None:
    """Probes, scrapes and lists are no embedding requests; labels cannot be made up by clients."""
    async with fake_service(default_checkpoint) as (client, _):
        before = await samples(client)
        for path in ("/health/live", "/health/ready", "/v1/models", "/nowhere", "/v1/embeddings/x"):
            await client.get(path)
        after = await samples(client)
    for found in (before, after):  # the event loop beats by itself
        for name in [name for name in found if "event_loop_lag" in name[0]]:
            del found[name]
    assert after == before
