"""A gateway in front of taskvec servers: the same vectors, and no lost requests."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from conftest import free_port, wait_until
from processes import EXACT, TASKS, TEXTS, Load, Served, embed, served, total, wait_for
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.checkpoint.open import DEFAULT_MODEL

pytestmark = pytest.mark.full("failures, restarts and several processes of running servers")

SERVER = ("--token-input", "accept", *EXACT)
GATEWAY = ("--engine", "remote", "--log-level", "error")

POISON = 6543
"""A token that no probe has."""

WITHOUT_TORCH = """
import importlib.abc
import sys
import time

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "vllm"):
            raise ModuleNotFoundError("not installed here: " + name, name=name)

sys.meta_path.insert(0, Refuse())
"""

MAKE_ENGINE = f"""{WITHOUT_TORCH}
from taskvec.checkpoint.open import open_checkpoint
from taskvec.service import build_engine
from taskvec.settings import Settings

settings = Settings(engine="remote", engine_url="http://127.0.0.1:1")
print(type(build_engine(settings, open_checkpoint({DEFAULT_MODEL!r}), None)).__name__)
"""

SERVE = (
    f"{WITHOUT_TORCH}\nfrom taskvec.cli.main import main\nif __name__ == '__main__':\n    main()\n"
)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Set a cache folder for the servers of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TASKVEC_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[Served, Served]]:
    """Start two servers of the default model that accept token ids."""
    with served(*SERVER) as first, served(*SERVER) as second:
        yield first, second


@pytest.fixture(scope="module", params=["1", "2"], ids=["one gateway", "two gateways"])
def gateway(servers: tuple[Served, Served], request: pytest.FixtureRequest) -> Iterator[Served]:
    """Start a gateway in front of both servers."""
    with served(*before(*servers), "--workers", request.param) as gateway:
        yield gateway


@pytest.mark.parametrize("task", TASKS)
def test_vectors_are_those_of_the_servers(
    gateway: Served, servers: tuple[Served, Served], task: str
) -> None:
    """The gateway returns the same vectors as a server for every task."""
    truth = vectors(servers[0].url, TEXTS, task)
    for _ in range(4):
        assert np.abs(vectors(gateway.url, TEXTS, task) - truth).max() <= 1e-5


def test_a_large_request_is_put_together_in_order(
    gateway: Served, servers: tuple[Served, Served]
) -> None:
    """A request that is split into several calls returns its vectors in order."""
    texts = [f"text {n} " + "word " * (n % 7) for n in range(300)]
    truth = vectors(servers[0].url, texts, "clustering")
    assert np.abs(vectors(gateway.url, texts, "clustering") - truth).max() <= 1e-5
    shown = httpx.get(f"{gateway.url}/metrics").text
    for server in servers:
        assert total(shown, "taskvec_engine_server_serving", server.url) == 1
    assert total(shown, "taskvec_engine_calls_total", 'outcome="ok"') >= 5


def test_a_request_id_need_not_be_unique(gateway: Served, servers: tuple[Served, Served]) -> None:
    """Parallel requests with the same x-request-id each get their own vectors."""
    texts = [f"number {n}" for n in range(24)]
    truth = vectors(servers[1].url, texts, "text-matching")

    def ask(text: str) -> list[float]:
        reply = httpx.post(
            f"{gateway.url}/v1/embeddings", json={"input": text}, headers={"x-request-id": "same"}
        )
        assert reply.headers["x-request-id"] == "same"
        return reply.raise_for_status().json()["data"][0]["embedding"]

    with ThreadPoolExecutor(12) as threads:
        given = np.array(list(threads.map(ask, texts)))
    assert np.abs(given - truth).max() <= 1e-5


def test_a_client_that_leaves_takes_its_texts_with_it(servers: tuple[Served, Served]) -> None:
    """When a client disconnects, the servers drop its queued texts."""
    with served(*before(*servers)) as gateway:
        was = sum(dropped(server) for server in servers)
        body = json.dumps({"input": ["word " * 400 + str(n) for n in range(1024)]})
        for _ in range(10):
            with closing(HTTPConnection("127.0.0.1", gateway.port)) as client:
                client.request("POST", "/v1/embeddings", body)
                wait_for(lambda: sum(queued(server) for server in servers) > 0)
            time.sleep(2)  # a page of metrics is kept for one second
            if sum(dropped(server) for server in servers) > was:
                break  # else all texts that the servers had were being embedded
        else:
            pytest.fail("no text was dropped")
        wait_for(lambda: requests(gateway, 'status="499"') >= 1)


def test_a_killed_server_loses_no_request() -> None:
    """SIGKILL of one of two servers loses no request; a restarted server is used again."""
    with (
        served(*SERVER) as first,
        served(*SERVER) as second,
        served(*before(first, second)) as gateway,
        ThreadPoolExecutor(8) as threads,
    ):
        load = Load(gateway.url, max_requests=120, seconds=60)
        runs = [threads.submit(load.run) for _ in range(8)]
        load.wait_for(24)
        first.process.kill()
        for run in runs:
            run.result()
        assert load.seen == {"200": 120}
        assert serving(gateway, first) == 0
        assert serving(gateway, second) == 1
        with served(*SERVER, port=first.port):
            wait_for(lambda: serving(gateway, first) == 1)
            second.process.kill()
            wait_for(lambda: serving(gateway, second) == 0)  # within ten quiet seconds
            assert len(vectors(gateway.url, TEXTS, "clustering")) == len(TEXTS)


def test_a_text_without_a_finite_vector_fails_alone(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """With a damaged row in the weights of all, only requests with its token fail, by name."""
    folder = shutil.copytree(default_checkpoint.folder, tmp_path / "checkpoint")
    tensors = load_file(folder / "model.safetensors")
    tensors["embed_tokens.weight"][POISON] = np.nan
    save_file(tensors, folder / "model.safetensors")
    model = ("--model", str(folder))
    with (
        served(*SERVER, *model) as first,
        served(*SERVER, *model) as second,
        served(*before(first, second), *model, "--token-input", "accept") as gateway,
        ThreadPoolExecutor(8) as threads,
    ):

        def ask(n: int) -> httpx.Response:
            ids = [[5 + n], [POISON if n % 4 == 0 else 6, 5]]
            return httpx.post(f"{gateway.url}/v1/embeddings", json={"input": ids}, timeout=30)

        for n, reply in enumerate(threads.map(ask, range(100))):
            assert reply.status_code == (500 if n % 4 == 0 else 200), reply.text
            if n % 4 == 0:
                error = reply.json()["error"]
                assert (error["code"], error["param"]) == ("vector_not_finite", "input[1]")
                assert "input[1]" in error["message"]
        shown = httpx.get(f"{gateway.url}/metrics", timeout=30).text
        assert total(shown, "taskvec_engine_calls_total", 'outcome="text_error"') >= 25
        assert total(shown, "taskvec_engine_calls_total", 'outcome="error"') == 0
        assert serving(gateway, first) == serving(gateway, second) == 1


def test_a_server_that_takes_no_token_ids_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that rejects token ids is not called; with a key, the probe names the setting."""
    with (
        served(*EXACT) as server,
        with_key(monkeypatch),
        served(*before(server), probe="live") as gateway,
    ):
        wait_for(lambda: "token ids" in readiness(gateway).json()["detail"])
        reply = readiness(gateway)
        assert reply.status_code == 503
        assert server.url in reply.json()["detail"]
        assert "TASKVEC_TOKEN_INPUT=accept" in reply.json()["detail"]
        assert serving(gateway, server) == 0


