"""``from taskvec import AsyncEmbedder``: the library's calls, awaited."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from taskvec import AsyncEmbedder, Embedder
from taskvec.errors import CheckpointError, InvalidRequestError

TEXTS = ["The cat sat on the mat.", "x", "Stock markets fell. " * 40]
TASKS = ["retrieval.query", "clustering", "retrieval.passage"]
NEAR = 2e-3
"""Documented maximum difference per component between batches, twice."""

WORK = ["word " * 1900] * 400
"""Many seconds of forward passes."""

BLOCKED_SECONDS = 0.25
"""Longest time for which the event loop may be held: by Python's own work, on a busy machine."""


@pytest.fixture
async def embedder() -> AsyncIterator[AsyncEmbedder]:
    async with AsyncEmbedder() as loaded:
        yield loaded


async def longest_pause(work: asyncio.Task[Any]) -> float:
    """Longest time between two iterations of the event loop until a task ends."""
    longest, before = 0.0, time.monotonic()
    while not work.done():
        await asyncio.sleep(0.001)
        now = time.monotonic()
        longest, before = max(longest, now - before), now
    return longest


@pytest.mark.anyio
async def test_vectors_are_those_of_the_embedder(embedder: AsyncEmbedder) -> None:
    """Each argument means what it does in ``Embedder.embed``."""
    with Embedder() as twin:
        assert embedder.tasks == twin.tasks
        assert embedder.model.name == twin.model.name
        assert embedder.task("clustering") == twin.task("clustering")
        calls: list[tuple[Any, dict[str, Any]]] = [
            ("a text", {}),
            (TEXTS, {"task": "clustering", "dimensions": 64}),
            (TEXTS, {"task": TASKS}),
            (TEXTS, {"normalized": False}),
            (["word " * 5000], {"truncate": True}),
            ([], {"dimensions": 32}),
        ]
        for texts, options in calls:
            vectors = await embedder.embed(texts, **options)
            expected = twin.embed(texts, **options)
            assert (vectors.shape, vectors.dtype) == (expected.shape, np.float32)
            scale = max(1.0, float(np.abs(expected).max(initial=0)))
            np.testing.assert_allclose(vectors, expected, atol=NEAR * scale)


@pytest.mark.anyio
async def test_errors_are_those_of_the_embedder(embedder: AsyncEmbedder, tmp_path: Path) -> None:
    """What ``Embedder`` refuses is refused; a model that cannot be loaded may be tried again."""
    with pytest.raises(InvalidRequestError, match=r"texts\[1\]"):
        await embedder.embed(["a", ""])
    with pytest.raises(InvalidRequestError, match=r"task\[1\]"):
        await embedder.embed(["a", "b"], ["clustering", "poetry"])
    with pytest.raises(InvalidRequestError, match=r"input\[1\].*2048 tokens"):
        await embedder.embed(["a", "word " * 5000])
    damaged = AsyncEmbedder(str(tmp_path))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"config\.json is missing"):
            await damaged.embed("a")
    await damaged.close()


@pytest.mark.anyio
async def test_the_event_loop_is_not_blocked() -> None:
    """While the model loads, embeds and is closed, the loop runs other tasks."""
    embedder = AsyncEmbedder()
    with pytest.raises(RuntimeError, match="not loaded"):
        _ = embedder.tasks
    for work in (embedder.load(), embedder.embed(["word " * 500] * 50), embedder.close()):
        assert await longest_pause(asyncio.create_task(work)) < BLOCKED_SECONDS


@pytest.mark.anyio
async def test_concurrent_calls_share_one_model() -> None:
    """Calls that come while the model loads wait for it; each gets its own vectors."""
    async with AsyncEmbedder() as embedder:
        truth = np.concatenate([await embedder.embed(f"text {n}") for n in range(16)])
    fresh = AsyncEmbedder()
    answers = await asyncio.gather(*(fresh.embed(f"text {n}") for n in range(16)))
    np.testing.assert_allclose(np.concatenate(answers), truth, atol=NEAR)
    await fresh.close()


@pytest.mark.anyio
async def test_a_cancelled_call_drops_its_texts(embedder: AsyncEmbedder) -> None:
    """Texts of a call that is cancelled, or times out, leave the engine's queue at once."""
    engine = embedder._ready._engine
    for seconds in (0.3, 1.0):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(embedder.embed(WORK), seconds)
    began = time.monotonic()
    assert (await embedder.embed("a text")).shape == (1, 256)
    assert time.monotonic() - began < 10, "it waited for texts that nobody wants"
    assert engine._waiting.queue.texts == 0
    assert embedder._ready._embedder._admission.tokens == 0


@pytest.mark.anyio
async def test_a_cancelled_load_goes_on_for_others() -> None:
    """Cancelling the call that began to load does not fail another one that waits."""
    embedder = AsyncEmbedder()
    first = asyncio.create_task(embedder.load())
    second = asyncio.create_task(embedder.embed("a text"))
    await asyncio.sleep(0.01)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert (await second).shape == (1, 256)
    await embedder.close()


@pytest.mark.anyio
async def test_closing(embedder: AsyncEmbedder) -> None:
    """``close`` finishes running calls, may be called twice, and further calls raise."""
    running = asyncio.create_task(embedder.embed(["word " * 100] * 64))
    while not embedder._ready._embedder._admission.tokens and not running.done():
        await asyncio.sleep(0.001)
    await embedder.close()
    assert (await running).shape == (64, 256)
    await embedder.close()
    with pytest.raises(RuntimeError, match="closed"):
        await embedder.embed("a text")
    await AsyncEmbedder().close()


def test_several_event_loops_use_one() -> None:
    """An AsyncEmbedder that one loop loaded answers in another."""
    embedder = AsyncEmbedder()
    shapes = [asyncio.run(embedder.embed("a text")).shape for _ in range(2)]
    asyncio.run(embedder.close())
    assert shapes == [(1, 256)] * 2
