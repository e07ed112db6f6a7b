"""A model behind HTTP: its vectors, and every way that it can fail."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import numpy as np
import orjson
import pytest

from conftest import running_server
from heldout import LABELLED
from processes import served
from taskvec.core.output_format import OutputFormat, OutputType
from taskvec.errors import UnavailableError
from taskvec.evaluation.formats import comparable_rows, read_vectors
from taskvec.evaluation.service import KEY_VARIABLE, REQUEST_TEXTS, ServedModel

TEXTS = [text for text, _ in LABELLED]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Start a real service with an answer cache, so that a text always has the same vector."""
    with running_server("--answer-cache-bytes", "100000000", "--log-level", "error") as address:
        yield address


def request_vectors(url: str, task: str, dimensions: int, output: OutputType) -> np.ndarray:
    """Return the answer to a client that requests this output type."""
    body = {"input": TEXTS, "task": task, "dimensions": dimensions, "embedding_type": output.value}
    headers = {"accept": "application/octet-stream"}
    answer = httpx.post(f"{url}/v1/embeddings", json=body, headers=headers).raise_for_status()
    return np.frombuffer(answer.content, dtype=answer.headers["x-embedding-dtype"]).reshape(
        len(TEXTS), -1
    )


@pytest.mark.parametrize("output", OutputType)
@pytest.mark.parametrize("dimensions", [256, 64, 32])
def test_forms_are_answers_of_the_service(url: str, dimensions: int, output: OutputType) -> None:
    """Formats made of the full vectors are, byte for byte, what the service sends."""
    for task in ("retrieval.query", "clustering"):
        full = ServedModel(url).embed(TEXTS, task, lambda _: None)
        theirs = request_vectors(url, task, dimensions, output)
        ours = OutputFormat(dimensions, (output,)).apply(full)[output]
        assert (ours == theirs).all()
        assert (
            comparable_rows(full, OutputFormat(dimensions, (output,)))
            == read_vectors(theirs, output)
        ).all()


def test_name_dimensions_and_tasks_come_from_the_service(url: str) -> None:
    """Name, dimensions and tasks come from /v1/models; the address may end with /v1."""
    service = ServedModel(f"{url}/v1/")
    assert service.name == "taskvec-mini"
    assert (service.dimension, list(service.matryoshka)) == (256, [32, 64, 128, 256])
    assert "retrieval.query" in service.tasks


def test_many_texts_keep_their_order(url: str) -> None:
    """Concurrent requests give each text its own vector, and progress counts all texts."""
    texts = [f"text number {n}" for n in range(5 * REQUEST_TEXTS + 7)]
    advanced: list[int] = []
    vectors = ServedModel(url).embed(texts, "clustering", advanced.append)
    assert sum(advanced) == len(texts)
    some = [0, REQUEST_TEXTS, 100, len(texts) - 1]
    alone = ServedModel(url).embed([texts[n] for n in some], "clustering", advanced.append)
    assert (vectors[some] == alone).all()


def test_long_texts_are_truncated(url: str) -> None:
    """A text that is too long for the model is truncated."""
    vectors = ServedModel(url).embed(["word " * 5000], "clustering", lambda _: None)
    assert np.isfinite(vectors).all()


def test_an_error_repeats_the_message_of_the_service(url: str) -> None:
    """An error ends the evaluation with the service's status and message."""
    with pytest.raises(UnavailableError, match=r"status 400: There is no task 'poetry'"):
        ServedModel(url).embed(["a"], "poetry", lambda _: None)


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service with keys refuses a request without one, and serves one with the variable set."""
    monkeypatch.setenv("TASKVEC_API_KEYS", "eval=tv-of-the-test")
    with served("--log-level", "error") as server:
        with pytest.raises(UnavailableError, match=rf"status 401.*{KEY_VARIABLE}"):
            ServedModel(server.url)
        monkeypatch.setenv(KEY_VARIABLE, "tv-of-the-test")
        assert ServedModel(server.url).embed(["a"], "clustering", lambda _: None).shape == (1, 256)


MODELS = {
    "data": [{"id": "m", "dimensions": 4, "matryoshka_dimensions": [4, 2], "tasks": ["embedding"]}]
}
Answer = tuple[int, dict[str, str], bytes]


@contextmanager
def peer(models: Any, embeddings: Callable[[int], Answer]) -> Iterator[str]:
    """Run an HTTP server that lists ``models`` and answers request n by ``embeddings``."""
    numbers = iter(range(1000))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(200, {}, orjson.dumps(models))

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self._answer(*embeddings(next(numbers)))

        def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in ({"content-length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


VECTOR: Answer = (200, {"x-embedding-shape": "1,4"}, np.ones(4, dtype="<f4").tobytes())
FULL: Answer = (429, {"retry-after": "0"}, b'{"error": {"message": "The queue is full."}}')


def test_a_full_service_is_retried() -> None:
    """A 429 is retried; a service that stays full ends the evaluation with its message."""
    with peer(MODELS, lambda n: VECTOR if n == 3 else FULL) as url:
        assert (ServedModel(url).embed(["a"], "embedding", lambda _: None) == 1).all()
        with pytest.raises(UnavailableError, match=r"status 429: The queue is full\."):
            ServedModel(url).embed(["a"], "embedding", lambda _: None)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((500, {}, b"<html>Bad gateway</html>"), "status 500: <html>Bad gateway"),
        ((200, {}, b'{"data": []}'), "did not send 1 vectors as bytes"),
        ((200, {"x-embedding-shape": "1,4"}, b"short"), "did not send 1 vectors as bytes"),
        ((200, {"content-length": "99"}, b"cut off"), "cannot be reached"),
    ],
    ids=["a proxy's page", "JSON", "too few bytes", "broken off"],
)
def test_other_answers_are_refused(answer: Answer, message: str) -> None:
    """An answer that is not a matrix of the expected shape is an error that names the address."""
    with (
        peer(MODELS, lambda _: answer) as url,
        pytest.raises(UnavailableError, match=rf"{url}.*{message}"),
    ):
        ServedModel(url).embed(["a"], "embedding", lambda _: None)


@pytest.mark.parametrize("models", [{"data": [{"id": "gpt"}]}, {"data": []}, []])
def test_other_services_are_refused(models: Any) -> None:
    """A server that lists no tasks is not a taskvec service."""
    with (
        peer(models, lambda _: VECTOR) as url,
        pytest.raises(UnavailableError, match="is not a taskvec service"),
    ):
        ServedModel(url)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "nonsense"])
def test_an_unreachable_address_is_named(url: str) -> None:
    """The message names an address that is invalid or that nobody listens on."""
    with pytest.raises(UnavailableError, match=f"{url}/v1/models cannot be reached"):
        ServedModel(url)
