"""Measure what ordinary clients see beside hostile ones.

Starts a server with the built-in model on this machine. While attackers of one kind send their
requests without pause, from another process and each from an address of its own, one client sends
short texts and one asks ``/health/live``. With ``--before``, the server of another checkout takes
turns with this one's. At the end, 600 requests at once of a key that may send ten a minute, with a
Redis that works (if redis-server is installed).

    python loadtest/hostile.py --seconds 3 --before ../taskvec-before
"""

from __future__ import annotations

import argparse
import collections
import http.client
import json
import multiprocessing
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import psutil

from report import RESULTS, write_result
from server import free_port, longest_pauses, wait_ready

ROOT = Path(__file__).parents[1]
HARD_WORD = "q" * 99 + "\u16a0 "
"""One token for which WordPiece makes 5,000 look-ups."""

PAUSE = 0.01
"""Seconds between two requests of an ordinary client."""

TIMEOUT = 60.0
"""Seconds after which a client gives up."""

SHORT = "a short text"

AT_ONCE = 600
"""Requests of one key at once."""


def embed(body: object) -> bytes:
    """Return a request to ``/v1/embeddings``."""
    return post(json.dumps(body, ensure_ascii=False).encode(), "/v1/embeddings", "")


def post(body: bytes, path: str, headers: str) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def unfinished(length: int) -> bytes:
    """Return a body of ``a``, as far as anyone sends it."""
    return post(b"a" * length, "/v1/embeddings", "")


def get(path: str, headers: str = "") -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode()


def empty_texts(count: int) -> bytes:
    """Return a call of the engine's binary route with texts of no tokens."""
    body = struct.pack("<i", count) + struct.pack("<ii", 0, 1) * count + struct.pack("<i", 5)
    headers = "Content-Type: application/octet-stream\r\nx-adapters: retrieval\r\n"
    return post(body, "/v1/engine/embed", headers)


ATTACKS: dict[str, Callable[[], bytes]] = {
    "one text of 205 KB": lambda: embed({"input": HARD_WORD * 1990}),
    "85 texts, 1 MB": lambda: embed({"input": [HARD_WORD * 121] * 85}),
    "2,048 texts, 25 MB, refused": lambda: embed({"input": ["." * 12_200] * 2048}),
    "64 short texts of 40 KB": lambda: embed({"input": ["short words in a row " * 30] * 64}),
    "GET of 60 KB, no such route": lambda: get("/" + "%01" * 20_000),
    "GET of 8 KB, no such route": lambda: get("/" + "%01" * 2_600),
    "13,000 headers": lambda: get("/health/live", "a:\r\n" * 13_000),
    "GET /metrics": lambda: get("/metrics"),
    "a million texts of no tokens": lambda: empty_texts(1_000_000),
    "30 MB of a body, not finished": lambda: unfinished(33_000_000)[:30_000_000],
    "answers of 6 MB, not read": lambda: embed({"input": ["a short text"] * 2048}),
}

TEXTS = {"85 texts, 1 MB": "In winter, said she, the brown fox lives on embeddings. " * 32}
"""Attack -> text of 1,800 characters that the ordinary client sends in a further run beside it."""

HELD = {"30 MB of a body, not finished": 5, "answers of 6 MB, not read": 5}
"""Attack -> connections that an attacker keeps open without reading."""

HOLD_SECONDS = 20.0
"""Seconds after which an attacker lets go of them."""


MAX_P50_MS, MAX_LIVE_P99_MS = 1000.0, 2000.0
"""Bounds of ``--check``: loose, so that only faults of an order of magnitude break them."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds of each attack")
    parser.add_argument("--attackers", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--before", type=Path, help="another checkout")
    parser.add_argument("--before-attackers", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--keep", action="store_true", help="keep the last result of other attacks")
    parser.add_argument("--only", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument(
        "--check",
        action="store_true",
        help="attack one server for a second each, compare with loose bounds, write no result",
    )
    parser.add_argument("--name", default="hostile", help="name of the result file; - writes none")
    options = parser.parse_args()
    if options.check:
        return check(options.only)
    sides = {"after": ROOT} | ({"before": options.before.resolve()} if options.before else {})
    figures: dict[str, Any] = kept(options.name) if options.keep else {}
    figures["seconds"] = options.seconds
    for name, text in [("nobody", SHORT), *cases(options.only)]:
        what = name if text == SHORT else f"{name}, 1,800 characters"
        for side, checkout in sides.items():
            with serving(checkout) as server:
                for attackers in numbers(name, side, options):
                    measured = attacked(server, name, attackers, options.seconds, text)
                    figures[f"{what}, {attackers} attackers, {side}"] = measured
                    print(f"{what}, {attackers} attackers, {side}: {measured}", flush=True)
    for side, checkout in sides.items():
        figures[f"worst, {side}"] = worst(
            [run for what, run in figures.items() if what.endswith(f"attackers, {side}")]
        )
        if shutil.which("redis-server") and not options.keep:
            figures[f"{AT_ONCE} requests at once of a key with 10 a minute, {side}"] = at_once(
                checkout
            )
    print({name: value for name, value in figures.items() if name.startswith(("worst", "600"))})
    if options.name != "-":
        write_result(options.name, figures)
    return 0


def numbers(name: str, side: str, options: argparse.Namespace) -> list[int]:
    """Return the numbers of attackers to measure with one server, one after another."""
    if name == "nobody":
        return [0]
    return list(options.before_attackers if side == "before" else options.attackers)


def kept(name: str) -> dict[str, Any]:
    """Return the figures of the last result."""
    result = json.loads((RESULTS / f"{name}.json").read_bytes())
    return {what: figure for what, figure in result.items() if what.endswith(("after", "before"))}


def cases(attacks: list[str]) -> list[tuple[str, str]]:
    """Return each attack with the text that the ordinary client sends."""
    return [(name, SHORT) for name in attacks] + [
        (name, text) for name, text in TEXTS.items() if name in attacks
    ]


def worst(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the worst of all runs for each measure, and the sums of what ordinary clients lost."""
    clients = [run[client] for run in runs for client in ("small", "live")]
    return {
        "small_p99_ms": max(run["small"]["p99_ms"] for run in runs),
        "live_p99_ms": max(run["live"]["p99_ms"] for run in runs),
        "longest_turn_ms": max(run.get("longest_turn_ms", 0) for run in runs),
        "longest_lock_hold_ms": max(run.get("longest_lock_hold_ms", 0) for run in runs),
        "rss_mb": max(run["rss_mb"] for run in runs),
        "lost": sum(client.get("lost", 0) for client in clients),
        "refused": sum(client.get("429", 0) + client.get("503", 0) for client in clients),
    }


