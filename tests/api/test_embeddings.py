"""POST /v1/embeddings: each field and spelling, what the engine is sent, what comes back."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer

from conftest import fake_service
from fakes import FakeEngine, hashed_vector
from taskvec.api.openai import INPUT_FIELDS, TYPE_FIELDS
from taskvec.api.unsupported import UNSUPPORTED
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.priority import Priority

PATH = "/v1/embeddings"
TASKS = {
    "retrieval.query": ("retrieval", "Query: "),
    "retrieval.passage": ("retrieval", "Document: "),
    "text-matching": ("text-matching", "Document: "),
    "clustering": ("clustering", "Document: "),
    "classification": ("classification", "Document: "),
}
"""Task -> the adapter and the prompt that it means."""

Service = tuple[httpx.AsyncClient, FakeEngine]
Ids = Callable[..., NDArray[np.int32]]
Vector = Callable[..., NDArray[np.float32]]


@pytest.fixture
async def service(default_checkpoint: Checkpoint) -> AsyncIterator[Service]:
    async with fake_service(
        default_checkpoint, model_aliases=("text-embedding-3-small",)
    ) as client_and_engine:
        yield client_and_engine


@pytest.fixture(scope="module")
def ids(default_checkpoint: Checkpoint) -> Ids:
    """The ids of a text under a task, by the tokenizers library alone."""
    tokenizer = Tokenizer.from_file(str(default_checkpoint.tokenizer))
    return lambda text, task="text-matching": np.array(
        tokenizer.encode(TASKS[task][1] + text).ids, np.int32
    )


@pytest.fixture(scope="module")
def raw(ids: Ids, default_checkpoint: Checkpoint) -> Vector:
    """What the engine gives for a text under a task, before anything is done to it."""
    width = default_checkpoint.card.dimension
    return lambda text, task="text-matching": hashed_vector(ids(text, task), TASKS[task][0], width)


def unit(vector: NDArray[np.float32]) -> NDArray[np.float64]:
    return vector.astype(np.float64) / np.linalg.norm(vector.astype(np.float64))


def quantised(vector: NDArray[np.float32], kind: str) -> NDArray[np.float64]:
    """The contract's formulas, written out."""
    if kind in {"int8", "uint8"}:
        steps = np.round(127 * vector / np.abs(vector).max())
        return steps + (128 if kind == "uint8" else 0)
    bits = (vector > 0).reshape(-1, 8) @ (1 << np.arange(7, -1, -1))
    return bits - (128 if kind == "binary" else 0)


async def one(client: httpx.AsyncClient, **body: Any) -> Any:
    """The only embedding of an answer that must be a 200."""
    answer = await client.post(PATH, json={"input": "some text", **body})
    assert answer.status_code == 200, answer.text
    (entry,) = answer.json()["data"]
    return entry["embedding"]


