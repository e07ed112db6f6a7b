"""A fake engine without weights: real lifecycle, and vectors computed from the token ids."""

from __future__ import annotations

import asyncio
import zlib

import numpy as np
from numpy.typing import NDArray

from taskvec.checkpoint.backbone import ModelCard
from taskvec.engines.base import EngineHealth, EngineResult, EngineState, TokenBatch, TokenIds


class FakeEngine:
    """Embeds by hashing (adapter, ids): only equal inputs give equal vectors.

    Args:
        model: card of the model.
        delay: seconds that each call takes.
        error: raised by ``start`` if it is not None.

    Attributes:
        refusals: exceptions of the next calls, one each.
    """

    def __init__(
        self, model: ModelCard, *, delay: float = 0.0, error: Exception | None = None
    ) -> None:
        self.model = model
        self.batches: list[TokenBatch] = []
        self.cancelled = 0
        self.finished = 0
        self.refusals: list[Exception] = []
        self.batch_tokens = 16_384
        self._delay = delay
        self._error = error
        self._health = EngineHealth(EngineState.STARTING, "it is loading the model")

    async def start(self) -> None:
        if self._error is not None:
            self._health = EngineHealth(EngineState.DEAD, str(self._error))
            raise self._error
        self._health = EngineHealth(EngineState.READY)

    async def embed(self, batch: TokenBatch) -> EngineResult:
        self._health.require_ready()
        if self.refusals:
            raise self.refusals.pop(0)
        self.batches.append(batch)
        try:
            await asyncio.sleep(self._delay)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        self.finished += 1
        vectors = [hashed_vector(ids, batch.adapter, self.model.dimension) for ids in batch.ids]
        return EngineResult(np.stack(vectors), queued=0.0, computed=self._delay)

    async def stop(self) -> None:
        self._health = EngineHealth(EngineState.DEAD, "stopped")

    def set_health(self, health: EngineHealth) -> None:
        """Be in a state from now on."""
        self._health = health

    def health(self) -> EngineHealth:
        return self._health


def hashed_vector(ids: TokenIds, adapter: str | None, dimension: int) -> NDArray[np.float32]:
    """Return the vector that FakeEngine computes."""
    seed = zlib.crc32(ids.tobytes(), zlib.crc32((adapter or "").encode()))
    return np.random.default_rng(seed).standard_normal(dimension).astype(np.float32)
