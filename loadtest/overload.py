"""Measure goodput at five times the service's capacity, for one minute.

Each round starts and ends with a closed loop, which measures the capacity: as many clients as keep
the engine busy, each waiting for its response. In between an open loop sends requests by a schedule
at a multiple of that rate. Goodput is compared with the capacity of the same round, because the
machine's speed varies.

Goodput, rejections, latency of admitted requests and memory are checked against thresholds; exits
with 1 if one is missed.

With single texts, the event loop is the limit and not the engine. ``late_p99_seconds`` shows
whether this script kept to its schedule.

    python loadtest/overload.py
    python loadtest/overload.py --texts 1 --clients 64 --times 2.2 --name overload-single
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import orjson

from latency import resident_megabytes
from report import spread, write_result
from sender import Sender
from server import free_port, wait_ready

TEXT = "How do I find out which process listens on a port, and stop it without losing its work?"
QUEUE_SECONDS = 5.0
CAPACITY_SECONDS = 15.0

MIN_GOODPUT = 0.9
"""Minimum goodput as a fraction of the capacity."""

MAX_P99_SECONDS = 2.0 * QUEUE_SECONDS
"""Maximum p99 of admitted requests in seconds; twice the queue, because its length is estimated."""

MAX_GROWTH_MEGABYTES = 20.0
"""Maximum growth of memory after the first third of the run, when queues and pools are full."""


@dataclass(slots=True)
class RunResult:
    """Result of open loops.

    Attributes:
        outcomes: number of requests by status or exception.
        seconds: latencies of successful requests.
        late: seconds from the scheduled time to sending, of all requests.
        unclean: bodies of responses that are neither a success nor a proper 429.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    unclean: list[str] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--times", type=float, default=5.0, help="load as multiple of the capacity")
    parser.add_argument("--texts", type=int, default=32, help="in a request")
    parser.add_argument("--clients", type=int, default=16, help="that measure the capacity")
    parser.add_argument("--name", default="overload", help="name of the result file")
    options = parser.parse_args()
    port = free_port()
    command = [sys.executable, "-m", "taskvec", "serve", "--port", str(port)]
    command += ["--queue-seconds", str(QUEUE_SECONDS)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
        try:
            wait_ready(port)
            figures = asyncio.run(measure(port, server.pid, options))
        finally:
            server.terminate()
    broken = figures["broken"]
    write_result(options.name, figures)
    for sentence in broken:
        print(sentence, file=sys.stderr)
    return 1 if broken else 0


async def measure(port: int, process: int, options: argparse.Namespace) -> dict[str, Any]:
    """Alternate closed loops and overload, and check the thresholds."""
    body = {"input": [TEXT] * options.texts, "encoding_format": "base64"}
    sender = Sender(port, orjson.dumps(body))
    await closed_loop(sender, options.clients, 3)
    memory: list[float] = []
    sampling = asyncio.create_task(sample_memory(process, memory))
    result = RunResult()
    capacities, answered, shares = [], [], []
    capacity = await closed_loop(sender, options.clients, CAPACITY_SECONDS)
    for _ in range(options.rounds):
        before = len(result.seconds)
        spent = await open_loop(sender, options.seconds, capacity * options.times, result)
        after = await closed_loop(sender, options.clients, CAPACITY_SECONDS)
        capacities.append((capacity + after) / 2)
        answered.append((len(result.seconds) - before) / spent)
        shares.append(answered[-1] / capacities[-1])
        capacity = after
        print(f"{answered[-1]:.1f} of {capacities[-1]:.1f} requests/s", file=sys.stderr)
    sampling.cancel()
    sender.close()
    seconds_of_admitted = sorted(result.seconds)
    p99 = seconds_of_admitted[len(seconds_of_admitted) * 99 // 100]
    growth = max(memory) - memory[len(memory) // 3]
    share = statistics.median(shares)
    broken = []
    if share < MIN_GOODPUT:
        broken.append(f"Goodput fell to {share:.2f} of the capacity.")
    if set(result.outcomes) - {"200", "429"} or result.unclean:
        broken.append(f"Unexpected responses: {result.outcomes} {result.unclean}")
    if p99 > MAX_P99_SECONDS:
        broken.append(f"The 99th percentile of admitted requests is {p99:.1f} s.")
    if growth > MAX_GROWTH_MEGABYTES:
        broken.append(f"Memory grew by {growth:.0f} MB.")
    return {
        "texts_a_request": options.texts,
        "queue_seconds": QUEUE_SECONDS,
        "rounds": options.rounds,
        "seconds": options.seconds,
        "load_in_capacities": options.times,
        "capacity_requests_a_second": spread(capacities),
        "answered_requests_a_second": spread(answered),
        "goodput_of_capacity": spread(shares, 3),
        "outcomes": dict(result.outcomes),
        "admitted_p50_seconds": round(seconds_of_admitted[len(seconds_of_admitted) // 2], 2),
        "admitted_p99_seconds": round(p99, 2),
        "late_p99_seconds": round(sorted(result.late)[len(result.late) * 99 // 100], 3),
        "resident_megabytes": {
            "start": round(memory[0]),
            "after_a_third": round(memory[len(memory) // 3]),
            "most": round(max(memory)),
        },
        "broken": broken,
    }


async def closed_loop(sender: Sender, clients: int, seconds: float) -> float:
    """Run clients that each wait for their response; return successful requests per second."""
    until = time.monotonic() + seconds
    answered = 0

    async def client() -> None:
        nonlocal answered
        while time.monotonic() < until:
            answer = await sender.send()
            if answer.status == 429:  # the machine is busy with something else
                await asyncio.sleep(1)
                continue
            assert answer.status == 200, answer
            answered += time.monotonic() < until

    await asyncio.gather(*(client() for _ in range(clients)))
    return answered / seconds


async def open_loop(sender: Sender, seconds: float, rate: float, result: RunResult) -> float:
    """Send requests at a fixed rate; return the seconds until the last response."""
    started = time.monotonic()
    running = set()
    for number in range(int(seconds * rate)):
        due = started + number / rate
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        request = asyncio.create_task(send_one(sender, due, result))
        running.add(request)
        request.add_done_callback(running.discard)
    await asyncio.gather(*running)
    return time.monotonic() - started


async def send_one(sender: Sender, due: float, result: RunResult) -> None:
    """Send one request and record its outcome; its latency counts from the scheduled time."""
    result.late.append(time.monotonic() - due)
    try:
        answer = await sender.send()
    except OSError as error:
        result.outcomes[type(error).__name__] += 1
        return
    result.outcomes[str(answer.status)] += 1
    if answer.status == 200:
        result.seconds.append(time.monotonic() - due)
    elif b"\nretry-after: " not in answer.head or orjson.loads(answer.body)["code"] != "queue_full":
        result.unclean.append(answer.body.decode(errors="replace")[:200])


async def sample_memory(process: int, memory: list[float]) -> None:
    """Append the resident megabytes of a process every second."""
    while True:
        memory.append(resident_megabytes(process))
        await asyncio.sleep(1)


if __name__ == "__main__":
    sys.exit(main())