@pytest.mark.anyio
async def test_the_answer_has_openais_form(service: Service, ids: Ids, raw: Vector) -> None:
    """Two texts give two unit vectors in order, the model's name, and both token counts."""
    answer = await service[0].post(PATH, json={"input": ["first", "the second"]})
    body = answer.json()
    assert answer.headers["content-type"] == "application/json"
    assert set(body) == {"object", "model", "data", "usage"}
    assert (body["object"], body["model"]) == ("list", "taskvec-mini")
    assert [(entry["object"], entry["index"]) for entry in body["data"]] == [
        ("embedding", 0),
        ("embedding", 1),
    ]
    for entry, text in zip(body["data"], ["first", "the second"], strict=True):
        assert np.allclose(entry["embedding"], unit(raw(text)), atol=1e-6)
    tokens = len(ids("first")) + len(ids("the second"))
    assert body["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ({"text": "a"}, ["a"]),
        ([{"text": "a"}, {"text": "b"}], ["a", "b"]),
        (["a", {"text": "b"}], ["a", "b"]),
        (["a", "a"], ["a", "a"]),
    ],
)
async def test_each_form_of_input(
    service: Service, ids: Ids, given: object, texts: list[str]
) -> None:
    """Strings and {"text": string}, alone and in lists, reach the engine as their ids."""
    client, engine = service
    assert (await client.post(PATH, json={"input": given})).status_code == 200
    (batch,) = engine.batches
    assert [sent.tolist() for sent in batch.ids] == [ids(text).tolist() for text in texts]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("fields", "task"),
    [
        ({}, "text-matching"),
        *(({"task": name}, name) for name in TASKS),
        *(({"task_type": name}, name) for name in TASKS),
        *(({"model": f"taskvec-mini:{name}"}, name) for name in TASKS),
        ({"task": "retrieval"}, "retrieval.passage"),
        ({"task": "separation"}, "clustering"),
        ({"model": "taskvec-mini:separation"}, "clustering"),
        ({"model": "text-embedding-3-small"}, "text-matching"),
        ({"model": "text-embedding-3-small:retrieval"}, "retrieval.passage"),
        ({"input_type": "query"}, "retrieval.query"),
        ({"input_type": "search_query"}, "retrieval.query"),
        ({"input_type": "document"}, "retrieval.passage"),
        ({"input_type": "search_document"}, "retrieval.passage"),
        ({"input_type": "classification"}, "classification"),
        ({"input_type": "clustering"}, "clustering"),
        ({"task": "separation", "task_type": "clustering"}, "clustering"),
        ({"task": "retrieval", "input_type": "document"}, "retrieval.passage"),
        (
            {
                "model": "taskvec-mini:retrieval.query",
                "task": "retrieval.query",
                "input_type": "query",
            },
            "retrieval.query",
        ),
        ({"model": None, "task": None, "task_type": None, "input_type": None}, "text-matching"),
    ],
)
async def test_each_way_to_name_a_task(
    service: Service, raw: Vector, fields: dict[str, Any], task: str
) -> None:
    """Every spelling of a task picks its adapter and its prompt."""
    assert np.allclose(await one(service[0], **fields), unit(raw("some text", task)), atol=1e-6)


@pytest.mark.anyio
@pytest.mark.parametrize("field", ["dimensions", "output_dimension", "output_dimensionality"])
@pytest.mark.parametrize("size", [1, 8, 64.0, 100, 256])
async def test_dimensions_cut_before_the_length_is_taken(
    service: Service, raw: Vector, field: str, size: float
) -> None:
    """The first values are kept, and scaled to length 1 after that; 64.0 is a whole number."""
    vector = await one(service[0], **{field: size})
    assert np.allclose(vector, unit(raw("some text")[: int(size)]), atol=1e-6)


@pytest.mark.anyio
@pytest.mark.parametrize("field", ["normalized", "normalize"])
async def test_normalized_false_leaves_lengths(service: Service, raw: Vector, field: str) -> None:
    """The engine's own values come back, cut but not scaled."""
    vector = await one(service[0], dimensions=10, **{field: False})
    assert np.allclose(vector, raw("some text")[:10], atol=1e-6)
    assert abs(np.linalg.norm(vector) - 1) > 0.01


@pytest.mark.anyio
async def test_null_is_silence(service: Service, raw: Vector) -> None:
    """Null in every optional field gives what leaving them out gives."""
    fields = "model task task_type input_type dimensions output_dimension encoding_format"
    fields += " embedding_type embedding_types encoding_type output_dtype normalized truncate"
    fields += " texts content output_dimensionality normalize"
    nulls = dict.fromkeys([*fields.split(), "truncation", "user", *UNSUPPORTED])
    assert np.allclose(await one(service[0], **nulls), unit(raw("some text")), atol=1e-6)


@pytest.mark.anyio
async def test_unknown_fields_are_ignored(service: Service, raw: Vector) -> None:
    """``user`` and fields nobody knows, of any type, change nothing."""
    vector = await one(service[0], user={"id": 5}, late_chunks=True, priority=[None])
    assert np.allclose(vector, unit(raw("some text")), atol=1e-6)


@pytest.mark.anyio
@pytest.mark.parametrize("truncate", ["truncate", "truncation"])
async def test_truncate_cuts_and_counts_what_is_left(
    service: Service, ids: Ids, truncate: str
) -> None:
    """A text that is too long is cut to the limit, its end token kept; usage counts the rest."""
    client, engine = service
    text = "word " * 3000
    answer = await client.post(PATH, json={"input": text, truncate: True})
    whole = ids(text)
    assert len(whole) > 2048
    (sent,) = engine.batches[0].ids
    assert sent.tolist() == [*whole[:2047].tolist(), whole[-1]]
    assert answer.json()["usage"] == {"prompt_tokens": 2048, "total_tokens": 2048}
    refused = await client.post(PATH, json={"input": text, truncate: False})
    assert (refused.status_code, refused.json()["code"]) == (400, "input_too_long")


