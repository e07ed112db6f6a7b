"""Reranking and scores: cosines of queries and passages, their order, and each API's own form."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest

from conftest import fake_service
from dialects import RANKED, DialectRoute
from fakes import FakeEngine
from processes import total
from taskvec.api.request import RequestLimits
from taskvec.api.rerank import RankFormat, error_response
from taskvec.api.response import answer_bytes
from taskvec.api.tei import TeiSimilarity
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.core.output_format import OutputFormat
from taskvec.errors import QueueFullError
from taskvec.service import build_service
from taskvec.settings import Settings

QUERY = "how do plants make food"
DOCUMENTS = ["the bank raised its rates", "leaves turn light into sugar", "plants eat light", "b"]
LONG = "word " * 5000
NEAR = 1e-6
V1, V2, TEI, SCORE = "/v1/rerank", "/v2/rerank", "/rerank", "/v1/score"


@pytest.fixture
async def service(
    default_checkpoint: Checkpoint,
) -> AsyncIterator[tuple[httpx.AsyncClient, FakeEngine]]:
    async with fake_service(default_checkpoint) as service:
        yield service


async def cosines(
    client: httpx.AsyncClient, queries: list[str], documents: list[str]
) -> list[float]:
    """Dot products of the vectors that /v1/embeddings gives of both sides."""
    sides = []
    for task, texts in (("retrieval.query", queries), ("retrieval.passage", documents)):
        body = {"input": texts, "task": task, "truncate": True}
        data = (await client.post("/v1/embeddings", json=body)).json()["data"]
        sides.append(np.array([entry["embedding"] for entry in data]))
    return [float(value) for value in (sides[0] * sides[1]).sum(axis=1)]


async def post(client: httpx.AsyncClient, path: str, **body: Any) -> Any:
    """Answer of a good request."""
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.anyio
@pytest.mark.parametrize("route", RANKED, ids=lambda route: route.path)
async def test_scores_are_cosines_from_one_request(
    service: tuple[httpx.AsyncClient, FakeEngine], route: DialectRoute
) -> None:
    """Each score is the dot product of both vectors, which one request with two tasks embeds."""
    client, engine = service
    body = await post(client, route.path, **{**route.request(DOCUMENTS), **query_of(route)})
    assert len(engine.batches) == 2
    assert sum(len(batch.ids) for batch in engine.batches) == 1 + len(DOCUMENTS)
    expected = await cosines(client, [QUERY], DOCUMENTS)
    found = [score for (score,) in route.vectors(body)]
    order = list(range(len(DOCUMENTS)))
    if route.path not in (SCORE, "/score"):
        order = sorted(order, key=lambda i: -expected[i])
        entries = body if route.path == TEI else body["results"]
        assert [entry["index"] for entry in entries] == order
    np.testing.assert_allclose(found, [expected[i] for i in order], atol=NEAR)


def query_of(route: DialectRoute) -> dict[str, str]:
    """The field of the query."""
    return {"text_1" if "text_1" in route.request(["a"]) else "query": QUERY}


@pytest.mark.anyio
async def test_the_answer_of_the_first_version(
    service: tuple[httpx.AsyncClient, FakeEngine],
) -> None:
    """The answer is Jina's and Cohere's at once, and says what the scores are."""
    client, _ = service
    documents = [DOCUMENTS[0], {"text": DOCUMENTS[1], "title": "leaves"}]
    body = await post(client, V1, model="taskvec-mini", query=QUERY, documents=documents)
    assert list(body) == ["id", "model", "object", "usage", "results", "meta"]
    assert body["model"] == "taskvec-mini:retrieval (bi-encoder)"
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] > 10
    assert body["meta"]["api_version"] == {"version": "1"}
    assert body["meta"]["billed_units"] == {"search_units": 1}
    assert body["meta"]["tokens"] == {"input_tokens": body["usage"]["total_tokens"]}
    assert "not the score of a cross-encoder" in body["meta"]["warnings"][0]
    returned = {entry["index"]: entry["document"] for entry in body["results"]}
    assert returned == {0: {"text": DOCUMENTS[0]}, 1: documents[1]}
    without = await post(client, V1, query=QUERY, documents=documents, return_documents=False)
    assert [set(entry) for entry in without["results"]] == [{"index", "relevance_score"}] * 2


@pytest.mark.anyio
async def test_the_answer_of_the_second_version(
    service: tuple[httpx.AsyncClient, FakeEngine],
) -> None:
    """The answer is Cohere's: no model, no documents unless they are asked for."""
    client, _ = service
    body = await post(client, V2, model="taskvec-mini", query=QUERY, documents=["a"] * 101)
    assert list(body) == ["id", "results", "meta"]
    assert body["meta"]["api_version"] == {"version": "2"}
    assert body["meta"]["billed_units"] == {"search_units": 2}
    assert set(body["results"][0]) == {"index", "relevance_score"}
    told = await post(
        client, V2, query=QUERY, documents=["a"], return_documents=True, max_tokens_per_doc=4096
    )
    assert told["results"][0]["document"] == {"text": "a"}


