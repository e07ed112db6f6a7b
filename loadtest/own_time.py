"""Measure the gateway's own time for a request, in one process and without a network.

A bare FastAPI route and the gateway with a null engine, as in loadtest/gateway.py, are called
through ASGI, interleaved. The minimum of many rounds is the cost of the code without noise from
other processes. ``limits`` has API keys with three limits.

``quiet`` writes no log lines, ``lines`` one per request; each is measured in its own process.

    python loadtest/own_time.py --rounds 120
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
import uvloop
from fastapi import FastAPI

from gateway import SECRET, bare_app, gateway_app, request_body, with_keys
from report import write_result
from taskvec.malloc import SERVING, tune_malloc
from taskvec.settings import Settings
from taskvec.telemetry.logs import configure_logs

PARTS = ("quiet", "lines")
REQUESTS = 40
"""Requests per round of one side."""

PAUSE = 0.06
"""Seconds between rounds, so that log lines are written before the next side is measured."""

WARM_UP = 1.5
"""Seconds until the engine is ready and its speed has been measured."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=120)
    parser.add_argument("--part", choices=PARTS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(part(options.part, options.rounds)))
        return
    figures: dict[str, Any] = {"requests_of_a_round": REQUESTS, "rounds": options.rounds}
    for name in PARTS:
        figures[f"microseconds, {name}"] = run_part(name, options.rounds)
    write_result("own-time", figures)


def run_part(name: str, rounds: int) -> Any:
    """Run one part in a process of its own, whose log lines are discarded; return its figures."""
    command = [sys.executable, __file__, "--part", name, "--rounds", str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def part(name: str, rounds: int) -> Any:
    """Measure one part."""
    tune_malloc(SERVING)
    log = configure_logs("info" if name == "lines" else "error")
    apps = {
        "bare": bare_app(encoding=False),
        "gateway": gateway_app(Settings(), log, tokenizing=False),
        "limits": gateway_app(with_keys(), log, tokenizing=False),
    }
    return uvloop.run(own_times(apps, rounds))


async def own_times(apps: dict[str, FastAPI], rounds: int) -> dict[str, Any]:
    """Return microseconds per request, by number of texts and by side."""
    found: dict[str, Any] = {}
    async with AsyncExitStack() as stack:
        for app in apps.values():
            await stack.enter_async_context(app.router.lifespan_context(app))
        await asyncio.sleep(WARM_UP)
        for texts in (1, 32):
            body = request_body(texts)
            times: dict[str, list[float]] = {side: [] for side in apps}
            for _ in range(rounds):
                for side, app in apps.items():
                    started = time.perf_counter()
                    for _ in range(REQUESTS):
                        await asyncio.create_task(ask(app, body))
                    times[side].append((time.perf_counter() - started) / REQUESTS)
                    await asyncio.sleep(PAUSE)
            found[f"{texts} texts"] = {side: microseconds(spent) for side, spent in times.items()}
    return found


async def ask(app: FastAPI, body: bytes) -> None:
    """Send one request through ASGI and receive its response."""
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        if not messages:
            await asyncio.Event().wait()  # the client does not disconnect
        return messages.pop()

    async def send(message: Any) -> None:
        sent.append(message)

    headers = {
        "host": "127.0.0.1",
        "content-type": "application/json",
        "content-length": str(len(body)),
        "authorization": f"Bearer {SECRET}",
    }
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/embeddings",
        "raw_path": b"/v1/embeddings",
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "state": {},
    }
    await app(scope, receive, send)
    assert sent[0]["status"] == 200, sent


def microseconds(seconds: list[float]) -> dict[str, float]:
    """Return the minimum and the median in microseconds."""
    return {
        "least": round(min(seconds) * 1e6, 1),
        "median": round(float(np.median(seconds)) * 1e6, 1),
    }


if __name__ == "__main__":
    main()
