"""The packed engine on a CUDA device: correct first, then measured.

Needs torch with CUDA, transformers, peft, tokenizers, safetensors; no web framework.

    PYTHONPATH=service:tests:loadtest python loadtest/gpu.py
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from parity import differences
from report import ratio, spread, write_result
from synthetic import ADAPTERS, NANO, SMALL, TINY_NANO, TINY_SMALL, Shape, write_checkpoint
from taskvec.checkpoint.layout import Checkpoint, read_checkpoint
from taskvec.engines.base import TokenIds
from taskvec.engines.packed.transformer import Transformer
from taskvec.engines.packed.weights import load_transformer
from workload import in_batches, log_normal_lengths

CUDA = torch.device("cuda")
BATCH_TOKENS = 32_768


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--texts", type=int, default=4096)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no CUDA device")
    torch.backends.cuda.matmul.allow_tf32 = False
    figures = {"device": torch.cuda.get_device_name(), "batch_tokens": BATCH_TOKENS}
    with tempfile.TemporaryDirectory() as room:
        for name, tiny, shape in (("small", TINY_SMALL, SMALL), ("nano", TINY_NANO, NANO)):
            figures[f"{name}, difference from the oracle"] = differences(
                read_checkpoint(write_checkpoint(Path(room) / f"tiny-{name}", tiny), name),
                Path(room),
                CUDA,
            )
            figures[f"{name}, tokens per second"] = speed(Path(room), name, shape, options)
    write_result("gpu", figures)


def speed(
    room: Path, name: str, shape: Shape, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Mixed lengths at the real shape: merged and low-rank, one task and four, transformers."""
    folder = write_checkpoint(room / name, shape, jina=False, dtype=torch.bfloat16)
    checkpoint = read_checkpoint(folder, name)
    ids = log_normal_lengths(options.texts, shape.vocabulary)
    one: list[str | None] = ["retrieval"] * len(ids)
    four: list[str | None] = [ADAPTERS[i % 4] for i in range(len(ids))]
    merged = load(checkpoint, torch.bfloat16, merge=True)
    low_rank = load(checkpoint, torch.bfloat16, merge=False)
    sides: dict[str, Callable[[], None]] = {
        "merged, one task": lambda: in_batches(merged, ids, one, BATCH_TOKENS),
        "merged, four tasks": lambda: in_batches(merged, ids, four, BATCH_TOKENS),
        "low-rank, four tasks": lambda: in_batches(low_rank, ids, four, BATCH_TOKENS),
        "transformers, padded, no adapter": transformers_side(checkpoint, ids),
    }
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for warm in [True] + [False] * options.rounds:
        for side, run in sides.items():
            torch.cuda.synchronize()
            begun = time.perf_counter()
            run()
            torch.cuda.synchronize()
            if not warm:
                rates[side].append(sum(map(len, ids)) / (time.perf_counter() - begun))
    result = {side: spread(values, 0) for side, values in rates.items()}
    result["merged, one task, over transformers"] = ratio(
        rates["merged, one task"], rates["transformers, padded, no adapter"]
    )
    result["merged, four tasks over one"] = ratio(
        rates["merged, four tasks"], rates["merged, one task"]
    )
    print(name, result, flush=True)
    return result


def load(checkpoint: Checkpoint, dtype: torch.dtype, *, merge: bool) -> Transformer:
    """The engine's transformer on the device."""
    return load_transformer(checkpoint, device=CUDA, dtype=dtype, merge=merge)


def transformers_side(checkpoint: Checkpoint, ids: list[TokenIds]) -> Callable[[], None]:
    """The backbone alone in transformers, length-sorted batches padded to the same budget."""
    from transformers import AutoModel  # noqa: PLC0415 - slow to import

    model = AutoModel.from_pretrained(checkpoint.folder, dtype=torch.bfloat16).to(CUDA).eval()

    @torch.inference_mode()
    def run() -> None:
        start = 0
        while start < len(ids):  # longest first
            width = len(ids[start])
            rows = ids[start : start + max(1, BATCH_TOKENS // width)]
            tokens = torch.zeros(len(rows), width, dtype=torch.long)
            mask = torch.zeros_like(tokens)
            for row, text in enumerate(rows):
                tokens[row, : len(text)] = torch.from_numpy(text)
                mask[row, : len(text)] = 1
            tokens, mask = tokens.to(CUDA), mask.to(CUDA)
            hidden = model(input_ids=tokens, attention_mask=mask).last_hidden_state
            hidden[torch.arange(len(rows)), mask.sum(1) - 1].float().cpu().numpy()
            start += len(rows)

    return run


if __name__ == "__main__":
    main()
