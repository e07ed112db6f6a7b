"""The end of a real server: it leaves, refuses, answers what it has, and is gone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from processes import EXACT, Load, Served, command_of, served, wait_for

pytestmark = pytest.mark.full("failures, restarts and several processes of running servers")

LONG = {"input": [f"{'word ' * 100}{n}" for n in range(2048)], "dimensions": 8}
WORKERS = pytest.mark.parametrize("workers", ["1", "2"])


@contextmanager
def long_request(server: Served) -> Iterator[Future[httpx.Response]]:
    """A request that takes the engine some seconds, and is in it."""
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(httpx.post, f"{server.url}/v1/embeddings", json=LONG, timeout=300)
        wait_for(lambda: "taskvec_requests_in_flight 1.0" in page(server))
        wait_for(lambda: "taskvec_queue_texts 0.0" not in page(server))
        yield answer


@WORKERS
def test_a_server_leaves_before_it_refuses(workers: str) -> None:
    """Not ready at once, but serving for the grace; then 503 draining; what it has is answered."""
    with (
        served("--workers", workers, "--drain-grace", "2", *EXACT) as server,
        long_request(server) as answer,
    ):
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: ready(server) == 503, 1)
        assert short(server).status_code == 200
        wait_for(lambda: short(server).status_code == 503)
        assert not answer.done()
        refused = short(server)
        assert refused.json()["code"] == "draining"
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.headers["connection"] == "close"
        assert len(answer.result().json()["data"]) == 2048
        assert server.process.wait(30) in {0, -signal.SIGTERM, 128 + signal.SIGTERM}


@WORKERS
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda item: item.name)
def test_the_same_signal_again_ends_it_at_once(number: signal.Signals, workers: str) -> None:
    """Whoever does not want to wait need not: no process is left, and the exit code says why."""
    options = ("--workers", workers, "--drain-grace", "60", *EXACT)
    with served(*options) as server, long_request(server) as answer:
        processes = server.descendants()
        server.process.send_signal(number)
        wait_for(lambda: ready(server) == 503, 2)
        server.process.send_signal(number)
        begun = time.monotonic()
        code = server.process.wait(30)
        assert time.monotonic() - begun < 10
        check_not_answered(answer.result())
        # One process ends as after SIGINT, whichever signal it was.
        assert code in {-number, 128 + number, 128 + signal.SIGINT}
        wait_for(lambda: not any(map(command_of, processes)))


def test_a_gateway_that_hangs_is_ended_by_the_second_signal() -> None:
    """A gateway that cannot answer signals is killed by the main process, and nothing is left."""
    with served("--workers", "2", "--drain-grace", "60", *EXACT) as server:
        processes = server.descendants()
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: ready(server) == 503, 5)
        os.kill(min(server.gateways()), signal.SIGSTOP)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 128 + signal.SIGTERM
        wait_for(lambda: not any(map(command_of, processes)))


def test_the_limit_ends_it() -> None:
    """What is not answered within the limit is given up, with an answer that says so."""
    with served("--drain-timeout", "1", *EXACT) as server, long_request(server) as answer:
        server.process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        server.process.wait(30)
        assert time.monotonic() - begun < 15
        check_not_answered(answer.result())


def test_grace_and_limit_bound_the_whole() -> None:
    """With a request that hangs in an engine server, the end comes a second after both, at most."""
    waits = ("--drain-grace", "1", "--drain-timeout", "4")
    with served("--token-input", "accept", *EXACT) as engine:
        pool = ("--engine", "remote", "--engine-url", engine.url, "--log-level", "error")
        with served(*pool, *waits) as server, ThreadPoolExecutor(1) as threads:
            engine.process.send_signal(signal.SIGSTOP)
            try:
                answer = threads.submit(short, server)
                wait_for(lambda: "taskvec_requests_in_flight 1.0" in page(server))
                server.process.send_signal(signal.SIGTERM)
                begun = time.monotonic()
                server.process.wait(30)
                assert 4.5 < time.monotonic() - begun < 8  # uvicorn's own limit would make it 9
                assert answer.exception() is not None or answer.result().status_code >= 500
            finally:
                engine.process.send_signal(signal.SIGCONT)


@WORKERS
def test_a_restart_under_load_loses_nothing(workers: str) -> None:
    """Clients that never stop see answers, clean refusals, and then a closed port; nothing else."""
    options = ("--workers", workers, "--drain-grace", "0.5", *EXACT)
    with served(*options) as server, ThreadPoolExecutor(6) as threads:
        load = Load(server.url, max_requests=10_000, seconds=60)
        runs: list[Future[Any]] = [threads.submit(load.run) for _ in range(6)]
        load.wait_for(12)
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(30)
        wait_for(lambda: load.seen.get("refused", 0) > 0)
        with served(*options, port=server.port):
            was = load.seen["200"]
            wait_for(lambda: load.seen["200"] >= was + 12)
            load.stop.set()
            for run in runs:
                run.result()
    assert set(load.seen) <= {"200", "503", "refused"}, load.seen


def check_not_answered(answer: httpx.Response) -> None:
    """The end of the service interrupted a request: a 503 that says so, in the usual form."""
    body = answer.json()
    assert (answer.status_code, body["code"]) == (503, "draining")
    assert set(body) == {"error", "detail", "code", "request_id"}
    assert "stopped before" in body["detail"]
    assert answer.headers["retry-after"] == "1"
    assert answer.headers["connection"] == "close"


def page(server: Served) -> str:
    """The metrics."""
    return httpx.get(f"{server.url}/metrics").text


def ready(server: Served) -> int:
    """The readiness probe's status."""
    return httpx.get(f"{server.url}/health/ready").status_code


def short(server: Served) -> httpx.Response:
    """The answer to a small request."""
    return httpx.post(f"{server.url}/v1/embeddings", json={"input": "a"}, timeout=60)
