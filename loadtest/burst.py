"""Measure bursts: many requests at the same moment to a service that is idle otherwise.

Clients that embed a corpus, such as LangChain's for JavaScript, send all their requests at once,
each on a new connection, and do not repeat those that are refused.

``--busy`` starts processes that compute without end, for a crowded machine.

    python loadtest/burst.py
    python loadtest/burst.py --busy 4 --name -
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import uvloop

from peer_servers import taskvec_server
from report import machine, spread, write_result

BURSTS = {"10 x 12": (10, 12), "100 x 12": (100, 12), "50 x 24": (50, 24), "400 x 3": (400, 3)}
"""Number of requests, and of texts in each."""

WORDS = [
    "bridge",
    "river",
    "engine",
    "letter",
    "garden",
    "number",
    "window",
    "summer",
    "history",
    "question",
    "company",
]
WORDS_PER_TEXT = 12
PAUSE = 2.0
"""Seconds between bursts; before the first one, the service measures its engine's speed."""

TIMEOUT = 60.0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="", help="a running server; if not set, one is started")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 4], help="busy processes beside")
    parser.add_argument("--name", default="burst", help="name of the result file; - writes none")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    for busy in options.busy:
        with server(options.url) as url, busy_processes(busy):
            measured = uvloop.run(bursts(url, options.rounds))
        figures[f"beside {busy} busy processes"] = measured
    result = {"rounds": options.rounds, **figures}
    if options.name == "-":
        print(json.dumps(result | {"machine": machine()}, indent=2))
    else:
        write_result(options.name, result)
    return 0


@contextmanager
def server(url: str) -> Iterator[str]:
    """Yield the URL of a running or a new server."""
    if url:
        yield url.rstrip("/")
        return
    with TemporaryDirectory() as folder, taskvec_server("taskvec-mini", Path(folder)) as running:
        yield running.url


@contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """Run processes that compute without end."""
    processes = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)
    ]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


async def bursts(url: str, rounds: int) -> dict[str, Any]:
    """Return the figures of each burst."""
    rng = random.Random(0)
    seen: dict[str, tuple[Counter[str], list[float]]] = {name: (Counter(), []) for name in BURSTS}
    for _ in range(rounds):
        for name, (requests, texts) in BURSTS.items():
            await asyncio.sleep(PAUSE)
            statuses, seconds = seen[name]
            started = time.perf_counter()
            statuses.update(
                await asyncio.gather(*(answer(url, payload(texts, rng)) for _ in range(requests)))
            )
            seconds.append(time.perf_counter() - started)
    return {
        name: {"statuses": dict(statuses), "seconds": spread(seconds, 2)}
        for name, (statuses, seconds) in seen.items()
    }


def payload(texts: int, rng: random.Random) -> bytes:
    """Return a request of short texts."""
    lines = [" ".join(rng.choices(WORDS, k=WORDS_PER_TEXT)) for _ in range(texts)]
    body = json.dumps({"input": lines, "task": "retrieval.passage"}).encode()
    head = (
        "POST /v1/embeddings HTTP/1.1\r\nHost: test\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def answer(url: str, request: bytes) -> str:
    """Send a request on a new connection; return the status of its answer, or the error."""
    address = urlsplit(url)
    try:
        async with asyncio.timeout(TIMEOUT):
            reader, writer = await asyncio.open_connection(address.hostname, address.port)
            writer.write(request)
            received = await reader.read()
            writer.close()
    except (OSError, TimeoutError) as error:
        return type(error).__name__
    return received.split(b" ", 2)[1].decode() if received else "no response"


if __name__ == "__main__":
    sys.exit(main())
