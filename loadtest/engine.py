"""Compare the packed engine with the machine's GEMM rate and with transformers, on a CPU.

All sides run in one process, interleaved, with the same threads; the ratios are what matters.

    python loadtest/engine.py --shape qwen3-0.6b --rounds 3
    python loadtest/engine.py --shape mini --rounds 9
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch.nn import functional

from report import ratio, spread, write_result
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.checkpoint.vllm_copy import make_vllm_copy
from taskvec.engines.base import TokenIds
from taskvec.engines.packed.transformer import Transformer
from taskvec.engines.packed.weights import load_transformer
from workload import CACHE, checkpoint_of, equal_lengths, in_batches, log_normal_lengths

CPU = torch.device("cpu")
PADDED_BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=["qwen3-0.6b", "mini"], default="mini")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mixed-texts", type=int, default=64)
    options = parser.parse_args()
    checkpoint = checkpoint_of(options.shape)
    merged, low_rank = (
        load_transformer(checkpoint, device=CPU, dtype=torch.bfloat16, merge=merge)
        for merge in (True, False)
    )
    equal = equal_lengths(64, 64, checkpoint.backbone.vocabulary)
    mixed = log_normal_lengths(options.mixed_texts, checkpoint.backbone.vocabulary)
    padded = transformers_side(checkpoint, mixed)
    budget = 2 * merged.block_rows
    one = ["retrieval"] * max(len(equal), len(mixed))
    every = [checkpoint.card.adapters[i % 4] for i in range(len(one))]

    def ours(side: Transformer, ids: list[TokenIds], adapters: list[str]) -> Callable[[], None]:
        return lambda: in_batches(side, ids, adapters[: len(ids)], budget)

    sides: dict[str, Callable[[], None]] = {
        "equal, merged, one task": ours(merged, equal, one),
        "equal, merged, four tasks": ours(merged, equal, every),
        "equal, low-rank, one task": ours(low_rank, equal, one),
        "equal, low-rank, four tasks": ours(low_rank, equal, every),
        "mixed, merged, one task": ours(merged, mixed, one),
        "mixed, transformers, no adapter": padded,
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    gemm: dict[str, list[float]] = {"square 4096": [], "the model's layers, 1024 rows": []}
    for warm in [True] + [False] * options.rounds:
        for name, rate in measured_gemm(checkpoint).items():
            if not warm:
                gemm[name].append(rate)
        for name, side in sides.items():
            tokens = sum(map(len, equal if name.startswith("equal") else mixed))
            started = time.perf_counter()
            side()
            if not warm:
                rates[name].append(tokens / (time.perf_counter() - started))
            print(f"{name}: {tokens / (time.perf_counter() - started):.0f} tok/s", flush=True)

    executed = executed_flops(checkpoint, equal) / sum(map(len, equal))
    fastest = [max(pair) for pair in zip(*gemm.values(), strict=True)]
    shares = {
        name: ratio([rate * executed / 1e9 for rate in rates[name]], fastest)
        for name in rates
        if name.startswith("equal")
    }
    write_result(
        f"engine-{options.shape}",
        {
            "shape": options.shape,
            "dtype": "bfloat16",
            "batch_tokens": budget,
            "equal": "64 texts of 64 tokens",
            "mixed": f"{len(mixed)} texts, {sum(map(len, mixed))} tokens, log-normal, to 512",
            "gemm_gflops": {name: spread(values) for name, values in gemm.items()},
            "tokens_per_second": {name: spread(values) for name, values in rates.items()},
            "share_of_the_faster_gemm": shares,
            "four_tasks_over_one": {
                mode: ratio(rates[f"equal, {mode}, four tasks"], rates[f"equal, {mode}, one task"])
                for mode in ("merged", "low-rank")
            },
            "over_transformers": ratio(
                rates["mixed, merged, one task"], rates["mixed, transformers, no adapter"]
            ),
        },
    )


def executed_flops(checkpoint: Checkpoint, ids: list[TokenIds]) -> float:
    """Return the floating-point operations of the linear layers that are executed.

    The last layer computes only keys and values for all tokens, and everything else for the last
    token of each text; the savings do not count as work. Attention is not counted.
    """
    backbone = checkpoint.backbone
    tokens = sum(map(len, ids))
    per_layer = backbone.linear_parameters / backbone.layers
    keys_values = 2 * backbone.kv_heads * backbone.head_dim * backbone.hidden
    full = (backbone.layers - 1) * per_layer * tokens
    return 2 * (full + keys_values * tokens + (per_layer - keys_values) * len(ids))


@torch.inference_mode()
def measured_gemm(checkpoint: Checkpoint) -> dict[str, float]:
    """Return GFLOP/s in bfloat16 of one large square product and of the model's layers."""
    square = torch.randn(4096, 4096, dtype=torch.bfloat16)
    started = time.perf_counter()
    functional.linear(square, square)
    square_rate = 2 * 4096**3 / (time.perf_counter() - started) / 1e9
    flops = seconds = 0.0
    for out, into in checkpoint.backbone.projections.values():
        rows = torch.randn(1024, into, dtype=torch.bfloat16)
        weight = torch.randn(out, into, dtype=torch.bfloat16)
        functional.linear(rows, weight)
        started = time.perf_counter()
        for _ in range(5):
            functional.linear(rows, weight)
        seconds += time.perf_counter() - started
        flops += 5 * 2 * 1024 * out * into
    return {"square 4096": square_rate, "the model's layers, 1024 rows": flops / seconds / 1e9}


def transformers_side(checkpoint: Checkpoint, ids: list[TokenIds]) -> Callable[[], None]:
    """Return a function that runs the backbone in transformers, in padded batches of 32 texts."""
    from transformers import AutoModel  # noqa: PLC0415 - slow to import

    # transformers cannot read Jina's config.json, but it can read the copy for vLLM.
    folder = make_vllm_copy(checkpoint, CACHE)
    model = AutoModel.from_pretrained(folder, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def run() -> None:
        for start in range(0, len(ids), PADDED_BATCH):
            rows = ids[start : start + PADDED_BATCH]
            width = max(map(len, rows))
            tokens = torch.zeros(len(rows), width, dtype=torch.long)
            mask = torch.zeros_like(tokens)
            for row, text in enumerate(rows):
                tokens[row, : len(text)] = torch.from_numpy(text)
                mask[row, : len(text)] = 1
            hidden = model(input_ids=tokens, attention_mask=mask).last_hidden_state
            hidden[torch.arange(len(rows)), mask.sum(1) - 1].float().numpy()

    return run


if __name__ == "__main__":
    main()
