"""While there is no room, requests are refused before anything of them is read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path

import httpx
import pytest

from conftest import fake_application, fake_service
from fakes import FakeEngine
from keyfiles import entry
from processes import total
from sockets import answer, served, whole
from taskvec.checkpoint.checkpoint import Checkpoint

pytestmark = pytest.mark.sheds_by_lag

PATH = "/v1/embeddings"
WEB, JOBS = {"api-key": "s3cret"}, {"api-key": "0ther"}
KEYS = entry("web", "s3cret") + entry("jobs", "0ther", priority="bulk")


@asynccontextmanager
async def full(checkpoint: Checkpoint, folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A service with keys whose interactive class is full, and has refused a request."""
    file = folder / "keys.toml"
    file.write_text(KEYS)
    engine = FakeEngine(checkpoint.card, delay=1.0)
    settings = {"keys_file": file, "max_queue_tokens": 10}
    async with fake_service(checkpoint, engine, **settings) as (client, _):
        held = asyncio.create_task(
            client.post(PATH, json={"input": "a b c d e f g h i j"}, headers=WEB)
        )
        while not engine.batches:
            await asyncio.sleep(0.01)
        large = {"input": "one two three four five six seven eight"}
        assert (await client.post(PATH, json=large, headers=WEB)).status_code == 429
        yield client
        assert (await held).status_code == 200
        assert (await client.post(PATH, json={"input": "a"}, headers=WEB)).status_code == 200


@pytest.mark.anyio
async def test_no_body_is_read(default_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """What is no JSON at all is refused like the rest, in the contract's form, and counted."""
    async with full(default_checkpoint, tmp_path) as client:
        answer = await client.post(PATH, content=b"{", headers=WEB)
        assert answer.status_code == 429
        told = answer.json()
        assert (told["code"], told["error"]["type"]) == ("queue_full", "rate_limit_error")
        assert int(answer.headers["retry-after"]) >= 1
        assert told["request_id"] == answer.headers["x-request-id"]
        page = (await client.get("/metrics")).text
        assert total(page, "taskvec_rejected_total", 'code="queue_full"') == 2
        assert total(page, "taskvec_key_requests_total", 'key="web",status="429"') == 2


@pytest.mark.anyio
async def test_who_has_no_key_is_told_so(default_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Room or no room, a wrong key is a 401."""
    async with full(default_checkpoint, tmp_path) as client:
        for headers in ({}, {"api-key": "wr0ng"}):
            answer = await client.post(PATH, json={"input": "a"}, headers=headers)
            assert answer.status_code == 401


@pytest.mark.anyio
async def test_the_other_class_has_its_room(default_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Bulk is let in while interactive is full, by its header or by its key."""
    async with full(default_checkpoint, tmp_path) as client:
        answers = await asyncio.gather(
            client.post(PATH, json={"input": "a"}, headers=WEB | {"x-priority": "bulk"}),
            client.post(PATH, json={"input": "a"}, headers=JOBS),
            client.post(PATH, json={"input": "a"}, headers=WEB),
            client.post(PATH, json={"input": "a"}, headers=WEB | {"x-priority": "urgent"}),
            client.get(PATH, headers=WEB),
        )
        assert [answer.status_code for answer in answers] == [200, 200, 429, 400, 405]


@pytest.mark.anyio
async def test_an_event_loop_that_stays_late_refuses(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """After a second of late iterations only probes are answered, until one is in time."""
    file = tmp_path / "keys.toml"
    file.write_text(KEYS)
    async with fake_service(default_checkpoint, keys_file=file) as (client, _):
        assert (await client.post(PATH, json={"input": "a"}, headers=WEB)).status_code == 200
        for _ in range(4):
            time.sleep(0.3)  # noqa: ASYNC251 - what a busy loop does
            await asyncio.sleep(0)
        time.sleep(0.3)  # noqa: ASYNC251 - what a busy loop does
        refused = await client.post(PATH, content=b"{", headers=WEB)
        assert refused.status_code == 429
        assert refused.json()["code"] == "queue_full"
        assert "not kept up with its requests" in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) == 1
        assert (await client.post(PATH, json={"input": "a"})).status_code == 401
        assert (await client.get("/health/live")).status_code == 200
        await asyncio.sleep(0.1)
        assert (await client.post(PATH, json={"input": "a"}, headers=WEB)).status_code == 200


@pytest.mark.anyio
async def test_a_late_iteration_refuses_nobody(default_checkpoint: Checkpoint) -> None:
    """A burst makes an iteration late, and a second one after a while: all of it is answered."""
    async with fake_service(default_checkpoint) as (client, _):
        for _ in range(3):
            time.sleep(0.7)  # noqa: ASYNC251 - what a busy loop does
            assert (await client.post(PATH, json={"input": "a"})).status_code == 200
            await asyncio.sleep(0.05)


@pytest.mark.anyio
async def test_another_client_has_its_share(default_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A queue that one key has filled admits another key's request, and none of the first."""
    interactive = {"x-priority": "interactive"}
    async with full(default_checkpoint, tmp_path) as client:
        answers = await asyncio.gather(
            client.post(PATH, json={"input": "a"}, headers=JOBS | interactive),
            client.post(PATH, json={"input": "a"}, headers=WEB),
        )
        assert [answer.status_code for answer in answers] == [200, 429]


@pytest.mark.anyio
async def test_addresses_have_shares_without_keys(default_checkpoint: Checkpoint) -> None:
    """Where there are no keys, a queue that one address has filled admits another address."""
    engine = FakeEngine(default_checkpoint.card, delay=0.3)
    app = fake_application(default_checkpoint, engine, [], max_queue_tokens=10)
    async with app.router.lifespan_context(app), AsyncExitStack() as stack:
        first, second = [
            await stack.enter_async_context(
                httpx.AsyncClient(
                    transport=httpx.ASGITransport(app, client=(address, 1)), base_url="http://test"
                )
            )
            for address in ("10.0.0.1", "10.0.0.2")
        ]
        held = asyncio.create_task(first.post(PATH, json={"input": "a b c d e f g h i j"}))
        while not engine.batches:
            await asyncio.sleep(0.01)
        answers = await asyncio.gather(
            *(client.post(PATH, json={"input": "a"}) for client in (first, second))
        )
        assert [answer.status_code for answer in answers] == [429, 200]
        assert (await held).status_code == 200


def test_a_pause_refuses_nobody(default_checkpoint: Checkpoint) -> None:
    """What came while the whole process stood still is answered, over real connections."""
    with served(default_checkpoint) as service, ExitStack() as open_until_the_end:
        clients = [open_until_the_end.enter_context(service.connect()) for _ in range(20)]
        for client in clients:
            client.sendall(whole({"input": "a"}))
            assert answer(client)[0].status == 200
        service.server.servers[0].get_loop().call_soon_threadsafe(time.sleep, 1.0)
        time.sleep(0.2)
        for client in clients:
            client.sendall(whole({"input": "a"}))
        assert [answer(client)[0].status for client in clients] == [200] * len(clients)