@pytest.mark.anyio
@pytest.mark.parametrize(
    "given", [[5, 6, 7], [[5, 6, 7]], [[5, 6, 7], [9]]], ids=["flat", "one", "two"]
)
async def test_token_ids_when_accepted(default_checkpoint: Checkpoint, given: list[Any]) -> None:
    """Ids reach the engine as they are, without a prompt, and the task picks the adapter."""
    async with fake_service(default_checkpoint, token_input="accept") as service:  # noqa: S106 - a setting
        client, engine = service
        answer = await client.post(PATH, json={"input": given, "task": "retrieval.query"})
        (batch,) = engine.batches
    rows = given if isinstance(given[0], list) else [given]
    assert [sent.tolist() for sent in batch.ids] == rows
    assert batch.adapter == "retrieval"
    assert answer.json()["usage"]["prompt_tokens"] == sum(map(len, rows))


@pytest.mark.anyio
async def test_three_hundred_texts_stay_in_order(service: Service, raw: Vector) -> None:
    """An answer so large that a thread encodes it has each text's vector at its index."""
    texts = [f"text {n}" for n in range(300)]
    for encoding in ("float", "base64"):
        answer = await service[0].post(PATH, json={"input": texts, "encoding_format": encoding})
        data = answer.json()["data"]
        assert [entry["index"] for entry in data] == list(range(300))
        rows = [entry["embedding"] for entry in data]
        if encoding == "base64":
            rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
        assert np.allclose(rows, [unit(raw(text)) for text in texts], atol=1e-6)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "fields",
    [
        {"encoding_format": "base64"},
        {"embedding_type": "base64"},
        {"encoding_type": ["base64"], "encoding_format": "float"},
        {"output_dtype": "float", "encoding_format": "base64"},
    ],
)
async def test_base64_is_little_endian_float32(
    service: Service, raw: Vector, fields: dict[str, Any]
) -> None:
    """base64 carries four bytes a value, least significant first."""
    packed = base64.b64decode(await one(service[0], dimensions=12, **fields), validate=True)
    assert len(packed) == 48
    assert np.allclose(np.frombuffer(packed, "<f4"), unit(raw("some text")[:12]), atol=1e-6)


@pytest.mark.anyio
@pytest.mark.parametrize("field", TYPE_FIELDS)
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("kind", ["float", "int8", "uint8", "binary", "ubinary"])
async def test_each_spelling_of_each_output_type(
    service: Service, raw: Vector, field: str, listed: bool, kind: str
) -> None:
    """Every type comes as JSON numbers by its formula, computed from the cut vector."""
    vector = await one(service[0], dimensions=40, **{field: [kind] if listed else kind})
    cut = raw("some text")[:40]
    if kind == "float":
        assert np.allclose(vector, unit(cut), atol=1e-6)
    else:
        assert vector == quantised(cut, kind).tolist()
        assert all(type(value) is int for value in vector)


def is_bytes(spellings: Sequence[str], headers: dict[str, str]) -> bool:
    """Only Voyage's own spelling, from another client than an OpenAI SDK, gives packed bytes."""
    return list(spellings) == ["output_dtype"] and not headers


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["int8", "uint8", "binary", "ubinary"])
@pytest.mark.parametrize("headers", [{}, {"X-Stainless-Lang": "js"}], ids=["other", "openai"])
@pytest.mark.parametrize(
    "spellings", [*([field] for field in TYPE_FIELDS), ["output_dtype", "embedding_type"]]
)
async def test_base64_of_a_quantised_type(
    service: Service, raw: Vector, kind: str, headers: dict[str, str], spellings: list[str]
) -> None:
    """It is float32 of the integers, as OpenAI's SDKs read it; for Voyage's client the bytes."""
    expected = quantised(raw("some text"), kind).tolist()
    body = {"input": "some text", "encoding_format": "base64", **dict.fromkeys(spellings, kind)}
    answer = await service[0].post(PATH, json=body, headers=headers)
    packed = base64.b64decode(answer.json()["data"][0]["embedding"], validate=True)
    own = np.dtype(np.uint8 if kind.startswith("u") else np.int8)
    dtype = own if is_bytes(spellings, headers) else np.dtype("<f4")
    assert np.frombuffer(packed, dtype).tolist() == expected
    for encoding in (None, "float"):
        numbers = await service[0].post(
            PATH, json={**body, "encoding_format": encoding}, headers=headers
        )
        assert numbers.json()["data"][0]["embedding"] == expected