def at_once(checkout: Path) -> dict[str, int]:
    """Return the statuses of many requests at once of one key, whose limit is in Redis."""
    port = free_port()
    options = ["--bind", "127.0.0.1", "--save", "", "--dir", "/"]
    command = ["redis-server", "--port", str(port), *options]
    environment = {
        "TASKVEC_API_KEYS": "hostile=a-secret-of-a-client",
        "TASKVEC_KEY_REQUESTS_PER_MINUTE": "10",
        "TASKVEC_LIMITS_URL": f"redis://127.0.0.1:{port}/0",
    }
    headers = "Authorization: Bearer a-secret-of-a-client\r\n"
    request = post(json.dumps({"input": SHORT}).encode(), "/v1/embeddings", headers)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as redis:
        try:
            time.sleep(0.5)
            with serving(checkout, environment) as (server, _):
                while time.time() % 60 > 35:  # within one minute of the limit
                    time.sleep(1)
                with ThreadPoolExecutor(AT_ONCE) as threads:
                    statuses = threads.map(lambda _: send(server, request), range(AT_ONCE))
                    return dict(collections.Counter(statuses))
        finally:
            redis.terminate()


def check(attacks: list[str]) -> int:
    """Attack one server with four attackers; return 1 if a bound is broken twice in a row."""
    status = 0
    with serving(ROOT) as server:
        for name in attacks:
            found = broken(server, name) and broken(server, name)  # the machine may be busy
            if found:
                status = 1
                print(f"Beside four attackers with {name!r}, {found}.", file=sys.stderr)
    return status


def broken(server: tuple[int, psutil.Process], name: str) -> str:
    """Return which bound ordinary clients see broken during an attack; empty if none is."""
    seen = attacked(server, name, 4, 1.0)
    print(f"{name}: {seen}", flush=True)
    small, live = seen["small"], seen["live"]
    lost = small.get("lost", 0) + live.get("lost", 0)
    if lost:
        return f"{lost} requests of ordinary clients were lost"
    if not small.get("200") or live.keys() != {"p50_ms", "p99_ms", "200"}:
        return f"ordinary clients got {small} and {live}"
    if small["p50_ms"] > MAX_P50_MS:
        return f"a short text takes {small['p50_ms']} ms, and the bound is {MAX_P50_MS:g}"
    if live["p99_ms"] > MAX_LIVE_P99_MS:
        return f"/health/live takes {live['p99_ms']} ms, and the bound is {MAX_LIVE_P99_MS:g}"
    return ""


