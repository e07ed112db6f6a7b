"""A gateway before other taskvec servers: their vectors, and no request lost with one of them."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import free_port, wait_until
from processes import EXACT, TASKS, TEXTS, Load, Served, embed, served, total, wait_for
from taskvec.checkpoint.open import DEFAULT_MODEL

SERVER = ("--token-input", "accept", *EXACT)
GATEWAY = ("--engine", "remote", "--log-level", "error")

WITHOUT_TORCH = """
import importlib.abc
import sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "vllm"):
            raise ModuleNotFoundError("not installed here: " + name, name=name)

sys.meta_path.insert(0, Refuse())
"""

MAKE_ENGINE = f"""{WITHOUT_TORCH}
from taskvec.checkpoint.open import open_checkpoint
from taskvec.service import make_engine
from taskvec.settings import Settings

settings = Settings(engine="remote", engine_url="http://127.0.0.1:1")
print(type(make_engine(settings, open_checkpoint({DEFAULT_MODEL!r}), None)).__name__)
"""

SERVE = (
    f"{WITHOUT_TORCH}\nfrom taskvec.cli.main import main\nif __name__ == '__main__':\n    main()\n"
)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Servers keep what they compute once in a folder of the tests, not in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TASKVEC_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[Served, Served]]:
    """Two servers of the default model that accept token ids."""
    with served(*SERVER) as first, served(*SERVER) as second:
        yield first, second


@pytest.fixture(scope="module", params=["1", "2"], ids=["one gateway", "two gateways"])
def gateway(servers: tuple[Served, Served], request: pytest.FixtureRequest) -> Iterator[Served]:
    """A gateway before both."""
    with served(*before(*servers), "--workers", request.param) as gateway:
        yield gateway


@pytest.mark.parametrize("task", TASKS)
def test_vectors_are_those_of_the_servers(
    gateway: Served, servers: tuple[Served, Served], task: str
) -> None:
    """Every task gives, through the gateway, the vectors that each server gives by itself."""
    truth = vectors(servers[0].url, TEXTS, task)
    for _ in range(4):
        assert np.abs(vectors(gateway.url, TEXTS, task) - truth).max() <= 1e-5


def test_a_large_request_is_put_together_in_order(
    gateway: Served, servers: tuple[Served, Served]
) -> None:
    """More texts than one call takes come back in their own order, from both servers."""
    texts = [f"text {n} " + "word " * (n % 7) for n in range(300)]
    truth = vectors(servers[0].url, texts, "clustering")
    assert np.abs(vectors(gateway.url, texts, "clustering") - truth).max() <= 1e-5
    shown = httpx.get(f"{gateway.url}/metrics").text
    for server in servers:
        assert total(shown, "taskvec_engine_server_serving", server.url) == 1
    assert total(shown, "taskvec_engine_calls_total", 'outcome="ok"') >= 5


def test_a_request_id_need_not_be_unique(gateway: Served, servers: tuple[Served, Served]) -> None:
    """Parallel requests under one x-request-id each get their own texts' vectors."""
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
    """When a client closes its connection, what it has queued in the servers is dropped."""
    with served(*before(*servers)) as gateway:
        was = sum(dropped(server) for server in servers)
        body = {"input": ["word " * 400 + str(n) for n in range(1024)]}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{gateway.url}/v1/embeddings", json=body, timeout=1)
        wait_for(lambda: sum(dropped(server) for server in servers) > was)
        wait_for(lambda: requests(gateway, 'status="499"') == 1)


def test_a_killed_server_loses_no_request() -> None:
    """SIGKILL of one of two servers under load loses nothing; started again it is used again."""
    with (
        served(*SERVER) as first,
        served(*SERVER) as second,
        served(*before(first, second)) as gateway,
        ThreadPoolExecutor(8) as threads,
    ):
        load = Load(gateway.url, most=120, seconds=60)
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


