"""GET /v1/models: names, aliases and tasks that clients can list, look up, and then ask for."""

from __future__ import annotations

from typing import Any

import pytest

from conftest import fake_service
from taskvec.checkpoint.checkpoint import Checkpoint

TASKS = {"retrieval.query", "retrieval.passage", "text-matching", "clustering", "classification"}
HUB_ID = "jinaai/jina-embeddings-v5-text-small"


async def listed(checkpoint: Checkpoint, **settings: Any) -> dict[str, dict[str, Any]]:
    """The entries of /v1/models by id."""
    async with fake_service(checkpoint, **settings) as (client, _):
        body = (await client.get("/v1/models")).json()
    assert set(body) == {"object", "data"}
    assert body["object"] == "list"
    entries = {entry["id"]: entry for entry in body["data"]}
    assert len(entries) == len(body["data"])
    return entries


@pytest.mark.anyio
async def test_the_model_and_each_task_are_listed(default_checkpoint: Checkpoint) -> None:
    """The served model comes first, then name:task for every task."""
    entries = await listed(default_checkpoint)
    assert next(iter(entries)) == "taskvec-mini"
    assert set(entries) == {"taskvec-mini", *(f"taskvec-mini:{task}" for task in TASKS)}
    assert set(entries["taskvec-mini"]["tasks"]) == TASKS
    assert entries["taskvec-mini:clustering"]["tasks"] == ["clustering"]


@pytest.mark.anyio
async def test_an_entry_has_openais_fields_and_ours(default_checkpoint: Checkpoint) -> None:
    """Each entry has what OpenAI clients require, and the model's sizes besides."""
    for entry in (await listed(default_checkpoint)).values():
        assert entry["object"] == "model"
        assert type(entry["created"]) is int
        assert entry["owned_by"]
        assert entry["dimensions"] == default_checkpoint.card.dimension == 256
        assert entry["matryoshka_dimensions"] == [32, 64, 128, 256]
        assert entry["max_tokens"] == 2048


@pytest.mark.anyio
async def test_a_lower_limit_is_told(default_checkpoint: Checkpoint) -> None:
    """max_tokens is the limit that is in force, not the model's; it is never above the model's."""
    entries = await listed(default_checkpoint, max_tokens=64)
    assert {entry["max_tokens"] for entry in entries.values()} == {64}
    entries = await listed(default_checkpoint, max_tokens=100_000)
    assert {entry["max_tokens"] for entry in entries.values()} == {2048}


@pytest.mark.anyio
async def test_aliases_are_listed(default_checkpoint: Checkpoint) -> None:
    """An alias is a model of its own to clients, with the same tasks."""
    aliases = ("text-embedding-3-small", "my-alias")
    entries = await listed(default_checkpoint, model_aliases=aliases)
    assert {"taskvec-mini", *aliases} <= set(entries)
    assert set(entries["my-alias"]["tasks"]) == TASKS


@pytest.mark.anyio
async def test_every_listed_name_can_be_asked_for(default_checkpoint: Checkpoint) -> None:
    """What the list shows is found by its id, slash and colon included, and embeds."""
    settings: dict[str, Any] = {"served_model_name": HUB_ID, "model_aliases": ("alias/with/more",)}
    entries = await listed(default_checkpoint, **settings)
    short = HUB_ID.partition("/")[2]
    assert {HUB_ID, short, "alias/with/more", f"{HUB_ID}:clustering"} <= set(entries)
    async with fake_service(default_checkpoint, **settings) as (client, _):
        for name in [*entries, f"{short}:clustering", "alias/with/more:retrieval"]:
            body = {"input": "a", "model": name}
            answer = await client.post("/v1/embeddings", json=body)
            assert answer.status_code == 200, name
            assert answer.json()["model"] == HUB_ID
        for name, entry in entries.items():
            found = (await client.get(f"/v1/models/{name}")).json()
            assert found.pop("created")
            assert found == {key: value for key, value in entry.items() if key != "created"}
        escaped = await client.get(f"/v1/models/{HUB_ID.replace('/', '%2F')}")
        assert escaped.json()["id"] == HUB_ID


@pytest.mark.anyio
async def test_a_name_of_ones_own_replaces_the_models(default_checkpoint: Checkpoint) -> None:
    """Where the operator names the model, its former name is unknown."""
    async with fake_service(default_checkpoint, served_model_name="mine") as (client, _):
        assert (await client.get("/v1/models/mine")).json()["owned_by"] == "mine"
        assert (await client.get("/v1/models/taskvec-mini")).status_code == 404
        body = {"input": "a", "model": "taskvec-mini"}
        assert (await client.post("/v1/embeddings", json=body)).status_code == 404


@pytest.mark.anyio
@pytest.mark.parametrize(
    "name", ["nothing", "taskvec-mini:nothing", "taskvec-mini/x", "a/b/c", "x" * 3000, "%00%FF"]
)
async def test_an_unknown_model(default_checkpoint: Checkpoint, name: str) -> None:
    """A name that is not served is a 404 model_not_found in the form of every error."""
    async with fake_service(default_checkpoint) as (client, _):
        answer = await client.get(f"/v1/models/{name}")
    body = answer.json()
    assert answer.status_code == 404
    assert set(body) == {"error", "detail", "code", "request_id"}
    assert body["error"] == {
        "message": body["detail"],
        "type": "not_found_error",
        "param": "model",
        "code": "model_not_found",
    }
    assert body["code"] == "model_not_found"
    assert len(body["detail"]) < 400