@contextmanager
def serving(
    checkout: Path, settings: dict[str, str] | None = None
) -> Iterator[tuple[int, psutil.Process]]:
    """Start the server of a checkout; yields its port and its process."""
    port = free_port()
    environment = {
        **os.environ,
        "PYTHONPATH": str(checkout / "service"),
        "TASKVEC_TOKEN_INPUT": "accept",
        **(settings or {}),
    }
    command = [sys.executable, "-m", "taskvec", "serve", "--port", str(port)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            wait_ready(port, process=process)
            yield port, psutil.Process(process.pid)
        finally:
            process.terminate()
            try:
                process.wait(TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()


def attacked(
    server: tuple[int, psutil.Process],
    name: str,
    attackers: int,
    seconds: float,
    text: str = SHORT,
) -> dict[str, Any]:
    """Return what ordinary clients see during an attack."""
    port, process = server
    for _ in range(20):  # warm up
        status_of(port, "POST", "/v1/embeddings", {"input": text})
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    answers = context.Manager().dict()
    attack = context.Process(target=run_attackers, args=(port, name, attackers, stop, answers))
    if attackers:
        attack.start()
        time.sleep(1.0)  # the process has to start
    ended = threading.Event()
    small, live, rss = Seen(), Seen(), [resident_bytes(process)]
    clients = [
        threading.Thread(
            target=small.ask, args=(port, "POST", "/v1/embeddings", ended, {"input": text})
        ),
        threading.Thread(target=live.ask, args=(port, "GET", "/health/live", ended)),
        threading.Thread(target=watch_memory, args=(process, rss, ended)),
    ]
    for client in clients:
        client.start()
    time.sleep(seconds)
    ended.set()
    stop.set()
    for client in clients:
        client.join()
    if attackers:
        attack.join(TIMEOUT)
        if attack.is_alive():
            attack.kill()
    return {
        "small": small.summary(),
        "live": live.summary(),
        **longest_pauses(port),
        "rss_mb": round(max(rss) / 1e6),
        "attackers": dict(answers),
    }


class Seen:
    """The answers that one ordinary client got."""

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._statuses: collections.Counter[str] = collections.Counter()

    def ask(
        self, port: int, method: str, path: str, ended: threading.Event, body: object = None
    ) -> None:
        """Send one request after another."""
        while not ended.is_set():
            began = time.perf_counter()
            status = status_of(port, method, path, body)
            self._seconds.append(time.perf_counter() - began)
            self._statuses[status] += 1
            time.sleep(PAUSE)

    def summary(self) -> dict[str, Any]:
        """Return milliseconds and the number of answers with each status."""
        ordered = sorted(self._seconds)
        return {
            "p50_ms": round(1e3 * ordered[len(ordered) // 2], 1),
            "p99_ms": round(1e3 * ordered[int(0.99 * len(ordered))], 1),
            **self._statuses,
        }


def status_of(port: int, method: str, path: str, body: object) -> str:
    """Send one request on a connection of its own; return its status, or ``lost``."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    try:
        connection.request(method, path, None if body is None else json.dumps(body))
        answer = connection.getresponse()
        answer.read()
    except (OSError, http.client.HTTPException):
        return "lost"
    finally:
        connection.close()
    return str(answer.status)


def resident_bytes(process: psutil.Process) -> int:
    """Return the RSS of a server and its child processes; one may end meanwhile."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            total += one.memory_info().rss
    return total


def watch_memory(process: psutil.Process, rss: list[int], ended: threading.Event) -> None:
    while not ended.is_set():
        rss.append(resident_bytes(process))
        time.sleep(0.02)


def run_attackers(
    port: int, name: str, attackers: int, stop: Event, answers: Any, *, headers: str = ""
) -> None:
    """Send the requests of an attack from threads until stopped.

    Args:
        port: of the server, on this machine.
        name: one of ``ATTACKS``.
        attackers: number of threads.
        stop: set to end it.
        answers: gets the number of answers with each status.
        headers: further lines of each request, such as an API key.
    """
    request = ATTACKS[name]().replace(b"Host: x\r\n", b"Host: x\r\n" + headers.encode(), 1)
    statuses: collections.Counter[str] = collections.Counter()
    held = HELD.get(name)

    def attack(address: str) -> None:
        while not stop.is_set():
            if held:
                statuses.update(hold(port, request, held, stop, address))
            else:
                statuses[send(port, request, address)] += 1

    threads = [
        threading.Thread(target=attack, args=(f"127.0.1.{i + 1}",), daemon=True)
        for i in range(attackers)
    ]
    for thread in threads:
        thread.start()
    stop.wait()
    for thread in threads:
        thread.join(1.0)
    answers.update(statuses)


def hold(
    port: int, request: bytes, connections: int, stop: Event, address: str = "127.0.0.1"
) -> list[str]:
    """Send a request on several connections, read nothing, and keep them open for a while.

    Returns:
        Statuses of the connections that the server answered or closed within that time.
    """
    opened: list[socket.socket] = []
    statuses = []
    try:
        for _ in range(connections):
            connection = socket.socket()
            opened.append(connection)
            # A small buffer, so that an answer which is not read stays in the server.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(TIMEOUT)
            connection.bind((address, 0))
            connection.connect(("127.0.0.1", port))
            with suppress(OSError):  # refused, and closed
                connection.sendall(request)
        stop.wait(HOLD_SECONDS)
    except OSError:
        statuses.append("connection closed")
    for connection in opened:
        connection.settimeout(0.01)
        with suppress(OSError):
            first = connection.recv(64)
            statuses.append(first[9:12].decode() if first else "connection closed")
        connection.close()
    return statuses


def send(port: int, request: bytes, address: str = "127.0.0.1") -> str:
    """Send a request on a connection of its own; return the status of its answer."""
    try:
        with socket.create_connection(("127.0.0.1", port), TIMEOUT, (address, 0)) as connection:
            connection.sendall(request)
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            answer.read()
    except (OSError, http.client.HTTPException):
        return "connection closed"
    return str(answer.status)


if __name__ == "__main__":
    sys.exit(main())
