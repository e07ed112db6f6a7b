"""Several gateway processes in front of one engine process, as one service."""

from __future__ import annotations

import base64
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from conftest import running_server
from processes import (
    EXACT,
    NOT_MEASURED,
    TASKS,
    TEXTS,
    Load,
    Served,
    answers,
    command_of,
    connects,
    embed,
    ended,
    served,
    started,
    total,
    wait_for,
)

pytestmark = pytest.mark.full("failures, restarts and several processes of running servers")

OUTPUTS = ["float", "base64", "int8", "uint8", "binary", "ubinary"]
RAW_OUTPUTS = {"float": "<f4", "float16": "<f2", "int8": "i1", "ubinary": "u1"}
REMOTE = ("--engine", "remote", "--engine-url", "https://127.0.0.1:1")


@pytest.fixture(scope="module")
def workers() -> Iterator[Served]:
    """Two gateways and their engine, on the default model."""
    with served("--workers", "2", *EXACT) as server:
        yield server


@pytest.fixture(scope="module")
def alone() -> Iterator[str]:
    """One process that serves the same."""
    with running_server(*EXACT) as url:
        yield url


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("output", OUTPUTS)
def test_the_answer_is_that_of_one_process(
    workers: Served, alone: str, task: str, output: str
) -> None:
    """Every task and output type gives the JSON that a single process gives."""
    body = {"input": TEXTS, "task": task, "embedding_type": output, "dimensions": 128}
    mine, theirs = (embed(url, body).json() for url in (workers.url, alone))
    assert {k: v for k, v in mine.items() if k != "data"} == {
        k: v for k, v in theirs.items() if k != "data"
    }
    rows = [[decoded(row["embedding"]) for row in answer["data"]] for answer in (mine, theirs)]
    # A value between two steps of a quantised type may fall to either side.
    allowed = 1e-5 if output in {"float", "base64"} else 1 if "int8" in output else 0
    assert np.abs(np.subtract(*rows)).max() <= allowed


def test_limits_of_clients_are_not_those_of_gateways() -> None:
    """Gateways merge and split requests: the engine process takes more texts than a client may."""
    with served("--workers", "2", "--max-texts", "1", *EXACT) as server:
        assert embed(server.url, {"input": ["one"]}).status_code == 200
        refused = httpx.post(f"{server.url}/v1/embeddings", json={"input": ["one", "two"]})
        assert refused.json()["code"] == "too_many_inputs"


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("output", "dtype"), RAW_OUTPUTS.items())
def test_raw_bytes_are_those_of_one_process(
    workers: Served, alone: str, task: str, output: str, dtype: str
) -> None:
    """A matrix comes with the same headers and values as from a single process."""
    body = {"input": TEXTS, "task": task, "embedding_type": output, "normalized": True}
    answers = [embed(url, body, accept="application/octet-stream") for url in (workers.url, alone)]
    for header in ("content-type", "x-embedding-shape", "x-embedding-dtype", "x-prompt-tokens"):
        assert answers[0].headers[header] == answers[1].headers[header]
    mine, theirs = (np.frombuffer(a.content, dtype).astype(np.float64) for a in answers)
    assert len(mine) >= len(TEXTS) * 32
    allowed = {"float": 1e-5, "float16": 1e-3, "int8": 1, "ubinary": 0}[output]
    assert np.abs(mine - theirs).max() <= allowed


def test_lengths_survive_the_way_to_the_engine(workers: Served, alone: str) -> None:
    """Vectors that are not normalised keep the length that the engine gave them."""
    body = {"input": TEXTS, "normalized": False, "task": "clustering"}
    mine, theirs = (
        np.array([row["embedding"] for row in embed(url, body).json()["data"]])
        for url in (workers.url, alone)
    )
    assert np.abs(np.linalg.norm(theirs, axis=1) - 1).max() > 0.01
    assert np.abs(mine - theirs).max() <= 1e-4 * np.abs(theirs).max()


