"""Nothing blocks the event loop: no call that waits, on any route, and no long work."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import httpx
import numpy as np
import pytest
from blockbuster import blockbuster_ctx

from conftest import fake_service
from fakes import FakeEngine
from taskvec.api.app import create_app
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.engines.base import Engine, EngineResult, TokenBatch
from taskvec.service import build_service
from taskvec.settings import Settings

PATH = "/v1/embeddings"
RAW = {"accept": "application/octet-stream"}
OUTPUTS = [
    *(
        {"embedding_type": kind}
        for kind in ("float", "base64", "int8", "uint8", "binary", "ubinary")
    ),
    {"encoding_format": "base64"},
    {"output_dtype": "ubinary", "encoding_format": "base64"},
    {"dimensions": 8, "normalized": False},
]
SMALL = {"input": "a text"}
LARGE = {"input": ["a word"] * 400, "user": "x" * 200_000}
WRONG = [b"{", b"[]", b'{"input": []}', b'{"input": "a", "task": "none"}', b"[" * 300_000]
MEGABYTES = 30 << 20
LATE = 0.15
"""Seconds by which a loop may be late: other processes share the machine, other threads Python."""


class InstantEngine(FakeEngine):
    """Gives the same wide vectors each time, without work."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(dataclasses.replace(checkpoint.card, dimension=4096))
        self.vectors = np.random.default_rng(0).standard_normal((2048, 4096), np.float32)

    async def embed(self, batch: TokenBatch) -> EngineResult:
        return EngineResult(self.vectors[: len(batch.ids)], queued=0.0, computed=0.0)


@asynccontextmanager
async def client_of(
    checkpoint: Checkpoint, engine: str
) -> AsyncIterator[tuple[httpx.AsyncClient, Engine]]:
    """The application in front of the fake engine or the real one, ready."""
    settings = Settings(log_requests=False, dtype="float32", threads=1)
    fake = FakeEngine(checkpoint.card) if engine == "fake" else None
    service = build_service(settings, checkpoint=checkpoint, engine=fake)
    made = service.engine
    app = create_app(service, pytest.fail)
    async with app.router.lifespan_context(app):
        while not made.health().ready:
            await asyncio.sleep(0.01)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://test", timeout=60
        ) as client:
            yield client, made


@pytest.mark.anyio
@pytest.mark.parametrize("engine", ["fake", "packed"])
async def test_no_route_waits_in_the_event_loop(
    default_checkpoint: Checkpoint, engine: str
) -> None:
    """No file, lock, socket or sleep is waited for in the loop: all routes, outputs and sizes."""
    async with client_of(default_checkpoint, engine) as (client, _):
        with blockbuster_ctx():
            for output in OUTPUTS:
                for body in (SMALL, LARGE):
                    answer = await client.post(PATH, json=body | output)
                    assert answer.status_code == 200, answer.text[:300]
            for body in (SMALL, LARGE):
                raw = await client.post(
                    PATH, json=body | {"embedding_type": "float16"}, headers=RAW
                )
                assert raw.status_code == 200
            for content in WRONG:
                assert (await client.post(PATH, content=content)).status_code == 400
            for path in (
                *("/v1/models", "/v1/models/taskvec-mini", "/health/live", "/health/ready"),
                *("/metrics", "/docs", "/openapi.json"),
            ):
                assert (await client.get(path)).status_code == 200, path
            for path in ("/v1/models/none", "/none"):
                assert (await client.get(path)).status_code == 404


def test_blockbuster_sees_what_blocks() -> None:
    """The proof above would fail: a sleep in a coroutine is noticed."""

    async def sleeper() -> None:
        time.sleep(0.001)  # noqa: ASYNC251 - what is to be noticed

    with blockbuster_ctx(), pytest.raises(Exception, match="Blocking call"):
        asyncio.run(sleeper())


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("made", "status"),
    [
        (lambda: b'{"input": [' + b",".join([b'"a"'] * 2048) + b"]}", 200),
        (lambda: b'{"truncate": true, "input": ["' + b"word " * (MEGABYTES // 5) + b'"]}', 200),
        (lambda: b'{"input": [' + b"[]," * (MEGABYTES // 3) + b"[]]}", 400),
        (lambda: b'{"input": "a", "user": [' + b'"a",' * (MEGABYTES // 4) + b"1]}", 400),
    ],
    ids=["large answer", "large body", "ten million lists", "seven million strings"],
)
async def test_large_requests_do_not_hold_up_others(
    default_checkpoint: Checkpoint, made: Callable[[], bytes], status: int
) -> None:
    """While megabytes are read or written, the loop goes on; the best of five tries shows it."""
    content = made()  # by a function: every process that collects the tests would hold the bytes
    async with fake_service(default_checkpoint, InstantEngine(default_checkpoint)) as (client, _):
        latest = []
        while len(latest) < 5 and min(latest, default=LATE) >= LATE:
            latest.append(0.0)
            request = asyncio.create_task(client.post(PATH, content=content))
            while not request.done():
                began = time.monotonic()
                await asyncio.sleep(0.001)
                latest[-1] = max(latest[-1], time.monotonic() - began)
            assert (await request).status_code == status
        assert min(latest) < LATE