@pytest.mark.anyio
async def test_the_answer_of_text_embeddings_inference(
    service: tuple[httpx.AsyncClient, FakeEngine],
) -> None:
    """The answer is a bare list; texts come with ``return_text``; raw scores are the same."""
    client, _ = service
    plain = await post(client, TEI, query=QUERY, texts=DOCUMENTS)
    assert {tuple(entry) for entry in plain} == {("index", "score")}
    told = await post(client, TEI, query=QUERY, texts=DOCUMENTS, return_text=True, raw_scores=True)
    assert [(entry["index"], entry["score"]) for entry in told] == [
        (entry["index"], entry["score"]) for entry in plain
    ]
    assert all(entry["text"] == DOCUMENTS[entry["index"]] for entry in told)
    assert await post(client, TEI, query=QUERY, texts=DOCUMENTS, top_n=2) == plain[:2]
    answer = await client.post(TEI, json={"query": QUERY, "texts": DOCUMENTS})
    assert int(answer.headers["x-compute-tokens"]) > 10


@pytest.mark.anyio
@pytest.mark.parametrize("fields", [("text_1", "text_2"), ("queries", "documents")])
@pytest.mark.parametrize(
    ("left", "right"),
    [("a", "b"), ("a", ["b", "c"]), (["a"], ["b", "c"]), (["a", "d"], ["b", "c"])],
)
async def test_scores_of_pairs(
    service: tuple[httpx.AsyncClient, FakeEngine],
    fields: tuple[str, str],
    left: str | list[str],
    right: str | list[str],
) -> None:
    """/v1/score compares one text with one or several, or each with its own, in their order."""
    client, _ = service
    body = await post(client, SCORE, **{fields[0]: left, fields[1]: right})
    queries = [left] if isinstance(left, str) else left
    documents = [right] if isinstance(right, str) else right
    queries = queries * len(documents) if len(queries) == 1 else queries
    expected = await cosines(client, queries, documents)
    assert [(entry["index"], entry["object"]) for entry in body["data"]] == [
        (i, "score") for i in range(len(documents))
    ]
    np.testing.assert_allclose([e["score"] for e in body["data"]], expected, atol=NEAR)
    assert (body["object"], body["model"]) == ("list", "taskvec-mini:retrieval (bi-encoder)")
    assert body["usage"]["total_tokens"] > 2
    assert body["created"] > 1.7e9
    assert body["id"]


@pytest.mark.anyio
async def test_equal_documents_keep_their_order(
    service: tuple[httpx.AsyncClient, FakeEngine],
) -> None:
    """Of documents with equal scores the first one comes first; the same text scores the same."""
    client, _ = service
    body = await post(client, V1, query=QUERY, documents=["a", "b"] * 20)
    found = [(entry["relevance_score"], entry["index"]) for entry in body["results"]]
    assert found == sorted(found, key=lambda entry: (-entry[0], entry[1]))
    assert len({score for score, _ in found}) == 2


@pytest.mark.anyio
@pytest.mark.parametrize("path", [V1, V2])
async def test_top(service: tuple[httpx.AsyncClient, FakeEngine], path: str) -> None:
    """``top_n`` returns the best documents; more than there are returns all; none is refused."""
    client, engine = service
    every = (await post(client, path, query=QUERY, documents=DOCUMENTS, top_n=None))["results"]
    for top in (1, 3, 3.0, 4, 10**6, 10**20):
        body = await post(client, path, query=QUERY, documents=DOCUMENTS, top_n=top)
        assert body["results"] == every[: int(top)]
    asked = len(engine.batches)
    for top in (0, -1, 1.5, "2", True, []):
        answer = await client.post(path, json={"query": "q", "documents": ["a"], "top_n": top})
        assert answer.status_code == 400
        assert answer.json()["message"].startswith("top_n must be ")
    assert len(engine.batches) == asked


