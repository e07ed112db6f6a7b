"""Measure the latency of single texts while requests of 2,048 texts keep the engine busy.

The bound is the time of one forward plus twice the idle p99. Forwards vary: the gateway's work for
a request of 2,048 texts competes with the running one for CPU cores. A single text is sent when a
forward starts, so its time in the queue is that of the forward; the figures show its part of the
p99.

    python loadtest/fairness.py
"""

from __future__ import annotations

import argparse
import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from report import spread, write_result
from server import free_port, wait_ready

BULK_CLIENTS = 4
WARM_UP = 50
TEXT = "How do I find out which process listens on a port, and stop it without losing its work?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=300)
    options = parser.parse_args()
    port = free_port()
    command = [sys.executable, "-m", "taskvec", "serve", "--port", str(port), "--no-log-requests"]
    figures: dict[str, list[float]] = {}
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
        try:
            wait_ready(port)
            for _ in range(options.rounds):
                for name, value in one_round(port, options.requests).items():
                    figures.setdefault(name, []).append(value)
        finally:
            server.terminate()
    write_result("fairness", {name: spread(values, 2) for name, values in figures.items()})


def one_round(port: int, requests: int) -> dict[str, float]:
    """Return milliseconds when idle, of one forward, and under bulk with and without priority."""
    figures: dict[str, float] = {}
    singles(port, WARM_UP)
    idle, _ = singles(port, requests)
    figures |= {"idle p50 ms": median(idle), "idle p99 ms": p99(idle)}
    for name, headers in (("marked", {"x-priority": "bulk"}), ("unmarked", {})):
        with bulk(port, headers):
            before = forwards(port)
            times, queued = singles(port, requests)
            after = forwards(port)
        figures[f"under {name} bulk p50 ms"] = median(times)
        figures[f"under {name} bulk p99 ms"] = p99(times)
        if name == "marked":
            figures["of it in the queue p50 ms"] = median(queued)
            figures["of it in the queue p99 ms"] = p99(queued)
            figures["one bulk forward, mean ms"] = bulk_forward(before, after, requests, idle)
            figures["texts a second meanwhile"] = (after["texts"] - before["texts"]) / (
                after["at"] - before["at"]
            )
    figures["bound by the mean forward ms"] = (
        figures["one bulk forward, mean ms"] + 2 * figures["idle p99 ms"]
    )
    figures["bound by the slow forward ms"] = (
        figures["of it in the queue p99 ms"] + 2 * figures["idle p99 ms"]
    )
    return figures


def singles(port: int, requests: int) -> tuple[list[float], list[float]]:
    """Send single texts one after another; return sorted latencies and queue times in ms."""
    body = json.dumps({"input": TEXT, "task": "retrieval.query", "encoding_format": "base64"})
    times, queued = [], []
    connection = http.client.HTTPConnection("127.0.0.1", port)
    for _ in range(requests):
        started = time.perf_counter()
        connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        times.append((time.perf_counter() - started) * 1000)
        assert answer.status == 200
        stage = answer.headers["server-timing"].partition("queue;dur=")[2]
        queued.append(float(stage.partition(",")[0]))
    connection.close()
    return sorted(times), sorted(queued)


def bulk_forward(
    before: dict[str, float], after: dict[str, float], singles: int, idle: list[float]
) -> float:
    """Return the mean milliseconds of a bulk forward.

    The forwards of the single texts are subtracted, each with the median latency when idle.
    """
    bulk_forwards = after["count"] - before["count"] - singles
    milliseconds = (after["seconds"] - before["seconds"]) * 1000 - singles * median(idle)
    return milliseconds / bulk_forwards


@contextmanager
def bulk(port: int, headers: dict[str, str]) -> Iterator[None]:
    """Run clients that repeatedly send 2,048 texts; enter once their requests are queued."""
    stop = threading.Event()
    body = json.dumps({"input": [TEXT] * 2048, "encoding_format": "base64"}).encode()
    sent = {"Content-Type": "application/json", **headers}

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        while not stop.is_set():
            connection.request("POST", "/v1/embeddings", body, sent)
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(BULK_CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        while forwards(port)["waiting"] < 2048:
            time.sleep(0.02)
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def forwards(port: int) -> dict[str, float]:
    """Return the current counters of the engine."""
    wanted = {
        "taskvec_forward_seconds_count": "count",
        "taskvec_forward_seconds_sum": "seconds",
        "taskvec_batch_texts_sum": "texts",
        "taskvec_queue_texts": "waiting",
    }
    found: dict[str, Any] = {"at": time.monotonic()}
    for line in httpx.get(f"http://127.0.0.1:{port}/metrics").text.splitlines():
        name, _, value = line.partition(" ")
        if name in wanted:
            found[wanted[name]] = float(value)
    return found


def median(times: list[float]) -> float:
    """Return the median of sorted times."""
    return times[len(times) // 2]


def p99(times: list[float]) -> float:
    """Return the 99th percentile of sorted times."""
    return times[len(times) * 99 // 100]


if __name__ == "__main__":
    main()
