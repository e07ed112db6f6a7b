"""Texts and checkpoints shared by the benchmarks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lengths import log_normal
from taskvec.checkpoint.checkpoint import Checkpoint, read_checkpoint
from taskvec.checkpoint.open import DEFAULT_MODEL, open_checkpoint
from taskvec.engines.base import TokenIds
from taskvec.engines.packed.transformer import Transformer

sys.path.append(str(Path(__file__).parents[1] / "tests"))

CACHE = Path(__file__).parents[1] / ".cache"
QWEN = "qwen3-0.6b"


def checkpoint_of(shape: str) -> Checkpoint:
    """Return the checkpoint of a shape.

    Args:
        shape: ``mini``, the default model, or ``qwen3-0.6b``, random bfloat16 weights, which are
            written on first use.
    """
    if shape == "mini":
        return open_checkpoint(DEFAULT_MODEL)
    import torch  # noqa: PLC0415 - the HTTP benchmark needs no torch

    from synthetic import SMALL, write_checkpoint  # noqa: PLC0415

    folder = CACHE / QWEN
    if not (folder / "adapters" / "classification" / "adapter_config.json").exists():
        print(f"writing random weights to {folder} ...", file=sys.stderr)
        write_checkpoint(folder, SMALL, jina=False, dtype=torch.bfloat16)
    return read_checkpoint(folder, QWEN)


def equal_lengths(texts: int, length: int, vocabulary: int) -> list[TokenIds]:
    """Return texts of random ids, all of the same length."""
    random = np.random.default_rng(0)
    return [random.integers(5, vocabulary, length, dtype=np.int32) for _ in range(texts)]


def log_normal_lengths(texts: int, vocabulary: int) -> list[TokenIds]:
    """Return texts of random ids, log-normal lengths, mean about 60, max 512, longest first."""
    random = np.random.default_rng(0)
    lengths = sorted(log_normal(60, 0.8, texts, random).tolist(), reverse=True)
    return [random.integers(5, vocabulary, length, dtype=np.int32) for length in lengths]


def in_batches(
    transformer: Transformer,
    ids: Sequence[TokenIds],
    adapters: Sequence[str | None],
    budget: int,
) -> None:
    """Embed all texts in batches as the engine would form them, of at most ``budget`` tokens."""
    start = 0
    while start < len(ids):
        stop, left = start, budget
        while stop < len(ids) and (len(ids[stop]) <= left or stop == start):
            left -= len(ids[stop])
            stop += 1
        transformer.embed(ids[start:stop], adapters[start:stop])
        start = stop
