"""/v1/embeddings under other paths: without /v1, and as a deployment of Azure OpenAI."""

from __future__ import annotations

import httpx
import pytest

from conftest import fake_service
from dialects import openai_message
from taskvec.checkpoint.checkpoint import Checkpoint

DEPLOYMENTS = ["/openai/deployments/{}/embeddings", "/v1/deployments/{}/embeddings"]


async def embeddings(client: httpx.AsyncClient, task: str) -> object:
    """The data of /v1/embeddings."""
    answer = await client.post("/v1/embeddings", json={"input": ["a", "b"], "task": task})
    return answer.json()["data"]


@pytest.mark.anyio
async def test_without_version(default_checkpoint: Checkpoint) -> None:
    """/embeddings takes the same fields, and gives the same answer."""
    async with fake_service(default_checkpoint) as (client, _):
        body = {"input": ["a", {"text": "b"}], "input_type": "query", "output_dimension": 64}
        answer = await client.post("/embeddings", json=body)
        assert answer.status_code == 200
        assert answer.json() == (await client.post("/v1/embeddings", json=body)).json()


@pytest.mark.anyio
@pytest.mark.parametrize("path", DEPLOYMENTS)
async def test_the_path_names_the_model(default_checkpoint: Checkpoint, path: str) -> None:
    """A deployment is a served name, which may have slashes, or name:task; the body may agree."""
    async with fake_service(
        default_checkpoint, served_model_name="org/m", model_aliases="x"
    ) as service:
        client, _ = service
        for name in ("org/m", "m", "x"):
            for model, task in ((name, "text-matching"), (f"{name}:clustering", "clustering")):
                url = f"{path.format(model)}?api-version=2024-10-21"
                for body in ({"input": ["a", "b"]}, {"input": ["a", "b"], "model": model}):
                    answer = await client.post(url, json=body)
                    assert answer.status_code == 200, answer.text
                    assert answer.json()["data"] == await embeddings(client, task)


@pytest.mark.anyio
@pytest.mark.parametrize("path", DEPLOYMENTS)
async def test_the_path_decides(default_checkpoint: Checkpoint, path: str) -> None:
    """A body may name the model without its task, or OpenAI's model: LangChain does by default."""
    async with fake_service(default_checkpoint) as (client, _):
        url = path.format("taskvec-mini:clustering")
        for model in ("taskvec-mini", "text-embedding-ada-002", "org/m:text-matching"):
            answer = await client.post(url, json={"input": ["a", "b"], "model": model})
            assert answer.status_code == 200, answer.text
            assert answer.json()["data"] == await embeddings(client, "clustering")


@pytest.mark.anyio
async def test_azures_path_without_a_deployment(default_checkpoint: Checkpoint) -> None:
    """/openai/v1/embeddings takes the model from the body, and a key in api-key."""
    async with fake_service(default_checkpoint) as (client, _):
        body = {"input": ["a", "b"], "model": "taskvec-mini:clustering"}
        answer = await client.post("/openai/v1/embeddings?api-version=v1", json=body)
        assert answer.json()["data"] == await embeddings(client, "clustering")
        missing = await client.post("/openai/v1/embeddings", json={**body, "model": "gpt"})
        assert (missing.status_code, missing.json()["code"]) == (404, "model_not_found")


@pytest.mark.anyio
@pytest.mark.parametrize("path", DEPLOYMENTS)
async def test_bad_models(default_checkpoint: Checkpoint, path: str) -> None:
    """An unknown deployment is a 404; a body that names another model or task is a 400."""
    async with fake_service(default_checkpoint) as (client, engine):
        unknown = await client.post(path.format("gpt"), json={"input": "a"})
        assert (unknown.status_code, unknown.json()["code"]) == (404, "model_not_found")
        assert "taskvec-mini" in openai_message(unknown.json())
        good = path.format("taskvec-mini")
        for model, code in (
            ("taskvec-mini:clustering", "conflicting_fields"),
            (1, "invalid_model"),
        ):
            answer = await client.post(good, json={"input": "a", "model": model})
            assert (answer.status_code, answer.json()["code"]) == (400, code)
        other = {"input": "a", "task": "classification"}
        answer = await client.post(path.format("taskvec-mini:clustering"), json=other)
        assert (answer.status_code, answer.json()["code"]) == (400, "conflicting_fields")
        assert not engine.batches
