"""Wrong requests to /v1/embeddings: each a clear refusal in the contract's form, none a 500."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import DEFAULT_VOCABULARY, examples, fake_service
from taskvec.api.openai import DIMENSION_FIELDS, INPUT_FIELDS, TRUNCATE_FIELDS
from taskvec.api.request import request_timeout
from taskvec.api.unsupported import SERVED_VALUES, UNSUPPORTED
from taskvec.checkpoint.checkpoint import Checkpoint

PATH = "/v1/embeddings"
MANY = "[" * 20_000
TASKS = ["clustering", "retrieval.query", "retrieval.passage"]
FLOAT16 = {"embedding_type": "float16"}


@pytest.fixture
async def client(default_checkpoint: Checkpoint) -> AsyncIterator[httpx.AsyncClient]:
    async with fake_service(default_checkpoint) as (client, _):
        yield client


@pytest.fixture
async def accepting(default_checkpoint: Checkpoint) -> AsyncIterator[httpx.AsyncClient]:
    """A service that takes token ids."""
    async with fake_service(default_checkpoint, token_input="accept") as service:  # noqa: S106 - a setting
        yield service[0]


def refused(
    answer: httpx.Response, code: str, param: str | None = None, status: int = 400
) -> dict[str, Any]:
    """Check the status and the whole form of a refusal; return its body."""
    body: dict[str, Any] = answer.json()
    assert (answer.status_code, body["code"], body["error"]["param"]) == (status, code, param), body
    assert set(body) == {"error", "detail", "code", "request_id"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["detail"], str)
    assert body["detail"] == body["error"]["message"]
    assert body["code"] == body["error"]["code"]
    assert body["request_id"] == answer.headers["x-request-id"]
    return body


@pytest.mark.anyio
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b'{"input": "a"',
        b'{"input": "a"} {}',
        b"{'input': 'a'}",
        b'{"input": "\xff\xfe"}',
        b"\xff\xfe{\x00}\x00",
        b'{"input": "a", "dimensions": NaN}',
        b'{"input": "a", "dimensions": Infinity}',
        b'{"input": "a", "dimensions": -Infinity}',
        b'{"input": "a", "dimensions": 1e400}',
        b'{"input": "\\ud800"}',
        b'{"input": "\\udc00\\ud800"}',
        b'{"input": "line\nbreak"}',
        f'{{"input": {MANY}'.encode(),
        f'{{"input": {MANY}1{"]" * 20_000}}}'.encode(),
    ],
)
async def test_what_is_not_json(client: httpx.AsyncClient, content: bytes) -> None:
    """Bytes that are not JSON, or are nested beyond reason, are a 400 invalid_json."""
    refused(await client.post(PATH, content=content), "invalid_json")


@pytest.mark.anyio
@pytest.mark.parametrize("content", ["null", "[]", '["a"]', '"a"', "1", "true"])
async def test_a_body_that_is_no_object(client: httpx.AsyncClient, content: str) -> None:
    """Any other JSON than an object is a 400."""
    body = refused(await client.post(PATH, content=content), "invalid_request")
    assert "object" in body["detail"]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("given_input", "code", "param"),
    [
        (None, "missing_input", "input"),
        ([], "empty_input", "input"),
        ("", "empty_input", "input"),
        (["a", ""], "empty_input", "input[1]"),
        ({"text": ""}, "empty_input", "input.text"),
        (["a", {"text": ""}], "empty_input", "input[1].text"),
        (" ", "empty_input", "input[0]"),
        (["a", "\u200b"], "empty_input", "input[1]"),
        (["a", "b", {"text": "\0"}], "empty_input", "input[2]"),
        (["a" * 700, "\n\t \u3000\ufeff"], "empty_input", "input[1]"),
        (["a", " " * 20_000], "empty_input", "input[1]"),
        (5, "invalid_input", "input"),
        (1.5, "invalid_input", "input"),
        (True, "invalid_input", "input"),
        ({}, "invalid_input", "input"),
        ({"image": "x"}, "unsupported_field", "input.image"),
        (["a", {"url": "http://x/y.png"}], "unsupported_field", "input[1].url"),
        ([{"bytes": "aGk="}], "unsupported_field", "input[0].bytes"),
        ([{"type": "image_url", "image_url": {}}], "unsupported_field", "input[0].image_url"),
        ([{"text": "a", "image": "x"}], "unsupported_field", "input[0].image"),
        (["a", {"text": "b", "prompt": "c"}], "unsupported_field", "input[1].prompt"),
        ([{"text": "a", "dimensions": 8}], "unsupported_field", "input[0].dimensions"),
        ({"text": "a", "embedding_type": "int8"}, "unsupported_field", "input.embedding_type"),
        (["a", {"text": "b", "task": "poetry"}], "unknown_task", "input[1].task"),
        ({"text": "b", "task": "poetry"}, "unknown_task", "input.task"),
        ([{"text": "b", "task_type": "poetry"}], "unknown_task", "input[0].task_type"),
        ([{"text": "b", "input_type": "passage"}], "unknown_task", "input[0].input_type"),
        ([{"text": "b", "task": 5}], "invalid_task", "input[0].task"),
        (
            ["a", {"text": "b", "input_type": ["query"]}],
            "invalid_input_type",
            "input[1].input_type",
        ),
        (
            [{"text": "b", "task": "clustering", "input_type": "query"}],
            "conflicting_fields",
            "input[0].input_type",
        ),
        ({"text": None}, "invalid_input", "input.text"),
        ({"text": ["a"]}, "invalid_input", "input.text"),
        ([None], "invalid_input", "input[0]"),
        ([True], "invalid_input", "input[0]"),
        ([1.5], "invalid_input", "input[0]"),
        (["a", 5], "invalid_input", "input[1]"),
        (["a", None], "invalid_input", "input[1]"),
        (["a", ["b"]], "invalid_input", "input[1]"),
        ([["hi"]], "invalid_input", "input[0]"),
        ([["hi", 1]], "invalid_input", "input[0]"),
        ([[]], "invalid_input", "input[0]"),
        ([[None]], "invalid_input", "input[0]"),
        (["a"] * 7 + [{"image": "x"}], "unsupported_field", "input[7].image"),
        (["a"] * 7 + [{"name": "x"}], "invalid_input", "input[7]"),
        (["a"] * 2049, "too_many_inputs", "input"),
        ("word " * 3000, "input_too_long", "input[0]"),
        (["a", "word " * 3000], "input_too_long", "input[1]"),
        (["a", " " * 3_000_000], "input_too_long", "input[1]"),
        ([1, 2, 3], "token_input_rejected", "input"),
        ([[1, 2, 3], [4]], "token_input_rejected", "input[0]"),
    ],
)
async def test_a_wrong_input(
    client: httpx.AsyncClient, given_input: object, code: str, param: str
) -> None:
    """Each fault of ``input`` is named, with the index of the item at fault."""
    body = refused(await client.post(PATH, json={"input": given_input}), code, param)
    assert code == "token_input_rejected" or param.removesuffix(".text") in body["detail"]


@pytest.mark.anyio
async def test_input_that_is_left_out(client: httpx.AsyncClient) -> None:
    """No ``input`` at all is named as missing."""
    refused(await client.post(PATH, json={"model": "taskvec-mini"}), "missing_input", "input")


@pytest.mark.anyio
async def test_as_many_texts_as_fit(client: httpx.AsyncClient) -> None:
    """2,048 texts are answered: only the next is too many."""
    assert (await client.post(PATH, json={"input": ["a"] * 2048})).status_code == 200


@pytest.mark.anyio
async def test_refused_token_ids_say_why(client: httpx.AsyncClient) -> None:
    """The refusal explains the harm, and names langchain-openai's and the operator's switch."""
    message = (await client.post(PATH, json={"input": [1, 2]})).json()["detail"]
    assert "meaningless" in message
    assert "check_embedding_ctx_length=False" in message
    assert "TASKVEC_TOKEN_INPUT" in message


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("ids", "code", "param"),
    [
        ([DEFAULT_VOCABULARY], "invalid_token_id", "input[0]"),
        ([1, -1], "invalid_token_id", "input[1]"),
        ([1, True], "invalid_token_id", "input[1]"),
        ([1, "a"], "invalid_token_id", "input[1]"),
        ([1, 1.5], "invalid_token_id", "input[1]"),
        ([1, None], "invalid_token_id", "input[1]"),
        ([1, [2]], "invalid_token_id", "input[1]"),
        ([2**63], "invalid_token_id", "input[0]"),
        ([[1], [2, DEFAULT_VOCABULARY]], "invalid_token_id", "input[1][1]"),
        ([[1], [False]], "invalid_token_id", "input[1][0]"),
        ([[1], [[2]]], "invalid_token_id", "input[1][0]"),
        ([[]], "invalid_input", "input[0]"),
        ([[1], []], "invalid_input", "input[1]"),
        ([[1], "a"], "invalid_input", "input[1]"),
        ([[1], 2], "invalid_input", "input[1]"),
        (["a", [1]], "invalid_input", "input[1]"),
        (["a", 1], "invalid_input", "input[1]"),
        ([True, 1], "invalid_input", "input[0]"),
        ([1] * 2049, "input_too_long", "input"),
        ([[1], [1] * 2049], "input_too_long", "input[1]"),
        ([[1]] * 2049, "too_many_inputs", "input"),
        ([10**30], "invalid_token_id", "input[0]"),
        ([1.0, 2.5], "invalid_token_id", "input[1]"),
        ([["hi"]], "invalid_input", "input[0]"),
        ([["hi", 1]], "invalid_input", "input[0]"),
    ],
)
async def test_wrong_token_ids_where_they_are_accepted(
    accepting: httpx.AsyncClient, ids: list[object], code: str, param: str
) -> None:
    """Ids outside the vocabulary, or among other things, are named by their index."""
    body = refused(await accepting.post(PATH, json={"input": ids}), code, param)
    assert param in body["detail"]


@pytest.mark.anyio
@pytest.mark.parametrize("field", DIMENSION_FIELDS)
@pytest.mark.parametrize("value", [0, -1, 257, 2**63, 10**30, True, 1.5, "64", [64], {}])
async def test_wrong_dimensions(client: httpx.AsyncClient, field: str, value: object) -> None:
    """Dimensions that are no whole number from 1 to the model's width are a 400."""
    answer = await client.post(PATH, json={"input": "a", field: value})
    body = refused(answer, "invalid_dimensions", field)
    assert body["detail"].startswith(f"{field} must be")


