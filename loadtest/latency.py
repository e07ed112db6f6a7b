"""Measure time from start to ready, latency of one text at a time over HTTP, and resident memory.

python loadtest/latency.py
"""

from __future__ import annotations

import argparse
import http.client
import json
import subprocess
import sys
import time
from contextlib import suppress

import psutil

from report import spread, write_result
from server import free_port, wait_ready

TEXT = "How do I find out which process listens on a port?"
WARM_UP = 50
"""Requests that are not measured."""

MEASURE_SECONDS = 3.0
"""Time without requests in which the server measures its engine's speed; its memory counts."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--requests", type=int, default=500)
    options = parser.parse_args()
    ready, medians, tails, engine, resident = [], [], [], [], []
    for _ in range(options.starts):
        port = free_port()
        started = time.perf_counter()
        command = [sys.executable, "-m", "taskvec", "serve", "--port", str(port)]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
            try:
                wait_ready(port)
                ready.append(time.perf_counter() - started)
                times, engine_times = one_by_one(port, options.requests)
                medians.append(times[len(times) // 2])
                tails.append(times[len(times) * 99 // 100])
                engine.append(engine_times[len(engine_times) // 2])
                time.sleep(MEASURE_SECONDS)
                resident.append(resident_megabytes(server.pid))
            finally:
                server.terminate()
    write_result(
        "latency",
        {
            "starts": options.starts,
            "requests_each": options.requests,
            "start_to_ready_seconds": spread(ready, 2),
            "one_text_p50_ms": spread(medians, 2),
            "one_text_p99_ms": spread(tails, 2),
            "of_it_engine_p50_ms": spread(engine, 2),
            "resident_megabytes": spread(resident, 0),
        },
    )


def one_by_one(port: int, requests: int) -> tuple[list[float], list[float]]:
    """Return sorted milliseconds of each request, and of its part in the engine.

    Uses the standard library's client: httpx and requests alone take most of a millisecond.
    """
    body = {"input": TEXT, "task": "retrieval.query", "encoding_format": "base64"}
    content, headers = json.dumps(body), {"Content-Type": "application/json"}
    times, engine = [], []
    connection = http.client.HTTPConnection("127.0.0.1", port)
    for number in range(requests + WARM_UP):
        started = time.perf_counter()
        connection.request("POST", "/v1/embeddings", content, headers)
        answer = connection.getresponse()
        answer.read()
        elapsed = (time.perf_counter() - started) * 1000
        assert answer.status == 200
        if number >= WARM_UP:
            times.append(elapsed)
            stage = answer.headers["server-timing"].partition("engine;dur=")[2]
            engine.append(float(stage.partition(",")[0]))
    connection.close()
    return sorted(times), sorted(engine)


def resident_megabytes(pid: int) -> float:
    """Return the RSS of a process and its child processes, in MiB."""
    root = psutil.Process(pid)
    resident = root.memory_info().rss
    for child in root.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            resident += child.memory_info().rss
    return resident / (1 << 20)


if __name__ == "__main__":
    main()
