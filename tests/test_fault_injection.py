"""Faults injected into a running service.

Responses stay correct, errors are reported, and the service recovers by itself.
"""

from __future__ import annotations

import asyncio
import resource
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from processes import EXACT, embed, served, total
from taskvec.api.app import create_app
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.engines.base import TokenIds
from taskvec.engines.packed.transformer import Transformer
from taskvec.service import build_service
from taskvec.settings import Settings

pytestmark = pytest.mark.full("failures, restarts and several processes of running servers")

PATH = "/v1/embeddings"
MEGABYTE = 1 << 20
FREE_BYTES = [160 * MEGABYTE, 80 * MEGABYTE, 40 * MEGABYTE]
"""Free address space, in bytes, tried in turn until a forward of 32,768 tokens in float32 fails.

How much it needs depends on the memory that earlier forwards have freed."""

RAW = "application/octet-stream"


def test_memory_that_runs_out_costs_no_request() -> None:
    """A server that runs out of memory answers all requests in smaller batches, and counts it."""
    big = {"input": [f"{'many words ' * 30}{n}" for n in range(600)], "task": "clustering"}
    small = {"input": "one text", "task": "retrieval"}
    with served("--max-batch-tokens", "32768", *EXACT) as server:
        expected = embed(server.url, small, RAW).content, embed(server.url, big, RAW).content
        before = httpx.get(f"{server.url}/metrics").text
        assert total(before, "taskvec_out_of_memory_total") == 0
        after = before
        for free in FREE_BYTES:
            limit = address_space(server.engine()) + free
            limits = (limit, resource.RLIM_INFINITY)
            resource.prlimit(server.engine(), resource.RLIMIT_AS, limits)
            with ThreadPoolExecutor(4) as threads:
                answers = [threads.submit(embed, server.url, big, RAW)]
                answers += [threads.submit(embed, server.url, small, RAW) for _ in range(20)]
                first, *others = [answer.result().content for answer in answers]
            assert near(first, expected[1])
            assert all(near(other, expected[0]) for other in others)
            after = httpx.get(f"{server.url}/metrics").text
            if total(after, "taskvec_out_of_memory_total"):
                break
        assert total(after, "taskvec_out_of_memory_total") > 0
        assert total(after, "taskvec_batch_budget_tokens") < total(
            before, "taskvec_batch_budget_tokens"
        )
        assert total(after, "taskvec_texts_dropped_total") == 0
        assert httpx.get(f"{server.url}/health/ready").status_code == 200


@pytest.mark.anyio
async def test_a_stalled_engine_is_reported_and_recovers(
    default_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hanging forward makes the service not ready, then not live; later all is answered."""
    gate = threading.Event()
    gate.set()
    embed_now = Transformer.embed

    def embed_or_hang(
        transformer: Transformer, ids: Sequence[TokenIds], adapters: Sequence[str | None]
    ) -> NDArray[np.float32]:
        gate.wait(60)
        return embed_now(transformer, ids, adapters)

    monkeypatch.setattr(Transformer, "embed", embed_or_hang)
    settings = Settings(
        log_requests=False, dtype="float32", threads=1, stall_timeout=0.5, dead_timeout=2.0
    )
    app = create_app(build_service(settings, checkpoint=default_checkpoint), pytest.fail)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://test", timeout=60, headers={"accept": RAW}
        ) as client:
            await becomes(client, "/health/ready", 200)
            truth = await client.post(PATH, json={"input": "a text"})
            gate.clear()
            hung = [
                asyncio.create_task(client.post(PATH, json={"input": "a text"})) for _ in range(3)
            ]
            impatient = await client.post(
                PATH, json={"input": "a text"}, headers={"x-request-timeout-ms": "200"}
            )
            assert impatient.status_code == 504
            await becomes(client, "/health/ready", 503)
            assert (await client.get("/health/live")).status_code == 200
            refused = await client.post(PATH, json={"input": "another"})
            assert refused.status_code == 503
            assert "nothing was finished" in refused.json()["detail"]
            assert refused.headers["retry-after"]
            await becomes(client, "/health/live", 503)
            gate.set()
            answers = await asyncio.gather(*hung)
            assert all(near(answer.content, truth.content) for answer in answers)
            await becomes(client, "/health/ready", 200)
            assert (await client.get("/health/live")).status_code == 200
            again = await client.post(PATH, json={"input": "a text"})
            assert near(again.content, truth.content)


async def becomes(client: httpx.AsyncClient, path: str, status: int) -> Any:
    """Poll a probe until it returns a status."""
    limit = time.monotonic() + 30
    while (answer := await client.get(path)).status_code != status:
        assert time.monotonic() < limit, f"{path} still answers {answer.status_code}"
        await asyncio.sleep(0.05)
    return answer


def address_space(process: int) -> int:
    """Return the size of a process's address space in bytes."""
    (line,) = (
        line
        for line in Path(f"/proc/{process}/status").read_text().splitlines()
        if line.startswith("VmSize")
    )
    return int(line.split()[1]) * 1024


def near(one: bytes, other: bytes) -> bool:
    """Return whether two responses of float32 vectors are equal up to rounding."""
    return bool(np.abs(np.frombuffer(one, "<f4") - np.frombuffer(other, "<f4")).max() < 1e-5)
