"""Ollama's API: both embedding routes, models, truncation, and its errors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from conftest import fake_service
from dialects import ollama_message
from fakes import FakeEngine
from taskvec import __version__
from taskvec.checkpoint.checkpoint import Checkpoint

LONG = "word " * 5000
TASKS = {"retrieval.query", "retrieval.passage", "text-matching", "clustering", "classification"}


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
@pytest.mark.parametrize(
    ("model", "task"),
    [
        ("taskvec-mini", "text-matching"),
        ("taskvec-mini:latest", "text-matching"),
        *((f"taskvec-mini:{task}", task) for task in sorted(TASKS)),
        ("taskvec-mini:clustering:latest", "clustering"),
    ],
)
async def test_the_model_names_the_task(
    service: tuple[httpx.AsyncClient, FakeEngine], model: str, task: str
) -> None:
    """A tag is a task; without one, or with ``latest``, it is the default of /v1/embeddings."""
    client, _ = service
    answer = await client.post("/api/embed", json={"model": model, "input": ["a", "b"]})
    body = answer.json()
    assert body["embeddings"] == await embeddings(client, task=task)
    assert body["model"] == model
    assert body["total_duration"] > 0
    assert body["prompt_eval_count"] > 2


@pytest.mark.anyio
async def test_one_text(service: tuple[httpx.AsyncClient, FakeEngine]) -> None:
    """A string is a list of one; the older route has one vector, with the same values."""
    client, _ = service
    body = {"model": "taskvec-mini", "input": "a", "dimensions": 64}
    newer = (await client.post("/api/embed", json=body)).json()["embeddings"]
    assert newer == await embeddings(client, input="a", dimensions=64)
    old = await client.post("/api/embeddings", json={"model": "taskvec-mini", "prompt": "a"})
    assert old.json() == {"embedding": (await embeddings(client, input="a"))[0]}


@pytest.mark.anyio
@pytest.mark.parametrize(
    "fields",
    [
        {"options": {}},
        {"options": {"num_ctx": None, "temperature": 0.5, "seed": 3}},
        {"options": {"num_ctx": 8192}},
        {"options": None, "keep_alive": "5m", "truncate": None},
        {"keep_alive": -1, "truncate": True, "dimensions": None},
    ],
)
async def test_fields_without_effect(
    service: tuple[httpx.AsyncClient, FakeEngine], fields: dict[str, Any]
) -> None:
    """Options of the generation and of memory change no vector, nor does null."""
    client, _ = service
    body = {"model": "taskvec-mini", "input": ["a", "b"], **fields}
    answer = await client.post("/api/embed", json=body)
    assert answer.json()["embeddings"] == await embeddings(client)


@pytest.mark.anyio
async def test_truncation_is_the_default(service: tuple[httpx.AsyncClient, FakeEngine]) -> None:
    """A text that is too long is cut, unless ``truncate`` is false."""
    client, engine = service
    for fields in ({}, {"truncate": None}, {"truncate": True}):
        body = {"model": "taskvec-mini", "input": [LONG], **fields}
        answer = await client.post("/api/embed", json=body)
        assert answer.json()["embeddings"] == await embeddings(client, input=[LONG], truncate=True)
        assert len(engine.batches[-1].ids[0]) == 2048
    body = {"model": "taskvec-mini", "input": ["a", LONG], "truncate": False}
    answer = await client.post("/api/embed", json=body)
    assert answer.status_code == 400
    assert "input[1] has more than the 2048 tokens" in ollama_message(answer.json())


@pytest.mark.anyio
async def test_models(default_checkpoint: Checkpoint) -> None:
    """Tags lists each name, with ``latest``, and each task; show finds each; version is ours."""
    async with fake_service(default_checkpoint, model_aliases="other") as (client, _):
        models = (await client.get("/api/tags")).json()["models"]
        names = [model["name"] for model in models]
        assert names[:2] == ["taskvec-mini:latest", "other:latest"]
        assert set(names) >= {f"other:{task}" for task in TASKS}
        assert all(len(model["digest"]) == 64 and model["size"] > 0 for model in models)
        for name in (*names, "taskvec-mini", "other"):
            for field in ("model", "name"):
                shown = (await client.post("/api/show", json={field: name})).json()
                assert shown["capabilities"] == ["embedding"]
                info = shown["model_info"]
                family = info["general.architecture"]
                assert info[f"{family}.embedding_length"] == 256
                assert info[f"{family}.context_length"] == 2048
                assert shown["details"]["family"] == family
        unknown = await client.post("/api/show", json={"model": "llama3"})
        assert unknown.status_code == 404
        assert "llama3" in ollama_message(unknown.json())
        for bad in ({}, {"model": 1}, {"model": ""}, [], {"model": "other:x"}):
            answer = await client.post("/api/show", json=bad)
            assert answer.status_code == 400
            assert ollama_message(answer.json())
        assert (await client.get("/api/version")).json() == {"version": __version__}


@pytest.mark.anyio
async def test_the_routes_of_models_need_a_key(default_checkpoint: Checkpoint) -> None:
    """With API keys, the routes that list and show models need one as well."""
    async with fake_service(default_checkpoint, api_keys="web=s3cret") as (client, _):
        for method, path in (("GET", "/api/tags"), ("GET", "/api/version"), ("POST", "/api/show")):
            answer = await client.request(method, path)
            assert answer.status_code == 401
            assert "API key" in ollama_message(answer.json())
        good = await client.get("/api/tags", headers={"authorization": "Bearer s3cret"})
        assert good.status_code == 200


BAD: list[tuple[dict[str, Any], str]] = [
    ({"model": None}, "model is missing"),
    ({"model": ""}, "model is missing"),
    ({"model": 1}, "model must be a string"),
    ({"model": "taskvec-mini:x"}, "no task 'x'"),
    ({"truncate": "yes"}, "truncate must be true or false"),
    ({"options": []}, "options must be a JSON object"),
    ({"options": {"num_ctx": 512}}, "options.num_ctx below"),
    ({"options": {"num_ctx": "8k"}}, "options.num_ctx must be a whole number"),
    ({"task": "clustering"}, "task is not served: name the task after the model"),
    ({"input_type": "query"}, "input_type is not served"),
]


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/api/embed", "/api/embeddings"])
@pytest.mark.parametrize(("fields", "part"), BAD, ids=str)
async def test_bad_input(
    service: tuple[httpx.AsyncClient, FakeEngine], path: str, fields: dict[str, Any], part: str
) -> None:
    """A field of another type, or a value that is not served, is a 400 that names it."""
    client, engine = service
    text = "input" if path == "/api/embed" else "prompt"
    body = {"model": "taskvec-mini", text: "a"} | fields
    answer = await client.post(path, json=body)
    assert answer.status_code == 400, answer.text
    assert part in ollama_message(answer.json())
    assert not engine.batches


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "fields", "part"),
    [
        ("/api/embed", {}, "input is missing"),
        ("/api/embed", {"prompt": "a"}, "send what to embed in input"),
        ("/api/embed", {"input": {"text": "a"}}, "input must be a string"),
        ("/api/embed", {"input": []}, "empty list"),
        ("/api/embed", {"input": ""}, "empty string"),
        ("/api/embed", {"input": "a", "dimensions": 257}, "dimensions must be between"),
        ("/api/embed", {"input": "a", "dimensions": "64"}, "dimensions must be a whole number"),
        ("/api/embeddings", {"input": "a"}, "send what to embed in prompt"),
        ("/api/embeddings", {"prompt": ["a"]}, "prompt must be a string"),
        ("/api/embeddings", {"prompt": ""}, "empty string"),
    ],
)
async def test_bad_texts(
    service: tuple[httpx.AsyncClient, FakeEngine], path: str, fields: dict[str, Any], part: str
) -> None:
    """Each route names its own field of texts."""
    client, _ = service
    answer = await client.post(path, json={"model": "taskvec-mini", **fields})
    assert answer.status_code == 400, answer.text
    assert part in ollama_message(answer.json())


@pytest.mark.anyio
@pytest.mark.parametrize("model", ["llama3", "llama3:latest", "taskvec", "taskvec-mini-x"])
async def test_an_unknown_model(service: tuple[httpx.AsyncClient, FakeEngine], model: str) -> None:
    """A model that is not served is a 404, with or without the tag ``latest``."""
    client, _ = service
    answer = await client.post("/api/embed", json={"model": model, "input": "a"})
    assert answer.status_code == 404
    assert "taskvec-mini" in ollama_message(answer.json())
