"""What holds for every API dialect: keys, limits, errors in its own form, metrics, a switch."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from conftest import examples, fake_service
from dialects import (
    OPENAI,
    OTHERS,
    RANKED,
    ROUTES,
    DialectRoute,
    Message,
    cohere_message,
    gemini_message,
    ollama_message,
    openai_message,
)
from fakes import FakeEngine
from keyfiles import entry
from processes import total
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.dialects import DialectName
from taskvec.engines.base import EngineResult, TokenBatch
from taskvec.errors import CODES

LONG = "word " * 5000
SOURCE, OTHERS_1 = "inputs.source_sentence", "inputs.sentences[1]"

EACH = pytest.mark.parametrize("route", [*OTHERS, *RANKED], ids=lambda route: route.path)


class RaisingEngine(FakeEngine):
    """Has a bug."""

    async def embed(self, batch: TokenBatch) -> EngineResult:
        raise RuntimeError(len(batch.ids))


def refused(route: DialectRoute, answer: httpx.Response, status: int, *parts: str) -> str:
    """Check a refusal's status, form and message."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    message = route.message(answer.json())
    for part in parts:
        assert part in message, message
    return message


def test_every_dialect_is_tested() -> None:
    """The table of the tests has each dialect."""
    assert {route.dialect for route in ROUTES} == set(DialectName)


@pytest.mark.anyio
@pytest.mark.parametrize("route", OTHERS, ids=lambda route: route.path)
async def test_vectors_are_those_of_openais_route(
    default_checkpoint: Checkpoint, route: DialectRoute
) -> None:
    """Each route gives the vectors that /v1/embeddings gives for the same task, in order."""
    texts = ["one", "two", "ünï \U0001f600"]
    async with fake_service(default_checkpoint) as (client, engine):
        answer = await client.post(route.path, json=route.request(texts))
        assert answer.status_code == 200, answer.text
        adapter = engine.batches[-1].adapter
        ids = engine.batches[-1].ids
        tasks = (await client.get("/v1/models")).json()["data"][0]["tasks"]
        for task in tasks:
            expected = await client.post(OPENAI.path, json={"input": texts, "task": task})
            same = all(map(np.array_equal, ids, engine.batches[-1].ids))
            if adapter == engine.batches[-1].adapter and same:
                break
        else:
            pytest.fail("no task has these ids")
    np.testing.assert_array_equal(
        route.vectors(answer.json()), OPENAI.vectors(expected.json()), strict=True
    )


@pytest.mark.anyio
@EACH
@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[]", b'"a"', b"\xff", b"[" * 9000])
async def test_what_is_no_json_object(
    default_checkpoint: Checkpoint, route: DialectRoute, content: bytes
) -> None:
    """Bytes that are not a JSON object are a 400 in the dialect's form."""
    async with fake_service(default_checkpoint) as (client, _):
        refused(route, await client.post(route.path, content=content), 400, "JSON")


@pytest.mark.anyio
@EACH
async def test_bad_texts(default_checkpoint: Checkpoint, route: DialectRoute) -> None:
    """Texts that are missing, empty, of another type or too many are a 400 that names them."""
    async with fake_service(default_checkpoint) as (client, engine):

        async def post(texts: Any) -> httpx.Response:
            return await client.post(route.path, json=route.request(texts))

        refused(route, await post(["a"] * 2049), 400, "2049", "2048")
        refused(route, await post(["a", ""]), 400, f"{route.field}[1]", "empty")
        refused(route, await post(["a", " "]), 400, f"{route.field}[1]", "token")
        refused(route, await post(["a", 1]), 400, f"{route.field}[1]", "a number")
        refused(route, await post(["a", None]), 400, f"{route.field}[1]", "null")
        refused(route, await post(["a", ["b"]]), 400, f"{route.field}[1]", "a list")
        assert not engine.batches


@pytest.mark.anyio
@EACH
async def test_a_long_text_is_refused_in_the_dialects_words(
    default_checkpoint: Checkpoint, route: DialectRoute
) -> None:
    """A text that is too long is a 400 with the client's name of it, where it is not cut."""
    async with fake_service(default_checkpoint) as (client, engine):
        body = route.request(["a", "word " * 5000])
        message = refused(
            route, await client.post(route.path, json=body), 400, f"{route.field}[1] has more than"
        )
        assert "send truncate: true" not in message or route.dialect in (
            "openai",
            "azure",
            "ollama",
            "tei",
            "rerank",
        )
        assert not engine.batches


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        ("/embed", {"inputs": LONG}, "inputs"),
        ("/embed", {"inputs": [LONG]}, "inputs[0]"),
        ("/similarity", {"inputs": {"source_sentence": LONG, "sentences": ["a"]}}, SOURCE),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": ["a", LONG]}}, OTHERS_1),
        ("/api/embed", {"model": "taskvec-mini", "input": LONG, "truncate": False}, "input"),
        (
            "/api/embeddings",
            {"model": "taskvec-mini", "prompt": LONG, "truncate": False},
            "prompt",
        ),
        (
            "/v1beta/models/taskvec-mini:embedContent",
            {"content": {"parts": [{"text": LONG}]}},
            "content",
        ),
    ],
)
async def test_a_text_is_named_as_it_was_sent(
    default_checkpoint: Checkpoint, path: str, body: dict[str, Any], name: str
) -> None:
    """An error names the text by its field, with an index only where the client sent a list."""
    async with fake_service(default_checkpoint) as (client, _):
        answer = await client.post(path, json=body)
        assert answer.status_code == 400
        error = answer.json()["error"]
        message = error if isinstance(error, str) else error["message"]
        assert message.startswith(f"{name} has more than the 2048 tokens"), message


