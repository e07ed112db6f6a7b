"""The texts and checkpoints that the benchmarks share."""

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
    """``mini``, the default model, or ``qwen3-0.6b`` with random bf16 weights, made once."""
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
    """Random ids, every text equally long."""
    random = np.random.default_rng(0)
    return [random.integers(5, vocabulary, length, dtype=np.int32) for _ in range(texts)]


def log_normal_lengths(texts: int, vocabulary: int) -> list[TokenIds]:
    """Random ids of mixed lengths: log-normal, mean about 60, at most 512, longest first."""
    random = np.random.default_rng(0)
    lengths = sorted(log_normal(60, 0.8, texts, random).tolist(), reverse=True)
    return [random.integers(5, vocabulary, length, dtype=np.int32) for length in lengths]


def in_batches(
    transformer: Transformer,
    ids: Sequence[TokenIds],
    adapters: Sequence[str | None],
    budget: int,
) -> None:
    """Embed everything in the batches that the engine would form."""
    start = 0
    while start < len(ids):
        stop, room = start, budget
        while stop < len(ids) and (len(ids[stop]) <= room or stop == start):
            room -= len(ids[stop])
            stop += 1
        transformer.embed(ids[start:stop], adapters[start:stop])
        start = stop
