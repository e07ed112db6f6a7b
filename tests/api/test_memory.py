"""Memory in sum: refusals under the budget and under pressure, and that all memory comes back."""

from __future__ import annotations

import asyncio
import errno
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from cgroups import MB, Cgroup
from conftest import fake_service
from fakes import FakeEngine
from processes import total
from sockets import PATH, answer, head, served, wait_for, whole
from taskvec.checkpoint.backbone import ModelCard
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.engines.base import EngineResult, TokenBatch

HELD = "taskvec_memory_held_bytes"
BUDGET = 4 * MB


def texts(characters: int) -> dict[str, list[str]]:
    """A request with many texts of so many characters together."""
    return {"input": ["a word or two " * 4] * (characters // 56)}


def test_unfinished_bodies_share_one_budget(default_checkpoint: Checkpoint) -> None:
    """They are counted as they arrive; a client gets 429 beyond half of the budget."""
    part = b'{"input": "' + b"a" * (MB - 100)
    with served(default_checkpoint, memory_budget=BUDGET) as server:
        connections = [socket.create_connection(("127.0.0.1", server.port), 20) for _ in range(2)]
        for connection in connections:
            connection.sendall(head(f"Content-Length: {3 * MB}") + part)
        wait_for(lambda: server.sample(HELD) >= 2 * len(part))
        with server.connect() as late:
            late.sendall(head(f"Content-Length: {3 * MB}") + part)
            refused, body = answer(late)
        assert (refused.status, body["code"]) == (429, "queue_full")
        assert "of 4 MB" in body["detail"]
        assert int(refused.headers["retry-after"]) >= 1
        with server.connect() as short:  # is answered all the same
            short.sendall(whole({"input": "a"}))
            assert answer(short)[0].status == 200
        for connection in connections:
            connection.close()
        wait_for(lambda: server.sample(HELD) == 0)


def test_unread_answers_are_held_until_they_are_read(default_checkpoint: Checkpoint) -> None:
    """An answer that its client does not read counts against the client; reading it frees it."""
    request = whole({"input": ["a"] * 2000, "user": "x" * 9000})
    with served(default_checkpoint, memory_budget=BUDGET, max_texts=2048) as server:
        slow = []
        while server.sample(HELD) < MB // 4:
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.port))
            # The kernel takes some of the first answers.
            connection.sendall(request)
            slow.append(connection)
            assert len(slow) < 100
            asyncio.run(asyncio.sleep(0.15))
        for connection in slow[1:]:
            connection.close()
        slow[0].settimeout(20)
        assert answer(slow[0])[0].status == 200
        slow[0].close()
        wait_for(lambda: server.sample(HELD) == 0)


LARGE = texts(400_000)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("body", "status"),
    [
        (LARGE, 200),
        (LARGE | {"task": "none"}, 400),
        ({"input": ["a word or two " * 5000] * 10}, 400),
    ],
)
async def test_all_memory_comes_back(
    default_checkpoint: Checkpoint, body: dict[str, object], status: int
) -> None:
    """After an answer or an error nothing is held."""
    async with fake_service(default_checkpoint, max_texts=10_000) as (client, _):
        assert (await client.post(PATH, json=body)).status_code == status
        assert await held(client) == 0


@pytest.mark.anyio
async def test_a_deadline_and_a_client_that_leaves_give_memory_back(
    default_checkpoint: Checkpoint,
) -> None:
    """While a request waits for the engine its memory is held; when it is given up, it is not."""
    engine = FakeEngine(default_checkpoint.card, delay=6.0)
    async with fake_service(default_checkpoint, engine, max_texts=10_000) as (client, _):
        late = {"x-request-timeout-ms": "2500"}
        waiting = asyncio.create_task(client.post(PATH, json=LARGE, headers=late))
        while not engine.batches:
            await asyncio.sleep(0.01)
        assert await held(client) > 400_000
        assert (await waiting).status_code == 504
        leaving = asyncio.create_task(client.post(PATH, json=LARGE))
        while len(engine.batches) == 1:
            await asyncio.sleep(0.01)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        assert await held(client) == 0


