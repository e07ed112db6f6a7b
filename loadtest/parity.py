"""Compare the vectors of the packed engine with transformers and peft in float32, on a CPU.

PYTHONPATH=tests python loadtest/parity.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from oracle import Oracle
from report import write_result
from synthetic import TINY_NANO, TINY_SMALL, write_checkpoint
from taskvec.checkpoint.checkpoint import Checkpoint, read_checkpoint
from taskvec.engines.packed.adapter_check import check_adapters
from taskvec.engines.packed.weights import load_transformer
from workload import checkpoint_of

LENGTHS = (1, 2, 7, 33, 64, 319, 320, 700, 2048)


def main() -> None:
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder)
        checkpoints = {"default model": checkpoint_of("mini")}
        for name, shape in (("small layout", TINY_SMALL), ("nano layout", TINY_NANO)):
            place = write_checkpoint(workdir / name.partition(" ")[0], shape)
            checkpoints[name] = read_checkpoint(place, name)
        figures = {
            name: differences(checkpoint, workdir, device)
            for name, checkpoint in checkpoints.items()
        }
    write_result("parity", {"lengths": LENGTHS, **figures})


def differences(checkpoint: Checkpoint, workdir: Path, device: torch.device) -> dict[str, float]:
    """Return the maximum component difference in float32 and the minimum cosine in bfloat16.

    The batch mixes all adapters.
    """
    adapters: list[str | None] = [*checkpoint.card.adapters, None]
    names = [adapters[i % len(adapters)] for i in range(len(adapters) * len(LENGTHS))]
    random = np.random.default_rng(0)
    ids = [
        random.integers(0, checkpoint.backbone.vocabulary, length, dtype=np.int32)
        for length in LENGTHS
        for _ in adapters
    ]
    oracle = Oracle(
        checkpoint.folder, checkpoint.backbone.architecture, checkpoint.card.adapters, workdir
    )
    truth = np.stack([oracle.embed(text, name) for text, name in zip(ids, names, strict=True)])
    result = {}
    for merge in (True, False):
        mode = "merged" if merge else "low-rank"
        exact = load_transformer(checkpoint, device=device, dtype=torch.float32, merge=merge)
        difference = float(np.abs(normalised(exact.embed(ids, names)) - truth).max())
        half = load_transformer(checkpoint, device=device, dtype=torch.bfloat16, merge=merge)
        check_adapters(half, checkpoint.card.adapters)
        cosine = float((normalised(half.embed(ids, names)) * truth).sum(1).min())
        assert difference <= 1e-5, (checkpoint.card.name, mode, difference)
        assert cosine >= 0.9995, (checkpoint.card.name, mode, cosine)
        result[f"float32, {mode}, greatest difference"] = difference
        result[f"bfloat16, {mode}, least cosine"] = cosine
    print(checkpoint.card.name, result, flush=True)
    return result


def normalised(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return rows scaled to length 1."""
    unit: NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


if __name__ == "__main__":
    main()