@pytest.mark.anyio
async def test_a_number_that_is_not_whole_is_repeated(client: httpx.AsyncClient) -> None:
    """The message has the value: "got a number" would not say what is wrong with it."""
    answer = await client.post(PATH, json={"input": "a", "dimensions": 1.5})
    assert refused(answer, "invalid_dimensions", "dimensions")["detail"].endswith("got 1.5.")


@pytest.mark.anyio
async def test_lists_in_lists_are_not_mistaken_for_token_ids(accepting: httpx.AsyncClient) -> None:
    """A list of texts inside the list is called that, also where token ids are accepted."""
    answer = await accepting.post(PATH, json={"input": [["hi", "there"]]})
    body = refused(answer, "invalid_input", "input[0]")
    assert "got a list: send all texts in one list" in body["detail"]
    mixed = await accepting.post(PATH, json={"input": [1, "a"]})
    assert "got a string" in refused(mixed, "invalid_token_id", "input[1]")["detail"]


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["binary", "ubinary"])
@pytest.mark.parametrize("size", [1, 7, 12, 255])
async def test_packed_types_need_multiples_of_eight(
    client: httpx.AsyncClient, kind: str, size: int
) -> None:
    """Bits that would not fill their last byte are refused."""
    for field in ("dimensions", "output_dimension"):
        asked = {"input": "a", "embedding_type": kind, field: size}
        refused(await client.post(PATH, json=asked), "invalid_dimensions", field)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"task": "retrieval.nothing"}, "unknown_task", "task"),
        ({"task": ""}, "unknown_task", "task"),
        ({"task_type": "x" * 5000}, "unknown_task", "task_type"),
        ({"input_type": "passage"}, "unknown_task", "input_type"),
        ({"model": "taskvec-mini:nothing"}, "unknown_task", "model"),
        ({"model": "taskvec-mini:"}, "unknown_task", "model"),
        ({"task": 5}, "invalid_task", "task"),
        ({"task_type": ["clustering"]}, "invalid_task_type", "task_type"),
        ({"input_type": True}, "invalid_input_type", "input_type"),
        ({"model": {}}, "invalid_model", "model"),
        ({"encoding_format": "hex"}, "invalid_encoding_format", "encoding_format"),
        ({"encoding_format": ["float"]}, "invalid_encoding_format", "encoding_format"),
        ({"embedding_type": "int4"}, "invalid_embedding_type", "embedding_type"),
        ({"embedding_type": 8}, "invalid_embedding_type", "embedding_type"),
        ({"embedding_type": []}, "invalid_embedding_type", "embedding_type"),
        ({"embedding_types": ["float", "int4"]}, "invalid_embedding_type", "embedding_types"),
        ({"embedding_type": ["float", None]}, "invalid_embedding_type", "embedding_type"),
        ({"output_dtype": ["int8", "float16"]}, "invalid_embedding_type", "output_dtype"),
        ({"encoding_type": [None]}, "invalid_embedding_type", "encoding_type"),
        ({"output_dtype": "float32"}, "invalid_embedding_type", "output_dtype"),
        (FLOAT16, "invalid_embedding_type", "embedding_type"),
        ({"output_dtype": "float16"}, "invalid_embedding_type", "output_dtype"),
        ({"normalized": "false"}, "invalid_normalized", "normalized"),
        ({"normalized": 0}, "invalid_normalized", "normalized"),
        ({"normalize": "no"}, "invalid_normalize", "normalize"),
        ({"output_dimensionality": "64"}, "invalid_dimensions", "output_dimensionality"),
        ({"truncate": 1}, "invalid_truncate", "truncate"),
        ({"truncation": "END"}, "invalid_truncation", "truncation"),
    ],
)
async def test_a_wrong_field(
    client: httpx.AsyncClient, fields: dict[str, Any], code: str, param: str
) -> None:
    """Each other field, of a wrong type or value, is named; long values are not echoed."""
    body = refused(await client.post(PATH, json={"input": "a", **fields}), code, param)
    assert len(body["detail"]) < 400


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"task": "clustering", "task_type": "classification"}, ["task", "task_type"]),
        ({"task": "clustering", "input_type": "query"}, ["task", "input_type"]),
        ({"task": "retrieval.query", "input_type": "document"}, ["task", "input_type"]),
        ({"task": "clustering", "model": "taskvec-mini:classification"}, ["task", "model"]),
        ({"model": "taskvec-mini:retrieval.query", "input_type": "document"}, ["model", "input_t"]),
        ({"dimensions": 8, "output_dimension": 16}, ["dimensions", "output_dimension"]),
        ({"dimensions": 8, "output_dimensionality": 16}, ["dimensions", "output_dimensionality"]),
        ({"normalized": True, "normalize": False}, ["normalized", "normalize"]),
        ({"texts": ["y"]}, ["input", "texts"]),
        ({"content": ["x", "x"]}, ["input", "content"]),
        ({"texts": {"text": "x", "task": "clustering"}}, ["input", "texts"]),
        ({"embedding_type": ["int8", "float"], "output_dtype": "int8"}, ["embedding_type"]),
        ({"truncate": True, "truncation": False}, ["truncate", "truncation"]),
        ({"embedding_type": "int8", "output_dtype": "uint8"}, ["embedding_type", "output_dtype"]),
        ({"embedding_types": ["int8"], "encoding_type": "float"}, ["embedding_types", "encoding"]),
    ],
)
async def test_fields_that_disagree(
    client: httpx.AsyncClient, fields: dict[str, Any], named: list[str]
) -> None:
    """Two fields that contradict each other are a 400 that names both."""
    answer = await client.post(PATH, json={"input": "x", **fields})
    assert (answer.status_code, answer.json()["code"]) == (400, "conflicting_fields")
    assert all(name in answer.json()["detail"] for name in named)
    assert answer.json()["error"]["param"] in fields


