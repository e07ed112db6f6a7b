"""How fast an engine is, found out by asking it."""

from __future__ import annotations

import time

import numpy as np

from taskvec.engines.base import Engine, TokenBatch
from taskvec.priority import Priority

TEXT_TOKENS = 64
FIRST_TEXTS, MOST_TEXTS = 8, 1024
ENOUGH_SECONDS = 0.25
"""A batch that takes so long tells the speed; smaller ones tell what a call costs."""


async def measure_speed(engine: Engine) -> tuple[int, float]:
    """Embed batches that grow until one takes a while.

    Args:
        engine: ready; what others send it meanwhile goes first.

    Returns:
        Tokens of the last batch, and the seconds that it took.

    Raises:
        TaskvecError: the engine cannot embed now.
    """
    card = engine.model
    adapter = card.adapters[0] if card.adapters else None
    length = min(TEXT_TOKENS, card.max_tokens)
    texts = FIRST_TEXTS
    while True:
        ids = np.arange(texts * length, dtype=np.int32) % card.vocabulary
        batch = TokenBatch(np.split(ids, texts), adapter, priority=Priority.BULK)
        begun = time.monotonic()
        await engine.embed(batch)
        seconds = time.monotonic() - begun
        if seconds >= ENOUGH_SECONDS or texts == MOST_TEXTS:
            return batch.tokens, seconds
        texts *= 2
