"""The answer cache over HTTP: what was embedded before is not embedded again, for its owner."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from redis import Redis as RedisClient

from conftest import fake_service
from fakes import FakeEngine
from keyfiles import Redis, entry, running_redis
from processes import total
from taskvec.checkpoint.checkpoint import Checkpoint, read_checkpoint
from taskvec.errors import StartError
from taskvec.metrics.registry import Metrics
from taskvec.service import build_cache
from taskvec.settings import Settings

PATH = "/v1/embeddings"
RAW = {"accept": "application/octet-stream"}
ON: dict[str, Any] = {"answer_cache_bytes": 1 << 20}
OUTPUTS = [
    {},
    {"dimensions": 8, "normalized": False},
    {"embedding_type": "int8"},
    {"embedding_type": "ubinary", "dimensions": 64},
]
KEYS = entry("web", "s3cret") + entry("jobs", "0ther")
WEB, JOBS = {"api-key": "s3cret"}, {"api-key": "0ther"}

pytestmark = pytest.mark.usefixtures("patience")


@pytest.fixture
def redis() -> Iterator[Redis]:
    with running_redis() as server:
        yield server


@pytest.fixture(params=["memory", "redis", "valkey"])
def cached(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Settings with a cache, in each place."""
    if request.param == "memory":
        yield ON
        return
    with running_redis() as server:
        yield {"answer_cache_url": server.url.replace("redis", request.param, 1)}


@pytest.mark.anyio
async def test_texts_of_several_tasks_are_found_again(
    default_checkpoint: Checkpoint, cached: dict[str, Any]
) -> None:
    """Of a request with several tasks, each text is cached under its own task."""
    items = [{"text": "a", "task": task} for task in ("clustering", "retrieval.query")] + ["a"]
    more = [items[1], {"text": "b", "task": "clustering"}, *items]
    async with fake_service(default_checkpoint) as (plain, _):
        truth = (await plain.post(PATH, json={"input": more})).json()
    async with fake_service(default_checkpoint, **cached) as (client, engine):
        await embed(client, {"input": items})
        await embed(client, {"input": "a", "task": "retrieval.query"})
        assert len(engine.batches) == 3
        answer = await embed(client, {"input": more})
        assert (answer["data"], answer["usage"]) == (truth["data"], truth["usage"])
        assert [len(batch.ids) for batch in engine.batches[3:]] == [1]
        assert engine.batches[3].adapter == "clustering"


@pytest.mark.anyio
async def test_a_text_that_comes_again_is_not_embedded(
    default_checkpoint: Checkpoint, cached: dict[str, Any]
) -> None:
    """The same answer, in any type and width, without the engine; usage is the same."""
    async with fake_service(default_checkpoint, **cached) as (client, engine):
        for output in OUTPUTS:
            body = {"input": ["one", "two"], "task": "clustering"} | output
            async with fake_service(default_checkpoint) as (plain, _):
                truth = (await plain.post(PATH, json=body)).json()
            for _ in range(2):
                answer = await embed(client, body)
                assert (answer["data"], answer["usage"]) == (truth["data"], truth["usage"])
        assert len(engine.batches) == 1
        page = (await client.get("/metrics")).text
    assert total(page, "taskvec_cache_texts_total", 'outcome="miss"') == 2
    assert total(page, "taskvec_cache_texts_total", 'outcome="hit"') == 4 * len(OUTPUTS) - 2
    tokens = truth["usage"]["total_tokens"]
    assert total(page, "taskvec_cache_hit_tokens_total") == tokens * (2 * len(OUTPUTS) - 1)
    assert total(page, "taskvec_tokens_total") == tokens * 2 * len(OUTPUTS)
    assert total(page, "taskvec_cache_failures_total") == 0
    assert (total(page, "taskvec_cache_bytes") > 0) == (cached == ON)


@pytest.mark.anyio
async def test_only_what_is_new_is_embedded(
    default_checkpoint: Checkpoint, cached: dict[str, Any]
) -> None:
    """Of known and new texts in one request the new ones are embedded; the order is kept."""
    texts = ["a", "b", "c", "d", "e"]
    async with fake_service(default_checkpoint) as (plain, _):
        truth = await embed(plain, {"input": texts})
    async with fake_service(default_checkpoint, **cached) as (client, engine):
        await embed(client, {"input": ["d", "b"]})
        answer = await embed(client, {"input": texts})
        assert answer["data"] == truth["data"]
        assert [len(batch.ids) for batch in engine.batches] == [2, 3]
        timing = (await client.post(PATH, json={"input": texts})).headers["server-timing"]
    assert [part.partition(";")[0] for part in timing.split(", ")] == [
        "tokenize",
        "cache",
        "encode",
    ]