@pytest.mark.anyio
@pytest.mark.parametrize("field", sorted(UNSUPPORTED))
async def test_a_field_that_is_not_served(client: httpx.AsyncClient, field: str) -> None:
    """A field that would change vectors is refused with what to do instead, unless it is unused."""
    unused = SERVED_VALUES.get(field, (None, False))
    for value in unused:
        answer = await client.post(PATH, json={"input": "a", field: value})
        assert answer.status_code == 200, (value, answer.text)
        item = {"text": "a", field: value}
        assert (await client.post(PATH, json={"input": [item]})).status_code == 200
    for value in ("x", ["x"], {"x": 1}, 0, 1, 1.5, True not in unused):
        answer = await client.post(PATH, json={"input": "a", field: value})
        body = refused(answer, "unsupported_field", field)
        assert body["detail"] == f"{field} is not served: {UNSUPPORTED[field]}."
        answer = await client.post(PATH, json={"input": ["a", {"text": "b", field: value}]})
        assert refused(answer, "unsupported_field", f"input[1].{field}")


@pytest.mark.anyio
@pytest.mark.parametrize("field", INPUT_FIELDS)
async def test_the_name_of_the_input_is_the_clients(client: httpx.AsyncClient, field: str) -> None:
    """Errors of a text name the field that the client sent, also those of the tokenizer."""
    for value, code, param in [
        ([], "empty_input", field),
        (5, "invalid_input", field),
        ([1, 2], "token_input_rejected", field),
        (["a"] * 2049, "too_many_inputs", field),
        (["a", ""], "empty_input", f"{field}[1]"),
        (["a", " "], "empty_input", f"{field}[1]"),
        (["a", {"text": "word " * 3000}], "input_too_long", f"{field}[1]"),
        (["a", {"text": "b", "task": "poetry"}], "unknown_task", f"{field}[1].task"),
    ]:
        body = refused(await client.post(PATH, json={field: value}), code, param)
        assert code == "token_input_rejected" or param in body["detail"]


