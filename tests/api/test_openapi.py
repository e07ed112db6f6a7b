"""The OpenAPI document says what the parser does: each field, each value, each status."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

from conftest import fake_service
from fakes import FakeEngine
from taskvec.api.openai import INPUT_FIELDS, TYPE_FIELDS
from taskvec.api.unsupported import UNSUPPORTED
from taskvec.checkpoint.checkpoint import Checkpoint

PATH = "/v1/embeddings"
FIELDS = {
    *("texts", "content", "output_dimensionality", "normalize", *UNSUPPORTED),
    *("model", "input", "task", "task_type", "input_type", "dimensions", "output_dimension"),
    *("encoding_format", "embedding_type", "embedding_types", "encoding_type", "output_dtype"),
    *("normalized", "truncate", "truncation", "user"),
}
"""The contract's table, with every alias."""


OUR_ERROR_FIELDS = {"error", "detail", "code", "request_id"}
ERROR_FIELDS = {
    "cohere": {"id", "message"},
    "ollama": {"error"},
    "tei": {"error", "error_type"},
    "gemini": {"error"},
    "rerank": {*OUR_ERROR_FIELDS, "id", "message"},
}
"""Required fields of an error, by the tag of a route."""


async def document(checkpoint: Checkpoint, **settings: Any) -> dict[str, Any]:
    """The whole /openapi.json."""
    async with fake_service(checkpoint, **settings) as (client, _):
        answer = await client.get("/openapi.json")
    assert answer.status_code == 200
    body: dict[str, Any] = answer.json()
    return body


def operation(openapi: dict[str, Any]) -> dict[str, Any]:
    described: dict[str, Any] = openapi["paths"][PATH]["post"]
    return described


def schema(openapi: dict[str, Any]) -> dict[str, Any]:
    body: dict[str, Any] = operation(openapi)["requestBody"]["content"]["application/json"]
    described: dict[str, Any] = body["schema"]
    return described


def examples(described: dict[str, Any]) -> Iterator[Any]:
    """Values that a schema of the kinds used here allows: every enum's, and each bound."""
    if "anyOf" in described:
        for choice in described["anyOf"]:
            yield from examples(choice)
    elif "enum" in described:
        yield from described["enum"]
    else:
        kinds = described.get("type", [])
        for kind in [kinds] if isinstance(kinds, str) else kinds:
            yield from examples_of(kind, described)


def examples_of(kind: str, described: dict[str, Any]) -> Iterator[Any]:
    if kind == "null":
        yield None
    elif kind == "boolean":
        yield from (True, False)
    elif kind == "string":
        yield "a" * described.get("minLength", 0)
    elif kind == "integer":
        yield from (int(described["minimum"]), int(described["maximum"]))
    elif kind == "array":
        for item in examples(described["items"]):
            for length in {described.get("minItems", 0), described.get("maxItems", 3)}:
                yield [copy.deepcopy(item)] * length
    elif kind == "object":
        values = {name: next(examples(s)) for name, s in described["properties"].items()}
        yield values
    else:
        raise AssertionError(f"a kind of schema that this test does not know: {kind}")


@pytest.mark.anyio
async def test_the_document_and_its_page_are_served(default_checkpoint: Checkpoint) -> None:
    """/openapi.json is OpenAPI 3.1 with every route, /docs a page that loads it."""
    openapi = await document(default_checkpoint)
    assert openapi["openapi"].startswith("3.1")
    assert {PATH, "/v1/models", "/v1/models/{model_id}", "/health/live", "/health/ready"} <= set(
        openapi["paths"]
    )
    assert "/metrics" in openapi["paths"]
    assert openapi["info"]["title"] == "taskvec"
    async with fake_service(default_checkpoint) as (client, _):
        page = await client.get("/docs")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "/openapi.json" in page.text


@pytest.mark.anyio
async def test_every_field_is_described(default_checkpoint: Checkpoint) -> None:
    """The request has each field of the contract, each with a description; input is required."""
    described = schema(await document(default_checkpoint))
    assert set(described["properties"]) == FIELDS
    assert set(TYPE_FIELDS) <= FIELDS
    assert all(field.get("description") for field in described["properties"].values())
    assert described["anyOf"] == [{"required": [field]} for field in INPUT_FIELDS]


@pytest.mark.anyio
@pytest.mark.parametrize("field", sorted(FIELDS - {*INPUT_FIELDS, "user"}))
async def test_every_described_value_is_accepted(
    default_checkpoint: Checkpoint, field: str
) -> None:
    """Whatever a field's schema allows is answered with 200; float16 comes as bytes only."""
    values = list(examples(schema(await document(default_checkpoint))["properties"][field]))
    assert len(values) >= 2
    assert None in values
    async with fake_service(default_checkpoint) as (client, _):
        for value in values:
            half = value == "float16" or (isinstance(value, list) and value[0] == "float16")
            headers = {"accept": "application/octet-stream"} if half else {}
            answer = await client.post(PATH, json={"input": "a", field: value}, headers=headers)
            assert answer.status_code == 200, (value, answer.text)