@pytest.mark.anyio
@pytest.mark.parametrize("encoding", [None, "float", "base64"])
@pytest.mark.parametrize("field", TYPE_FIELDS)
@pytest.mark.parametrize("texts", [1, 400])
async def test_several_types_in_one_request(
    service: Service, raw: Vector, encoding: str | None, field: str, texts: int
) -> None:
    """Each embedding is an object with a vector of each type, and the engine is asked once."""
    client, engine = service
    names = ["ubinary", "float", "int8", "base64", "binary", "uint8", "int8"]
    given = [f"text {n}" for n in range(texts)]
    body = {"input": given, "dimensions": 40, field: names, "encoding_format": encoding}
    answer = await client.post(PATH, json=body)
    assert answer.status_code == 200, answer.text
    assert len(engine.batches) == 1
    assert set(answer.json()) == {"object", "model", "data", "usage"}
    data = answer.json()["data"]
    assert [entry["index"] for entry in data] == list(range(texts))
    for entry, text in zip(data, given, strict=True):
        cut, found = raw(text)[:40], entry["embedding"]
        assert found.keys() == set(names)
        assert np.allclose(found["float"], unit(cut), atol=1e-6)
        assert np.array_equal(
            np.frombuffer(base64.b64decode(found["base64"]), "<f4"),
            np.array(found["float"], np.float32),
        )
        for kind in ("int8", "uint8", "binary", "ubinary"):
            assert found[kind] == quantised(cut, kind).tolist()


@pytest.mark.anyio
async def test_several_types_are_counted(service: Service) -> None:
    """The metric of answers counts each type with the encoding that it has in the answer."""
    client, _ = service
    await one(client, embedding_type=["base64", "int8"])
    page = (await client.get("/metrics")).text
    assert 'taskvec_answers_total{output="float",transport="base64"} 1.0' in page
    assert 'taskvec_answers_total{output="int8",transport="numbers"} 1.0' in page
    assert 'taskvec_answers_total{output="float",transport="numbers"} 0.0' in page


@pytest.mark.anyio
@pytest.mark.parametrize("field", INPUT_FIELDS)
async def test_each_name_of_the_input(service: Service, raw: Vector, field: str) -> None:
    """``texts`` and ``content`` are other names of ``input``; equal values may come twice."""
    client, _ = service
    for extra in ({}, {"input": ["a", "b"]}, {"texts": ["a", {"text": "b"}]}):
        answer = await client.post(PATH, json={**extra, field: ["a", "b"]})
        assert answer.status_code == 200, answer.text
        vectors = [entry["embedding"] for entry in answer.json()["data"]]
        assert np.allclose(vectors, [unit(raw("a")), unit(raw("b"))], atol=1e-6)


@pytest.mark.anyio
async def test_equal_token_ids_may_come_twice(default_checkpoint: Checkpoint) -> None:
    """Token ids under two names are compared as well."""
    async with fake_service(default_checkpoint, token_input="accept") as (client, _):  # noqa: S106 - a setting
        same = {"input": [[5, 6], [7]], "texts": [[5.0, 6], [7]]}
        assert (await client.post(PATH, json=same)).status_code == 200
        for other in ([[5, 6], [8]], [[5, 6]], ["a", "b"], [5, 6]):
            answer = await client.post(PATH, json={**same, "texts": other})
            assert (answer.status_code, answer.json()["code"]) == (400, "conflicting_fields")


ITEMS: list[Any] = [
    {"text": "a", "task": "retrieval.query"},
    {"text": "a", "task": "retrieval.passage"},
    "a",
    {"text": "b", "task_type": "separation", "task": None},
    {"text": "a", "input_type": "search_query"},
    {"text": "c"},
    {"text": "b", "input_type": "classification", "image": None},
    {"text": "d", "task": "text-matching", "id": 7},
]
ITEM_TASKS = [
    *("retrieval.query", "retrieval.passage", None, "clustering", "retrieval.query", None),
    *("classification", "text-matching"),
]
"""Task of each item; None is that of the request."""