def test_errors_are_those_of_one_process(workers: Served, alone: str) -> None:
    """What a client does wrong is told as a single process tells it; token ids stay refused."""
    for body in ({"input": ["a", ""]}, {"input": [1, 2]}, {"input": "x", "task": "poetry"}):
        mine, theirs = (
            httpx.post(f"{url}/v1/embeddings", json=body) for url in (workers.url, alone)
        )
        assert mine.status_code == theirs.status_code == 400
        assert mine.json()["error"] == theirs.json()["error"]
    assert httpx.post(f"{workers.url}/v1/engine/embed", content=b"x").status_code == 404


def test_metrics_are_of_all_processes() -> None:
    """Whichever gateway renders them, the series are those of the service as one."""
    with served("--workers", "2", *NOT_MEASURED, *EXACT) as server:
        for n in range(40):
            embed(server.url, {"input": f"text {n}", "task": TASKS[n % len(TASKS)]})
        httpx.post(f"{server.url}/v1/embeddings", json={"input": ""})
        for _ in range(12):
            shown = httpx.get(f"{server.url}/metrics").text
            assert total(shown, "taskvec_requests_total", 'status="200"') == 40
            assert total(shown, "taskvec_requests_total", 'status="400"') == 1
            assert total(shown, "taskvec_requests_total") == 41, "a call to the engine was counted"
            assert total(shown, "taskvec_texts_total", 'status="200"') == 40
            assert total(shown, "taskvec_requests_in_flight") == 0
            assert total(shown, "taskvec_queue_texts") == total(shown, "taskvec_queue_tokens") == 0
            assert total(shown, "taskvec_engine_ready") == 1
            assert total(shown, "taskvec_batch_texts_sum") >= 40
            assert total(shown, "taskvec_forward_seconds_count") > 0
            assert total(shown, "taskvec_batch_fill_ratio_count") > 0
            for stage in ("tokenize", "queue", "engine", "encode"):
                assert total(shown, "taskvec_stage_seconds_count", f'"{stage}"') == 40
            assert total(shown, "taskvec_answers_total", '"numbers"') == 40
            assert total(shown, "taskvec_rejected_total", '"empty_input"') == 1
            assert total(shown, "taskvec_engine_state", '"ready"') == 1
            assert total(shown, "taskvec_engine_state") == 1
            assert total(shown, "taskvec_build_info", 'engine="packed"') == 1
            assert total(shown, "taskvec_build_info") == 1
            assert total(shown, "taskvec_queue_oldest_seconds") == 0
            assert total(shown, "taskvec_tokenizer_requests_waiting") == 0
            assert total(shown, "taskvec_event_loop_lag_seconds_count") > 0
            assert "pid=" not in shown
            lines = [line for line in shown.splitlines() if not line.startswith("#")]
            series = [line.rpartition(" ")[0] for line in lines]
            assert len(series) == len(set(series)), "a series came twice"


def test_the_age_of_the_queue_is_that_of_the_engine_process() -> None:
    """While texts wait in the engine process, gateways show how long the oldest has."""
    with served("--workers", "2", "--max-batch-tokens", "512", *EXACT) as server:

        def ask() -> int:
            body = {"input": [f"word {n} " * 100 for n in range(200)]}
            return httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=120).status_code

        def age() -> float:
            shown = httpx.get(f"{server.url}/metrics").text
            # 200, and the few of the calibration; counted by gateways, too, they would be near 400.
            assert total(shown, "taskvec_queue_texts") < 300
            return total(shown, "taskvec_queue_oldest_seconds")

        with ThreadPoolExecutor(1) as threads:
            answer = threads.submit(ask)
            wait_for(lambda: age() > 0.5)
            assert not answer.done()
            assert answer.result() == 200
        wait_for(lambda: age() == 0)


def test_the_first_connection_is_answered() -> None:
    """From the moment the port takes connections no request is told to come back later."""
    with started("--workers", "2", *EXACT) as server:
        wait_for(lambda: connects(server.port), seconds=60)
        statuses = {
            httpx.post(f"{server.url}/v1/embeddings", json={"input": str(n)}).status_code
            for n in range(100)
        }
        assert statuses == {200}
        assert len(server.gateways()) == 2