@pytest.mark.anyio
@pytest.mark.parametrize("field", sorted(FIELDS - {*INPUT_FIELDS, "user"}))
async def test_other_values_are_refused(default_checkpoint: Checkpoint, field: str) -> None:
    """A value outside a field's schema is refused: the schema is not narrower than it says."""
    async with fake_service(default_checkpoint) as (client, _):
        for value in ("made-up", {"a": 1}, 1.5, -7):
            answer = await client.post(PATH, json={"input": "a", field: value})
            assert answer.status_code in {400, 404}, (value, answer.text)


@pytest.mark.anyio
@pytest.mark.parametrize("token_input", ["reject", "accept"])
@pytest.mark.parametrize("field", INPUT_FIELDS)
async def test_every_described_input_is_accepted(
    default_checkpoint: Checkpoint, token_input: str, field: str
) -> None:
    """Input's schema has each form up to its bounds, token ids only where they are accepted."""
    settings: dict[str, Any] = {"token_input": token_input, "max_texts": 5}
    described = schema(await document(default_checkpoint, **settings))["properties"][field]
    values = [value for value in examples(described) if value is not None]
    forms = [value[0] if isinstance(value, list) else value for value in values]
    accepts = token_input == "accept"  # noqa: S105 - a setting
    assert any(type(form) is int for form in forms) == accepts
    assert any(isinstance(form, list) for form in forms) == accepts
    assert any(isinstance(form, dict) for form in forms)
    assert max(len(value) for value in values if isinstance(value, list)) == 5
    async with fake_service(default_checkpoint, **settings) as (client, _):
        for value in values:
            answer = await client.post(PATH, json={field: value})
            assert answer.status_code == 200, (value, answer.text)
        refused = await client.post(PATH, json={field: ["a"] * 6})
        assert refused.json()["code"] == "too_many_inputs"


@pytest.mark.anyio
async def test_the_example_works(default_checkpoint: Checkpoint) -> None:
    """The document's own example is answered with the fields that it describes."""
    described = operation(await document(default_checkpoint))
    example = described["requestBody"]["content"]["application/json"]["example"]
    async with fake_service(default_checkpoint) as (client, _):
        body = (await client.post(PATH, json=example)).json()
    answer = described["responses"]["200"]["content"]["application/json"]["schema"]
    assert set(body) == set(answer["required"]) == set(answer["properties"])
    entry = answer["properties"]["data"]["items"]
    assert set(body["data"][0]) == set(entry["required"]) == set(entry["properties"])
    assert set(body["usage"]) == set(answer["properties"]["usage"]["properties"])


@pytest.mark.anyio
async def test_served_names_are_described(default_checkpoint: Checkpoint) -> None:
    """The model field's values follow the operator's names."""
    settings: dict[str, Any] = {"served_model_name": "mine", "model_aliases": ("other",)}
    described = schema(await document(default_checkpoint, **settings))["properties"]["model"]
    assert {"mine", "other", "mine:clustering", "other:clustering"} <= set(described["enum"])
    assert not any("taskvec-mini" in name for name in described["enum"] if name)


@pytest.mark.anyio
async def test_every_status_is_described(default_checkpoint: Checkpoint) -> None:
    """Each status that the route can give is in the document, errors with one shared form."""
    responses = operation(await document(default_checkpoint))["responses"]
    contract = {"200", "400", "404", "408", "413", "415", "429", "500", "503", "504"}
    assert set(responses) == contract
    for status, response in responses.items():
        assert response["description"]
        if status != "200":
            form = response["content"]["application/json"]["schema"]
            assert set(form["required"]) == set(form["properties"]) == OUR_ERROR_FIELDS


@pytest.mark.anyio
async def test_every_error_of_every_route_has_one_form(default_checkpoint: Checkpoint) -> None:
    """No route describes a form of error but its API's, such as the framework's own 422."""
    openapi = await document(default_checkpoint)
    forms = [
        (
            path,
            status,
            ERROR_FIELDS.get(described["tags"][0], OUR_ERROR_FIELDS),
            set(response["content"]["application/json"]["schema"].get("required", [])),
        )
        for path, methods in openapi["paths"].items()
        for described in methods.values()
        for status, response in described["responses"].items()
        if status != "200"
    ]
    assert len(forms) > 8
    assert [form for form in forms if form[2] != form[3]] == []


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ({"json": {"input": "a"}}, 200),
        ({"json": {}}, 400),
        ({"json": {"input": "a", "model": "made-up"}}, 404),
        ({"content": b"{" + b" " * 2000}, 413),
        ({"content": b"a", "headers": {"content-type": "text/plain"}}, 415),
        ({"json": {"input": "slow"}, "headers": {"x-request-timeout-ms": "1"}}, 504),
    ],
)
async def test_given_statuses_are_described(
    default_checkpoint: Checkpoint, request_: dict[str, Any], status: int
) -> None:
    """What comes back is of a status and a type of body that the document has."""
    engine = FakeEngine(default_checkpoint.card, delay=0.1)
    async with fake_service(default_checkpoint, engine, max_body_bytes=1000) as (client, _):
        described = operation((await client.get("/openapi.json")).json())["responses"]
        answer = await client.post(PATH, **request_)
    assert answer.status_code == status
    assert answer.headers["content-type"] in described[str(status)]["content"]