@pytest.mark.anyio
async def test_tasks_have_vectors_of_their_own(
    default_checkpoint: Checkpoint, cached: dict[str, Any]
) -> None:
    """Another adapter or another prompt is another answer."""
    tasks = ["retrieval.query", "retrieval.passage", "clustering", "text-matching"]
    async with fake_service(default_checkpoint, **cached) as (client, engine):
        for _ in range(2):
            answers = [await embed(client, {"input": "a", "task": task}) for task in tasks]
            vectors = {tuple(answer["data"][0]["embedding"]) for answer in answers}
            assert len(vectors) == len(tasks)
        assert len(engine.batches) == len(tasks)


@pytest.mark.anyio
@pytest.mark.parametrize("shared", [False, True])
async def test_keys_share_only_where_allowed(
    default_checkpoint: Checkpoint, cached: dict[str, Any], tmp_path: Path, *, shared: bool
) -> None:
    """A key's answers are its own, unless the operator lets all have them."""
    file = tmp_path / "keys.toml"
    file.write_text(KEYS)
    settings = cached | {"keys_file": file, "answer_cache_shared": shared}
    async with fake_service(default_checkpoint, **settings) as (client, engine):
        for key in (WEB, JOBS, WEB, JOBS):
            await embed(client, {"input": "a"}, key)
        assert len(engine.batches) == (1 if shared else 2)


