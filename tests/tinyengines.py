"""Packed engines with tiny weights, and an observer that records what they report."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from conftest import DEFAULT_VOCABULARY
from synthetic import TINY_SMALL, write_checkpoint
from taskvec.checkpoint.backbone import Backbone
from taskvec.checkpoint.checkpoint import Checkpoint, read_checkpoint
from taskvec.engines.base import EngineObserver, EngineResult, TokenBatch, TokenIds
from taskvec.engines.packed.engine import PackedEngine, PackedOptions
from taskvec.engines.packed.transformer import Transformer
from taskvec.engines.packed.weights import load_transformer

FP32 = PackedOptions(dtype="float32")
DIFFERENCE = 1e-5
"""Maximum difference of unit vectors in float32, between two batches that contain a text."""


class Recorder:
    """An observer that records and checks the reports of an engine.

    Attributes:
        batches: texts and tokens of each finished forward pass.
        budgets: token budget of each of them.
        pauses: seconds of each pause.
        shrunk: token budget after each out-of-memory error.
        dropped: texts that were dropped, by reason.
        queued: texts and tokens in the queue.
        oldest: arrival of the oldest request, of each report.
    """

    def __init__(self) -> None:
        self.batches: list[tuple[int, int]] = []
        self.budgets: list[int] = []
        self.pauses: list[float] = []
        self.shrunk: list[int] = []
        self.dropped: dict[str, int] = {}
        self.queued = (0, 0)
        self.oldest: list[float | None] = []

    def queue_changed(self, texts: int, tokens: int, oldest: float | None) -> None:
        assert (oldest is None) == (texts == 0)
        self.queued = (texts, tokens)
        self.oldest.append(oldest)

    def batch_started(self, waited: Sequence[float]) -> None:
        assert all(seconds >= 0 for seconds in waited)

    def batch_finished(self, texts: int, tokens: int, seconds: float, budget: int) -> None:
        assert seconds > 0
        assert budget > 0
        self.batches.append((texts, tokens))
        self.budgets.append(budget)

    def forward_paused(self, seconds: float) -> None:
        assert seconds > 0
        self.pauses.append(seconds)

    def memory_ran_out(self, budget: int) -> None:
        self.shrunk.append(budget)

    def texts_dropped(self, reason: str, texts: int) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + texts


def tiny_checkpoint(folder: Path, shape: Backbone = TINY_SMALL) -> Checkpoint:
    """Write a checkpoint of random weights with the vocabulary of the default model; open it."""
    write_checkpoint(folder, replace(shape, vocabulary=DEFAULT_VOCABULARY))
    return read_checkpoint(folder, folder.name)


def load_reference(checkpoint: Checkpoint) -> Transformer:
    """Load a checkpoint in float32."""
    loaded = load_transformer(
        checkpoint, device=torch.device("cpu"), dtype=torch.float32, merge=False
    )
    assert isinstance(loaded, Transformer)
    return loaded


@asynccontextmanager
async def running(
    checkpoint: Checkpoint, options: PackedOptions = FP32, observer: EngineObserver | None = None
) -> AsyncIterator[PackedEngine]:
    """Run an engine."""
    engine = PackedEngine(checkpoint, options, observer)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


@asynccontextmanager
async def recording(
    checkpoint: Checkpoint, options: PackedOptions = FP32
) -> AsyncIterator[tuple[PackedEngine, Recorder]]:
    """Run an engine with a recorder."""
    recorder = Recorder()
    async with running(checkpoint, options, recorder) as engine:
        yield engine, recorder


def check(reference: Transformer, batch: TokenBatch, result: EngineResult) -> None:
    """Compare the vectors of a batch with those of the same texts in one forward pass."""
    truth = reference.embed(batch.ids, [batch.adapter] * len(batch.ids))
    assert np.abs(unit(result.vectors) - unit(truth)).max() <= DIFFERENCE


def random_ids(length: int, seed: int) -> TokenIds:
    """Return random token ids."""
    return np.random.default_rng(seed).integers(0, DEFAULT_VOCABULARY, length, dtype=np.int32)


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return normalised vectors."""
    result: NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return result
