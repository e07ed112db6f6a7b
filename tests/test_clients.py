"""Real clients (openai-python, curl, httpx) against a real server with the default model."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from numpy.typing import NDArray

from conftest import running_server
from processes import NOT_MEASURED, total
from programs import program
from taskvec import Embedder
from taskvec.api.openai import TYPE_FIELDS
from taskvec.core.output_format import OutputType, quantise

TEXT = "some text"
KINDS = ["float", "int8", "uint8", "binary", "ubinary"]
TASKS = ["retrieval.query", "retrieval.passage", "text-matching", "clustering", "classification"]
BF16_DIFFERENCE = 1e-3
"""Documented maximum difference per component between batches."""


@pytest.fixture(scope="module")
def library() -> Iterator[Embedder]:
    """Load the same model in this process."""
    with Embedder() as embedder:
        yield embedder


def test_openai_gets_floats_through_base64(server_url: str, library: Embedder) -> None:
    """openai-python requests base64 by default and decodes it to the library's vectors."""
    with openai.OpenAI(base_url=f"{server_url}/v1", api_key="none") as client:
        answer = client.embeddings.create(
            model="taskvec-mini:clustering", input=["one text", "another text"], dimensions=64
        )
    vectors = np.array([entry.embedding for entry in answer.data])
    truth = library.embed(["one text", "another text"], task="clustering", dimensions=64)
    assert vectors.shape == (2, 64)
    assert np.abs(vectors - truth).max() <= BF16_DIFFERENCE
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 4


def test_openai_gets_floats_as_numbers(server_url: str) -> None:
    """openai-python gets the same vector with encoding_format float as by default."""
    with openai.OpenAI(base_url=f"{server_url}/v1", api_key="none") as client:
        numbers = client.embeddings.create(
            model="taskvec-mini", input="a text", encoding_format="float"
        )
        packed = client.embeddings.create(model="taskvec-mini", input="a text")
    difference = np.subtract(numbers.data[0].embedding, packed.data[0].embedding)
    assert np.abs(difference).max() <= BF16_DIFFERENCE


