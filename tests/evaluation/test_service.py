"""A model behind HTTP: the vectors of its own answers, and every way that it can fail."""

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
from taskvec.core.postprocess import OutputFormat, OutputType
from taskvec.errors import UnavailableError
from taskvec.evaluation.formats import Form, read_vectors
from taskvec.evaluation.service import KEY_VARIABLE, TEXTS_A_REQUEST, Service

TEXTS = [text for text, _ in LABELLED]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A real service with an answer cache: a text's vector is one, whatever it is batched with."""
    with running_server("--answer-cache-bytes", "100000000", "--log-level", "error") as address:
        yield address


def answered(url: str, task: str, dimensions: int, output: OutputType) -> np.ndarray:
    """What a client of this output type gets."""
    body = {"input": TEXTS, "task": task, "dimensions": dimensions, "embedding_type": output.value}
    headers = {"accept": "application/octet-stream"}
    answer = httpx.post(f"{url}/v1/embeddings", json=body, headers=headers).raise_for_status()
    return np.frombuffer(answer.content, dtype=answer.headers["x-embedding-dtype"]).reshape(
        len(TEXTS), -1
    )


@pytest.mark.parametrize("output", OutputType)
@pytest.mark.parametrize("dimensions", [256, 64, 32])
def test_forms_are_the_service_s_own_answers(url: str, dimensions: int, output: OutputType) -> None:
    """What is made here of the full vectors is, byte for byte, what the service sends."""
    for task in ("retrieval.query", "clustering"):
        full = Service(url).embed(TEXTS, task, lambda _: None)
        theirs = answered(url, task, dimensions, output)
        ours = OutputFormat(dimensions, (output,)).apply(full)[output]
        assert (ours == theirs).all()
        assert (Form(dimensions, output).rows(full) == read_vectors(theirs, output)).all()


def test_the_service_says_what_it_serves(url: str) -> None:
    """Name, dimensions and tasks come from its list of models; /v1 in its address is no matter."""
    service = Service(f"{url}/v1/")
    assert service.name == "taskvec-mini"
    assert (service.dimension, list(service.matryoshka)) == (256, [32, 64, 128, 256])
    assert "retrieval.query" in service.tasks


def test_many_texts_keep_their_order(url: str) -> None:
    """Requests that overlap give each text its own vector, and all texts are told of."""
    texts = [f"text number {n}" for n in range(5 * TEXTS_A_REQUEST + 7)]
    told: list[int] = []
    vectors = Service(url).embed(texts, "clustering", told.append)
    assert sum(told) == len(texts)
    some = [0, TEXTS_A_REQUEST, 100, len(texts) - 1]
    alone = Service(url).embed([texts[n] for n in some], "clustering", told.append)
    assert (vectors[some] == alone).all()


def test_long_texts_are_cut(url: str) -> None:
    """What is too long for the model is evaluated on its head."""
    vectors = Service(url).embed(["word " * 5000], "clustering", lambda _: None)
    assert np.isfinite(vectors).all()


def test_a_refusal_is_told_in_the_service_s_words(url: str) -> None:
    """An error ends the evaluation with the status and the sentence."""
    with pytest.raises(UnavailableError, match=r"status 400: There is no task 'poetry'"):
        Service(url).embed(["a"], "poetry", lambda _: None)


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service with keys refuses without one, naming the variable, and serves with it."""
    monkeypatch.setenv("TASKVEC_API_KEYS", "eval=tv-of-the-test")
    with served("--log-level", "error") as server:
        with pytest.raises(UnavailableError, match=rf"status 401.*{KEY_VARIABLE}"):
            Service(server.url)
        monkeypatch.setenv(KEY_VARIABLE, "tv-of-the-test")
        assert Service(server.url).embed(["a"], "clustering", lambda _: None).shape == (1, 256)


MODELS = {
    "data": [{"id": "m", "dimensions": 4, "matryoshka_dimensions": [4, 2], "tasks": ["embedding"]}]
}
Answer = tuple[int, dict[str, str], bytes]


@contextmanager
def peer(models: Any, embeddings: Callable[[int], Answer]) -> Iterator[str]:
    """An HTTP server that lists ``models`` and answers request n for vectors as told."""
    asked = iter(range(1000))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(200, {}, orjson.dumps(models))

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self._answer(*embeddings(next(asked)))

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


def test_a_full_service_is_asked_again() -> None:
    """429 is waited out; a service that stays full ends it with its sentence."""
    with peer(MODELS, lambda n: VECTOR if n == 3 else FULL) as url:
        assert (Service(url).embed(["a"], "embedding", lambda _: None) == 1).all()
        with pytest.raises(UnavailableError, match=r"status 429: The queue is full\."):
            Service(url).embed(["a"], "embedding", lambda _: None)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((500, {}, b"<html>Bad gateway</html>"), "status 500: <html>Bad gateway"),
        ((200, {}, b'{"data": []}'), "no vectors as bytes for 1 texts"),
        ((200, {"x-embedding-shape": "1,4"}, b"short"), "no vectors as bytes"),
        ((200, {"content-length": "99"}, b"cut off"), "cannot be asked"),
    ],
    ids=["a proxy's page", "JSON", "too few bytes", "broken off"],
)
def test_other_answers_are_refused(answer: Answer, said: str) -> None:
    """What is no matrix of the asked shape is an error that names the address."""
    with (
        peer(MODELS, lambda _: answer) as url,
        pytest.raises(UnavailableError, match=rf"{url}.*{said}"),
    ):
        Service(url).embed(["a"], "embedding", lambda _: None)


@pytest.mark.parametrize("models", [{"data": [{"id": "gpt"}]}, {"data": []}, []])
def test_other_services_are_told_apart(models: Any) -> None:
    """A server that lists no tasks is no taskvec service."""
    with (
        peer(models, lambda _: VECTOR) as url,
        pytest.raises(UnavailableError, match="is no taskvec service"),
    ):
        Service(url)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "nonsense"])
def test_no_service_is_named(url: str) -> None:
    """An address where nobody listens, or that is none, is told."""
    with pytest.raises(UnavailableError, match=f"{url}/v1/models cannot be asked"):
        Service(url)