def test_a_gateway_waits_for_its_servers() -> None:
    """A gateway is live and "starting" until its servers are up, then becomes ready."""
    port = free_port()
    with served(*GATEWAY, "--engine-url", f"http://127.0.0.1:{port}", probe="live") as gateway:
        wait_for(lambda: readiness(gateway).json()["code"] == "starting")
        refused = httpx.post(f"{gateway.url}/v1/embeddings", json={"input": "x"})
        for reply in (readiness(gateway), refused):
            assert (reply.status_code, reply.json()["code"]) == (503, "starting")
            assert int(reply.headers["retry-after"]) >= 1
        assert httpx.get(f"{gateway.url}/health/live").status_code == 200
        with served(*SERVER, port=port):
            wait_until(f"{gateway.url}/health/ready", gateway.process)
            assert embed(gateway.url, {"input": "x"}).json()["usage"]["total_tokens"] > 0


def test_servers_are_found_by_name(servers: tuple[Served, Served]) -> None:
    """dns://localhost:port resolves to the server on this machine."""
    with served(*GATEWAY, "--engine-url", f"dns://localhost:{servers[0].port}") as gateway:
        truth = vectors(servers[0].url, TEXTS, "retrieval.query")
        assert np.abs(vectors(gateway.url, TEXTS, "retrieval.query") - truth).max() <= 1e-5
        assert serving(gateway, servers[0]) == 1