@pytest.mark.anyio
async def test_long_texts(service: tuple[httpx.AsyncClient, FakeEngine]) -> None:
    """Rerankers cut what is too long, as their APIs do; text-embeddings-inference and vLLM ask."""
    client, engine = service
    (expected,) = await cosines(client, [LONG], [LONG])
    asked = len(engine.batches)
    for path in (V1, V2):
        body = await post(client, path, query=LONG, documents=["a", LONG])
        scores = {entry["index"]: entry["relevance_score"] for entry in body["results"]}
        assert scores[1] == pytest.approx(expected, abs=NEAR)
    for path, pair in ((TEI, ("query", "texts")), (SCORE, ("text_1", "text_2"))):
        cut = {pair[0]: LONG, pair[1]: ["a", LONG], "truncate": True}
        body = await post(client, path, **cut)
        entries = body if path == TEI else body["data"]
        scores = {entry["index"]: entry["score"] for entry in entries}
        assert scores[1] == pytest.approx(expected, abs=NEAR)
    assert len(engine.batches) == asked + 8
    for path, fields, name in (
        (V1, {"query": "q", "documents": ["a", LONG], "truncation": False}, "documents[1]"),
        (V1, {"query": {"text": LONG}, "documents": ["a"], "truncate": False}, "query"),
        (V2, {"query": "q", "documents": ["a", LONG], "truncate": "NONE"}, "documents[1]"),
        (TEI, {"query": LONG, "texts": ["a"]}, "query"),
        (TEI, {"query": "q", "texts": ["a", LONG], "truncate": False}, "texts[1]"),
        (SCORE, {"text_1": LONG, "text_2": "a"}, "text_1"),
        (SCORE, {"text_1": ["b", "c"], "text_2": ["a", LONG]}, "text_2[1]"),
        (SCORE, {"queries": ["b", LONG], "items": ["a", "a"]}, "queries[1]"),
    ):
        answer = await client.post(path, json=fields)
        assert answer.status_code == 400, (path, fields)
        body = answer.json()
        message = body.get("message") or body["error"]
        assert message.startswith(f"{name} has more than the 2048 tokens"), message


@pytest.mark.anyio
async def test_a_model_without_retrieval_does_not_rank(default_checkpoint: Checkpoint) -> None:
    """Without tasks for queries and passages each route is a 400 that says so, in its form."""
    card = replace(default_checkpoint.card, adapters=("clustering",))
    checkpoint = replace(default_checkpoint, card=card)
    async with fake_service(checkpoint) as (client, engine):
        for route in RANKED:
            answer = await client.post(route.path, json=route.request(["a"]))
            assert answer.status_code == 400
            assert "so it does not rank" in route.message(answer.json())
        assert not engine.batches


def nested(levels: int) -> dict[str, Any]:
    """An object of so many levels."""
    value: dict[str, Any] = {}
    for _ in range(levels - 1):
        value = {"of": value}
    return value


NESTED = nested(300)

