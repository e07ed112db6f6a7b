"""Measure what the engine costs and gives in a process of its own.

Two servers with the built-in model take turns: with the engine in the gateway's process, and in one
of its own. Measured of each: start to ready; one text at a time; single texts from several clients;
requests of 256 texts from four; single texts beside four clients that ask for paths of 8 KB that do
not exist; and the memory of each process at the end. The clients run on the same cores.

    python loadtest/engine_process.py --rounds 3
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from typing import Any

import psutil

from hostile import run_attackers
from latency import TEXT, one_by_one
from report import spread, write_result
from server import free_port, wait_ready

SIDES = {"in the gateway's process": ("--in-process",), "in a process of its own": ()}
CLIENTS = (1, 16, 64)
BULK_CLIENTS, BULK_TEXTS = 4, 256
ATTACK, ATTACKERS = "GET of 8 KB, no such route", 4
SETTLE_SECONDS = 1.0
"""Time from ready to the first measurement: the server measures its engine."""

Figures = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=500, help="requests one at a time")
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds of each load")
    options = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = {side: {} for side in SIDES}
    for _ in range(options.rounds):
        for side, arguments in SIDES.items():
            for name, value in one_round(arguments, options.requests, options.seconds).items():
                found[side].setdefault(name, []).append(value)
            print(side, {name: round(v[-1], 2) for name, v in found[side].items()}, flush=True)
    write_result(
        "engine-process",
        {
            "rounds": options.rounds,
            "requests_one_at_a_time": options.requests,
            "seconds_of_each_load": options.seconds,
            **{
                side: {name: spread(values, 2) for name, values in figures.items()}
                for side, figures in found.items()
            },
        },
    )


def one_round(arguments: tuple[str, ...], requests: int, seconds: float) -> Figures:
    """Return the figures of one server."""
    figures: Figures = {}
    port = free_port()
    command = [sys.executable, "-m", "taskvec", "serve", "--port", str(port), *arguments]
    started = time.perf_counter()
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
        try:
            wait_ready(port)
            figures["start to ready s"] = time.perf_counter() - started
            time.sleep(SETTLE_SECONDS)
            figures |= memory(server.pid, "idle")
            times, _ = one_by_one(port, requests)
            figures["one text p50 ms"] = times[len(times) // 2]
            figures["one text p99 ms"] = times[len(times) * 99 // 100]
            for clients in CLIENTS:
                rate, times = loaded(port, clients, 1, seconds)
                figures[f"{clients} clients, requests/s"] = rate
                figures[f"{clients} clients, p99 ms"] = times[len(times) * 99 // 100]
            rate, _ = loaded(port, BULK_CLIENTS, BULK_TEXTS, seconds)
            figures["bulk texts/s"] = rate * BULK_TEXTS
            with attacked(port):
                times, _ = timed(port, seconds)
                figures["beside 404s p50 ms"] = times[len(times) // 2]
                figures["beside 404s p99 ms"] = times[len(times) * 99 // 100]
            figures |= memory(server.pid, "at the end")
        finally:
            server.terminate()
    return figures


def memory(pid: int, when: str) -> Figures:
    """Return megabytes of the gateway, of its child processes, and of all together."""
    gateway = psutil.Process(pid)
    processes = [gateway, *gateway.children(recursive=True)]
    used = [process.memory_full_info() for process in processes]
    figures: Figures = {
        f"USS of the gateway {when}, MB": used[0].uss / 1e6,
        f"RSS of the gateway {when}, MB": used[0].rss / 1e6,
        f"USS of all {when}, MB": sum(each.uss for each in used) / 1e6,
        f"PSS of all {when}, MB": sum(each.pss for each in used) / 1e6,
        f"RSS of all {when}, MB": sum(each.rss for each in used) / 1e6,
    }
    if len(used) > 1:
        figures[f"USS of the engine {when}, MB"] = used[1].uss / 1e6
        figures[f"RSS of the engine {when}, MB"] = used[1].rss / 1e6
    return figures


def timed(port: int, seconds: float) -> tuple[list[float], int]:
    """Send single texts one after another for some time; return sorted milliseconds."""
    times: list[float] = []
    send_until(port, 1, time.monotonic() + seconds, times)
    return sorted(times), len(times)


def loaded(port: int, clients: int, texts: int, seconds: float) -> tuple[float, list[float]]:
    """Return requests per second of clients in another process, and sorted milliseconds."""
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=run_clients, args=(port, clients, texts, seconds, sending))
    process.start()
    times = receiving.recv()
    process.join()
    return len(times) / seconds, times


def run_clients(port: int, clients: int, texts: int, seconds: float, sending: Any) -> None:
    """Send requests from threads for some time; send the sorted milliseconds of each."""
    times: list[float] = []
    until = time.monotonic() + seconds
    threads = [
        threading.Thread(target=send_until, args=(port, texts, until, times))
        for _ in range(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sending.send(sorted(times))


def send_until(port: int, texts: int, until: float, times: list[float]) -> None:
    """Send requests on one connection until a time; append the milliseconds of each."""
    content = json.dumps({"input": [TEXT] * texts, "encoding_format": "base64"})
    headers = {"Content-Type": "application/json"}
    connection = http.client.HTTPConnection("127.0.0.1", port)
    while time.monotonic() < until:
        started = time.perf_counter()
        connection.request("POST", "/v1/embeddings", content, headers)
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200, answer.status
        times.append((time.perf_counter() - started) * 1000)
    connection.close()


@contextmanager
def attacked(port: int) -> Iterator[None]:
    """Run attackers in another process."""
    context = multiprocessing.get_context("spawn")
    stop: Event = context.Event()
    arguments = (port, ATTACK, ATTACKERS, stop, context.Manager().dict())
    process = context.Process(target=run_attackers, args=arguments)
    process.start()
    time.sleep(SETTLE_SECONDS)
    try:
        yield
    finally:
        stop.set()
        process.join()


if __name__ == "__main__":
    main()
