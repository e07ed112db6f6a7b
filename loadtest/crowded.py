"""Measure forward passes while other processes want the cores, with ways to wait for threads.

OpenMP threads spin at the end of each parallel region, also while another process could use the
core. Each way runs in a process of its own, in turns:

    python loadtest/crowded.py --rounds 3

embeds texts of 1,600 tokens one at a time, and short ones, beside 0, 2 and 8 busy processes, and
measures the engine's speed as the service does when it starts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

from report import write_result
from taskvec import Embedder
from taskvec.checkpoint.open import open_checkpoint
from taskvec.core.admission import measure_speed
from taskvec.engines.packed.engine import PackedEngine, PackedOptions

WAYS: dict[str, dict[str, str]] = {
    "as served": {},
    "libgomp's default": {"GOMP_SPINCOUNT": "300000"},
    "spin 1000": {"GOMP_SPINCOUNT": "1000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"TASKVEC_THREADS": "1"},
}
"""Environment variables of the measured processes. libgomp spins 300,000 times by default, the
service 10,000 times."""

BUSY = (0, 2, 8)
LONG, SHORT = "word " * 1_590, "a short text to be found by a search"
MIN_SECONDS = 1.5
"""Each figure is the median of as many texts as take this long, and at least five."""


def main() -> None:
    """Measure all ways in turns, or one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--busy", nargs="+", type=int, default=list(BUSY))
    parser.add_argument("--seconds", type=float, default=MIN_SECONDS)
    parser.add_argument("--name", default="crowded", help="name of the result; - for none")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.seconds)))
        return
    found: dict[str, dict[str, list[dict[str, float]]]] = {
        f"{busy} busy processes": {way: [] for way in options.ways} for busy in options.busy
    }
    for _, busy in product(range(options.rounds), options.busy):
        for way in options.ways:
            with busy_processes(busy):
                found[f"{busy} busy processes"][way].append(run(way, options.seconds))
    result = {
        "medians": {
            beside: {
                way: {
                    name: round(statistics.median(each[name] for each in rounds), 2)
                    for name in rounds[0]
                }
                for way, rounds in ways.items()
            }
            for beside, ways in found.items()
        }
    }
    if options.name == "-":
        print(json.dumps(result, indent=2))
    else:
        write_result(options.name, result)


def run(way: str, seconds: float) -> dict[str, float]:
    """Measure one way in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--measure", "--seconds", str(seconds)],
        env=os.environ | WAYS[way],
        stdout=subprocess.PIPE,
        check=True,
        timeout=600,
    )
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measure(seconds: float) -> dict[str, float]:
    """Return median milliseconds of a long text, a short one and 64 short ones, and the speed."""

    async def speed() -> float:
        options = PackedOptions(threads=threads)
        engine = PackedEngine(open_checkpoint("taskvec-mini"), options)
        await engine.start()
        tokens, seconds = await measure_speed(engine)
        await engine.stop()
        return tokens / seconds

    threads = int(os.environ.get("TASKVEC_THREADS", "0"))
    figures = {"measured at the start, tokens/s": asyncio.run(speed())}
    with Embedder("taskvec-mini", threads=threads) as embedder:
        texts = {"one text of 1,600 tokens": [LONG], "one text of 10 tokens": [SHORT]}
        texts["64 texts of 10 tokens"] = [f"{SHORT} {n}" for n in range(64)]
        return figures | {
            f"{name}, ms": median(embedder, each, seconds) for name, each in texts.items()
        }


def median(embedder: Embedder, texts: list[str], seconds: float) -> float:
    """Return the median milliseconds of embedding the texts."""
    times: list[float] = []
    until = time.monotonic() + seconds
    while len(times) < 6 or time.monotonic() < until:
        started = time.monotonic()
        embedder.embed(texts)
        times.append(1e3 * (time.monotonic() - started))
    return statistics.median(times[1:])


@contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """Run processes that use a core each, for at most ten minutes."""
    endless = "import time\nuntil = time.monotonic() + 600\nwhile time.monotonic() < until: pass"
    command = [sys.executable, "-c", endless]
    started = [subprocess.Popen(command) for _ in range(number)]
    try:
        yield
    finally:
        for process in started:
            process.send_signal(signal.SIGKILL)
            process.wait()


if __name__ == "__main__":
    main()