@pytest.mark.anyio
@pytest.mark.parametrize("field", TRUNCATE_FIELDS)
async def test_the_name_of_the_truncation_is_the_clients(
    client: httpx.AsyncClient, field: str
) -> None:
    """A text that is too long is refused with the client's own word for truncation."""
    answer = await client.post(PATH, json={"input": "word " * 3000, field: False})
    assert f"send {field}: true" in refused(answer, "input_too_long", "input[0]")["detail"]


@pytest.mark.anyio
async def test_an_error_among_several_tasks_has_the_index_of_the_request(
    client: httpx.AsyncClient,
) -> None:
    """Texts are tokenised task by task, and errors still count the items of the request."""
    items = [{"text": f"text {n}", "task": TASKS[n % 3]} for n in range(9)]
    for n in (0, 4, 8):
        for wrong, code in (("word " * 3000, "input_too_long"), ("\u200b", "empty_input")):
            sent = [*items[:n], {**items[n], "text": wrong}, *items[n + 1 :]]
            body = refused(await client.post(PATH, json={"input": sent}), code, f"input[{n}]")
            assert f"input[{n}]" in body["detail"]


@pytest.mark.anyio
async def test_bytes_hold_one_type(client: httpx.AsyncClient) -> None:
    """Several types are refused where the answer is a bare matrix."""
    body = {"input": "a", "embedding_type": ["float", "int8"]}
    answer = await client.post(PATH, json=body, headers={"accept": "application/octet-stream"})
    assert (
        "one request for each"
        in refused(answer, "invalid_embedding_type", "embedding_type")["detail"]
    )


