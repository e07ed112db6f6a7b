"""Cohere's API: number types, truncation, input types, content, and its errors."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest

from conftest import fake_service
from dialects import cohere_message
from fakes import FakeEngine
from taskvec.checkpoint.checkpoint import Checkpoint

TYPES = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
LONG = "word " * 5000
CONTENT = {"content": [{"type": "text", "text": "a"}]}
IMAGE = {"content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]}


@pytest.fixture
async def service(
    default_checkpoint: Checkpoint,
) -> AsyncIterator[tuple[httpx.AsyncClient, FakeEngine]]:
    async with fake_service(default_checkpoint) as service:
        yield service


async def embed(
    client: httpx.AsyncClient, path: str = "/v2/embed", **fields: Any
) -> dict[str, Any]:
    """Answer of a good request."""
    body = {"texts": ["a", "b"], "input_type": "search_document", "truncate": "NONE"} | fields
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    parsed: dict[str, Any] = answer.json()
    return parsed


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/v2/embed", "/v1/embed"])
async def test_all_types_come_from_one_forward(
    service: tuple[httpx.AsyncClient, FakeEngine], path: str
) -> None:
    """Six types in one answer are those of six requests to /v1/embeddings, from one batch."""
    client, engine = service
    body = await embed(client, path, embedding_types=TYPES, output_dimension=64)
    assert len(engine.batches) == 1
    assert list(body["embeddings"]) == TYPES
    assert body["response_type"] == "embeddings_by_type"
    assert body["meta"]["api_version"] == {"version": path[2]}
    for kind in TYPES:
        fields = {"embedding_type": kind} if kind != "base64" else {"encoding_format": "base64"}
        answer = await client.post(
            "/v1/embeddings",
            json={"input": ["a", "b"], "task": "retrieval.passage", "dimensions": 64, **fields},
        )
        entries = answer.json()
        assert body["embeddings"][kind] == [entry["embedding"] for entry in entries["data"]], kind
        assert body["meta"]["billed_units"]["input_tokens"] == entries["usage"]["prompt_tokens"]
    floats = [np.frombuffer(base64.b64decode(t), "<f4") for t in body["embeddings"]["base64"]]
    np.testing.assert_allclose(floats, body["embeddings"]["float"], atol=1e-7)


@pytest.mark.anyio
async def test_shapes_without_types(service: tuple[httpx.AsyncClient, FakeEngine]) -> None:
    """Without types the second version has float by type, and the first a plain list."""
    client, _ = service
    for types in ({}, {"embedding_types": None}):
        second = await embed(client, **types)
        assert list(second["embeddings"]) == ["float"]
        first = await embed(client, "/v1/embed", **types)
        assert first["response_type"] == "embeddings_floats"
        assert first["embeddings"] == second["embeddings"]["float"]
        assert first["id"]
        assert first["id"] != second["id"]
    only = await embed(client, embedding_types=["base64", "base64"])
    assert list(only["embeddings"]) == ["base64"]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("input_type", "task"),
    [
        ("search_document", "retrieval.passage"),
        ("search_query", "retrieval.query"),
        ("classification", "classification"),
        ("clustering", "clustering"),
    ],
)
async def test_input_types_are_tasks(
    service: tuple[httpx.AsyncClient, FakeEngine], input_type: str, task: str
) -> None:
    """Each input type is the task of /v1/embeddings; a suffix of the model may name it as well."""
    client, _ = service
    body = await embed(client, input_type=input_type, model="taskvec-mini")
    expected = await client.post("/v1/embeddings", json={"input": ["a", "b"], "task": task})
    assert body["embeddings"]["float"] == [e["embedding"] for e in expected.json()["data"]]
    suffix = await embed(client, input_type=None, model=f"taskvec-mini:{task}")
    assert suffix["embeddings"] == body["embeddings"]


@pytest.mark.anyio
async def test_the_default_task(service: tuple[httpx.AsyncClient, FakeEngine]) -> None:
    """The first version needs no input type: the task is that of /v1/embeddings without one."""
    client, _ = service
    answer = await client.post("/v1/embed", json={"texts": ["a"]})
    expected = await client.post("/v1/embeddings", json={"input": ["a"]})
    assert answer.json()["embeddings"] == [expected.json()["data"][0]["embedding"]]
    missing = await client.post("/v2/embed", json={"texts": ["a"]})
    assert missing.status_code == 400
    assert "input_type is missing" in cohere_message(missing.json())


@pytest.mark.anyio
async def test_inputs_with_text(service: tuple[httpx.AsyncClient, FakeEngine]) -> None:
    """Content of the type text is embedded as the same texts are; errors name the input."""
    client, _ = service
    plain = await embed(client, texts=["a"])
    content = await embed(client, texts=None, inputs=[CONTENT])
    assert content["embeddings"] == plain["embeddings"]
    long = {"content": [{"type": "text", "text": LONG}]}
    body = {"inputs": [CONTENT, long], "input_type": "clustering", "truncate": "NONE"}
    answer = await client.post("/v2/embed", json=body)
    assert answer.status_code == 400
    assert "inputs[1] has more than" in cohere_message(answer.json())


@pytest.mark.anyio
@pytest.mark.parametrize("truncate", [{}, {"truncate": None}, {"truncate": "END"}])
async def test_end_cuts(
    service: tuple[httpx.AsyncClient, FakeEngine], truncate: dict[str, Any]
) -> None:
    """END, which is the default, embeds what /v1/embeddings does with ``truncate: true``."""
    client, engine = service
    body = {"texts": [LONG], "input_type": "clustering", **truncate}
    answer = await client.post("/v2/embed", json=body)
    assert answer.status_code == 200
    assert len(engine.batches[-1].ids[0]) == 2048
    ours = {"input": [LONG], "task": "clustering", "truncate": True}
    expected = await client.post("/v1/embeddings", json=ours)
    assert answer.json()["embeddings"]["float"] == [expected.json()["data"][0]["embedding"]]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("truncate", "advice"),
    [("NONE", "send truncate: END"), ("START", "truncate: START is not served")],
)
async def test_none_and_start_refuse(
    service: tuple[httpx.AsyncClient, FakeEngine], truncate: str, advice: str
) -> None:
    """NONE and START refuse a text that is too long, with advice; others they embed."""
    client, _ = service
    await embed(client, truncate=truncate)
    body = {"texts": ["a", LONG], "input_type": "clustering", "truncate": truncate}
    answer = await client.post("/v2/embed", json=body)
    assert answer.status_code == 400
    message = cohere_message(answer.json())
    assert "texts[1]" in message
    assert advice in message


@pytest.mark.anyio
async def test_fields_without_effect(service: tuple[httpx.AsyncClient, FakeEngine]) -> None:
    """A priority, and a maximum that nothing exceeds, change nothing."""
    client, _ = service
    plain = await embed(client)
    same = await embed(client, priority=1, max_tokens=4096, images=None, texts=["a", "b"])
    assert same["embeddings"] == plain["embeddings"]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"texts": None}, "texts is missing"),
    ({"inputs": [CONTENT]}, "texts and inputs"),
    ({"texts": "a"}, "texts must be a list"),
    ({"texts": []}, "empty list"),
    ({"texts": None, "inputs": "a"}, "inputs must be a list"),
    ({"texts": None, "inputs": []}, "empty list"),
    ({"texts": None, "inputs": ["a"]}, "inputs[0] must be a JSON object"),
    ({"texts": None, "inputs": [CONTENT, IMAGE]}, "inputs[1].content[0].type"),
    ({"texts": None, "inputs": [{"content": "a"}]}, "inputs[0].content must be a list"),
    ({"texts": None, "inputs": [{"content": CONTENT["content"] * 2}]}, "inputs[0].content has 2"),
    ({"texts": None, "inputs": [{"content": [{"type": "text", "text": ""}]}]}, "empty string"),
    ({"texts": None, "inputs": [{"content": [{"type": "text"}]}]}, "inputs[0].content[0].text"),
    ({"texts": None, "inputs": [CONTENT] * 2049}, "2049"),
    ({"texts": None, "images": ["data:image/png;base64,AA=="]}, "images is not served"),
    ({"images": []}, "images is not served"),
    ({"input_type": "image"}, "input_type image is not served"),
    ({"input_type": "query"}, "input_type must be one of"),
    ({"input_type": ""}, "input_type must be one of"),
    ({"input_type": 1}, "input_type must be a string"),
    ({"input_type": "clustering", "model": "taskvec-mini:classification"}, "name one"),
    ({"model": 1}, "model must be a string"),
    ({"model": "taskvec-mini:x"}, "no task 'x'"),
    ({"embedding_types": []}, "embedding_types must be a list"),
    ({"embedding_types": "float"}, "embedding_types must be a list"),
    ({"embedding_types": ["float16"]}, "embedding_types must be one of"),
    ({"embedding_types": ["float", None]}, "embedding_types must be one of"),
    ({"output_dimension": 0}, "output_dimension must be between"),
    ({"output_dimension": 1.5}, "output_dimension must be a whole number"),
    ({"output_dimension": "64"}, "output_dimension must be a whole number"),
    ({"output_dimension": 4, "embedding_types": ["float", "binary"]}, "multiple of 8"),
    ({"truncate": "end"}, "truncate must be one of"),
    ({"truncate": True}, "truncate must be a string"),
    ({"priority": -1}, "priority must be between"),
    ({"priority": "high"}, "priority must be a whole number"),
    ({"max_tokens": 100}, "max_tokens below"),
    ({"max_tokens": "all"}, "max_tokens must be a whole number"),
]


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/v2/embed", "/v1/embed"])
@pytest.mark.parametrize(("fields", "part"), BAD, ids=str)
async def test_bad_input(
    service: tuple[httpx.AsyncClient, FakeEngine], path: str, fields: dict[str, Any], part: str
) -> None:
    """A field of another type, or a value that is not served, is a 400 that names it."""
    client, engine = service
    body = {"texts": ["a"], "input_type": "clustering", "truncate": "NONE"} | fields
    answer = await client.post(path, json=body)
    assert answer.status_code == 400, answer.text
    assert part in cohere_message(answer.json())
    assert not engine.batches