def test_the_engine_is_made_without_torch() -> None:
    """A remote engine can be created without torch and vLLM."""
    done = subprocess.run(
        [sys.executable, "-c", MAKE_ENGINE], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.stdout.strip(), done.stderr) == ("RemoteEngine", "")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_gateway_serves_without_torch(
    tmp_path: Path, servers: tuple[Served, Served], workers: str
) -> None:
    """A gateway, including its golden vectors, serves without torch."""
    options = ("--cache-dir", str(tmp_path), "--workers", workers)
    script = tmp_path / "serve.py"  # a file: several gateways import the main module again
    script.write_text(SERVE)
    with served(*before(*servers), *options, run=(str(script),)) as gateway:
        truth = vectors(servers[0].url, TEXTS, "classification")
        assert np.abs(vectors(gateway.url, TEXTS, "classification") - truth).max() <= 1e-5
    assert list((tmp_path / "golden").glob("*.npz"))


def test_sigterm_of_a_gateway_loses_nothing(servers: tuple[Served, Served]) -> None:
    """After SIGTERM a gateway under load answers every request, or rejects it as draining."""
    with served(*before(*servers)) as gateway, ThreadPoolExecutor(8) as threads:
        load = Load(gateway.url)
        runs = [threads.submit(load.run) for _ in range(8)]
        load.wait_for(24)
        load.hold()
        gateway.process.send_signal(signal.SIGTERM)
        errors = gateway.process.communicate(timeout=60)[1].decode()
        for run in runs:
            run.result()
        assert set(load.seen) <= {"200", "503"}, load.seen
        assert errors.strip() == ""


def before(*servers: Served) -> tuple[str, ...]:
    """Return the options of a gateway in front of these servers."""
    return (*GATEWAY, *(word for server in servers for word in ("--engine-url", server.url)))


def vectors(url: str, texts: list[str], task: str) -> NDArray[np.float64]:
    """Return the vectors of some texts, float64 [texts, dimension]."""
    rows = embed(url, {"input": texts, "task": task}).json()["data"]
    return np.array([row["embedding"] for row in rows])


def readiness(server: Served) -> httpx.Response:
    """Return the response of the readiness probe to the operator."""
    headers = {"api-key": "tv-operator"}
    return httpx.get(f"{server.url}/health/ready", headers=headers, timeout=30)


@contextmanager
def with_key(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give the servers that are started meanwhile an API key: the operator's."""
    with monkeypatch.context() as patch:
        patch.setenv("TASKVEC_API_KEYS", "operator=tv-operator")
        yield


def serving(gateway: Served, server: Served) -> float:
    """Return 1 if the gateway calls the server, else 0."""
    shown = httpx.get(f"{gateway.url}/metrics", timeout=30).text
    return total(shown, "taskvec_engine_server_serving", f'"{server.url}"')


def dropped(server: Served) -> float:
    """Return the number of texts that a server dropped because their request was cancelled."""
    shown = httpx.get(f"{server.url}/metrics", timeout=30).text
    return total(shown, "taskvec_texts_dropped_total", 'reason="cancelled"')


def queued(server: Served) -> float:
    """Return the number of texts that wait in a server."""
    return total(httpx.get(f"{server.url}/metrics", timeout=30).text, "taskvec_queue_texts")


def requests(server: Served, label: str) -> float:
    """Return the number of requests that a server counted under a label."""
    return total(httpx.get(f"{server.url}/metrics").text, "taskvec_requests_total", label)