def test_every_gateway_answers(workers: Served) -> None:
    """Requests go on while one gateway does nothing, whichever of the two that is."""
    first, second = sorted(workers.gateways())
    for still in (first, second):
        os.kill(still, signal.SIGSTOP)
        try:
            # The sleeper may have been given a connection already: another try gets the other one.
            assert any(answers(workers.url) for _ in range(10))
        finally:
            os.kill(still, signal.SIGCONT)


def test_nothing_is_lost_on_sigterm() -> None:
    """SIGTERM under load: what was taken is answered, or refused as draining; no process stays."""
    with served("--workers", "2", *EXACT) as server:
        processes = server.descendants()
        assert len(server.gateways()) == 2
        with ThreadPoolExecutor(8) as threads:
            load = Load(server.url)
            runs = [threads.submit(load.run) for _ in range(8)]
            load.wait_for(24)
            load.hold()
            server.process.send_signal(signal.SIGTERM)
            signalled = time.monotonic()
            errors = server.process.communicate(timeout=60)[1].decode()
            ended = time.monotonic() - signalled
            for run in runs:
                run.result()
        assert ended < 30
        assert set(load.seen) <= {"200", "503"}, load.seen
        assert load.seen["200"] >= 24
        assert errors.strip() == ""
        assert server.process.returncode in {0, -signal.SIGTERM, 128 + signal.SIGTERM}
        wait_for(lambda: not any(map(command_of, processes)))


def test_a_killed_gateway_is_replaced() -> None:
    """A gateway that dies costs what it held: the other goes on, a new one comes, counts stay."""
    with served("--workers", "2", *EXACT) as server:
        for _ in range(10):
            embed(server.url, {"input": "before"})
        before = server.gateways()
        killed = min(before)
        os.kill(killed, signal.SIGKILL)
        for _ in range(5):
            embed(server.url, {"input": "by the other"})
        wait_for(lambda: len(server.gateways() - {killed}) == 2)
        for _ in range(5):
            embed(server.url, {"input": "by either"})
        shown = httpx.get(f"{server.url}/metrics").text
        assert total(shown, "taskvec_requests_total", 'status="200"') == 20
        assert total(shown, "taskvec_requests_in_flight") == 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--model", "/no/such/folder"), "/no/such/folder"),
        (("--device", "cuda:99"), "--device"),
        ((*REMOTE, "--model", "/no/such/folder"), "/no/such/folder"),
        ((*REMOTE, "--engine-ca", "/no/such/file"), "--engine-ca /no/such/file"),
    ],
    ids=str,
)
def test_a_start_that_cannot_be_ends(options: tuple[str, ...], named: str) -> None:
    """What no new gateway would cure is not tried for ever: exit code 3, one sentence."""
    server = Served("--workers", "2", "--log-level", "error", *options)
    code, errors = ended(server)
    assert code == 3, errors
    (sentence,) = errors.splitlines()
    assert sentence.startswith("taskvec: ")
    assert named in sentence


def test_a_busy_port_is_named() -> None:
    """A port that is taken ends the start, and the last line says which address it was."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = Served("--workers", "2", "--log-level", "error", port=port)
        code, errors = ended(server)
    assert code == 3, errors
    assert "in use" in errors
    assert f"127.0.0.1:{port}" in errors.splitlines()[-1]


def test_a_start_can_be_broken_off() -> None:
    """SIGTERM ends gateways that still wait for their engine."""
    server = Served("--workers", "2", "--log-level", "error", *REMOTE)
    wait_for(lambda: len(server.gateways()) == 2)
    time.sleep(1)  # they are importing; then they wait
    server.process.terminate()
    _, errors = ended(server)
    assert errors.strip() == ""


def decoded(embedding: list[float] | str) -> list[float]:
    """The numbers of an embedding, as numbers or base64 of float32."""
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding), "<f4").tolist()
    return embedding
