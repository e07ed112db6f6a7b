"""Measure latency against load: locust sends queries, bulk and mixed requests at several levels.

For each scenario a closed loop finds the capacity first, then open loops run at fractions of it.
Exits with 1 if a latency exceeds its threshold, or if a response is missing or unexpected. Writes
figures to results/NAME.json, and a page with plots to results/NAME.html.

    python loadtest/load.py
    python loadtest/load.py --url http://192.0.2.1:8080 --name -
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gevent
from gevent.event import Event

from arrivals import ClosedLoop, OpenLoop, poisson
from drive import RunResult, drive
from latency import resident_megabytes
from page import page
from peer_servers import taskvec_server
from report import RESULTS, machine, write_result
from scenarios import BULK_TEXTS, Scenario, scenarios
from thresholds import Level, missed_thresholds, percentile, small_samples

NAMES = [*scenarios()]
LEVELS = [0.25, 0.5, 0.75, 0.9, 1.2]
WARM_SECONDS = 3.0
MAX_RATE = 20_000.0
"""Maximum requests per second of a schedule, so that it fits into memory."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--url", default="", help="URL of a running server; if not set, one is started"
    )
    parser.add_argument("--model", default="taskvec-mini", help="model of the started server")
    parser.add_argument("--seconds", type=float, default=60.0, help="duration of each level")
    parser.add_argument(
        "--levels", type=float, nargs="+", default=LEVELS, help="as fractions of the capacity"
    )
    parser.add_argument("--scenarios", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument(
        "--bulk-texts", type=int, default=BULK_TEXTS, help="texts in a bulk request"
    )
    parser.add_argument(
        "--clients", type=int, help="clients of the closed loop; if not set, the scenario's own"
    )
    parser.add_argument(
        "--p99", type=float, help="maximum p99 in milliseconds; if not set, the scenario's own"
    )
    parser.add_argument("--name", default="load", help="name of the result files; - writes none")
    options = parser.parse_args()
    with server(options) as (url, memory):
        measured = {name: measure(url, name, options) for name in options.scenarios}
    missed, notes = [], []
    for name, (figures, levels) in measured.items():
        missed += missed_thresholds(name, levels, figures["p99_bound_ms"])
        notes += small_samples(name, levels)
    result = {
        "model": options.model if not options.url else options.url,
        "seconds": options.seconds,
        "bulk_texts": options.bulk_texts,
        "scenarios": {name: figures for name, (figures, _) in measured.items()},
        "resident_megabytes": {"start": round(memory[0]), "most": round(max(memory))}
        if memory
        else None,
        "notes": notes,
        "broken": missed,
    }
    if options.name != "-":
        file = write_result(options.name, result)
        report = RESULTS / f"{options.name}.html"
        report.write_text(page(json.loads(file.read_text())))
        print(f"The report is {report}.", file=sys.stderr)
    else:
        print(json.dumps(result | {"machine": machine()}, indent=2))
    for sentence in missed:
        print(sentence, file=sys.stderr)
    return 1 if missed else 0


@contextmanager
def server(options: argparse.Namespace) -> Iterator[tuple[str, list[float]]]:
    """Yield the URL of the server and its resident megabytes, sampled every second."""
    if options.url:
        yield options.url.rstrip("/"), []
        return
    memory: list[float] = []
    stop = Event()
    with TemporaryDirectory() as workdir, taskvec_server(options.model, Path(workdir)) as running:
        gevent.spawn(sample_memory, running.pid, memory, stop)
        try:
            yield running.url, memory
        finally:
            stop.set()


def sample_memory(process: int, memory: list[float], stop: Event) -> None:
    """Append the resident megabytes of a process every second until stopped."""
    while True:
        memory.append(resident_megabytes(process))
        if stop.wait(1.0):
            return


def measure(url: str, name: str, options: argparse.Namespace) -> tuple[dict[str, Any], list[Level]]:
    """Measure the capacity of a scenario, and latencies at fractions of it."""
    scenario = scenarios(options.bulk_texts)[name]
    clients = options.clients or scenario.clients
    drive(url, ClosedLoop(scenario.requests(0), clients, WARM_SECONDS))
    capacity = drive(url, ClosedLoop(scenario.requests(1), clients, options.seconds))
    if not capacity.answered:
        raise SystemExit(f"{name}: no request to {url} succeeded: {dict(capacity.outcomes)}.")
    rate = capacity.answered / capacity.seconds
    levels = []
    for number, load in enumerate(options.levels):
        level = at_level(url, scenario, load, rate, seconds=options.seconds, seed=2 + number)
        print(f"{name} {level.figures()}", file=sys.stderr)
        levels.append(level)
    figures = {
        "clients": clients,
        "capacity_requests_a_second": round(rate, 2),
        "capacity_texts_a_second": round(capacity.texts / capacity.seconds, 1),
        "p99_bound_ms": options.p99 or scenario.p99_ms,
        "levels": [level.figures() for level in levels],
    }
    return figures, levels


def at_level(
    url: str, scenario: Scenario, load: float, capacity: float, *, seconds: float, seed: int
) -> Level:
    """Run one open loop at a fraction of the capacity."""
    rate = min(load * capacity, MAX_RATE)
    times = poisson(rate, seconds, random.Random(seed))
    result = drive(url, OpenLoop(list(islice(scenario.requests(seed), len(times))), times))
    assert result.outcomes.total() == len(times), result.outcomes
    return level_of(result, load, rate)


def level_of(result: RunResult, load: float, rate: float) -> Level:
    """Return the figures of a run at an offered rate."""
    latencies = [*chain.from_iterable(result.milliseconds.values())]
    return Level(
        load=load,
        offered=rate,
        answered=result.answered / result.seconds,
        texts=result.texts / result.seconds,
        requests=result.outcomes.total(),
        outcomes=dict(result.outcomes),
        p50_ms=percentile(latencies, 0.5),
        p90_ms=percentile(latencies, 0.9),
        p99_ms=percentile(latencies, 0.99),
        late_p99_ms=percentile(result.late, 0.99),
        generator_cores=result.generator_cores,
    )


if __name__ == "__main__":
    sys.exit(main())