CHANGING = {
    **dict.fromkeys(("dimensions", "output_dimension", "outputDimensionality"), 8),
    **dict.fromkeys(("embedding_type", "output_dtype"), "int8"),
    "embedding_types": ["int8"],
    "encoding_format": "base64",
    **dict.fromkeys(("task", "input_type", "inputType", "prompt_name"), "clustering"),
    "taskType": "CLUSTERING",
    "instruction": "Find:",
    **{key: ["b"] for key in ("input", "inputs", "texts", "documents", "requests")},
    **dict.fromkeys(("text", "prompt", "image"), "b"),
    "content": {"parts": [{"text": "b"}]},
    "images": ["b"],
    "config": {"taskType": "CLUSTERING"},
    **dict.fromkeys(("normalize", "normalized"), False),
    "late_chunking": True,
}
"""Fields of any of the APIs that change vectors."""


@pytest.mark.anyio
@pytest.mark.parametrize(
    "route",
    [route for route in OTHERS if route.dialect not in ("openai", "azure")],
    ids=lambda route: route.path,
)
async def test_no_field_is_ignored_in_silence(
    default_checkpoint: Checkpoint, route: DialectRoute
) -> None:
    """A field of another API is refused by name, or has its effect."""
    async with fake_service(default_checkpoint) as (client, _):
        plain = route.request(["a"])
        usual = route.vectors((await client.post(route.path, json=plain)).json())
        for field, value in CHANGING.items():
            if field in plain or (route.dialect == "tei" and field == "normalize"):
                continue
            answer = await client.post(route.path, json={**plain, field: value})
            if answer.status_code != 200:
                refused(route, answer, 400, field)
            elif field != "embedding_types":  # other keys in the answer
                assert route.vectors(answer.json()) != usual, field


@pytest.mark.anyio
@pytest.mark.parametrize("route", OTHERS, ids=lambda route: route.path)
async def test_values_of_what_is_served_are_accepted(
    default_checkpoint: Checkpoint, route: DialectRoute
) -> None:
    """Other APIs' fields that ask for nothing, or for float32 of length 1, are no errors."""
    more = {"encoding_format": "float", "normalize": True, "images": None, "late_chunking": False}
    async with fake_service(default_checkpoint) as (client, _):
        answer = await client.post(route.path, json={**route.request(["a"]), **more})
        assert answer.status_code == 200, answer.text


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/api/chat", ollama_message),
        ("/v2/chat", cohere_message),
        ("/v1beta/models/taskvec-mini:generateContent", gemini_message),
        ("/v1/chat/completions", openai_message),
        ("/nowhere", openai_message),
    ],
)
async def test_an_unknown_route(
    default_checkpoint: Checkpoint, path: str, message: Message
) -> None:
    """A route that is not served is a 404 in the form of the API that has it."""
    async with fake_service(default_checkpoint) as (client, _):
        answer = await client.post(path, json={"model": "taskvec-mini"})
        assert answer.status_code == 404
        assert f"There is no route {path}" in message(answer.json())