@pytest.mark.anyio
@pytest.mark.parametrize("task", [None, "clustering"])
async def test_items_with_tasks_of_their_own(
    service: Service, raw: Vector, task: str | None
) -> None:
    """One request with several tasks gives what one request for each item gives."""
    client, engine = service
    answer = await client.post(PATH, json={"input": ITEMS, "task": task})
    assert answer.status_code == 200, answer.text
    batches = len(engine.batches)
    data, tokens = answer.json()["data"], 0
    assert [entry["index"] for entry in data] == list(range(len(ITEMS)))
    for item, own, entry in zip(ITEMS, ITEM_TASKS, data, strict=True):
        text = item if isinstance(item, str) else item["text"]
        named = own or task or "text-matching"
        alone = (await client.post(PATH, json={"input": text, "task": named})).json()
        assert entry["embedding"] == alone["data"][0]["embedding"]
        assert np.allclose(entry["embedding"], unit(raw(text, named)), atol=1e-6)
        tokens += alone["usage"]["prompt_tokens"]
    assert answer.json()["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert tokens == sum(len(sent) for batch in engine.batches[:batches] for sent in batch.ids)
    assert [stage.partition(";")[0] for stage in answer.headers["server-timing"].split(", ")] == [
        *("tokenize", "queue", "engine", "encode"),
    ]
    page = (await client.get("/metrics")).text
    assert 'taskvec_requests_total{status="200",task="mixed"} 1.0' in page
    assert f'taskvec_texts_total{{status="200",task="mixed"}} {len(ITEMS)}.0' in page


@pytest.mark.anyio
@pytest.mark.parametrize("given", [{"text": "a", "task": "clustering"}, ["a", {"text": "b"}]])
async def test_items_of_one_task_are_one_batch(service: Service, given: Any) -> None:
    """If all items have one task, the request counts as one of that task."""
    client, engine = service
    answer = await client.post(PATH, json={"input": given, "task": "clustering"})
    assert answer.status_code == 200
    assert len(engine.batches) == 1
    page = (await client.get("/metrics")).text
    assert 'taskvec_requests_total{status="200",task="clustering"} 1.0' in page


@pytest.mark.anyio
async def test_several_tasks_share_one_class(default_checkpoint: Checkpoint) -> None:
    """Texts that together do not fit into a forward pass are bulk work, whatever their tasks."""
    engine = FakeEngine(default_checkpoint.card)
    engine.batch_tokens = 100
    items = [{"text": "word " * 40, "task": task} for task in TASKS]
    async with fake_service(default_checkpoint, engine) as (client, _):
        assert (await client.post(PATH, json={"input": items[:2]})).status_code == 200
        small = [batch.priority for batch in engine.batches]
        engine.batches.clear()
        assert (await client.post(PATH, json={"input": items})).status_code == 200
        large = [batch.priority for batch in engine.batches]
    assert small == [Priority.INTERACTIVE] * 2
    assert large == [Priority.BULK] * 5


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (None, "<f4"),
        ("float", "<f4"),
        ("float16", "<f2"),
        ("int8", "i1"),
        ("uint8", "u1"),
        ("binary", "i1"),
        ("ubinary", "u1"),
    ],
)
async def test_raw_bytes(
    service: Service, raw: Vector, ids: Ids, kind: str | None, dtype: str
) -> None:
    """Accept: application/octet-stream gives the matrix, with shape, type and tokens in headers."""
    body = {"input": ["some text", "more"], "dimensions": 16, "embedding_type": kind}
    accept = {"accept": "text/plain, Application/Octet-Stream;q=0.9"}
    answer = await service[0].post(PATH, json=body, headers=accept)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["x-embedding-dtype"] == np.dtype(dtype).name
    assert answer.headers["x-prompt-tokens"] == str(len(ids("some text")) + len(ids("more")))
    shape = tuple(map(int, answer.headers["x-embedding-shape"].split(",")))
    assert shape == ((2, 2) if kind in {"binary", "ubinary"} else (2, 16))
    matrix = np.frombuffer(answer.content, dtype).reshape(shape)
    cuts = [raw(text)[:16] for text in ("some text", "more")]
    if kind in {None, "float", "float16"}:
        units = [unit(cut) for cut in cuts]
        assert np.allclose(matrix, units, rtol=0, atol=1e-3 if kind == "float16" else 1e-6)
    else:
        assert matrix.tolist() == [quantised(cut, str(kind)).tolist() for cut in cuts]
