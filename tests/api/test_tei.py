"""The API of text-embeddings-inference: prompts, truncation, similarity, info, and its errors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest

from conftest import fake_service
from dialects import tei_message
from fakes import FakeEngine
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.engines.base import EngineHealth, EngineState

LONG = "word " * 5000
PAIR = {"source_sentence": "a", "sentences": ["b", "a"]}


@pytest.fixture
async def service(
    default_checkpoint: Checkpoint,
) -> AsyncIterator[tuple[httpx.AsyncClient, FakeEngine]]:
    async with fake_service(default_checkpoint) as service:
        yield service


async def embeddings(client: httpx.AsyncClient, **fields: Any) -> list[list[float]]:
    """Vectors of /v1/embeddings."""
    answer = await client.post("/v1/embeddings", json={"input": ["a", "b"]} | fields)
    return [entry["embedding"] for entry in answer.json()["data"]]


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/embed", "/"])
@pytest.mark.parametrize(
    ("fields", "ours"),
    [
        ({}, {}),
        ({"inputs": "a"}, {"input": "a"}),
        ({"prompt_name": "query"}, {"task": "retrieval.query"}),
        ({"prompt_name": "document"}, {"task": "retrieval.passage"}),
        ({"prompt_name": "clustering"}, {"task": "clustering"}),
        ({"model": "taskvec-mini:classification"}, {"task": "classification"}),
        ({"normalize": False}, {"normalized": False}),
        ({"dimensions": 64, "encoding_format": "float", "normalize": True}, {"dimensions": 64}),
        ({"truncate": True, "truncation_direction": "Right", "parameters": {}}, {}),
        ({"truncate": None, "truncation_direction": "left", "prompt_name": None}, {}),
    ],
)
async def test_fields(
    service: tuple[httpx.AsyncClient, FakeEngine],
    path: str,
    fields: dict[str, Any],
    ours: dict[str, Any],
) -> None:
    """Each field gives the bare vectors of its counterpart of /v1/embeddings."""
    client, _ = service
    answer = await client.post(path, json={"inputs": ["a", "b"]} | fields)
    assert answer.status_code == 200, answer.text
    assert answer.json() == await embeddings(client, **ours)
    assert int(answer.headers["x-compute-tokens"]) > 1


@pytest.mark.anyio
async def test_truncation(service: tuple[httpx.AsyncClient, FakeEngine]) -> None:
    """Texts that are too long are cut with ``truncate``, on the right only, and else refused."""
    client, engine = service
    good = {"inputs": [LONG], "truncate": True}
    for fields in ({}, {"truncation_direction": "right"}):
        answer = await client.post("/embed", json=good | fields)
        assert answer.json() == await embeddings(client, input=[LONG], truncate=True)
    sent = len(engine.batches)
    for fields, advice in (
        ({}, "send truncate: true."),
        ({"truncate": False}, "send truncate: true."),
        ({"truncate": True, "truncation_direction": "left"}, "left is not served"),
    ):
        answer = await client.post("/embed", json={"inputs": ["a", LONG], **fields})
        assert answer.status_code == 400
        assert answer.json()["error_type"] == "Validation"
        message = tei_message(answer.json())
        assert "inputs[1]" in message
        assert advice in message
    assert len(engine.batches) == sent


@pytest.mark.anyio
async def test_similarity(service: tuple[httpx.AsyncClient, FakeEngine]) -> None:
    """/similarity has the cosine of each sentence with the source, for a task."""
    client, engine = service
    for parameters, task in (
        ({}, "text-matching"),
        ({"prompt_name": "clustering"}, "clustering"),
    ):
        body = {"inputs": PAIR, "parameters": parameters}
        answer = await client.post("/similarity", json=body)
        vectors = np.array(await embeddings(client, input=["a", "b"], task=task))
        np.testing.assert_allclose(answer.json(), [vectors[0] @ vectors[1], 1.0], atol=1e-6)
    assert len(engine.batches) == 4
    empty = {"inputs": {"source_sentence": "a", "sentences": []}}
    for body, part in (
        ({}, "inputs is missing"),
        ({"inputs": ["a"]}, "inputs must be a JSON object"),
        ({"inputs": {"sentences": ["a"]}}, "inputs.source_sentence must be a string"),
        ({"inputs": {"source_sentence": "a"}}, "inputs.sentences must be a list"),
        (empty, "empty list"),
        ({"inputs": {"source_sentence": "a", "sentences": ["b", 1]}}, "inputs.sentences[1]"),
        ({"inputs": {"source_sentence": "a", "sentences": ["b"] * 2048}}, "2048 items"),
        ({"inputs": PAIR, "parameters": {"normalize": False}}, "normalize: false"),
        ({"inputs": PAIR, "parameters": {"normalize": {}}}, "normalize must be true or false"),
        ({"inputs": PAIR, "parameters": {"dimensions": 8}}, "dimensions is not served"),
        ({"inputs": PAIR, "parameters": []}, "parameters must be a JSON object"),
    ):
        answer = await client.post("/similarity", json=body)
        assert answer.status_code == 400, answer.text
        assert part in tei_message(answer.json())


@pytest.mark.anyio
async def test_info(default_checkpoint: Checkpoint) -> None:
    """/info describes the model, and needs a key if there are any."""
    async with fake_service(default_checkpoint, api_keys="web=s3cret") as (client, engine):
        refused = await client.get("/info")
        assert refused.status_code == 401
        assert "API key" in tei_message(refused.json())
        body = (await client.get("/info", headers={"authorization": "Bearer s3cret"})).json()
    assert body["model_id"] == "taskvec-mini"
    assert body["max_input_length"] == body["max_client_batch_size"] == 2048
    assert body.get("max_batch_tokens", 0) == engine.batch_tokens
    assert "embedding" in body["model_type"]


@pytest.mark.anyio
async def test_kinds_of_errors(default_checkpoint: Checkpoint) -> None:
    """An error has the kind that text-embeddings-inference has for it."""
    async with fake_service(default_checkpoint) as (client, engine):

        async def kind(inputs: Any) -> tuple[int, str]:
            answer = await client.post("/embed", json={"inputs": inputs})
            return answer.status_code, answer.json()["error_type"]

        assert await kind(1) == (400, "Validation")
        assert await kind("") == (400, "Empty")
        engine.set_health(EngineHealth(EngineState.UNAVAILABLE, "gone"))
        assert await kind("a") == (503, "Unhealthy")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"inputs": None}, "inputs is missing"),
    ({"inputs": {"text": "a"}}, "inputs must be a string"),
    ({"inputs": PAIR}, "send it to /similarity"),
    ({"inputs": []}, "empty list"),
    ({"inputs": [1, 2]}, "inputs[0] must be a string"),
    ({"inputs": [["a", "b"]]}, "inputs[0] must be a string"),
    ({"parameters": {"truncate": True}}, "parameters is not served"),
    ({"truncate": "yes"}, "truncate must be true or false"),
    ({"truncation_direction": "up"}, "truncation_direction must be one of right, left"),
    ({"truncation_direction": 1}, "truncation_direction must be a string"),
    ({"normalize": 1}, "normalize must be true or false"),
    ({"prompt_name": "poem"}, "no task 'poem'"),
    ({"prompt_name": 1}, "prompt_name must be a string"),
    ({"prompt_name": "query", "model": "taskvec-mini:clustering"}, "name one"),
    ({"dimensions": 0}, "dimensions must be between"),
    ({"dimensions": 6.5}, "dimensions must be a whole number"),
    ({"encoding_format": "base64"}, "encoding_format must be one of float"),
    ({"task": "clustering"}, "task is not served: name the task by prompt_name"),
    ({"model": 1}, "model must be a string"),
]


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/embed", "/"])
@pytest.mark.parametrize(("fields", "part"), BAD, ids=str)
async def test_bad_input(
    service: tuple[httpx.AsyncClient, FakeEngine], path: str, fields: dict[str, Any], part: str
) -> None:
    """A field of another type, or a value that is not served, is a 400 that names it."""
    client, engine = service
    answer = await client.post(path, json={"inputs": "a"} | fields)
    assert answer.status_code == 400, answer.text
    assert part in tei_message(answer.json())
    assert not engine.batches
