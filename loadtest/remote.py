"""Measure the cost of a gateway in front of engine servers, and the scaling of gateway processes.

Three parts: the gateway's CPU time per text in front of servers with almost no cost; one and two
gateway processes in front of one engine process; and, with vLLM's own environment (``make
.venv-vllm/stamp``), the gateway compared with calling the same vLLM server directly with the same
token ids. wrk sends the load.

    python loadtest/remote.py --vllm-python .venv-vllm/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from peer_servers import vllm_server
from report import ratio, spread, write_result
from server import free_port, wait_ready
from taskvec.checkpoint.open import DEFAULT_MODEL, open_checkpoint
from taskvec.service import build_tokenizer
from workload import QWEN, checkpoint_of

HERE = Path(__file__).parent
TEXT = "How do I find out which process listens on a port, and stop it without losing its work?"
TICKS = os.sysconf("SC_CLK_TCK")
VLLM_FACTOR = 4
"""Factor for the duration of vLLM's rounds: on a CPU it answers few requests per second."""
SIDES = ("direct", "through the gateway")
Figures = dict[tuple[str, int, int], list[tuple[float, float]]]
"""(side, texts per request, connections) -> (requests per second, median ms) of each round."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--vllm-python", type=Path)
    options = parser.parse_args()
    model = str(checkpoint_of(QWEN).folder)
    with tempfile.TemporaryDirectory() as workdir:
        figures: dict[str, Any] = {
            "vector": "1024 dimensions, base64, tokenised by the gateway",
            "gateway processor time": {
                f"{kind}, {connections} connections": processor_time(
                    kind, connections, model, Path(workdir), options
                )
                for kind in ("vllm", "taskvec")
                for connections in (2, 8)
            },
            "of it the tokenizer, measured alone": tokenizer_time(options),
            "gateways side by side": side_by_side(model, Path(workdir), options),
        }
        if options.vllm_python:
            figures["over vLLM"] = over_vllm(options.vllm_python, Path(workdir), options)
    write_result("remote", figures)


def processor_time(
    kind: str, connections: int, model: str, workdir: Path, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Return the gateway's CPU microseconds per text, with 32 texts per request."""
    micros, rates = [], []
    with null_server(kind, model, workdir) as engine, gateway(model, workdir, engine) as (url, pid):
        for warm in [True] + [False] * options.rounds:
            before, done = cpu_seconds(pid), answered_requests(url)
            rate = wrk(f"{url}/v1/embeddings", text_body(32), connections, options.seconds)[0]
            requests = answered_requests(url) - done
            if not warm:
                micros.append((cpu_seconds(pid) - before) / requests / 32 * 1e6)
                rates.append(rate)
    result = {
        "microseconds a text": spread(micros),
        "requests of 32 texts a second": spread(rates, 0),
    }
    print(kind, connections, result, flush=True)
    return result


def tokenizer_time(options: argparse.Namespace) -> dict[str, float]:
    """Return the tokeniser's microseconds per text, with 32 texts per call and no other load."""
    tokenizer = build_tokenizer(checkpoint_of(QWEN), max_tokens=0, threads=1)
    micros = []
    for warm in [True] + [False] * options.rounds:
        started = time.process_time()
        for _ in range(300):
            tokenizer.encode_now([TEXT] * 32, prompt="Document: ", truncate=False)
        if not warm:
            micros.append((time.process_time() - started) / 300 / 32 * 1e6)
    return spread(micros)


