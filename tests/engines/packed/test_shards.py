"""How a batch is divided into shards for processor threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from taskvec.checkpoint.open import DEFAULT_MODEL, open_checkpoint
from taskvec.engines.packed.packing import (
    MAX_SHARD_RATIO,
    MAX_SHARDS,
    MIN_SHARD_MULTIPLY_ADDS,
    Shards,
    shard,
)
from taskvec.engines.packed.weights import load_transformer

BACKBONE = open_checkpoint(DEFAULT_MODEL).backbone
NAMES = ["retrieval", "clustering", None]


@given(
    lengths=st.lists(st.integers(1, 600), min_size=1, max_size=60),
    threads=st.integers(1, 64),
    seed=st.integers(0, 9),
)
def test_every_text_is_in_one_shard(lengths: list[int], threads: int, seed: int) -> None:
    """Each text is in exactly one shard, and the shards use no more threads than allowed."""
    adapters = np.random.default_rng(seed).choice(np.array(NAMES), len(lengths)).tolist()
    shards, per_shard = sharded(lengths, adapters, threads)
    assert sorted(i for texts in shards for i in texts) == list(range(len(lengths)))
    assert all(shards)
    assert len(shards) * per_shard <= max(threads, 1)
    assert len(shards) <= MAX_SHARDS


def test_small_batches_stay_whole() -> None:
    """A batch that takes some milliseconds uses one thread."""
    assert sharded([20], [None], 8) == Shards([range(1)], 1)


def test_a_long_text_uses_every_thread() -> None:
    """If one text is most of the work, the batch stays whole and uses all threads."""
    assert sharded([8000, 20, 20], [None] * 3, 4) == Shards([range(3)], 4)


def test_shards_are_even() -> None:
    """Shards of texts with mixed lengths have similar work, and adapters stay together."""
    lengths = np.random.default_rng(0).integers(5, 200, 64).tolist()
    shards, per_shard = sharded(lengths, ["a", "b"] * 32, 2)
    assert per_shard == 1
    tokens = [sum(lengths[i] for i in texts) for texts in shards]
    assert max(tokens) * 2 < MAX_SHARD_RATIO * sum(tokens)
    assert {i % 2 for i in shards[0][:16]} == {0}


def test_shards_use_several_threads_each() -> None:
    """With more threads than shards, each shard uses several threads."""
    shards, per_shard = sharded([100] * 200, [None] * 200, 16)
    assert (len(shards), per_shard) == (MAX_SHARDS, 16 // MAX_SHARDS)


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_shards_do_not_change_vectors(threads: int) -> None:
    """Vectors are the same for one thread and for several."""
    random = np.random.default_rng(1)
    ids = [
        random.integers(5, 20_000, length, dtype=np.int32) for length in random.integers(1, 300, 40)
    ]
    adapters = [NAMES[i] for i in random.integers(0, 3, 40)]
    assert sum(map(len, ids)) * BACKBONE.linear_parameters > 2 * MIN_SHARD_MULTIPLY_ADDS
    alone, together = (
        load_transformer(
            open_checkpoint(DEFAULT_MODEL),
            device=torch.device("cpu"),
            dtype=torch.float32,
            merge=True,
            threads=count,
        ).embed(ids, adapters)
        for count in (1, threads)
    )
    assert np.abs(alone - together).max() < 1e-4


def sharded(lengths: list[int], adapters: list[str | None], threads: int) -> Shards:
    """Return the shards of texts with these lengths, for the default model."""
    return shard([np.zeros(length, np.int32) for length in lengths], adapters, BACKBONE, threads)
