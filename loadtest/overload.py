"""Five times the load that the service can bear, for a minute: what is still answered, and how.

Each round begins and ends with the capacity: as many clients as keep the engine busy, each sending
when it was answered. Between them an open loop: requests start by the clock at a multiple of that
rate, answered or not. Goodput is compared within a round, because the machine's speed changes.

Goodput, what is refused, how long what is admitted takes, and memory are held against the bounds;
the exit code is 1 where one is broken.

    python loadtest/overload.py
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
TEXTS = 32
CLIENTS = 16
QUEUE_SECONDS = 5.0
CAPACITY_SECONDS = 15.0
BODY = orjson.dumps({"input": [TEXT] * TEXTS, "encoding_format": "base64"})

LEAST_GOODPUT = 0.9
"""Share of the capacity that must still be answered."""

LONGEST = 2.0 * QUEUE_SECONDS
"""Seconds within which 99 of 100 of the admitted are answered: the queue is an estimate."""

MOST_GROWTH = 20.0
"""Megabytes by which memory may grow in the second half, when queues and pools are full."""


@dataclass(slots=True)
class Seen:
    """What clients saw: outcomes, seconds of good answers, and bad refusals."""

    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    unclean: list[str] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--times", type=float, default=5.0, help="the load, in capacities")
    options = parser.parse_args()
    port = free_port()
    command = [sys.executable, "-m", "taskvec", "serve", "--port", str(port)]
    command += ["--queue-seconds", str(QUEUE_SECONDS)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
        try:
            wait_ready(port)
            figures = asyncio.run(
                measure(port, server.pid, options.seconds, options.times, options.rounds)
            )
        finally:
            server.terminate()
    broken = figures["broken"]
    write_result("overload", figures)
    for sentence in broken:
        print(sentence, file=sys.stderr)
    return 1 if broken else 0


async def measure(
    port: int, process: int, seconds: float, times: float, rounds: int
) -> dict[str, Any]:
    """Capacity before and after, the overload between them; several times."""
    sender = Sender(port, BODY)
    await closed_loop(sender, 3)
    memory: list[float] = []
    watching = asyncio.create_task(watch(process, memory))
    seen = Seen()
    capacities, answered, shares = [], [], []
    capacity = await closed_loop(sender, CAPACITY_SECONDS)
    for _ in range(rounds):
        good = len(seen.seconds)
        spent = await open_loop(sender, seconds, capacity * times, seen)
        after = await closed_loop(sender, CAPACITY_SECONDS)
        capacities.append((capacity + after) / 2)
        answered.append((len(seen.seconds) - good) / spent)
        shares.append(answered[-1] / capacities[-1])
        capacity = after
        print(f"{answered[-1]:.1f} of {capacities[-1]:.1f} requests/s", file=sys.stderr)
    watching.cancel()
    sender.close()
    seconds_of_admitted = sorted(seen.seconds)
    tail = seconds_of_admitted[len(seconds_of_admitted) * 99 // 100]
    growth = max(memory) - memory[len(memory) // 3]
    share = statistics.median(shares)
    broken = []
    if share < LEAST_GOODPUT:
        broken.append(f"Goodput fell to {share:.2f} of the capacity.")
    if set(seen.outcomes) - {"200", "429"} or seen.unclean:
        broken.append(f"Not all was answered or cleanly refused: {seen.outcomes} {seen.unclean}")
    if tail > LONGEST:
        broken.append(f"The 99th percentile of admitted requests is {tail:.1f} s.")
    if growth > MOST_GROWTH:
        broken.append(f"Memory grew by {growth:.0f} MB.")
    return {
        "texts_a_request": TEXTS,
        "queue_seconds": QUEUE_SECONDS,
        "rounds": rounds,
        "seconds": seconds,
        "load_in_capacities": times,
        "capacity_requests_a_second": spread(capacities),
        "answered_requests_a_second": spread(answered),
        "goodput_of_capacity": spread(shares, 3),
        "outcomes": dict(seen.outcomes),
        "admitted_p50_seconds": round(seconds_of_admitted[len(seconds_of_admitted) // 2], 2),
        "admitted_p99_seconds": round(tail, 2),
        "resident_megabytes": {
            "start": round(memory[0]),
            "after_a_third": round(memory[len(memory) // 3]),
            "most": round(max(memory)),
        },
        "broken": broken,
    }


async def closed_loop(sender: Sender, seconds: float) -> float:
    """Requests a second that are answered when each client waits for its answer."""
    until = time.monotonic() + seconds
    answered = 0

    async def client() -> None:
        nonlocal answered
        while time.monotonic() < until:
            answer = await sender.send()
            assert answer.status == 200, answer
            answered += time.monotonic() < until

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return answered / seconds


async def open_loop(sender: Sender, seconds: float, rate: float, seen: Seen) -> float:
    """Requests by the clock; gives the seconds until all was answered."""
    begun = time.monotonic()
    running = set()
    for number in range(int(seconds * rate)):
        await asyncio.sleep(max(0.0, begun + number / rate - time.monotonic()))
        request = asyncio.create_task(one(sender, seen))
        running.add(request)
        request.add_done_callback(running.discard)
    await asyncio.gather(*running)
    return time.monotonic() - begun


async def one(sender: Sender, seen: Seen) -> None:
    begun = time.monotonic()
    try:
        answer = await sender.send()
    except OSError as error:
        seen.outcomes[type(error).__name__] += 1
        return
    seen.outcomes[str(answer.status)] += 1
    if answer.status == 200:
        seen.seconds.append(time.monotonic() - begun)
    elif b"\nretry-after: " not in answer.head or orjson.loads(answer.body)["code"] != "queue_full":
        seen.unclean.append(answer.body.decode(errors="replace")[:200])


async def watch(process: int, memory: list[float]) -> None:
    """Note the resident memory every second."""
    while True:
        memory.append(resident_megabytes(process))
        await asyncio.sleep(1)


if __name__ == "__main__":
    sys.exit(main())
