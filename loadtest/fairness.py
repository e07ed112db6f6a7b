"""Measure what single texts and bulk work cost each other: latencies, and rates of bulk texts.

Every case starts servers of its own on this machine and sends the load over HTTP from another
process. Latencies under load are compared with those without, and rates with those of another
checkout or without single texts, all in one run. The result keeps the cases of earlier runs.

    python loadtest/fairness.py --before ../taskvec-before
    python loadtest/fairness.py --only default qwen3-0.6b-long
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import os
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil

from report import RESULTS, spread, write_result
from server import free_port, wait_ready
from taskvec.priority import WEIGHTS, Priority
from workload import CACHE, QWEN, checkpoint_of

ROOT = Path(__file__).parents[1]
START_SECONDS = 180.0
"""Timeout of the start of a server with random weights of the shape of Qwen3-0.6B."""

SETTLE_SECONDS = 2.0
"""Time between the first request of a load and the first measurement beside it."""

QUEUE_TOKENS = 1 << 20
"""Tokens that may wait: more than the clients send, so that no request is refused."""

POLL_SECONDS = 0.25
"""Interval at which the engine's counter of texts is read."""

WARM_UP = 50
SINGLE = "How do I find out which process listens on a port, and stop it without losing its work?"
LONG_WORDS = 8187
"""Words of one token each. With the prompt and the end, the text has about 8,192 tokens."""


@dataclass(frozen=True, slots=True)
class Load:
    """Requests that clients repeat without pause.

    Attributes:
        texts: the texts of a request.
        clients: number of clients, each with one request at a time.
        headers: further headers.
    """

    texts: list[str]
    clients: int = 4
    headers: Mapping[str, str] = field(default_factory=lambda: {"x-priority": "bulk"})


@dataclass(frozen=True, slots=True)
class Check:
    """A comparison of a figure with its bound.

    Attributes:
        figure: what is compared.
        value: the figure.
        wanted: the bound, in words.
        bound: the bound.
        met: whether the figure is within the bound.
    """

    figure: str
    value: float
    wanted: str
    bound: float
    met: bool


def at_most(figure: str, value: float, wanted: str, bound: float) -> Check:
    """Compare a figure with its maximum."""
    return Check(figure, round(value, 2), wanted, round(bound, 2), value <= bound)


def at_least(figure: str, value: float, bound: float) -> Check:
    """Compare a figure with its minimum."""
    return Check(figure, round(value, 3), f">= {bound:g}", bound, value >= bound)


@dataclass(slots=True)
class Outcome:
    """The figures of a case, and what was wanted of them."""

    figures: dict[str, Any]
    checks: list[Check]


MANY = Load([SINGLE] * 2048)
UNMARKED = Load([SINGLE] * 2048, headers={})
FEW = Load([" ".join([SINGLE] * 3)] * 64)
LONG = Load([" ".join(["time"] * LONG_WORDS)], clients=1, headers={})