BAD: list[tuple[str, dict[str, Any], str]] = [
    *(
        (path, fields, part)
        for path in (V1, V2)
        for fields, part in (
            ({"query": None}, "query is missing"),
            ({"query": ""}, "query is an empty string"),
            ({"query": ["a"]}, "query must be a string, got a list"),
            ({"documents": None}, "documents is missing"),
            ({"documents": "a"}, "documents must be a list"),
            ({"documents": []}, "documents is an empty list"),
            ({"documents": ["a", ""]}, "documents[1] is an empty string"),
            ({"documents": ["a", " "]}, "documents[1] contains nothing"),
            ({"documents": ["a", 1]}, "documents[1] must be a string"),
            ({"documents": [{}]}, "documents[0].text must be a string, got null"),
            ({"documents": [{"image": "https://a/b"}]}, "documents[0].image is not served"),
            ({"documents": [{"url": "https://a/b"}]}, "documents[0].url is not served"),
            *(
                ({"documents": ["a", {"text": "a", media: "https://a/b"}]}, f"documents[1].{media}")
                for media in ("image", "images", "image_url", "audio", "video", "multi_modal")
            ),
            ({"query": {"text": "a", "image": "https://a/b"}}, "query.image is not served"),
            (
                {"documents": ["a", {"text": "a", "of": NESTED}], "return_documents": True},
                "documents[1] is nested too deeply to be returned",
            ),
            ({"documents": ["a"] * 2049}, "documents has 2049 items: at most 2048"),
            ({"model": "rerank-v3.5"}, "There is no model 'rerank-v3.5'"),
            ({"model": "taskvec-mini:clustering"}, "send model:retrieval"),
            ({"model": "taskvec-mini:retrieval.query"}, "send model:retrieval"),
            ({"model": 1}, "model must be a string"),
            ({"return_documents": "yes"}, "return_documents must be true or false"),
            ({"rank_fields": ["title", "text"]}, 'rank_fields must be ["text"]'),
            ({"max_chunks_per_doc": 10}, "max_chunks_per_doc is not served"),
            ({"max_tokens_per_doc": 512}, "max_tokens_per_doc below the 2048 tokens"),
            ({"max_tokens_per_query": "a"}, "max_tokens_per_query must be a whole number"),
            ({"relevant_spans": {"a": 1}}, "relevant_spans is not served"),
            ({"instruction": "rank"}, "instruction is not served"),
            ({"input_type": "query"}, "input_type is not served: a query and its documents"),
            ({"dimensions": 64}, "dimensions is not served"),
            ({"truncate_prompt_tokens": 9}, "truncate_prompt_tokens is not served"),
        )
    ),
    (V1, {"truncate": "END"}, "truncate must be true or false"),
    (V1, {"truncate": True, "truncation": False}, "disagree"),
    (V2, {"truncate": True}, "truncate must be a string"),
    (V2, {"truncate": "NEVER"}, "truncate must be one of"),
    (V2, {"priority": 1000}, "priority must be between 0 and 999"),
    (TEI, {"query": None}, "query is missing"),
    (TEI, {"texts": None}, "texts is missing: send it instead of documents, or ask /v1/rerank"),
    (TEI, {"texts": [{"text": "a"}]}, "texts[0] must be a string"),
    (TEI, {"raw_scores": 1}, "raw_scores must be true or false"),
    (TEI, {"return_text": "a"}, "return_text must be true or false"),
    (TEI, {"truncation_direction": "up"}, "truncation_direction must be one of"),
    (TEI, {"prompt_name": "query"}, "prompt_name is not served"),
    (SCORE, {"text_1": None}, "text_1 is missing: send text_1 and text_2, or queries"),
    (SCORE, {"text_2": None}, "text_2 is missing"),
    (SCORE, {"text_1": ["a", "b"]}, "text_1 has 2 texts and text_2 1"),
    (
        SCORE,
        {"text_1": ["a"] * 1025, "text_2": ["b"] * 1025},
        "text_1 and text_2 have 2050 texts: at most 1024 pairs",
    ),
    (SCORE, {"text_2": []}, "text_2 is an empty list"),
    (SCORE, {"text_2": ["a", 1]}, "text_2[1] must be a string"),
    (SCORE, {"text_1": {"content": []}}, "text_1 must be a string, got an object"),
    (SCORE, {"queries": "a"}, "text_1 and text_2 are a way to send texts, queries belongs to"),
    (SCORE, {"items": {}}, "items belongs to another: send one"),
    (SCORE, {"text_2": ["a"] * 2049}, "text_2 has 2049 items: at most 2048"),
]


@pytest.mark.anyio
@pytest.mark.parametrize(("path", "fields", "part"), BAD, ids=lambda value: str(value)[:60])
async def test_bad_input(
    service: tuple[httpx.AsyncClient, FakeEngine], path: str, fields: dict[str, Any], part: str
) -> None:
    """A field of another type, or a value that is not served, is a 400 that names it."""
    client, engine = service
    documents = {"query": "q", "documents": ["a"]}
    good: dict[str, dict[str, Any]] = {
        TEI: {"query": "q", "texts": ["a"], "documents": ["a"]},
        SCORE: {"text_1": "q", "text_2": ["a"]},
    }
    answer = await client.post(path, json={**good.get(path, documents), **fields})
    assert answer.status_code == (404 if "no model" in part else 400), answer.text
    body = answer.json()
    assert part in (body["error"] if path == TEI else body["message"])
    assert not engine.batches


@pytest.mark.anyio
async def test_as_many_documents_as_texts(service: tuple[httpx.AsyncClient, FakeEngine]) -> None:
    """TASKVEC_MAX_TEXTS documents are ranked; the query comes on top of them."""
    client, engine = service
    body = await post(client, V1, query="q", documents=[f"a {i}" for i in range(2048)])
    assert len(body["results"]) == 2048
    assert sorted(len(batch.ids) for batch in engine.batches) == [1, 2048]


