"""How a batch is shared out among threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from taskvec.checkpoint.open import DEFAULT_MODEL, open_checkpoint
from taskvec.engines.packed.packing import MOST_PARTS, SMALL_FORWARD, UNEVEN, Cut, cut
from taskvec.engines.packed.weights import load_transformer

BACKBONE = open_checkpoint(DEFAULT_MODEL).backbone
NAMES = ["retrieval", "clustering", None]


@given(
    lengths=st.lists(st.integers(1, 600), min_size=1, max_size=60),
    threads=st.integers(1, 64),
    seed=st.integers(0, 9),
)
def test_every_text_is_in_one_part(lengths: list[int], threads: int, seed: int) -> None:
    """Whatever the batch, each text is in exactly one part, and no more threads work than may."""
    adapters = np.random.default_rng(seed).choice(np.array(NAMES), len(lengths)).tolist()
    parts, within = shared(lengths, adapters, threads)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    assert all(parts)
    assert len(parts) * within <= max(threads, 1)
    assert len(parts) <= MOST_PARTS


def test_small_batches_stay_whole() -> None:
    """What takes some milliseconds is left to one thread."""
    assert shared([20], [None], 8) == Cut([range(1)], 1)


def test_a_long_text_is_worth_every_thread() -> None:
    """Where one text is most of the work, all threads share its steps."""
    assert shared([8000, 20, 20], [None] * 3, 4) == Cut([range(3)], 4)


def test_parts_are_even() -> None:
    """Texts of mixed lengths are shared out evenly, neighbours by adapter."""
    lengths = np.random.default_rng(0).integers(5, 200, 64).tolist()
    parts, within = shared(lengths, ["a", "b"] * 32, 2)
    assert within == 1
    tokens = [sum(lengths[i] for i in part) for part in parts]
    assert max(tokens) * 2 < UNEVEN * sum(tokens)
    assert {i % 2 for i in parts[0][:16]} == {0}


def test_more_threads_than_parts_work_within_them() -> None:
    """Many cores are used by few parts, each with some threads."""
    parts, within = shared([100] * 200, [None] * 200, 16)
    assert (len(parts), within) == (MOST_PARTS, 16 // MOST_PARTS)


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_parts_do_not_change_vectors(threads: int) -> None:
    """However many threads share a batch, every vector is what one thread finds."""
    dice = np.random.default_rng(1)
    ids = [dice.integers(5, 20_000, length, dtype=np.int32) for length in dice.integers(1, 300, 40)]
    adapters = [NAMES[i] for i in dice.integers(0, 3, 40)]
    assert sum(map(len, ids)) * BACKBONE.linear_parameters > 2 * SMALL_FORWARD
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


def shared(lengths: list[int], adapters: list[str | None], threads: int) -> Cut:
    """The cut of texts of these lengths, for the default model."""
    return cut([np.zeros(length, np.int32) for length in lengths], adapters, BACKBONE, threads)