@pytest.mark.anyio
@pytest.mark.parametrize(
    "model", ["gpt-4", "", "taskvec-mini/x", "other:clustering", "TASKVEC-MINI"]
)
async def test_an_unknown_model(client: httpx.AsyncClient, model: str) -> None:
    """A model that is not served is a 404 that names the one that is."""
    answer = await client.post(PATH, json={"input": "a", "model": model})
    body = refused(answer, "model_not_found", "model", 404)
    assert body["error"]["type"] == "not_found_error"
    assert "taskvec-mini" in body["detail"]


@pytest.mark.anyio
async def test_a_body_over_the_limit(default_checkpoint: Checkpoint) -> None:
    """A byte too many is a 413, whether the header says so or the chunks add up to it."""

    async def in_chunks(content: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(content), 100):
            yield content[start : start + 100]

    fits = json.dumps({"input": "a" * 900}).encode()
    async with fake_service(default_checkpoint, max_body_bytes=len(fits)) as (client, engine):
        assert (await client.post(PATH, content=fits)).status_code == 200
        assert (await client.post(PATH, content=in_chunks(fits))).status_code == 200
        for content in (fits + b" ", in_chunks(fits + b" ")):
            answer = await client.post(PATH, content=content)
            refused(answer, "body_too_large", status=413)
        assert len(engine.batches) == 2