def side_by_side(model: str, workdir: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one and two gateway processes in front of one engine process with a null engine."""
    result: dict[str, Any] = {}
    rates: dict[int, list[float]] = {1: [], 2: []}
    with null_server("taskvec", model, workdir, unix=True) as engine:
        engine_pid = int((workdir / "null.pid").read_text())
        costs: dict[str, list[float]] = {"gateways": [], "engine process": []}
        for warm in [True] + [False] * options.rounds:
            for workers, values in rates.items():
                with gateway(model, workdir, engine, "--workers", str(workers)) as (url, pid):
                    wrk(f"{url}/v1/embeddings", text_body(1), 64, 1)
                    before = [cpu_seconds(pid), cpu_seconds(engine_pid)]
                    done = answered_requests(url)
                    rate = wrk(f"{url}/v1/embeddings", text_body(1), 64, options.seconds)[0]
                    requests = answered_requests(url) - done
                    after = [cpu_seconds(pid), cpu_seconds(engine_pid)]
                if warm:
                    continue
                values.append(rate)
                for name, start, end in zip(costs, before, after, strict=True):
                    costs[name].append((end - start) / requests * 1e6)
    result["requests of one text a second"] = {n: spread(r, 0) for n, r in rates.items()}
    result["two over one"] = ratio(rates[2], rates[1])
    result["microseconds a request"] = {name: spread(values) for name, values in costs.items()}
    print(result, flush=True)
    return result


def over_vllm(python: Path, workdir: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Compare direct calls with calls through the gateway, to a real and to a null vLLM server."""
    seconds = options.seconds
    with null_server("vllm", DEFAULT_MODEL, workdir) as url:
        free = directly_and_through(url, workdir, {(1, 1): seconds}, options.rounds)
    with vllm_server(python, open_checkpoint(DEFAULT_MODEL), workdir) as (url, _):
        loads = {(1, 1): VLLM_FACTOR * seconds, (8, 16): VLLM_FACTOR * seconds}
        real = directly_and_through(url, workdir, loads, options.rounds)
    result = {
        "one text of 20 tokens, one connection, p50 ms": {
            "vLLM on these cores": p50s(real),
            "a server without cost": p50s(free),
        },
        "8 texts of 20 tokens, 16 connections, requests a second": {
            side: spread([rate for rate, _ in real[side, 8, 16]], 1) for side in SIDES
        },
        "throughput, gateway over direct": ratio(
            *([rate for rate, _ in real[side, 8, 16]] for side in reversed(SIDES))
        ),
    }
    print(result, flush=True)
    return result


def p50s(figures: Figures) -> dict[str, dict[str, float]]:
    """Return the median latencies of one text at a time, and their difference, in milliseconds."""
    direct, through = ([p50 for _, p50 in figures[side, 1, 1]] for side in SIDES)
    added = [a - b for a, b in zip(through, direct, strict=True)]
    return {"direct": spread(direct, 2), "through": spread(through, 2), "added": spread(added, 2)}


def directly_and_through(
    url: str, workdir: Path, loads: dict[tuple[int, int], int], rounds: int
) -> Figures:
    """Measure both sides under each load, alternately.

    Args:
        url: engine server.
        workdir: folder for the gateway's cache.
        loads: (texts per request, connections) -> seconds.
        rounds: number of rounds after one to warm up.
    """
    random = np.random.default_rng(0)
    vocabulary = open_checkpoint(DEFAULT_MODEL).backbone.vocabulary
    ids = random.integers(5, vocabulary, (8, 20)).tolist()
    direct = {
        "model": "retrieval",
        "encoding_format": "bytes_only",
        "embed_dtype": "float32",
        "use_activation": True,
    }
    raw = {"Accept": "application/octet-stream"}
    figures: Figures = {}
    with gateway(DEFAULT_MODEL, workdir, url, "--token-input", "accept") as (gateway_url, _):
        through = (gateway_url, {"task": "retrieval"}, raw)
        sides = dict(zip(SIDES, ((url, direct, {}), through), strict=True))
        for warm in [True] + [False] * rounds:
            for (side, (base, body, headers)), (load, seconds) in product(
                sides.items(), loads.items()
            ):
                texts, connections = load
                sent = body | {"input": ids[:texts]}
                measured = wrk(f"{base}/v1/embeddings", sent, connections, seconds, headers)
                if not warm:
                    figures.setdefault((side, texts, connections), []).append(measured)
    return figures


@contextmanager
def null_server(kind: str, model: str, workdir: Path, *, unix: bool = False) -> Iterator[str]:
    """Run a server with almost no cost; yields its URL."""
    port, socket = free_port(), workdir / "null.sock"
    address = ["--uds", str(socket)] if unix else ["--port", str(port)]
    command = [sys.executable, str(HERE / "null_server.py"), kind, "--model", model]
    with subprocess.Popen([*command, "--cache", str(workdir), *address]) as process:
        (workdir / "null.pid").write_text(str(process.pid))
        try:
            yield f"unix://{socket}" if unix else f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


@contextmanager
def gateway(model: str, workdir: Path, engine: str, *options: str) -> Iterator[tuple[str, int]]:
    """Run `taskvec serve --engine remote`; yields its URL and process id when it is ready."""
    port = free_port()
    command = [sys.executable, "-m", "taskvec", "serve", "--port", str(port), "--model", model]
    command += ["--engine", "remote", "--engine-url", engine, "--cache-dir", str(workdir)]
    command += ["--no-log-requests", "--log-level", "error", *options]
    with subprocess.Popen(command) as process:
        try:
            wait_ready(port)
            yield f"http://127.0.0.1:{port}", process.pid
        finally:
            process.terminate()


def text_body(texts: int) -> dict[str, Any]:
    """Return a request body with this number of texts."""
    return {"input": [TEXT] * texts, "encoding_format": "base64", "task": "clustering"}


def wrk(
    url: str,
    body: dict[str, Any],
    connections: int,
    seconds: int,
    headers: dict[str, str] | None = None,
) -> tuple[float, float]:
    """Run wrk; return requests per second and the median latency in milliseconds."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "post.lua"
        lines = ['wrk.method = "POST"', 'wrk.headers["Content-Type"] = "application/json"']
        for name, value in (headers or {}).items():
            lines.append(f'wrk.headers["{name}"] = "{value}"')
        script.write_text("\n".join([*lines, f"wrk.body = {json.dumps(json.dumps(body))}", ""]))
        command = f"wrk -t1 -c{connections} -d{seconds}s --latency -s {script} {url}"
        report = subprocess.run(
            shlex.split(command), capture_output=True, text=True, check=True
        ).stdout
    assert "Non-2xx" not in report, report
    rate = re.search(r"Requests/sec:\s+([\d.]+)", report)
    median = re.search(r"50%\s+([\d.]+)(us|ms|s)", report)
    assert rate is not None, report
    assert median is not None, report
    return float(rate[1]), float(median[1]) * {"us": 1e-3, "ms": 1.0, "s": 1e3}[median[2]]


def answered_requests(url: str) -> float:
    """Return the number of requests answered with status 200 so far."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(
        float(line.split()[-1])
        for line in lines
        if line.startswith("taskvec_requests_total{") and 'status="200"' in line
    )


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and its descendants."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    total = (int(fields[11]) + int(fields[12])) / TICKS
    return total + sum(map(cpu_seconds, children(pid)))


def children(pid: int) -> Sequence[int]:
    """Return the child processes of a process."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return found


if __name__ == "__main__":
    main()