def test_a_server_that_takes_no_token_ids_is_not_used() -> None:
    """A server with the default --token-input is not called, and the probe says what to set."""
    with (
        served(*EXACT) as server,
        served(*before(server), probe="live") as gateway,
    ):
        wait_for(lambda: "it has not been checked" not in readiness(gateway).json()["detail"])
        reply = readiness(gateway)
        assert reply.status_code == 503
        assert server.url in reply.json()["detail"]
        assert "TASKVEC_TOKEN_INPUT=accept" in reply.json()["detail"]
        assert serving(gateway, server) == 0


def test_a_gateway_waits_for_its_servers() -> None:
    """Before its servers are up a gateway is live and "starting"; later ready by itself."""
    port = free_port()
    with served(*GATEWAY, "--engine-url", f"http://127.0.0.1:{port}", probe="live") as gateway:
        wait_for(lambda: str(port) in readiness(gateway).json()["detail"])
        refused = httpx.post(f"{gateway.url}/v1/embeddings", json={"input": "x"})
        for reply in (readiness(gateway), refused):
            assert (reply.status_code, reply.json()["code"]) == (503, "starting")
            assert int(reply.headers["retry-after"]) >= 1
        assert httpx.get(f"{gateway.url}/health/live").status_code == 200
        with served(*SERVER, port=port):
            wait_until(f"{gateway.url}/health/ready", gateway.process)
            assert embed(gateway.url, {"input": "x"}).json()["usage"]["total_tokens"] > 0


def test_servers_are_found_by_name(servers: tuple[Served, Served]) -> None:
    """dns://localhost:port finds the server on this machine."""
    with served(*GATEWAY, "--engine-url", f"dns://localhost:{servers[0].port}") as gateway:
        truth = vectors(servers[0].url, TEXTS, "retrieval.query")
        assert np.abs(vectors(gateway.url, TEXTS, "retrieval.query") - truth).max() <= 1e-5
        assert serving(gateway, servers[0]) == 1


def test_the_engine_is_made_without_torch() -> None:
    """A remote engine is built where neither torch nor vLLM can be imported."""
    done = subprocess.run(
        [sys.executable, "-c", MAKE_ENGINE], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.stdout.strip(), done.stderr) == ("RemoteEngine", "")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_gateway_serves_without_torch(
    tmp_path: Path, servers: tuple[Served, Served], workers: str
) -> None:
    """The whole gateway, golden vectors included, serves where torch cannot be imported."""
    options = ("--cache-dir", str(tmp_path), "--workers", workers)
    script = tmp_path / "serve.py"  # a file: several gateways import the main module again
    script.write_text(SERVE)
    with served(*before(*servers), *options, run=(str(script),)) as gateway:
        truth = vectors(servers[0].url, TEXTS, "classification")
        assert np.abs(vectors(gateway.url, TEXTS, "classification") - truth).max() <= 1e-5
    assert list((tmp_path / "golden").glob("*.npz"))


def test_sigterm_of_a_gateway_loses_nothing(servers: tuple[Served, Served]) -> None:
    """SIGTERM of a gateway under load: what it has taken is answered, or refused as draining."""
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
    """The options of a gateway before these servers."""
    return (*GATEWAY, *(word for server in servers for word in ("--engine-url", server.url)))


def vectors(url: str, texts: list[str], task: str) -> NDArray[np.float64]:
    """What a server gives for some texts, [texts, dimension]."""
    rows = embed(url, {"input": texts, "task": task}).json()["data"]
    return np.array([row["embedding"] for row in rows])


def readiness(server: Served) -> httpx.Response:
    """What the probe says."""
    return httpx.get(f"{server.url}/health/ready", timeout=30)


def serving(gateway: Served, server: Served) -> float:
    """1 where the gateway calls the server, 0 where it does not."""
    shown = httpx.get(f"{gateway.url}/metrics", timeout=30).text
    return total(shown, "taskvec_engine_server_serving", f'"{server.url}"')


def dropped(server: Served) -> float:
    """Texts that left a server's queue because nobody waited for them any more."""
    shown = httpx.get(f"{server.url}/metrics", timeout=30).text
    return total(shown, "taskvec_texts_dropped_total", 'reason="cancelled"')


def requests(server: Served, label: str) -> float:
    """Requests that a server counted under a label."""
    return total(httpx.get(f"{server.url}/metrics").text, "taskvec_requests_total", label)