def as_openai_node(embedding: str | list[int]) -> list[float]:
    """Decode as openai-node 6 does unless its user names an encoding: any value as base64."""
    if isinstance(embedding, str):
        data = base64.b64decode(embedding)
    else:
        data = np.array(embedding).astype(np.uint8).tobytes()  # of a list, each item is a byte
    return np.frombuffer(data, "<f4", count=len(data) // 4).tolist()


def as_voyage(embedding: str | list[float], kind: str | None) -> list[float]:
    """Decode as voyageai 0.5 does: base64 as the bytes of its own ``output_dtype``."""
    if not isinstance(embedding, str):
        return embedding
    dtypes = {"int8": "i1", "uint8": "u1", "binary": "i1", "ubinary": "u1"}
    return np.frombuffer(base64.b64decode(embedding), dtypes.get(str(kind), "<f4")).tolist()


@pytest.fixture(scope="module")
def by_type(library: Embedder) -> dict[str, NDArray[np.generic]]:
    """The vector of a text in each output type."""
    vector = library.embed(TEXT)
    return {kind.value: quantise(vector, kind)[0] for kind in OutputType}


def check_type(
    found: object, kind: str, by_type: dict[str, NDArray[np.generic]], what: object
) -> None:
    """The values of a type are there: all of them, and next to those of the library."""
    values, truth = np.array(found, np.float64), by_type[kind].astype(np.float64)
    assert values.shape == truth.shape, what
    if kind in {"binary", "ubinary"}:  # a value near zero may have either sign
        offset = 128 if kind == "binary" else 0
        bits = np.unpackbits((values + offset).astype(np.uint8))
        assert np.mean(bits != np.unpackbits((truth + offset).astype(np.uint8))) < 0.02, what
    else:
        assert np.abs(values - truth).max() <= (BF16_DIFFERENCE if kind == "float" else 1), what


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("field", TYPE_FIELDS)
def test_every_type_through_openais_sdks(
    server_url: str, by_type: dict[str, NDArray[np.generic]], field: str, kind: str
) -> None:
    """Each spelling of each type gives an OpenAI SDK its values, with base64 and without."""
    with openai.OpenAI(base_url=f"{server_url}/v1", api_key="none") as client:
        for encoding in ({}, {"encoding_format": "float"}, {"encoding_format": None}):
            answer: Any = client.embeddings.create(
                model="taskvec-mini", input=TEXT, extra_body={field: kind, **encoding}
            )
            check_type(answer.data[0].embedding, kind, by_type, encoding)
    body = {"model": "taskvec-mini", "input": TEXT, "encoding_format": "base64", field: kind}
    answer = httpx.post(
        f"{server_url}/v1/embeddings", json=body, headers={"X-Stainless-Lang": "js"}
    )
    check_type(as_openai_node(answer.json()["data"][0]["embedding"]), kind, by_type, "node")


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_every_type_through_voyages_client(
    server_url: str, by_type: dict[str, NDArray[np.generic]], kind: str | None
) -> None:
    """Voyage's client sends all its fields, null or not, asks for base64, and decodes each type."""
    body = {"input": [TEXT], "model": "taskvec-mini", "input_type": None, "truncation": True}
    body |= {"output_dtype": kind, "output_dimension": None, "encoding_format": "base64"}
    answer = httpx.post(f"{server_url}/v1/embeddings", json=body)
    found = as_voyage(answer.json()["data"][0]["embedding"], kind)
    check_type(found, kind or "float", by_type, kind)


def test_several_types_through_openai_python(
    server_url: str, by_type: dict[str, NDArray[np.generic]]
) -> None:
    """openai-python passes on an object with a vector of each type."""
    with openai.OpenAI(base_url=f"{server_url}/v1", api_key="none") as client:
        answer: Any = client.embeddings.create(
            model="taskvec-mini", input=TEXT, extra_body={"embedding_type": KINDS}
        )
    found = answer.data[0].embedding
    assert found.keys() == set(KINDS)
    for kind in KINDS:
        check_type(found[kind], kind, by_type, kind)


def test_several_tasks_in_one_request_share_forward_passes(library: Embedder) -> None:
    """Items with tasks of their own get the library's vectors, and share forward passes."""
    texts = [f"text {n}" for n in range(20)]
    items = [{"text": text, "task": TASKS[n % 5]} for n, text in enumerate(texts)]
    with running_server(*NOT_MEASURED) as url:
        for _ in range(10):
            answer = httpx.post(f"{url}/v1/embeddings", json={"input": items}, timeout=60)
            assert answer.status_code == 200, answer.text
        time.sleep(1.5)  # a page of metrics is kept for a second
        page = httpx.get(f"{url}/metrics").text
    assert total(page, "taskvec_batch_texts_sum") == 10 * len(items)
    vectors = np.array([entry["embedding"] for entry in answer.json()["data"]])
    for start, task in enumerate(TASKS):
        truth = library.embed(texts[start::5], task=task)
        assert np.abs(vectors[start::5] - truth).max() <= BF16_DIFFERENCE
    passes = total(page, "taskvec_batch_texts_count")
    assert 10 <= passes <= 30, "one pass for each of five tasks would be 50"


def test_openai_reads_our_errors(server_url: str) -> None:
    """openai-python raises the exception of each status, with our message."""
    with openai.OpenAI(base_url=f"{server_url}/v1", api_key="none") as client:
        with pytest.raises(openai.BadRequestError, match=r"input\[1\]") as bad:
            client.embeddings.create(model="taskvec-mini", input=["a", ""])
        assert bad.value.code == "empty_input"
        with pytest.raises(openai.NotFoundError, match="taskvec-mini"):
            client.embeddings.create(model="text-embedding-3-small", input="a")


@pytest.mark.anyio
async def test_two_hundred_clients_get_their_own_vectors(
    server_url: str, library: Embedder
) -> None:
    """200 concurrent requests of different tasks each get the vectors of their own texts."""
    texts = [f"text number {n} " + "word " * (n % 40) for n in range(200)]
    async with openai.AsyncOpenAI(
        base_url=f"{server_url}/v1", api_key="none", max_retries=0
    ) as client:
        answers = await asyncio.gather(
            *(
                client.embeddings.create(model=f"taskvec-mini:{TASKS[n % 5]}", input=text)
                for n, text in enumerate(texts)
            )
        )
    vectors = np.array([answer.data[0].embedding for answer in answers])
    truth: NDArray[np.float32] = np.empty((200, library.model.dimension), np.float32)
    for start in range(5):
        truth[start::5] = library.embed(texts[start::5], task=TASKS[start])
    cosines = vectors @ truth.T
    assert np.diag(cosines).min() > 0.9995
    assert (cosines.argmax(axis=1) == np.arange(200)).all(), "a client got another's vector"


def test_curl_gets_an_answer(server_url: str) -> None:
    """curl, as in the README, gets JSON with one vector per text."""
    body = json.dumps({"input": ["hello", "world"], "task": "clustering", "dimensions": 8})
    command = [program("curl"), "-sS", f"{server_url}/v1/embeddings", "-d", body]
    command += ["-H", "Content-Type: application/json"]
    done = subprocess.run(command, capture_output=True, check=True, timeout=30)
    answer = json.loads(done.stdout)
    assert [len(entry["embedding"]) for entry in answer["data"]] == [8, 8]


def test_raw_bytes_equal_base64(server_url: str) -> None:
    """application/octet-stream has the same values as base64 row by row."""
    body = {"input": ["first", "second"], "encoding_format": "base64"}
    raw = httpx.post(
        f"{server_url}/v1/embeddings", json=body, headers={"accept": "application/octet-stream"}
    )
    rows = httpx.post(f"{server_url}/v1/embeddings", json=body).json()["data"]
    matrix = np.frombuffer(raw.content, "<f4").reshape(
        [int(extent) for extent in raw.headers["x-embedding-shape"].split(",")]
    )
    decoded = [np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in rows]
    assert np.abs(matrix - np.stack(decoded)).max() <= BF16_DIFFERENCE


def test_a_long_text_is_refused_and_truncated(server_url: str) -> None:
    """A megabyte of text gets a 400, and is embedded with ``truncate: true``."""
    body = {"input": "the quick brown fox " * 50_000}
    refused = httpx.post(f"{server_url}/v1/embeddings", json=body, timeout=30)
    assert (refused.status_code, refused.json()["code"]) == (400, "input_too_long")
    cut = httpx.post(f"{server_url}/v1/embeddings", json={**body, "truncate": True}, timeout=30)
    assert cut.json()["usage"]["prompt_tokens"] == 2048


def test_a_folder_is_served_under_its_own_names(tmp_path: Path) -> None:
    """A checkpoint folder is served under its own name and the configured aliases."""
    from synthetic import TINY_NANO, write_checkpoint  # noqa: PLC0415 - one test needs it

    write_checkpoint(tmp_path / "my-model", TINY_NANO)
    options = ["--model", str(tmp_path / "my-model"), "--model-aliases", "text-embedding-3-small"]
    with running_server(*options, "--adapter-mode", "low-rank") as url:
        ids = [entry["id"] for entry in httpx.get(f"{url}/v1/models").json()["data"]]
        assert {"my-model", "text-embedding-3-small", "my-model:retrieval.query"} <= set(ids)
        body = {"input": "x", "model": "text-embedding-3-small:clustering"}
        assert httpx.post(f"{url}/v1/embeddings", json=body).status_code == 200
