"""`taskvec serve --engine vllm`: signals, a dead engine process, and parity."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import numpy as np
import pytest

from conftest import free_port, wait_until
from taskvec.checkpoint.checkpoint import Checkpoint
from vllm_servers import START_SECONDS, unit

TASKS = ("retrieval.query", "text-matching", "clustering", "classification")


@contextmanager
def serving(cache: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run a gateway with vLLM in its own process group."""
    port = free_port()
    command = [sys.executable, "-m", "taskvec", "serve", "--port", str(port), "--engine", "vllm"]
    command += ["--memory-share", "0.15", "--cache-dir", str(cache), "--no-log-requests", *options]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, process_group=0
    ) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until(f"{url}/health/ready", process, START_SECONDS)
            yield url, process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def ask(url: str, task: str, text: str = "How do I stop a program?") -> httpx.Response:
    """Send one request over a new connection."""
    body = {"input": [text, "Two."], "task": task}
    return httpx.post(f"{url}/v1/embeddings", json=body, timeout=120)


def test_a_signal_to_the_whole_group_loses_nothing(cache: Path) -> None:
    """After SIGTERM or SIGINT to the process group, the admitted requests are answered."""
    with serving(cache) as (url, process):
        answers: list[httpx.Response] = []
        sent = threading.Barrier(9)

        def client(number: int) -> None:
            sent.wait()
            answers.append(ask(url, TASKS[number % 4], "word " * 400))

        threads = [threading.Thread(target=client, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        sent.wait()
        limit = time.monotonic() + 30
        while time.monotonic() < limit:
            page = httpx.get(f"{url}/metrics").text
            if "taskvec_requests_in_flight 8.0" in page or answers:
                break
        os.killpg(process.pid, signal.SIGINT)
        os.killpg(process.pid, signal.SIGTERM)
        for thread in threads:
            thread.join()
        process.wait(60)
        assert [answer.text for answer in answers if answer.status_code != 200] == []
        assert len(answers) == 8


def test_a_dead_engine_process_is_not_live(cache: Path) -> None:
    """Without vLLM's process, requests fail with the documented error, and liveness fails."""
    with serving(cache) as (url, process):
        assert ask(url, "clustering").status_code == 200
        for child in children(process.pid):
            os.kill(child, signal.SIGKILL)
        limit = time.monotonic() + 30
        while httpx.get(f"{url}/health/live").status_code == 200 and time.monotonic() < limit:
            time.sleep(0.1)
        live, answer = httpx.get(f"{url}/health/live"), ask(url, "clustering")
        assert (live.status_code, answer.status_code) == (503, 503)
        assert answer.json()["error"]["code"] == "engine_unavailable"
        assert "vLLM's engine process died" in live.json()["detail"]


def test_the_vectors_are_those_of_the_packed_engine(
    cache: Path, default_checkpoint: Checkpoint
) -> None:
    """The vllm and the packed engine return the same vectors for the same request."""
    port = free_port()
    packed = [sys.executable, "-m", "taskvec", "serve", "--port", str(port)]
    with serving(cache) as (url, _), subprocess.Popen(packed, stderr=subprocess.PIPE) as process:
        try:
            other = f"http://127.0.0.1:{port}"
            wait_until(f"{other}/health/ready", process)
            for task in TASKS:
                pair = [vectors(ask(side, task)) for side in (url, other)]
                assert (unit(pair[0]) * unit(pair[1])).sum(axis=1) == pytest.approx(1, abs=1e-3)
            raw = [
                httpx.post(
                    f"{side}/v1/embeddings",
                    json={"input": "Lengths.", "normalized": False},
                    headers={"accept": "application/octet-stream"},
                    timeout=60,
                )
                for side in (url, other)
            ]
            lengths = [float(np.linalg.norm(np.frombuffer(r.content, "<f4"))) for r in raw]
            assert lengths[0] == pytest.approx(lengths[1], rel=0.02)
        finally:
            process.terminate()
            process.communicate(timeout=60)
    assert default_checkpoint.card.dimension * 4 == len(raw[0].content)


def vectors(answer: httpx.Response) -> np.ndarray:
    return np.array([entry["embedding"] for entry in answer.json()["data"]])


def children(process: int) -> list[int]:
    """Return all descendants of a process."""
    found = []
    for task in Path(f"/proc/{process}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *children(child)]
    return found
