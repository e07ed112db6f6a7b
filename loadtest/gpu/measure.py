"""Check and measure the engines on a CUDA device; run by run.sh.

Measures tokens per second through the Engine protocol, as the service uses it: many concurrent
requests of texts of equal lengths, with one task or four mixed.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from parity import differences
from report import ratio, spread, write_result
from synthetic import ADAPTERS, NANO, SMALL, TINY_NANO, TINY_SMALL, Shape, write_checkpoint
from taskvec.checkpoint.checkpoint import Checkpoint, read_checkpoint
from taskvec.checkpoint.golden import golden_vectors
from taskvec.engines.base import Engine, TokenBatch
from taskvec.engines.packed.engine import PackedEngine, PackedOptions
from taskvec.engines.packed.weights import load_transformer
from taskvec.engines.vllm.arguments import VllmOptions
from taskvec.engines.vllm.engine import VllmEngine
from workload import equal_lengths

CUDA = torch.device("cuda")
SHAPES = {"nano": (NANO, TINY_NANO), "small": (SMALL, TINY_SMALL)}
LENGTHS = (16, 50, 512, 8192)
TEXTS_A_REQUEST = 64
TOKENS_A_ROUND = 1_000_000
BATCH_TOKENS = 65_536
SINGLE_TEXTS = 300
GEMM_ROWS, GEMM_REPEATS = 32_768, 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--tokens", type=int, default=TOKENS_A_ROUND, help="tokens of one round")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "batch_tokens": BATCH_TOKENS,
    }
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder)
        for name in options.shapes:
            shape, tiny = SHAPES[name]
            checkpoint = read_checkpoint(write_checkpoint(workdir / f"tiny-{name}", tiny), name)
            figures[f"{name}, packed, difference from the oracle"] = differences(
                checkpoint, workdir, CUDA
            )
            asyncio.run(measure(workdir, name, shape, options, figures))
    write_result("gpu", figures)


async def measure(
    workdir: Path,
    name: str,
    shape: Shape,
    options: argparse.Namespace,
    figures: dict[str, Any],
) -> None:
    """Measure each engine at each length with one task and four, and one text alone.

    The figures are saved after each length, in case a later one fails or time runs out.
    """
    folder = write_checkpoint(workdir / name, shape, dtype=torch.bfloat16)
    checkpoint = read_checkpoint(folder, name)
    golden_vectors(checkpoint, workdir)  # cached, so that no engine's start time includes it
    figures[f"{name}, packed, profile"] = profile(checkpoint)
    gemm = gemm_rate(checkpoint)
    figures[f"{name}, TFLOP/s of the linear layers alone"] = round(gemm / 1e12)
    per_token = 2 * checkpoint.backbone.linear_parameters
    for label, make in engines(checkpoint, workdir).items():
        engine = make()
        started = time.perf_counter()
        await engine.start()
        figures[f"{name}, {label}, seconds to start"] = round(time.perf_counter() - started, 1)
        figures[f"{name}, {label}, one text of 16 tokens, ms"] = await one_text(engine)
        for length in options.lengths:
            measured = await rates(engine, length, options)
            measured["share of the linear layers' rate"] = round(
                measured["one task"]["median"] * per_token / gemm, 2
            )
            figures[f"{name}, {label}, {length} tokens"] = measured
            print(name, label, length, measured, flush=True)
            write_result("gpu", figures, show=False)
        await engine.stop()


async def one_text(engine: Engine) -> dict[str, float]:
    """Return the milliseconds of single texts of 16 tokens, one after another."""
    times = []
    for ids in equal_lengths(SINGLE_TEXTS, 16, engine.model.vocabulary):
        started = time.perf_counter()
        await engine.embed(TokenBatch([ids], ADAPTERS[0]))
        times.append(1e3 * (time.perf_counter() - started))
    times = sorted(times[SINGLE_TEXTS // 10 :])  # the first ones warm up
    return {"p50": round(times[len(times) // 2], 2), "p99": round(times[int(0.99 * len(times))], 2)}


@torch.inference_mode()
def gemm_rate(checkpoint: Checkpoint) -> float:
    """Return FLOP/s of the matrix products of one layer in sequence, with ``GEMM_ROWS`` rows."""
    products = []
    for out, into in checkpoint.backbone.projections.values():
        x = torch.randn(GEMM_ROWS, into, device=CUDA, dtype=torch.bfloat16)
        products.append((x, torch.randn(into, out, device=CUDA, dtype=torch.bfloat16)))
    seconds = []
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(GEMM_REPEATS):
            for x, weight in products:
                torch.mm(x, weight)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    flops = sum(2 * x.numel() * weight.shape[1] for x, weight in products)
    return GEMM_REPEATS * flops / statistics.median(seconds)


def engines(checkpoint: Checkpoint, workdir: Path) -> dict[str, Callable[[], Engine]]:
    """Return the packed engine in both adapter modes, and vLLM if it is installed."""
    sides: dict[str, Callable[[], Engine]] = {
        f"packed {mode}": lambda mode=mode: PackedEngine(  # type: ignore[misc]
            checkpoint,
            PackedOptions(
                device="cuda", dtype="bfloat16", adapter_mode=mode, max_batch_tokens=BATCH_TOKENS
            ),
        )
        for mode in ("merged", "low-rank")
    }
    if importlib.util.find_spec("vllm"):
        sides["vllm"] = lambda: VllmEngine(
            checkpoint, workdir, VllmOptions(max_batch_tokens=BATCH_TOKENS)
        )
    return sides


async def rates(engine: Engine, length: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return tokens per second at one length."""
    length = min(length, engine.model.max_tokens)
    texts = max(TEXTS_A_REQUEST, options.tokens // length)
    ids = equal_lengths(texts, length, engine.model.vocabulary)
    measured: dict[str, list[float]] = {"one task": [], "four tasks": []}
    for warm in [True] + [False] * options.rounds:
        for side, values in measured.items():
            tasks = ADAPTERS[:1] if side == "one task" else ADAPTERS
            requests = [
                TokenBatch(ids[start : start + TEXTS_A_REQUEST], tasks[i % len(tasks)])
                for i, start in enumerate(range(0, texts, TEXTS_A_REQUEST))
            ]
            started = time.perf_counter()
            await asyncio.gather(*map(engine.embed, requests))
            if not warm:
                values.append(texts * length / (time.perf_counter() - started))
    return {
        **{side: spread(values, 0) for side, values in measured.items()},
        "four over one": ratio(measured["four tasks"], measured["one task"]),
    }


def profile(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Profile one full forward of 512-token texts, merged weights; return the ten top entries."""
    transformer = load_transformer(checkpoint, device=CUDA, dtype=torch.bfloat16, merge=True)
    ids = equal_lengths(BATCH_TOKENS // 512, 512, checkpoint.backbone.vocabulary)
    names: list[str | None] = [ADAPTERS[i % 4] for i in range(len(ids))]
    transformer.embed(ids, names)
    with profiled() as events:
        started = time.perf_counter()
        transformer.embed(ids, names)
        torch.cuda.synchronize()
        wall = time.perf_counter() - started
    greatest = sorted(events(), key=lambda e: -max(e.self_device_time_total, e.self_cpu_time_total))
    table = [
        {
            "what": event.key[:80],
            "calls": event.count,
            "device_ms": round(event.self_device_time_total / 1e3, 2),
            "host_ms": round(event.self_cpu_time_total / 1e3, 2),
        }
        for event in greatest[:10]
    ]
    return [{"what": "wall", "device_ms": round(wall * 1e3, 2)}, *table]


@contextmanager
def profiled() -> Iterator[Callable[[], Any]]:
    """Run torch's profiler; yields a function that returns the events after the block."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as running:
        yield running.key_averages


if __name__ == "__main__":
    main()
