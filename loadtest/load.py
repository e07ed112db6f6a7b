"""Latency against load: locust sends queries, bulk and mixed requests, in steps, by the clock.

For each scenario the capacity is found first: clients that wait for their answers. Then an open
loop at shares of it. The exit code is 1 where a latency is over its bound, or an answer is missing
or is not the expected one. Figures go to results/NAME.json, and as a page with plots to NAME.html.

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
from drive import Seen, drive
from judgement import Level, broken, percentile, too_few
from latency import resident_megabytes
from page import page
from peer_servers import taskvec_server
from report import RESULTS, machine, write_result
from scenarios import BULK_TEXTS, Scenario, scenarios

NAMES = [*scenarios()]
LEVELS = [0.25, 0.5, 0.75, 0.9, 1.2]
WARM_SECONDS = 3.0
HIGHEST_RATE = 20_000.0
"""Requests a second that no schedule exceeds, so that it fits into memory."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--url", default="", help="of a server that runs; without it, one is started"
    )
    parser.add_argument("--model", default="taskvec-mini", help="of the server that is started")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each level")
    parser.add_argument("--levels", type=float, nargs="+", default=LEVELS, help="in capacities")
    parser.add_argument("--scenarios", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--bulk-texts", type=int, default=BULK_TEXTS, help="in a request of bulk")
    parser.add_argument(
        "--clients", type=int, help="that seek the capacity, in place of each scenario's own"
    )
    parser.add_argument("--p99", type=float, help="milliseconds, in place of each scenario's own")
    parser.add_argument("--name", default="load", help="of the results' files; - writes none")
    options = parser.parse_args()
    with server(options) as (url, memory):
        found = {name: measure(url, name, options) for name in options.scenarios}
    missed, notes = [], []
    for name, (figures, levels) in found.items():
        missed += broken(name, levels, figures["p99_bound_ms"])
        notes += too_few(name, levels)
    result = {
        "model": options.model if not options.url else options.url,
        "seconds": options.seconds,
        "bulk_texts": options.bulk_texts,
        "scenarios": {name: figures for name, (figures, _) in found.items()},
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
    """The URL of the server to ask, and its resident megabytes, noted every second."""
    if options.url:
        yield options.url.rstrip("/"), []
        return
    memory: list[float] = []
    over = Event()
    with TemporaryDirectory() as room, taskvec_server(options.model, Path(room)) as running:
        gevent.spawn(note_memory, running.pid, memory, over)
        try:
            yield running.url, memory
        finally:
            over.set()


def note_memory(process: int, memory: list[float], over: Event) -> None:
    """Every second until it is over."""
    while True:
        memory.append(resident_megabytes(process))
        if over.wait(1.0):
            return


def measure(url: str, name: str, options: argparse.Namespace) -> tuple[dict[str, Any], list[Level]]:
    """The capacity of a scenario, and latencies at shares of it."""
    scenario = scenarios(options.bulk_texts)[name]
    clients = options.clients or scenario.clients
    drive(url, ClosedLoop(scenario.requests(0), clients, WARM_SECONDS))
    capacity = drive(url, ClosedLoop(scenario.requests(1), clients, options.seconds))
    if not capacity.answered:
        raise SystemExit(f"{name}: no right answer from {url}, but {dict(capacity.outcomes)}.")
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
    """One open loop."""
    rate = min(load * capacity, HIGHEST_RATE)
    times = poisson(rate, seconds, random.Random(seed))
    seen = drive(url, OpenLoop(list(islice(scenario.requests(seed), len(times))), times))
    assert seen.outcomes.total() == len(times), seen.outcomes
    return level_of(seen, load, rate)


def level_of(seen: Seen, load: float, rate: float) -> Level:
    """The figures of what was seen at an offered rate."""
    good = [*chain.from_iterable(seen.milliseconds.values())]
    return Level(
        load=load,
        offered=rate,
        answered=seen.answered / seen.seconds,
        texts=seen.texts / seen.seconds,
        requests=seen.outcomes.total(),
        outcomes=dict(seen.outcomes),
        p50_ms=percentile(good, 0.5),
        p90_ms=percentile(good, 0.9),
        p99_ms=percentile(good, 0.99),
        late_p99_ms=percentile(seen.late, 0.99),
        generator_cores=seen.generator_cores,
    )


if __name__ == "__main__":
    sys.exit(main())