@pytest.mark.anyio
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS"])
async def test_a_wrong_method(client: httpx.AsyncClient, method: str) -> None:
    """Another method than POST is a 405 that says POST is allowed."""
    answer = await client.request(method, PATH)
    refused(answer, "method_not_allowed", status=405)
    assert answer.headers["allow"] == "POST"


@pytest.mark.anyio
@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "json", ""]
)
async def test_a_wrong_content_type(client: httpx.AsyncClient, kind: str) -> None:
    """A body declared as anything but JSON is a 415."""
    headers = {"content-type": kind}
    answer = await client.post(PATH, content=b'{"input": "a"}', headers=headers)
    refused(answer, "unsupported_media_type", status=415)


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/v1", "/v1/embedding", "/v3/nothing", "/a%FFb%00"])
async def test_an_unknown_route(client: httpx.AsyncClient, path: str) -> None:
    """A path that nothing answers is a 404 in the same form."""
    body = refused(await client.post(path, json={}), "not_found", status=404)
    assert body["error"]["type"] == "not_found_error"


@pytest.mark.anyio
@pytest.mark.parametrize("asked", ["0", "000", "-5", "1.5", "1e3", "soon", "", " ", "\xb2"])
async def test_a_wrong_timeout_header(client: httpx.AsyncClient, asked: str) -> None:
    """x-request-timeout-ms that is no positive number of milliseconds is a 400."""
    headers = {b"x-request-timeout-ms": asked.encode("latin-1")}
    answer = await client.post(PATH, json={"input": "a"}, headers=headers)
    refused(answer, "invalid_timeout", "x-request-timeout-ms")


@pytest.mark.anyio
@pytest.mark.parametrize("asked", ["9" * 11, "9" * 12, "9" * 5000, "0" * 20 + "60000"])
async def test_a_long_timeout_is_the_services_own(client: httpx.AsyncClient, asked: str) -> None:
    """Any whole number of milliseconds is accepted, and the service's own limit still holds."""
    headers = {"x-request-timeout-ms": asked}
    answer = await client.post(PATH, json={"input": "a"}, headers=headers)
    assert answer.status_code == 200
    assert request_timeout(headers, 300.0) == min(300.0, int(asked[-18:]) / 1000)


@pytest.mark.anyio
@pytest.mark.parametrize("text", ["a\x00b", " a", "a\n\t", "\ufeffa", "\u202ea", "\U00010348"])
async def test_odd_characters_are_text(client: httpx.AsyncClient, text: str) -> None:
    """Null bytes, white space and other odd characters around a letter do not spoil a text."""
    assert (await client.post(PATH, json={"input": text})).status_code == 200


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=20)  # lone surrogates included
    | st.sampled_from(["clustering", "query", "taskvec-mini", "int8", "base64", "float16"])
    | st.sampled_from(["clustering", "query"]).map(lambda task: {"text": "a", "task": task}),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
FIELDS = """input model task task_type input_type dimensions output_dimension encoding_format
    embedding_type embedding_types encoding_type output_dtype normalized truncate truncation user
    texts content output_dimensionality normalize prompt"""
BODIES = st.dictionaries(st.sampled_from(FIELDS.split()), JSON, max_size=5)


@pytest.mark.parametrize("token_input", ["reject", "accept"])
def test_no_json_gives_a_500(default_checkpoint: Checkpoint, token_input: str) -> None:
    """Whatever the JSON, the answer is a 200 or an error below 500 in the contract's form."""
    with asyncio.Runner() as runner:
        service = fake_service(default_checkpoint, token_input=token_input)
        client, _ = runner.run(service.__aenter__())

        @given(BODIES | BODIES.map(lambda body: {"input": "a", **body}) | JSON)
        @settings(max_examples=examples(150), suppress_health_check=[HealthCheck.too_slow])
        def check(body: object) -> None:
            answer = runner.run(client.post(PATH, content=json.dumps(body)))
            if answer.status_code != 200:
                error = answer.json()["error"]
                assert answer.status_code in {400, 404}
                refused(answer, error["code"], error["param"], answer.status_code)

        try:
            check()
        finally:
            runner.run(service.__aexit__(None, None, None))