async def held(client: httpx.AsyncClient) -> float:
    """Return what is held, read after the next measurement."""
    await asyncio.sleep(0.15)
    return total((await client.get("/metrics")).text, HELD)


class HungryEngine(FakeEngine):
    """Has no memory left.

    Args:
        model: card of the model.
        shortage: what a failed allocation raises.
    """

    def __init__(self, model: ModelCard, shortage: Exception) -> None:
        super().__init__(model)
        self._shortage = shortage

    async def embed(self, batch: TokenBatch) -> EngineResult:  # noqa: ARG002
        raise self._shortage


@pytest.mark.anyio
@pytest.mark.parametrize(
    "shortage",
    [
        MemoryError(),
        RuntimeError("can't start new thread"),
        RuntimeError("can't allocate lock"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
async def test_a_failed_allocation_is_a_shortage(
    default_checkpoint: Checkpoint, shortage: Exception
) -> None:
    """However Python reports it, it is a 503 with Retry-After, not a bug of the service."""
    engine = HungryEngine(default_checkpoint.card, shortage)
    async with fake_service(default_checkpoint, engine) as (client, _):
        response = await client.post(PATH, json={"input": "a"})
    assert (response.status_code, response.json()["code"]) == (503, "overloaded")
    assert int(response.headers["retry-after"]) >= 1


async def statuses(client: httpx.AsyncClient) -> dict[str, int]:
    """Return the status of a request of each kind."""

    async def chunks() -> AsyncIterator[bytes]:
        yield json.dumps({"input": "a"}).encode()

    large = {"input": "a", "user": "x" * 70_000}
    answers = {
        "short": await client.post(PATH, json={"input": "a"}),
        "bulk": await client.post(PATH, json={"input": "a"}, headers={"x-priority": "bulk"}),
        "large": await client.post(PATH, json=large),
        "of unknown size": await client.post(PATH, content=chunks()),
        "models": await client.get("/v1/models"),
        "live": await client.get("/health/live"),
        "ready": await client.get("/health/ready"),
        "metrics": await client.get("/metrics"),
    }
    for response in answers.values():
        if response.status_code == 429:
            assert response.json()["code"] == "overloaded"
            assert int(response.headers["retry-after"]) >= 1
    return {kind: response.status_code for kind, response in answers.items()}


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("used", "level", "refused"),
    [
        (1000, 0, {}),
        (1710, 1, {"bulk": 429, "large": 429, "of unknown size": 429}),
        (1810, 2, {"short": 429, "bulk": 429, "large": 429, "of unknown size": 429}),
        (
            1950,
            3,
            {
                "short": 429,
                "bulk": 429,
                "large": 429,
                "of unknown size": 429,
                "models": 503,
                "ready": 503,
            },
        ),
    ],
)
async def test_a_container_near_its_limit_sheds_load(
    default_checkpoint: Checkpoint, tmp_path: Path, used: int, level: int, refused: dict[str, int]
) -> None:
    """Bulk and large requests go first, then all embedding requests, then all but probes."""
    group = Cgroup(tmp_path, 2000 * MB)
    async with fake_service(default_checkpoint, limits=group.limits) as (client, _):
        group.use(used * MB, cache=300 * MB)
        await asyncio.sleep(0.3)
        found = await statuses(client)
        assert {kind: status for kind, status in found.items() if status != 200} == refused
        page = (await client.get("/metrics")).text
        assert total(page, "taskvec_memory_limit_bytes") == 2000 * MB
        assert total(page, "taskvec_memory_used_bytes") == used * MB
        assert total(page, "taskvec_memory_pressure") == level
        group.use(100 * MB)
        await asyncio.sleep(0.3)
        assert set((await statuses(client)).values()) == {200}