@pytest.mark.anyio
async def test_tokens_from_the_cache_are_not_charged(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """A key's tokens a minute are those that the engine embeds."""
    file = tmp_path / "keys.toml"
    file.write_text(entry("web", "s3cret", tokens_per_minute=50))
    async with fake_service(default_checkpoint, keys_file=file, **ON) as (client, _):
        for _ in range(20):
            answer = await embed(client, {"input": "a text of some tokens"}, WEB)
        assert answer["usage"]["total_tokens"] > 3
        new = {"input": "another text " * 12}
        assert (await client.post(PATH, json=new, headers=WEB)).status_code == 200
        new = {"input": "and one more " * 12}
        assert (await client.post(PATH, json=new, headers=WEB)).status_code == 429


@pytest.mark.anyio
async def test_it_is_off_unless_asked_for(default_checkpoint: Checkpoint) -> None:
    """Without a setting every text is embedded."""
    async with fake_service(default_checkpoint) as (client, engine):
        await embed(client, {"input": "a"})
        await embed(client, {"input": "a"})
        assert len(engine.batches) == 2


@pytest.mark.anyio
async def test_processes_share_what_redis_has(default_checkpoint: Checkpoint, redis: Redis) -> None:
    """What one process embedded, another gives back; entries end with their time to live."""
    settings = {"answer_cache_url": redis.url, "answer_cache_ttl": 500}
    async with both(default_checkpoint, **settings) as (one, other, engines):
        first = await embed(one, {"input": ["a", "b"]})
        assert (await embed(other, {"input": ["a", "b"]}))["data"] == first["data"]
        assert [len(engine.batches) for engine in engines] == [1, 0]
    with RedisClient.from_url(redis.url) as client:
        names = client.keys("*")
        assert len(names) == 2
        assert all(400 < client.ttl(name) <= 500 for name in names)


@pytest.mark.anyio
async def test_redis_may_come_and_go(default_checkpoint: Checkpoint, redis: Redis) -> None:
    """Without Redis all is embedded, and counted as a failure; when it is back it is used."""
    async with fake_service(default_checkpoint, answer_cache_url=redis.url) as (client, engine):
        await embed(client, {"input": "a"})
        redis.stop()
        for _ in range(3):
            await embed(client, {"input": "a"})
        assert len(engine.batches) == 4
        page = (await client.get("/metrics")).text
        assert total(page, "taskvec_cache_failures_total") >= 1
        redis.start()
        await asyncio.sleep(1.2)
        await embed(client, {"input": "a"})
        before = len(engine.batches)
        await embed(client, {"input": "a"})
        assert len(engine.batches) == before


@pytest.mark.anyio
async def test_a_damaged_entry_is_no_answer(default_checkpoint: Checkpoint, redis: Redis) -> None:
    """A value of another length is embedded anew."""
    async with fake_service(default_checkpoint, answer_cache_url=redis.url) as (client, engine):
        truth = await embed(client, {"input": "a"})
        with RedisClient.from_url(redis.url) as direct:
            (name,) = direct.keys("*")
            direct.set(name, b"short")
        assert (await embed(client, {"input": "a"}))["data"] == truth["data"]
        assert len(engine.batches) == 2


@pytest.mark.anyio
async def test_other_weights_have_other_answers(
    default_checkpoint: Checkpoint, redis: Redis, tmp_path: Path
) -> None:
    """In one Redis a model whose weights differ finds nothing; a copy of it finds all."""
    copies = []
    for name in ("same", "changed"):
        shutil.copytree(default_checkpoint.folder, tmp_path / name)
        copies.append(tmp_path / name)
    adapter = copies[1] / "adapters" / "retrieval" / "adapter_model.safetensors"
    data = bytearray(adapter.read_bytes())
    data[-1] ^= 1
    adapter.write_bytes(data)
    expected = {default_checkpoint.folder: 1, copies[0]: 0, copies[1]: 1}
    for folder, embedded in expected.items():
        checkpoint = read_checkpoint(folder, "taskvec-mini")
        async with fake_service(checkpoint, answer_cache_url=redis.url) as (client, engine):
            await embed(client, {"input": "a"})
        assert len(engine.batches) == embedded, folder


@pytest.mark.anyio
async def test_other_arithmetic_has_other_answers(
    default_checkpoint: Checkpoint, redis: Redis
) -> None:
    """What was computed in bfloat16 is no answer of a server that was told to use float32."""
    for dtype in ("bfloat16", "float32"):
        settings = {"answer_cache_url": redis.url, "dtype": dtype}
        async with fake_service(default_checkpoint, **settings) as (client, engine):
            await embed(client, {"input": "a"})
        assert len(engine.batches) == 1


@pytest.mark.anyio
async def test_a_cached_vector_is_bit_for_bit_the_engine_s(default_checkpoint: Checkpoint) -> None:
    """Raw float32 bytes, not normalised: the same from the cache as from the engine."""
    body = {"input": ["x", "y"], "normalized": False}
    async with fake_service(default_checkpoint, **ON) as (client, _):
        first = (await client.post(PATH, json=body, headers=RAW)).content
        second = (await client.post(PATH, json=body, headers=RAW)).content
    assert first == second
    assert np.isfinite(np.frombuffer(first, "<f4")).all()


def test_two_places_are_refused() -> None:
    """A cache is in memory or in Redis."""
    with pytest.raises(ValueError, match="set only one of them"):
        Settings(answer_cache_bytes=1, answer_cache_url="redis://localhost")


def test_an_address_that_is_none_ends_the_start(default_checkpoint: Checkpoint) -> None:
    """One sentence names the option and its variable."""
    settings = Settings(answer_cache_url="redis://host:port/x")
    with pytest.raises(StartError, match=r"--answer-cache-url \(TASKVEC_ANSWER_CACHE_URL\)"):
        build_cache(settings, default_checkpoint, Metrics([]))


async def embed(
    client: httpx.AsyncClient, body: dict[str, Any], headers: dict[str, str] | None = None
) -> Any:
    """The JSON of a good answer."""
    answer = await client.post(PATH, json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    await written()
    return answer.json()


async def written() -> None:
    """Wait until Redis has what it is to keep: that is written behind the answer."""
    for task in asyncio.all_tasks():
        if getattr(task.get_coro(), "__qualname__", "") == "RedisStore._write":
            await task


@asynccontextmanager
async def both(
    checkpoint: Checkpoint, **settings: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, httpx.AsyncClient, list[FakeEngine]]]:
    """Two services with the same settings."""
    async with AsyncExitStack() as stack:
        one, first = await stack.enter_async_context(fake_service(checkpoint, **settings))
        other, second = await stack.enter_async_context(fake_service(checkpoint, **settings))
        yield one, other, [first, second]
