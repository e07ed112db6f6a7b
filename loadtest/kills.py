"""Kill processes with SIGKILL under load, and count wrong vectors and lost answers.

Two cases, one after the other, on this machine with the built-in model:

* ``servers``: a gateway before three engine servers, of which one is killed and started again.
* ``gateways``: ``taskvec serve --workers 3``, of which one gateway process is killed at a time.

Clients send texts of all tasks whose vectors are known, some on connections of their own. A process
is killed every ``--interval`` seconds, or later if only one that serves would be left. The time
until the new one serves is measured: of a server, until the gateway has checked it. Exits with 1
after a wrong vector, and after a lost answer where only engine servers were killed. A connection
whose gateway was killed is lost without remedy, and counted.

    python loadtest/kills.py --seconds 300
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
import psutil

from report import write_result
from server import free_port
from taskvec import Embedder

PROCESSES = 3
TASKS = ("retrieval.query", "retrieval.passage", "clustering", "text-matching", "classification")
TEXTS = [
    f"{subject} {verb} {thing}."
    for subject in ("The glacier", "A compiler", "My neighbour", "The choir")
    for verb in ("slowly moves", "often breaks", "has found")
    for thing in ("a heavy stone", "the old bridge", "twelve songs", "every number in the list")
]

MIN_COSINE = 0.995
"""Smallest cosine of a right vector: batches of other shapes round bfloat16 differently, and the
nearest vector of another text or task is far below."""

CLIENTS = 8
START_SECONDS = 60.0


@dataclass(slots=True)
class Seen:
    """What the clients got.

    Attributes:
        outcomes: number of requests that ended in each way.
        seconds: latencies of the answers with vectors.
        wrong: descriptions of answers with a wrong vector.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Killing:
    """The kills of a case.

    Attributes:
        kills: number of killed processes.
        ready: seconds from each kill until the replacement served.
    """

    kills: int = 0
    ready: list[float] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0, help="seconds of each case")
    parser.add_argument("--interval", type=float, default=2.0, help="seconds between kills")
    parser.add_argument("--only", choices=["servers", "gateways"], nargs="+")
    parser.add_argument("--name", default="kills", help="name of the result; - for none")
    options = parser.parse_args()
    cases = {"servers": engine_servers, "gateways": gateway_processes}
    known = expected_vectors()
    figures: dict[str, Any] = {"seconds": options.seconds, "interval": options.interval}
    faults = []
    for name in options.only or cases:
        figures[name] = asyncio.run(measure(cases[name], known, options.seconds, options.interval))
        print(f"{name}: {figures[name]}", flush=True)
        lost = sum(figures[name]["lost"].values())
        if figures[name]["wrong"]:
            faults.append(f"{name}: {figures[name]['wrong']} answers had a wrong vector")
        if name == "servers" and lost:
            faults.append(f"{name}: {lost} answers were lost, although two servers were left")
        if not figures[name]["kills"]:
            faults.append(f"{name}: nothing was killed")
    if options.name != "-":
        write_result(options.name, figures, show=False)
    for fault in faults:
        print(fault, file=sys.stderr)
    return int(bool(faults))


def expected_vectors() -> dict[str, np.ndarray]:
    """Return the vectors of all texts by task, normalised, from the library in this process."""
    with Embedder(threads=1) as embedder:
        return {task: embedder.embed(TEXTS, task=task) for task in TASKS}


