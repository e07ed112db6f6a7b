"""Compare two checkouts: run the same benchmarks on both in turn, and print the ratios.

A change that must not cost speed is measured by this, on one machine in one run:

    git worktree add ../before main
    python loadtest/compare.py --before ../before --rounds 2
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

from report import spread, write_result

ROOT = Path(__file__).parents[1]


class Figure(NamedTuple):
    """One figure of a benchmark's result.

    Attributes:
        name: what the comparison calls it.
        path: keys that lead to it in the JSON result.
        more_is_better: True for rates, False for times and memory.
    """

    name: str
    path: tuple[str, ...]
    more_is_better: bool = False


class Benchmark(NamedTuple):
    """A script, and the figures of its result that are compared.

    Attributes:
        script: file name in loadtest/, without the suffix.
        arguments: command line of the script.
        result: file name in loadtest/results/, without the suffix.
        figures: what is compared.
    """

    script: str
    arguments: tuple[str, ...]
    result: str
    figures: tuple[Figure, ...]


def own_time(texts: str, side: str) -> Figure:
    """Return the processor time of a request of the gateway, at its fastest."""
    path = ("microseconds, quiet", texts, side, "least")
    return Figure(f"own time, {texts}, {side}, us", path)


def gateway_rate(texts: str, side: str) -> Figure:
    """Return the requests per second through the gateway."""
    path = (texts, "requests_per_second", side, "median")
    return Figure(f"gateway, {texts}, {side}, requests/s", path, more_is_better=True)


def engine_rate(shape: str, side: str) -> Figure:
    """Return the tokens per second of the packed engine."""
    path = ("tokens_per_second", side, "median")
    return Figure(f"engine, {shape}, {side}, tokens/s", path, more_is_better=True)


ENGINE_SIDES = (
    "equal, merged, one task",
    "equal, merged, four tasks",
    "equal, low-rank, four tasks",
    "mixed, merged, one task",
)
SUITE = {
    "latency": Benchmark(
        "latency",
        ("--starts", "3", "--requests", "300"),
        "latency",
        (
            Figure("one text, p50, ms", ("one_text_p50_ms", "median")),
            Figure("one text, p99, ms", ("one_text_p99_ms", "median")),
            Figure("start to ready, s", ("start_to_ready_seconds", "median")),
            Figure("resident memory, MB", ("resident_megabytes", "median")),
        ),
    ),
    "own-time": Benchmark(
        "own_time",
        ("--rounds", "31"),
        "own-time",
        tuple(
            own_time(texts, side)
            for texts in ("1 texts", "32 texts")
            for side in ("bare", "gateway", "limits")
        ),
    ),
    "gateway": Benchmark(
        "gateway",
        ("--rounds", "2", "--seconds", "2"),
        "gateway",
        tuple(
            gateway_rate(texts, side)
            for texts in ("1 text", "32 texts")
            for side in ("bare", "gateway", "gateway-everything", "gateway-tokenizing")
        ),
    ),
    "engine": Benchmark(
        "engine",
        ("--shape", "mini", "--rounds", "5"),
        "engine-mini",
        tuple(engine_rate("mini", side) for side in ENGINE_SIDES),
    ),
    "overload": Benchmark(
        "overload",
        ("--rounds", "1", "--seconds", "30"),
        "overload",
        (
            Figure(
                "overload, answered requests/s",
                ("answered_requests_a_second", "median"),
                more_is_better=True,
            ),
            Figure("overload, admitted, p99, s", ("admitted_p99_seconds",)),
            Figure("overload, memory at most, MB", ("resident_megabytes", "most")),
        ),
    ),
    "engine-0.6b": Benchmark(
        "engine",
        ("--shape", "qwen3-0.6b", "--rounds", "1"),
        "engine-qwen3-0.6b",
        tuple(engine_rate("Qwen3-0.6B", side) for side in ENGINE_SIDES),
    ),
}


def main() -> None:
    """Run the suite and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, required=True, help="the checkout to compare with")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--name", default="compare", help="name of the result")
    parser.add_argument("--only", nargs="+", choices=SUITE, default=list(SUITE))
    options = parser.parse_args()
    sides = {"before": options.before.resolve(), "after": ROOT}
    found: dict[str, dict[str, list[float]]] = {}
    for name in options.only:
        for turn in range(options.rounds):
            # The side that goes first alternates: a machine that warms up favours neither.
            order = list(sides) if turn % 2 == 0 else list(sides)[::-1]
            for side in order:
                print(f"{name}, round {turn + 1}, {side} ...", file=sys.stderr, flush=True)
                result = run(sides[side], SUITE[name])
                for figure in SUITE[name].figures:
                    values = found.setdefault(figure.name, {"before": [], "after": []})
                    values[side].append(reduce(lambda part, key: part[key], figure.path, result))
        write_result(  # after each benchmark: a later one may fail
            options.name,
            {
                "before": commit(sides["before"]),
                "after": commit(sides["after"]),
                "rounds": options.rounds,
                "figures": {
                    figure.name: compared(found[figure.name], figure)
                    for benchmark in SUITE.values()
                    for figure in benchmark.figures
                    if figure.name in found
                },
            },
        )


def run(checkout: Path, benchmark: Benchmark) -> Any:
    """Run a script of a checkout with its own code; return the result, and restore its file.

    A script that ends with an error because a threshold is missed has written its result.
    """
    folders = ("service", "training", "tests", "loadtest")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(checkout / folder) for folder in folders),
    }
    file = checkout / "loadtest" / "results" / f"{benchmark.result}.json"
    kept = file.read_bytes()
    file.unlink()
    script = str(checkout / "loadtest" / f"{benchmark.script}.py")
    try:
        subprocess.run(
            [sys.executable, script, *benchmark.arguments],
            cwd=checkout,
            env=environment,
            stdout=subprocess.DEVNULL,
            check=False,
        )
        return json.loads(file.read_bytes())
    finally:
        file.write_bytes(kept)


def compared(values: Mapping[str, Sequence[float]], figure: Figure) -> dict[str, Any]:
    """Return both sides, and the second over the first: above 1 is better for it."""
    before, after = (statistics.median(values[side]) for side in ("before", "after"))
    better = after / before if figure.more_is_better else before / after
    return {
        "before": spread(list(values["before"]), 2),
        "after": spread(list(values["after"]), 2),
        "speed_of_after_over_before": round(better, 3),
    }


def commit(checkout: Path) -> str:
    """Return the commit that is checked out."""
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
