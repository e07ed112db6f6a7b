"""Gemini's API: task types, one text and batches, models in the path, keys, and its errors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from conftest import fake_service
from dialects import gemini_message
from fakes import FakeEngine
from taskvec.api.gemini import TASK_TYPES
from taskvec.checkpoint.checkpoint import Checkpoint

PREFIXES = ["", "/v1", "/v1beta"]
ONE, MANY = "/v1beta/models/taskvec-mini:embedContent", "/v1beta/models/{}:batchEmbedContents"
LONG = "word " * 5000


@pytest.fixture
async def service(
    default_checkpoint: Checkpoint,
) -> AsyncIterator[tuple[httpx.AsyncClient, FakeEngine]]:
    async with fake_service(default_checkpoint) as service:
        yield service


def content(text: Any, **fields: Any) -> dict[str, Any]:
    """One request."""
    return {"content": {"parts": [{"text": text}], "role": "user"}, **fields}


async def embeddings(client: httpx.AsyncClient, **fields: Any) -> list[list[float]]:
    """Vectors of /v1/embeddings."""
    answer = await client.post("/v1/embeddings", json={"input": ["a", "b"]} | fields)
    return [entry["embedding"] for entry in answer.json()["data"]]


@pytest.mark.anyio
@pytest.mark.parametrize("prefix", PREFIXES)
async def test_one_and_many(service: tuple[httpx.AsyncClient, FakeEngine], prefix: str) -> None:
    """Each version, and none, has both methods; a batch is one forward."""
    client, engine = service
    fields = {"model": "models/taskvec-mini", "outputDimensionality": 64}
    one = await client.post(f"{prefix}/models/taskvec-mini:embedContent", json=content("a"))
    assert one.json() == {"embedding": {"values": (await embeddings(client, input="a"))[0]}}
    before = len(engine.batches)
    body = {"requests": [content("a", **fields), content("b", **fields)]}
    many = await client.post(f"{prefix}/models/taskvec-mini:batchEmbedContents", json=body)
    assert len(engine.batches) == before + 1
    truth = await embeddings(client, dimensions=64)
    assert [entry["values"] for entry in many.json()["embeddings"]] == truth
    listed = await client.get(f"{prefix}/models/taskvec-mini:clustering")
    assert listed.status_code == (200 if prefix == "/v1" else 404)


@pytest.mark.anyio
@pytest.mark.parametrize("task_type", [*TASK_TYPES, "TASK_TYPE_UNSPECIFIED", None])
async def test_task_types(
    service: tuple[httpx.AsyncClient, FakeEngine], task_type: str | None
) -> None:
    """Each of the eight task types is a task; without one it is the default."""
    client, _ = service
    truth = await embeddings(client, task=TASK_TYPES.get(task_type or "", "text-matching"))
    for spelling in ("taskType", "task_type"):
        answer = await client.post(ONE, json=content("a", **{spelling: task_type}))
        assert answer.json()["embedding"]["values"] == truth[0]
    assert len(TASK_TYPES) == 8


@pytest.mark.anyio
async def test_the_path_may_name_the_task(service: tuple[httpx.AsyncClient, FakeEngine]) -> None:
    """A model name:task has that task; another task type is a 400, an unknown model a 404."""
    client, _ = service
    path = MANY.format("taskvec-mini:clustering")
    answer = await client.post(path, json={"requests": [content("a"), content("b")]})
    found = [entry["values"] for entry in answer.json()["embeddings"]]
    assert found == await embeddings(client, task="clustering")
    other = {"requests": [content("a", taskType="CLASSIFICATION")]}
    answer = await client.post(path, json=other)
    assert answer.status_code == 400
    assert "name one" in gemini_message(answer.json())
    for name in ("gemini-embedding-001", "a%0Ab", "a/b", "models/x"):
        unknown = await client.post(MANY.format(name), json={"requests": []})
        assert unknown.status_code == 404
        assert unknown.json()["error"]["status"] == "NOT_FOUND"
        assert unknown.json()["error"]["code"] == 404


@pytest.mark.anyio
async def test_a_batch_of_several_task_types(
    service: tuple[httpx.AsyncClient, FakeEngine],
) -> None:
    """Each request of a batch has its own task type."""
    client, _ = service
    requests = [content("a", taskType="CLUSTERING"), content("b", taskType="RETRIEVAL_QUERY")]
    answer = await client.post(MANY.format("taskvec-mini"), json={"requests": requests})
    first = (await embeddings(client, task="clustering"))[0]
    second = (await embeddings(client, task="retrieval.query"))[1]
    assert [entry["values"] for entry in answer.json()["embeddings"]] == [first, second]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("query", "status"),
    [("key=s3cret", 200), ("x=%FF&key=s3cret", 200), ("key=%C3%BC", 401), ("key=%ff", 401)],
)
async def test_a_key_in_the_url(default_checkpoint: Checkpoint, query: str, status: int) -> None:
    """Whatever bytes a URL has, a wrong key is a 401."""
    async with fake_service(default_checkpoint, api_keys="web=s3cret") as (client, _):
        answer = await client.post(f"{ONE}?{query}", json=content("a"))
        assert answer.status_code == status


@pytest.mark.anyio
async def test_truncation(service: tuple[httpx.AsyncClient, FakeEngine]) -> None:
    """A text that is too long is refused, and cut with ``autoTruncate``."""
    client, _ = service
    for fields in ({}, {"autoTruncate": False}):
        answer = await client.post(ONE, json=content(LONG, **fields))
        assert answer.status_code == 400
        assert "send autoTruncate: true" in gemini_message(answer.json())
    answer = await client.post(ONE, json=content(LONG, autoTruncate=True))
    truth = await embeddings(client, input=[LONG], truncate=True)
    assert answer.json()["embedding"]["values"] == truth[0]


@pytest.mark.anyio
async def test_a_full_batch_with_all_fields(
    service: tuple[httpx.AsyncClient, FakeEngine],
) -> None:
    """As many texts as /v1/embeddings takes fit, each with every field that clients send."""
    client, _ = service
    fields = {"taskType": "CLUSTERING", "model": "models/taskvec-mini", "outputDimensionality": 8}
    body = {"requests": [content("a", autoTruncate=True, **fields)] * 2048}
    answer = await client.post(MANY.format("taskvec-mini"), json=body)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["embeddings"]) == 2048


BAD: list[tuple[dict[str, Any], str]] = [
    ({"content": None}, "content is missing"),
    ({"content": "a"}, "content must be a JSON object"),
    ({"content": {}}, "content.parts must be a list"),
    ({"content": {"parts": []}}, "content.parts is an empty list"),
    ({"content": {"parts": [{"text": "a"}, {"text": "b"}]}}, "content.parts has 2 items"),
    ({"content": {"parts": ["a"]}}, "content.parts[0] must be a JSON object"),
    ({"content": {"parts": [{"inlineData": {"data": "AA=="}}]}}, "inlineData is not served"),
    ({"content": {"parts": [{"text": "a", "fileData": {}}]}}, "fileData is not served"),
    ({"content": {"parts": [{"text": ""}]}}, "empty string"),
    ({"content": {"parts": [{}]}}, "content.parts[0].text must be a string"),
    ({"taskType": "SEARCH"}, "taskType must be one of"),
    ({"taskType": 1}, "taskType must be a string"),
    ({"taskType": "CLUSTERING", "task_type": "CLASSIFICATION"}, "disagree"),
    ({"title": "T"}, "title is not served"),
    ({"embedContentConfig": {}}, "embedContentConfig is not served"),
    ({"task": "clustering"}, "task is not served: name the task by taskType"),
    ({"outputDimensionality": 0}, "outputDimensionality must be between"),
    ({"outputDimensionality": "64"}, "outputDimensionality must be a whole number"),
    ({"autoTruncate": "yes"}, "autoTruncate must be true or false"),
    ({"model": "models/other"}, "model names 'models/other'"),
    ({"model": 1}, "model must be a string"),
]


@pytest.mark.anyio
@pytest.mark.parametrize(("fields", "part"), BAD, ids=str)
async def test_bad_input(
    service: tuple[httpx.AsyncClient, FakeEngine], fields: dict[str, Any], part: str
) -> None:
    """A field of another type, or a value that is not served, is a 400 that names it."""
    client, engine = service
    for path, body in (
        (ONE, content("a") | fields),
        (MANY.format("taskvec-mini"), {"requests": [content("a") | fields] * 2}),
    ):
        answer = await client.post(path, json=body)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["status"] == "INVALID_ARGUMENT"
        assert part in gemini_message(answer.json())
    assert not engine.batches


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("body", "part"),
    [
        ({}, "requests is missing"),
        ({"requests": {}}, "requests must be a list"),
        ({"requests": []}, "empty list"),
        ({"requests": ["a"]}, "requests[0] must be a JSON object"),
        (
            {"requests": [content("a"), content("b", outputDimensionality=8)]},
            "requests[1].outputDimensionality differs",
        ),
        ({"requests": [content("a"), content(LONG)]}, "requests[1] has more than"),
    ],
    ids=str,
)
async def test_bad_batches(
    service: tuple[httpx.AsyncClient, FakeEngine], body: dict[str, Any], part: str
) -> None:
    """The requests of a batch have one width; errors name the request."""
    client, engine = service
    answer = await client.post(MANY.format("taskvec-mini"), json=body)
    assert answer.status_code == 400
    assert part in gemini_message(answer.json())
    assert not engine.batches


@pytest.mark.anyio
@pytest.mark.parametrize("method", ["embedContent", "batchEmbedContents"])
async def test_head_is_answered_as_get(default_checkpoint: Checkpoint, method: str) -> None:
    """A path of this API below /v1/models is one of a model for GET, and so for HEAD."""
    async with fake_service(default_checkpoint) as (client, _):
        path = f"/v1/models/taskvec-mini:{method}"
        got, headed = await client.get(path), await client.head(path)
        assert (got.status_code, headed.status_code) == (404, 404)
        assert (await client.head("/v1/models/taskvec-mini:clustering")).status_code == 200
        assert (await client.head("/v1beta/models/taskvec-mini:embedContent")).status_code == 405
        assert (await client.head("/v1/embeddings")).status_code == 405