def main() -> None:
    """Run the cases, write the result after each, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--before", type=Path, help="the checkout to compare rates with")
    parser.add_argument("--rounds", type=int, help="rounds of each case; by default its own")
    parser.add_argument("--requests", type=int, help="single texts of each round and load")
    parser.add_argument("--dtype", default="auto", help="dtype of the engines")
    parser.add_argument("--name", default="fairness", help="name of the result file; - writes none")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # servers are stopped
    found = read_cases(options.name)
    chosen = [name for name in CASES if name in options.only]
    for name in chosen:
        if name in NEED_BEFORE and options.before is None:
            print(f"{name}: needs --before", file=sys.stderr)
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        outcome = CASES[name](options)
        found[name] = {
            "date": datetime.now(UTC).date().isoformat(),
            "command": shlex.join(["python", *sys.argv]),
            "figures": outcome.figures,
            "checks": [asdict(check) for check in outcome.checks],
        }
        if options.name != "-":
            write_result(options.name, {"cases": found}, show=False)
    ran = {name: found[name] for name in chosen if name in found}
    print(table(ran))


def read_cases(name: str) -> dict[str, Any]:
    """Return the cases of the last result; empty if there is none."""
    try:
        cases: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_bytes())["cases"]
    except (OSError, KeyError):
        return {}
    return cases


def table(cases: Mapping[str, Any]) -> str:
    """Return a table of all checks, one line each."""
    lines = [f"{'case':<22}{'figure':<44}{'value':>10}  {'wanted':<26}{'bound':>10}  met"]
    for name, case in cases.items():
        lines += [
            f"{name:<22}{check['figure']:<44}{check['value']:>10}  {check['wanted']:<26}"
            f"{check['bound']:>10}  {'yes' if check['met'] else 'NO'}"
            for check in case["checks"]
        ]
        lines.append("  " + ", ".join(f"{k}: {brief(v)}" for k, v in case["figures"].items()))
    return "\n".join(lines)


def brief(value: Any) -> str:
    """Return a figure as text; of several rounds, the median."""
    return str(value["median"] if isinstance(value, dict) else value)


# The cases.


def default_model(options: argparse.Namespace, kind: str) -> Outcome:
    """Single texts of the default model beside four clients with 2,048 texts a request."""
    times = Latencies()
    with servers(kind, serve_arguments(options)) as server:
        singles(server.port, WARM_UP)
        count = options.requests or 1000
        for _ in range(options.rounds or 2):
            times.add("idle", singles(server.port, count))
            for name, load in (("marked bulk", MANY), ("unmarked bulk", UNMARKED)):
                with running_load(server.port, load):
                    times.add(name, singles(server.port, count))
    bound = 2 * times.p99("idle") + 15
    checks = [
        at_most(f"p99 beside {name}, ms", times.p99(name), "<= 2x idle p99 + 15 ms", bound)
        for name in ("marked bulk", "unmarked bulk")
    ]
    return Outcome(times.figures(), checks)


def shape_beside_bulk(options: argparse.Namespace) -> Outcome:
    """Single texts of the Qwen3-0.6B shape beside four clients with 64 texts a request."""
    times = shape_latencies(options, FEW)
    return Outcome(
        times.figures(),
        [
            at_most(
                "p50 beside bulk, ms", times.p50("loaded"), "<= 1.5x idle", 1.5 * times.p50("idle")
            ),
            at_most(
                "p99 beside bulk, ms", times.p99("loaded"), "<= 4x idle", 4 * times.p99("idle")
            ),
        ],
    )


def shape_beside_long(options: argparse.Namespace) -> Outcome:
    """Single texts of the Qwen3-0.6B shape while texts of 8,192 tokens are embedded."""
    times = shape_latencies(options, LONG)
    bound = 4 * times.p99("idle")
    return Outcome(
        times.figures(),
        [at_most("p99 beside long texts, ms", times.p99("loaded"), "<= 4x idle p99", bound)],
    )


def shape_latencies(options: argparse.Namespace, load: Load) -> Latencies:
    """Measure single texts of the Qwen3-0.6B shape, three a second, without and with a load.

    More of them would take more than the interactive class's share of the engine.
    """
    times = Latencies()
    with servers("default", serve_arguments(options, QWEN)) as server:
        singles(server.port, 10)
        count = options.requests or 120
        for _ in range(options.rounds or 1):
            times.add("idle", singles(server.port, count, interval=0.3))
            with running_load(server.port, load):
                times.add("loaded", singles(server.port, count, interval=0.3))
    return times


def over_before(options: argparse.Namespace, shape: str, load: Load, seconds: float) -> Outcome:
    """Bulk texts a second with no single texts, over another checkout's, in turns.

    Other work on the machine takes more from bulk threads of a low priority than from those of a
    normal one; the processor time of a text does not depend on it.
    """
    before: Path = options.before.resolve()
    checkouts = {"before": before, "after": ROOT}
    rates: dict[str, list[float]] = {side: [] for side in checkouts}
    costs: dict[str, list[float]] = {side: [] for side in checkouts}
    with ExitStack() as stack:
        started = {
            side: stack.enter_context(servers("default", serve_arguments(options, shape), checkout))
            for side, checkout in checkouts.items()
        }
        for turn in range(options.rounds or 2):
            # The side that goes first alternates: a machine that warms up favours neither.
            for side in list(checkouts)[:: 1 if turn % 2 else -1]:
                port, pid = started[side].port, started[side].pid
                with running_load(port, load), texts_rate(port) as rate:
                    texts, used = embedded_texts(port), processor_seconds(pid)
                    time.sleep(seconds)
                    used = processor_seconds(pid) - used
                    costs[side].append(used / (embedded_texts(port) - texts) * 1e6)
                rates[side].append(rate())
                print(
                    f"  {side}: {rates[side][-1]:.1f} texts/s, {costs[side][-1]:.0f} us a text",
                    file=sys.stderr,
                    flush=True,
                )
    ratio = statistics.median(rates["after"]) / statistics.median(rates["before"])
    figures = {f"{side}, texts/s": spread(values, 1) for side, values in rates.items()}
    figures |= {
        f"{side}, processor time of a text, us": spread(values, 0) for side, values in costs.items()
    }
    return Outcome(figures, [at_least("bulk texts/s over before", ratio, 0.97)])


def beside_singles(options: argparse.Namespace, shape: str, load: Load, seconds: float) -> Outcome:
    """Bulk texts a second while ten single texts a second come, over the share that is left.

    The share of bulk work is the time that ten single texts a second leave, each with its engine
    time when idle, and at least what the weights of the classes give it. One client sends them one
    after another, so fewer come if they take longer than a tenth of a second.
    """
    weight = WEIGHTS[Priority.BULK] / sum(WEIGHTS.values())
    alone, beside, shares, ratios, sent = [], [], [], [], []
    with servers("default", serve_arguments(options, shape)) as server:
        singles(server.port, 20)
        engine_ms = statistics.median(singles(server.port, 50, interval=0.1, stage="engine"))
        for _ in range(options.rounds or 2):
            with running_load(server.port, load):
                with texts_rate(server.port) as rate:
                    time.sleep(seconds)
                alone.append(rate())
                count = round(seconds / 0.1)
                with texts_rate(server.port) as rate:
                    started = time.monotonic()
                    singles(server.port, count, interval=0.1)
                    sent.append(count / (time.monotonic() - started))
                beside.append(rate() - sent[-1])
            shares.append(max(weight, 1 - 10 * engine_ms / 1000))
            ratios.append(beside[-1] / alone[-1] / shares[-1])
    return Outcome(
        {
            "engine time of a single text when idle, ms": round(engine_ms, 2),
            "single texts/s": spread(sent, 2),
            "bulk texts/s alone": spread(alone, 1),
            "bulk texts/s beside single texts": spread(beside, 1),
            "share of bulk work": spread(shares, 3),
        },
        [at_least("bulk rate over its share", statistics.median(ratios), 0.9)],
    )


CASES: dict[str, Callable[[argparse.Namespace], Outcome]] = {
    "default": partial(default_model, kind="default"),
    "workers": partial(default_model, kind="workers"),
    "remote": partial(default_model, kind="remote"),
    "qwen3-0.6b-bulk": shape_beside_bulk,
    "qwen3-0.6b-long": shape_beside_long,
    "over-before": partial(over_before, shape="mini", load=MANY, seconds=10),
    "qwen3-0.6b-over-before": partial(over_before, shape=QWEN, load=FEW, seconds=20),
    "share": partial(beside_singles, shape="mini", load=MANY, seconds=15),
    "qwen3-0.6b-share": partial(beside_singles, shape=QWEN, load=FEW, seconds=30),
}
NEED_BEFORE = ("over-before", "qwen3-0.6b-over-before")


# Measuring.


class Latencies:
    """Milliseconds of single texts in several situations."""

    def __init__(self) -> None:
        """Start without any."""
        self._times: dict[str, list[float]] = {}

    def add(self, name: str, times: Sequence[float]) -> None:
        """Add those of one round."""
        self._times.setdefault(name, []).extend(times)
        print(
            f"  {name}: p50 {percentile(times, 50):.1f}, p99 {percentile(times, 99):.1f} ms",
            file=sys.stderr,
            flush=True,
        )

    def p50(self, name: str) -> float:
        """Return the median."""
        return percentile(self._times[name], 50)

    def p99(self, name: str) -> float:
        """Return the 99th percentile."""
        return percentile(self._times[name], 99)

    def figures(self) -> dict[str, Any]:
        """Return percentiles and numbers of all, and the ratios to those without load."""
        figures: dict[str, Any] = {}
        for name, times in self._times.items():
            figures[f"{name}, n"] = len(times)
            for percent in (50, 99):
                value = percentile(times, percent)
                figures[f"{name} p{percent}, ms"] = round(value, 2)
                if name != "idle":
                    idle = percentile(self._times["idle"], percent)
                    figures[f"{name} p{percent} over idle"] = round(value / idle, 2)
        return figures


def percentile(times: Sequence[float], percent: int) -> float:
    """Return a percentile."""
    return sorted(times)[len(times) * percent // 100]


def singles(port: int, count: int, interval: float = 0.0, stage: str | None = None) -> list[float]:
    """Send single texts one after another; return the milliseconds of each.

    Args:
        port: of the server.
        count: number of texts.
        interval: seconds between the starts of two requests, at least.
        stage: stage of the server-timing header to return instead of the latency.
    """
    body = json.dumps({"input": SINGLE, "task": "retrieval.query", "encoding_format": "base64"})
    times = []
    connection = http.client.HTTPConnection("127.0.0.1", port)
    for _ in range(count):
        started = time.perf_counter()
        connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        elapsed = time.perf_counter() - started
        assert answer.status == 200, answer.status
        if stage is None:
            times.append(elapsed * 1000)
        else:
            found = answer.headers["server-timing"].partition(f"{stage};dur=")[2]
            times.append(float(found.partition(",")[0]))
        time.sleep(max(0.0, interval - elapsed))
    connection.close()
    return times


@contextmanager
def running_load(port: int, load: Load) -> Iterator[None]:
    """Run the clients of a load in another process; their requests are cancelled at the end."""
    context = multiprocessing.get_context("spawn")
    sending = context.Event()
    process = context.Process(target=send_load, args=(port, load, sending), daemon=True)
    process.start()
    try:
        assert sending.wait(60), "the load did not start"
        time.sleep(SETTLE_SECONDS)
        yield
        assert process.is_alive(), "a request of the load failed"
    finally:
        process.kill()
        process.join()


def send_load(port: int, load: Load, sending: Event) -> None:
    """Send the requests of a load until the process is killed, or a request fails."""
    body = json.dumps({"input": load.texts, "encoding_format": "base64"}).encode()
    headers = {"Content-Type": "application/json", **load.headers}

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        while True:
            connection.request("POST", "/v1/embeddings", body, headers)
            sending.set()
            answer = connection.getresponse()
            content = answer.read()
            if answer.status != 200:
                print(f"status {answer.status}: {content[:200]!r}", file=sys.stderr, flush=True)
                os._exit(1)

    threads = [threading.Thread(target=client) for _ in range(load.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@contextmanager
def texts_rate(port: int) -> Iterator[Callable[[], float]]:
    """Measure the texts that an engine embeds a second; yields what returns the rate afterwards.

    The rate is that between the first and the last forward pass that ends meanwhile, because one
    can take seconds.
    """
    ended = threading.Event()
    changes: list[tuple[float, float]] = []

    def poll() -> None:
        last = embedded_texts(port)
        while not ended.wait(POLL_SECONDS):
            texts = embedded_texts(port)
            if texts != last:
                changes.append((time.monotonic(), texts))
                last = texts

    thread = threading.Thread(target=poll)
    thread.start()

    def rate() -> float:
        (start, first), (end, last) = changes[0], changes[-1]
        return (last - first) / (end - start)

    try:
        yield rate
    finally:
        ended.set()
        thread.join()


def processor_seconds(pid: int) -> float:
    """Return the processor time of a server with all its processes."""
    server = psutil.Process(pid)
    used = [process.cpu_times() for process in (server, *server.children(recursive=True))]
    return sum(times.user + times.system for times in used)


def embedded_texts(port: int) -> float:
    """Return the number of texts that the engine of a server has embedded."""
    with urlopen(f"http://127.0.0.1:{port}/metrics") as page:
        for line in page.read().decode().splitlines():
            name, _, value = line.partition(" ")
            if name == "taskvec_batch_texts_sum":
                return float(value)
    raise LookupError("taskvec_batch_texts_sum")


# Servers.


@dataclass(frozen=True, slots=True)
class Server:
    """A running server: its port, and the id of its first process."""

    port: int
    pid: int


def serve_arguments(options: argparse.Namespace, shape: str = "mini") -> list[str]:
    """Return the arguments of servers with a model of a shape."""
    arguments = ["--no-log-requests", "--dtype", options.dtype]
    arguments += ["--max-queue-tokens", str(QUEUE_TOKENS)]
    if shape != "mini":
        arguments += ["--model", str(checkpoint_of(shape).folder), "--cache-dir", str(CACHE)]
    return arguments


@contextmanager
def servers(kind: str, arguments: Sequence[str], checkout: Path = ROOT) -> Iterator[Server]:
    """Run a server, with two gateway processes, or with an engine server behind it."""
    if kind == "workers":
        arguments = [*arguments, "--workers", "2"]
    if kind == "remote":
        with one_server([*arguments, "--token-input", "accept"], checkout) as engine:
            url = f"http://127.0.0.1:{engine.port}"
            with one_server(
                [*arguments, "--engine", "remote", "--engine-url", url], checkout
            ) as gateway:
                yield gateway
        return
    with one_server(arguments, checkout) as server:
        yield server


@contextmanager
def one_server(arguments: Sequence[str], checkout: Path) -> Iterator[Server]:
    """Run a server of a checkout until the block ends."""
    port = free_port()
    command = [sys.executable, "-m", "taskvec", "serve", "--port", str(port), *arguments]
    paths = [str(checkout / folder) for folder in ("service", "training")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with subprocess.Popen(
        [*command, "--log-level", "error"], env=environment, cwd=checkout
    ) as process:
        try:
            wait_ready(port, timeout=START_SECONDS, process=process)
            yield Server(port, process.pid)
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


if __name__ == "__main__":
    main()