async def measure(
    case: Callable[[], Any], known: dict[str, np.ndarray], seconds: float, interval: float
) -> dict[str, Any]:
    """Run a case and return its figures."""
    seen = Seen()
    killing = Killing()
    ended = asyncio.Event()
    async with case() as (port, kill):
        clients = [
            asyncio.create_task(send(port, known, seen, ended, fresh=number % 2 == 0))
            for number in range(CLIENTS)
        ]
        kills = asyncio.create_task(kill(killing, interval, ended))
        await asyncio.sleep(seconds)
        ended.set()
        await asyncio.gather(*clients, kills)
    ordered = sorted(seen.seconds)
    answered = seen.outcomes.pop("answered", 0)
    refused = seen.outcomes.pop("429 queue_full", 0)
    return {
        "kills": killing.kills,
        "ready_seconds": {
            "p50": round(float(np.median(killing.ready)), 2),
            "max": round(max(killing.ready), 2),
        }
        if killing.ready
        else None,
        "answered": answered,
        "refused": refused,
        "lost": dict(seen.outcomes),
        "wrong": len(seen.wrong),
        "wrong_examples": seen.wrong[:5],
        "p50_ms": round(1e3 * ordered[len(ordered) // 2], 1),
        "p99_ms": round(1e3 * ordered[int(0.99 * len(ordered))], 1),
        "max_ms": round(1e3 * ordered[-1], 1),
    }


async def send(
    port: int, known: dict[str, np.ndarray], seen: Seen, ended: asyncio.Event, *, fresh: bool
) -> None:
    """Send requests one after another; ``fresh`` opens a connection for each."""
    connector = aiohttp.TCPConnector(force_close=fresh)
    async with aiohttp.ClientSession(connector=connector) as session:
        while not ended.is_set():
            task = random.choice(TASKS)
            chosen = random.choices(range(len(TEXTS)), k=random.choice((1, 1, 3, 9, 48)))
            body = {"input": [TEXTS[index] for index in chosen], "task": task}
            began = time.perf_counter()
            outcome, vectors = await ask(session, port, body)
            seen.outcomes[outcome] += 1
            if vectors is None:
                await asyncio.sleep(0.02)  # as a client that sends it again would
                continue
            seen.seconds.append(time.perf_counter() - began)
            cosines = (vectors * known[task][chosen]).sum(axis=1)
            if len(vectors) != len(chosen) or cosines.min() < MIN_COSINE:
                seen.wrong.append(f"{task}, {len(chosen)} texts: cosine {cosines.min():.4f}")


async def ask(
    session: aiohttp.ClientSession, port: int, body: dict[str, Any]
) -> tuple[str, np.ndarray | None]:
    """Send one request; return how it ended, and the vectors if there are any."""
    try:
        async with session.post(f"http://127.0.0.1:{port}/v1/embeddings", json=body) as response:
            answer = await response.json()
    except (aiohttp.ClientError, OSError, ValueError) as error:
        return type(error).__name__, None
    if response.status != 200:
        return f"{response.status} {answer['error']['code']}", None
    return "answered", np.array([entry["embedding"] for entry in answer["data"]], np.float32)


@asynccontextmanager
async def engine_servers() -> AsyncIterator[tuple[int, Callable[..., Any]]]:
    """Run a gateway before engine servers; yields its port, and what kills the servers."""
    ports = [free_port() for _ in range(PROCESSES)]
    processes = [start_server(port) for port in ports]
    gateway_port = free_port()
    urls = itertools.chain(*(["--engine-url", f"http://127.0.0.1:{port}"] for port in ports))
    gateway = start("--engine", "remote", *urls, "--port", str(gateway_port))

    async def restart(index: int, killing: Killing) -> None:
        processes[index].kill()
        processes[index].wait()
        began = time.monotonic()
        killing.kills += 1
        processes[index] = start_server(ports[index])
        # The gateway must have missed it before it can have it again.
        await until(lambda: serving(gateway_port), lambda used: ports[index] not in used, 5.0)
        if await until(lambda: serving(gateway_port), lambda used: ports[index] in used):
            killing.ready.append(time.monotonic() - began)

    async def kill_servers(killing: Killing, interval: float, ended: asyncio.Event) -> None:
        restarts = [asyncio.create_task(asyncio.sleep(0))] * PROCESSES
        for index in itertools.cycle(range(PROCESSES)):
            await pause(interval, ended)
            while not ended.is_set() and not (
                restarts[index].done() and len(await serving(gateway_port)) > 1
            ):
                await pause(0.1, ended)
            if ended.is_set():
                break
            restarts[index] = asyncio.create_task(restart(index, killing))
        await asyncio.gather(*restarts)

    try:
        await until(lambda: serving(gateway_port), lambda used: len(used) == PROCESSES)
        yield gateway_port, kill_servers
    finally:
        for process in [gateway, *processes]:
            process.terminate()
        for process in [gateway, *processes]:
            process.wait(START_SECONDS)


@asynccontextmanager
async def gateway_processes() -> AsyncIterator[tuple[int, Callable[..., Any]]]:
    """Run several gateway processes; yields their port, and what kills them."""
    port = free_port()
    parent = start("--workers", str(PROCESSES), "--port", str(port))

    async def kill(killing: Killing) -> None:
        before = gateways(parent.pid, port)
        min(before, key=lambda process: process.create_time()).kill()
        began = time.monotonic()
        killing.kills += 1

        async def replaced() -> int:
            found = await asyncio.to_thread(gateways, parent.pid, port)
            return sum(accepts(process, port) for process in found if process not in before)

        if await until(replaced, lambda count: count > 0):
            killing.ready.append(time.monotonic() - began)

    async def kill_gateways(killing: Killing, interval: float, ended: asyncio.Event) -> None:
        kills = set()
        while True:
            await pause(interval, ended)
            while not ended.is_set():
                found = gateways(parent.pid, port)
                if sum(accepts(process, port) for process in found) > 1:
                    break
                await pause(0.1, ended)
            if ended.is_set():
                break
            kills.add(asyncio.create_task(kill(killing)))
        await asyncio.gather(*kills)

    async def answering() -> int:
        async with aiohttp.ClientSession() as session:
            ready = f"http://127.0.0.1:{port}/health/ready"
            with suppress(aiohttp.ClientError, OSError):
                async with session.get(ready) as response:
                    return int(response.status == 200) * len(gateways(parent.pid, port))
        return 0

    try:
        await until(answering, lambda count: count == PROCESSES)
        yield port, kill_gateways
    finally:
        parent.terminate()
        parent.wait(START_SECONDS)


def start(*options: str) -> subprocess.Popen[bytes]:
    """Start ``taskvec serve``."""
    command = [sys.executable, "-m", "taskvec", "serve", "--no-log-requests", *options]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def start_server(port: int) -> subprocess.Popen[bytes]:
    """Start an engine server."""
    return start("--token-input", "accept", "--port", str(port))


def gateways(parent: int, port: int) -> list[psutil.Process]:
    """Return the processes below a parent that listen on a port."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(parent).children(recursive=True):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if any(
                    connection.laddr.port == port for connection in process.net_connections("tcp")
                ):
                    found.append(process)
    return found


def accepts(process: psutil.Process, port: int) -> bool:
    """Return whether a process has a connection to a client."""
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return any(
            connection.laddr.port == port and connection.status == psutil.CONN_ESTABLISHED
            for connection in process.net_connections("tcp")
        )
    return False


async def serving(port: int) -> set[int]:
    """Return the ports of the engine servers that a gateway uses; none while it does not answer."""
    with suppress(aiohttp.ClientError, OSError):
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{port}/metrics") as response,
        ):
            return {
                int(found[1])
                for found in re.finditer(
                    r'^taskvec_engine_server_serving{server="http://127.0.0.1:(\d+)"} 1.0$',
                    await response.text(),
                    re.MULTILINE,
                )
            }
    return set()


async def until(
    look: Callable[[], Any], enough: Callable[[Any], bool], seconds: float = START_SECONDS
) -> bool:
    """Wait until what is seen is enough; return False if that takes too long."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if enough(await look()):
            return True
        await asyncio.sleep(0.05)
    return False


async def pause(seconds: float, ended: asyncio.Event) -> None:
    """Wait, but not beyond the end."""
    with suppress(TimeoutError):
        await asyncio.wait_for(ended.wait(), seconds)


if __name__ == "__main__":
    sys.exit(main())