@pytest.mark.anyio
@EACH
async def test_an_unknown_model(default_checkpoint: Checkpoint, route: DialectRoute) -> None:
    """A model that is not served is a 404 that names the served one."""
    async with fake_service(default_checkpoint, model_aliases="other") as (client, _):
        task = "retrieval" if route in RANKED else "clustering"
        for model in ("other", f"other:{task}", "gpt", "other:"):
            path = route.path.replace("taskvec-mini", model)
            body = {**route.request(["a"]), "model": model, "input_type": None}
            if route.path == "/v2/embed":
                body["input_type"] = "clustering"
            answer = await client.post(path, json=body)
            if model == "gpt":
                refused(route, answer, 404, "gpt", "taskvec-mini")
            elif model == "other:":
                refused(route, answer, 400, "task ''")
            else:
                assert answer.status_code == 200


@pytest.mark.anyio
@EACH
async def test_each_spelling_of_a_key(
    default_checkpoint: Checkpoint, tmp_path: Path, route: DialectRoute
) -> None:
    """Every header that carries a key works; a missing and a wrong key are 401 in the form."""
    file = tmp_path / "keys.toml"
    file.write_text(entry("web", "s3cret"))
    body = route.request(["a"])
    async with fake_service(default_checkpoint, keys_file=file) as (client, engine):
        refused(route, await client.post(route.path, json=body), 401, "API key")
        for scheme in ("Bearer", "bearer"):
            good = {"authorization": f"{scheme} s3cret"}
            assert (await client.post(route.path, json=body, headers=good)).status_code == 200
            wrong = {"authorization": f"{scheme} other"}
            answer = await client.post(route.path, json=body, headers=wrong)
            refused(route, answer, 401, "Unknown API key")
            assert answer.headers["www-authenticate"] == "Bearer"
        for header in ("api-key", "x-api-key", "x-goog-api-key"):
            answer = await client.post(route.path, json=body, headers={header: "s3cret"})
            assert answer.status_code == 200
            answer = await client.post(route.path, json=body, headers={header: "other"})
            refused(route, answer, 401, "Unknown API key")
        for secret, status in (("s3cret", 200), ("other", 401)):
            answer = await client.post(f"{route.path}?key={secret}", json=body)
            assert answer.status_code == (status if route.dialect == "gemini" else 401)
        answered = 6 if route.dialect == "gemini" else 5
        assert len(engine.batches) == answered * (2 if route in RANKED else 1)


@pytest.mark.anyio
@EACH
async def test_limits_before_the_body(default_checkpoint: Checkpoint, route: DialectRoute) -> None:
    """A large body, another media type, a wrong method and a bad header have the form as well."""
    async with fake_service(default_checkpoint, max_body_bytes=1000) as (client, _):
        large = route.request(["a" * 2000])
        refused(route, await client.post(route.path, json=large), 413, "1000 bytes")
        plain = {"content-type": "text/plain"}
        answer = await client.post(route.path, content=b"{}", headers=plain)
        refused(route, answer, 415, "text/plain")
        answer = await client.delete(route.path)
        refused(route, answer, 405, "POST")
        for header in ({"x-request-timeout-ms": "0"}, {"x-priority": "urgent"}):
            answer = await client.post(route.path, json=route.request(["a"]), headers=header)
            refused(route, answer, 400, next(iter(header)))


@pytest.mark.anyio
@EACH
async def test_a_bug_and_a_full_queue(default_checkpoint: Checkpoint, route: DialectRoute) -> None:
    """A 500 shows no internals; a 429 says when to retry; both in the dialect's form."""
    async with fake_service(default_checkpoint, RaisingEngine(default_checkpoint.card)) as service:
        answer = await service[0].post(route.path, json=route.request(["a"]))
        assert "RuntimeError" not in refused(route, answer, 500, "Internal error")
    async with fake_service(
        default_checkpoint, FakeEngine(default_checkpoint.card, delay=1.0), max_queue_tokens=10
    ) as (client, engine):
        import asyncio  # noqa: PLC0415

        held = asyncio.create_task(client.post(route.path, json=route.request(["a b c d e f g h"])))
        while not engine.batches:
            await asyncio.sleep(0.01)
        answer = await client.post(route.path, json=route.request(["a b c d e f g h"]))
        refused(route, answer, 429)
        assert int(answer.headers["retry-after"]) >= 1
        assert (await held).status_code == 200