@pytest.mark.anyio
async def test_documents_in_answers_are_counted(default_checkpoint: Checkpoint) -> None:
    """Returned documents count against the memory budget while the answer is made."""
    documents = ["word " * 40_000] * 10
    engine = FakeEngine(default_checkpoint.card, delay=1.0)
    async with fake_service(default_checkpoint, engine) as (client, _):
        held: list[float] = []
        for wanted in (False, True):
            body = {"query": "q", "documents": documents, "return_documents": wanted}
            asked = asyncio.create_task(client.post(V1, json=body))
            while sum(len(batch.ids) == len(documents) for batch in engine.batches) <= len(held):
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.4)  # the gauge is set ten times a second
            page = (await client.get("/metrics")).text
            held.append(total(page, "taskvec_memory_held_bytes"))
            assert (await asked).status_code == 200
        assert held[1] - held[0] > 3_900_000  # as JSON, and in the answer


@pytest.mark.anyio
async def test_objects_are_returned_as_they_are(
    service: tuple[httpx.AsyncClient, FakeEngine],
) -> None:
    """Any object comes back with its other fields; what nests too deeply only without them."""
    client, engine = service
    documents = [
        {"text": "a", "url": "https://a/b", "content": [1, None, {"b": "\u00e9\n"}], "bytes": 3},
        {"text": "b \n" * 70_000 + "\u6f22"},
        {"text": "c", "of": nested(253)},
        'd\U0001f600" ' * 50_000,
    ]
    for path in (V1, V2):
        asked = {"query": {"text": "q", "url": "u"}, "documents": documents}
        body = await post(client, path, **asked, return_documents=True)
        returned = {entry["index"]: entry["document"] for entry in body["results"]}
        assert returned == {0: documents[0], 1: documents[1], 2: documents[2]} | {
            3: {"text": documents[3]}
        }
    count = len(engine.batches)
    deep = {"query": "q", "documents": ["a", {"text": "a", "of": NESTED}]}
    for path in (V1, V2):
        body = await post(client, path, **deep, return_documents=False)
        assert [set(entry) for entry in body["results"]] == [{"index", "relevance_score"}] * 2
    assert len(engine.batches) == count + 4


@pytest.mark.anyio
async def test_as_many_pairs_as_texts(service: tuple[httpx.AsyncClient, FakeEngine]) -> None:
    """Both sides of pairs have TASKVEC_MAX_TEXTS texts together; a single query comes on top."""
    client, _ = service
    for left, right in (("q", 2048), (["q"], 2048), (["q"] * 1024, 1024)):
        body = await post(client, SCORE, text_1=left, text_2=["a"] * right)
        assert len(body["data"]) == right
    described = (await client.get("/openapi.json")).json()["paths"][SCORE]["post"]["requestBody"]
    for pair in described["content"]["application/json"]["schema"]["oneOf"]:
        left, right = (pair["properties"][field]["anyOf"][1] for field in pair["required"])
        assert (left["type"], left["maxItems"], right["maxItems"]) == ("array", 1024, 2048)


def test_scores_have_no_vectors(default_checkpoint: Checkpoint) -> None:
    """The answer of a ranking counts no vectors, only those of the engine."""
    output: OutputFormat = RankFormat(384, echo_bytes=100)
    assert answer_bytes(10, 384, output) == 10 * 4 * 384 + 2 * 100
    assert answer_bytes(10, 384, OutputFormat(384)) == 10 * 20 * 384
    engine = FakeEngine(default_checkpoint.card)
    service = build_service(Settings(), checkpoint=default_checkpoint, engine=engine)
    limits = RequestLimits(10_000, 10.0, 100, 0, 8, 10.0, token_ids=False)
    body = {"inputs": {"source_sentence": "a", "sentences": ["b"]}}
    _, output = TeiSimilarity(service, limits).read(body, {})
    assert answer_bytes(10, 384, output) == 10 * 4 * 384


def test_a_429_names_its_delay_for_clients_of_cohere() -> None:
    """``message`` ends with the delay, as Cohere's does; our own form does not repeat it."""
    body = json.loads(error_response(QueueFullError("Full.", retry_after=1.5), "1").body)
    assert body["message"] == "Full. Retry after 2 s."
    assert body["detail"] == "Full."
