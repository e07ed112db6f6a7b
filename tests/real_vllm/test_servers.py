"""A gateway with stock vLLM servers: parity, a killed server, and wrong servers."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest

from conftest import free_port, wait_until
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.engines.base import TokenBatch
from taskvec.engines.packed.engine import PackedEngine, PackedOptions
from taskvec.engines.remote.engine import RemoteEngine, RemoteOptions
from vllm_servers import VllmServer, cosines, mixed_batches, vllm_servers

LEAST_COSINE = 0.999
TASKS = ("retrieval.query", "text-matching", "clustering", "classification")
Servers = tuple[VllmServer, ...]


@contextmanager
def gateway(cache: Path, *servers: VllmServer) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run `taskvec serve --engine remote` with servers."""
    port = free_port()
    command = [sys.executable, "-m", "taskvec", "serve", "--port", str(port), "--engine", "remote"]
    command += ["--cache-dir", str(cache), "--no-log-requests"]
    for server in servers:
        command += ["--engine-url", server.url]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until(f"{url}/health/live", process)
            yield url, process
        finally:
            process.terminate()
            process.communicate(timeout=60)


def until(condition: object, seconds: float = 60) -> None:
    """Wait until a condition is true."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it did not happen"
        time.sleep(0.1)


def all_serve(url: str, count: int) -> bool:
    """Return whether ``count`` servers are serving."""
    page = httpx.get(f"{url}/metrics").text
    lines = [
        line for line in page.splitlines() if line.startswith("taskvec_engine_server_serving{")
    ]
    return sum(line.endswith(" 1.0") for line in lines) == count


@pytest.mark.anyio
async def test_all_three_engines_agree(
    two_servers: Servers, default_checkpoint: Checkpoint, cache: Path
) -> None:
    """The packed and the remote engine equal the reference for every adapter and length."""
    urls = tuple(server.url for server in two_servers)
    remote = RemoteEngine(default_checkpoint, cache, RemoteOptions(urls=urls))
    packed = PackedEngine(default_checkpoint, PackedOptions(dtype="bfloat16"))
    await packed.start()
    await remote.start()
    try:
        async with asyncio.timeout(60):
            while not remote.health().ready:
                await asyncio.sleep(0.1)
        batches = mixed_batches(default_checkpoint)
        for engine in (packed, remote):
            answers = await asyncio.gather(
                *(engine.embed(TokenBatch(ids, adapter)) for adapter, ids in batches)
            )
            for (adapter, ids), answer in zip(batches, answers, strict=True):
                found = cosines(default_checkpoint, adapter, ids, answer.vectors)
                assert found.min() >= LEAST_COSINE, (adapter, found)
        short_and_longest = [
            np.arange(5, 8, dtype=np.int32),
            np.full(default_checkpoint.card.max_tokens, 7, dtype=np.int32),
        ]
        async with asyncio.timeout(120):
            answer = await remote.embed(TokenBatch(short_and_longest, "retrieval"))
        found = cosines(default_checkpoint, "retrieval", short_and_longest, answer.vectors)
        assert found.min() >= LEAST_COSINE
    finally:
        await remote.stop()
        await packed.stop()


def test_a_killed_server_fails_no_request(two_servers: Servers, cache: Path) -> None:
    """One of two servers is killed under load and restarted: every request is answered."""
    with gateway(cache, *two_servers) as (url, _):
        until(lambda: all_serve(url, 2))
        failures: list[str] = []
        answered = 0
        over = threading.Event()

        def client(number: int) -> None:
            nonlocal answered
            with httpx.Client(timeout=120) as http:
                turn = 0
                while not over.is_set():
                    turn += 1
                    body = {
                        "input": [f"text {number} {turn} {i}" for i in range(3)],
                        "task": TASKS[turn % 4],
                    }
                    # All requests have the same id, which must not become the id in the engine.
                    answer = http.post(
                        f"{url}/v1/embeddings", json=body, headers={"x-request-id": "the-same"}
                    )
                    if answer.status_code != 200:
                        failures.append(answer.text)
                    answered += 1
                    over.wait(0.3)  # leaves cores to the server that is starting

        threads = [threading.Thread(target=client, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        try:
            until(lambda: answered >= 30)
            two_servers[0].kill()
            before = answered
            until(lambda: answered >= before + 40)
            assert all_serve(url, 1)
            two_servers[0].start()
            two_servers[0].wait()
            until(lambda: all_serve(url, 2))
            before = answered
            until(lambda: answered >= before + 30)
        finally:
            over.set()
            for thread in threads:
                thread.join()
        assert failures == []
        assert sum(calls(url, two_servers[0], "unreachable")) > 0


def calls(url: str, server: VllmServer, outcome: str) -> list[float]:
    """Return the number of calls to a server with an outcome."""
    page = httpx.get(f"{url}/metrics").text
    head = f'taskvec_engine_calls_total{{outcome="{outcome}",server="{server.url}"}}'
    return [float(line.split()[-1]) for line in page.splitlines() if line.startswith(head)]


def test_sigterm_of_the_gateway_loses_nothing(two_servers: Servers, cache: Path) -> None:
    """After SIGTERM, the gateway answers the admitted requests before it ends."""
    with gateway(cache, *two_servers) as (url, process):
        until(lambda: all_serve(url, 2))
        answers: list[httpx.Response] = []

        def client(number: int) -> None:
            body = {"input": ["word " * 300] * 4, "task": TASKS[number % 4]}
            answers.append(httpx.post(f"{url}/v1/embeddings", json=body, timeout=120))

        threads = [threading.Thread(target=client, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        until(
            lambda: answers or "taskvec_requests_in_flight 8.0" in httpx.get(f"{url}/metrics").text
        )
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        process.wait(60)
    assert [answer.text for answer in answers if answer.status_code != 200] == []
    assert len(answers) == 8


@pytest.mark.anyio
async def test_servers_with_wrong_adapters_are_rejected(
    default_checkpoint: Checkpoint, cache: Path
) -> None:
    """A server with a missing or swapped adapter is rejected, and the adapter is named."""
    homes = {adapter.name: adapter.weights.parent for adapter in default_checkpoint.adapters}
    missing = [f"{name}={home}" for name, home in homes.items() if name != "clustering"]
    swapped = homes | {
        "retrieval": homes["classification"],
        "classification": homes["retrieval"],
    }
    servers = (
        VllmServer(default_checkpoint, cache, 0, missing),
        VllmServer(
            default_checkpoint, cache, 1, [f"{name}={home}" for name, home in swapped.items()]
        ),
    )
    reasons = []
    with vllm_servers(*servers):
        for server in servers:
            engine = RemoteEngine(default_checkpoint, cache, RemoteOptions(urls=(server.url,)))
            await engine.start()
            async with asyncio.timeout(60):
                while "not been checked" in engine.health().reason or "no server" in (
                    engine.health().reason
                ):
                    await asyncio.sleep(0.1)
            assert not engine.health().ready
            reasons.append(engine.health().reason)
            await engine.stop()
    assert "does not serve the adapters clustering" in reasons[0]
    assert "gives the vectors of adapter" in reasons[1]