@pytest.mark.anyio
@EACH
async def test_requests_are_counted_by_dialect(
    default_checkpoint: Checkpoint, route: DialectRoute
) -> None:
    """Answers and refusals are counted under the dialect; its series exist before."""
    async with fake_service(default_checkpoint) as (client, _):
        series = "taskvec_dialect_requests_total"
        page = (await client.get("/metrics")).text
        assert total(page, series, f'dialect="{route.dialect}",status="200"') == 0
        await client.post(route.path, json=route.request(["a"]))
        await client.post(route.path, json={})
        page = (await client.get("/metrics")).text
        assert total(page, series, f'dialect="{route.dialect}",status="200"') == 1
        assert total(page, series, f'dialect="{route.dialect}",status="400"') == 1
        assert total(page, series) == 2
        assert total(page, "taskvec_rejected_total", 'code="other"') == 0


@pytest.mark.anyio
@EACH
async def test_a_dialect_can_be_off(default_checkpoint: Checkpoint, route: DialectRoute) -> None:
    """Without its name in TASKVEC_DIALECTS, its routes are a 404 and not in the document."""
    others = ",".join(name for name in DialectName if name != route.dialect)
    async with fake_service(default_checkpoint, dialects=others) as (client, _):
        answer = await client.post(route.path, json=route.request(["a"]))
        # GET / is the page, GET /v1/models/{id} has any path below it: only another method.
        another = route.path == "/" or route.path.startswith("/v1/models/")
        assert answer.status_code == (405 if another else 404)
        paths = (await client.get("/openapi.json")).json()["paths"]
        assert route.path not in paths
        for other in OTHERS:
            if other.dialect != route.dialect:
                answer = await client.post(other.path, json=other.request(["a"]))
                assert answer.status_code == 200


FIELDS = [
    *("texts", "inputs", "input", "images", "model", "input_type", "embedding_types", "truncate"),
    *("output_dimension", "max_tokens", "priority", "options", "dimensions", "keep_alive"),
    *("prompt", "normalize", "prompt_name", "truncation_direction", "encoding_format", "content"),
    *(
        "requests",
        "taskType",
        "title",
        "autoTruncate",
        "outputDimensionality",
        "task",
        "embedding_type",
        "user",
    ),
    *("parameters", "", "\ud800", "unknown"),
    *("query", "documents", "top_n", "return_documents", "rank_fields", "max_tokens_per_doc"),
    *("text_1", "text_2", "queries", "raw_scores", "return_text"),
]
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1.0, 1.5, 1e308, 2**31, 2**64, 10**400, 8, 64),
    *("", " ", "\0", "a" * 5000, "\ud800", "float", "END", "START", "image", "query", "\u202e"),
    *([], [[]], {}, {"text": None}, ["a", 1], [1], [None], ["float", "int8"], ["base64"], [0] * 99),
    *([{"content": [{"type": "text", "text": "a"}]}], [{"content": []}], [{"content": None}]),
    *({"parts": [{"text": "a"}]}, {"parts": []}, {"parts": [{}]}, {"parts": None}),
]


@pytest.mark.anyio
@EACH
async def test_odd_bodies(default_checkpoint: Checkpoint, route: DialectRoute) -> None:
    """Thousands of bodies that nobody would send on purpose: described answers, never a 500."""
    chance = random.Random(20_260_101)
    async with fake_service(default_checkpoint, max_texts=50) as (client, _):
        document = (await client.get("/openapi.json")).json()
        path = next(p for p in document["paths"] if matches(p, route.path))
        described = document["paths"][path]["post"]["responses"]
        seen: set[int] = set()
        for number in range(examples(3000)):
            body = route.request(["a", "b"][: chance.randint(1, 2)])
            for _ in range(chance.randint(1, 3)):
                body[chance.choice([*FIELDS, *body])] = chance.choice(ODD)
            content = json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")
            if number % 5 == 0:
                at = chance.randrange(len(content))
                content = content[:at] + chance.randbytes(2) + content[at + chance.randint(0, 4) :]
            answer = await client.post(route.path, content=content)
            seen.add(answer.status_code)
            assert str(answer.status_code) in described, (content, answer.text)
            assert answer.status_code < 500, (content, answer.text)
            if answer.status_code != 200:
                assert len(route.message(answer.json())) < 1000
        assert {200, 400} <= seen
        page = (await client.get("/metrics")).text
        assert total(page, "taskvec_rejected_total", 'code="other"') == 0
        good = await client.post(route.path, json=route.request(["a"]))
        assert good.status_code == 200


def matches(described: str, path: str) -> bool:
    """Whether a path of the document, which may have parameters, is that of a route."""
    pattern = re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(described))
    return re.fullmatch(pattern, path) is not None


def test_every_code_is_listed() -> None:
    """The code of fields that a dialect does not serve has a series of its own."""
    assert "unsupported_field" in CODES
