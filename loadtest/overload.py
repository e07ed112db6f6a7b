"""Five times the load that the service can bear, for a minute: what is still answered, and how.

First the capacity: as many clients as keep the engine busy, each sending when it was answered.
Then an open loop: requests start by the clock at a multiple of that rate, answered or not.

Goodput, what is refused, how long what is admitted takes, and memory are held against the bounds;
the exit code is 1 where one is broken.

    python loadtest/overload.py
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

from latency import resident_megabytes
from report import write_result
from server import free_port, wait_ready

TEXT = "How do I find out which process listens on a port, and stop it without losing its work?"
TEXTS = 32
CLIENTS = 16
QUEUE_SECONDS = 5.0
HEADERS = {"Content-Type": "application/json"}
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
    parser.add_argument("--times", type=float, default=5.0, help="the load, in capacities")
    options = parser.parse_args()
    port = free_port()
    command = [sys.executable, "-m", "taskvec", "serve", "--port", str(port)]
    command += ["--queue-seconds", str(QUEUE_SECONDS)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
        try:
            wait_ready(port)
            figures = asyncio.run(measure(port, server.pid, options.seconds, options.times))
        finally:
            server.terminate()
    broken = figures["broken"]
    write_result("overload", figures)
    for sentence in broken:
        print(sentence, file=sys.stderr)
    return 1 if broken else 0


async def measure(port: int, process: int, seconds: float, times: float) -> dict[str, Any]:
    """Capacity before and after, the overload between them."""
    url = f"http://127.0.0.1:{port}/v1/embeddings"
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        await closed_loop(session, url, 3)
        before = await closed_loop(session, url, 15)
        memory: list[float] = []
        watching = asyncio.create_task(watch(process, memory))
        seen, spent = await open_loop(session, url, seconds, before * times)
        watching.cancel()
        after = await closed_loop(session, url, 15)
    capacity = (before + after) / 2
    answered = len(seen.seconds) / spent
    tail = sorted(seen.seconds)[len(seen.seconds) * 99 // 100]
    growth = max(memory) - memory[len(memory) // 2]
    broken = []
    if answered < LEAST_GOODPUT * capacity:
        broken.append(f"Goodput fell to {answered / capacity:.2f} of the capacity.")
    if set(seen.outcomes) - {"200", "429"} or seen.unclean:
        broken.append(f"Not all was answered or cleanly refused: {seen}")
    if tail > LONGEST:
        broken.append(f"The 99th percentile of admitted requests is {tail:.1f} s.")
    if growth > MOST_GROWTH:
        broken.append(f"Memory grew by {growth:.0f} MB.")
    return {
        "texts_a_request": TEXTS,
        "queue_seconds": QUEUE_SECONDS,
        "seconds": seconds,
        "load_in_capacities": times,
        "capacity_requests_a_second": {"before": round(before, 1), "after": round(after, 1)},
        "sent_requests_a_second": round(seen.outcomes.total() / seconds, 1),
        "answered_requests_a_second": round(answered, 1),
        "goodput_of_capacity": round(answered / capacity, 3),
        "outcomes": dict(seen.outcomes),
        "admitted_p50_seconds": round(sorted(seen.seconds)[len(seen.seconds) // 2], 2),
        "admitted_p99_seconds": round(tail, 2),
        "resident_megabytes": {
            "start": round(memory[0]),
            "middle": round(memory[len(memory) // 2]),
            "most": round(max(memory)),
        },
        "broken": broken,
    }


async def closed_loop(session: aiohttp.ClientSession, url: str, seconds: float) -> float:
    """Requests a second that are answered when each client waits for its answer."""
    until = time.monotonic() + seconds
    answered = 0

    async def client() -> None:
        nonlocal answered
        while time.monotonic() < until:
            async with session.post(url, data=BODY, headers=HEADERS) as answer:
                await answer.read()
                assert answer.status == 200, answer.status
                answered += time.monotonic() < until

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return answered / seconds


async def open_loop(
    session: aiohttp.ClientSession, url: str, seconds: float, rate: float
) -> tuple[Seen, float]:
    """Requests by the clock; what became of them, and the seconds until all was answered."""
    seen = Seen()
    begun = time.monotonic()
    running = set()
    for number in range(int(seconds * rate)):
        await asyncio.sleep(max(0.0, begun + number / rate - time.monotonic()))
        request = asyncio.create_task(one(session, url, seen))
        running.add(request)
        request.add_done_callback(running.discard)
    await asyncio.gather(*running)
    return seen, time.monotonic() - begun


async def one(session: aiohttp.ClientSession, url: str, seen: Seen) -> None:
    begun = time.monotonic()
    try:
        async with session.post(url, data=BODY, headers=HEADERS) as answer:
            content = await answer.read()
    except aiohttp.ClientError as error:
        seen.outcomes[type(error).__name__] += 1
        return
    seen.outcomes[str(answer.status)] += 1
    if answer.status == 200:
        seen.seconds.append(time.monotonic() - begun)
    elif not is_clean(answer, content):
        seen.unclean.append(content.decode(errors="replace")[:200])


def is_clean(answer: aiohttp.ClientResponse, content: bytes) -> bool:
    """Whether a refusal has the contract's form and says when to come back."""
    told = orjson.loads(content)
    return told["error"]["code"] == "queue_full" and int(answer.headers["retry-after"]) >= 1


async def watch(process: int, memory: list[float]) -> None:
    """Note the resident memory every second."""
    while True:
        memory.append(resident_megabytes(process))
        await asyncio.sleep(1)


if __name__ == "__main__":
    sys.exit(main())
