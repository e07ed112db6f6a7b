"""POST /tokenize: ids, places and special tokens, and that it is work like any other."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from conftest import examples, fake_service
from dialects import tei_message
from fakes import FakeEngine
from keyfiles import avoid_the_end_of_a_minute, entry
from processes import total
from taskvec.api.tokenize import DUMP_BYTES, _tokens
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.concurrency import LargeWork
from taskvec.core.token_spans import TokenSpans
from tokenizing import theirs

PATH = "/tokenize"
TEXT = "Grüße, \U0001f600 plants!"


@pytest.fixture
async def service(
    default_checkpoint: Checkpoint,
) -> AsyncIterator[tuple[httpx.AsyncClient, FakeEngine]]:
    async with fake_service(default_checkpoint) as service:
        yield service


async def tokens(client: httpx.AsyncClient, **body: Any) -> list[list[dict[str, Any]]]:
    """Answer of a good request."""
    answer = await client.post(PATH, json=body)
    assert answer.status_code == 200, answer.text
    found: list[list[dict[str, Any]]] = answer.json()
    return found


@pytest.mark.anyio
async def test_tokens_have_their_characters(
    service: tuple[httpx.AsyncClient, FakeEngine], default_checkpoint: Checkpoint
) -> None:
    """Places count characters of the client's own text, without a prompt; nothing is embedded."""
    client, engine = service
    (listed,) = await tokens(client, inputs=TEXT, add_special_tokens=False)
    encoding = theirs(default_checkpoint.tokenizer).encode(TEXT, add_special_tokens=False)
    assert [token["id"] for token in listed] == encoding.ids
    assert [(token["start"], token["stop"]) for token in listed] == encoding.offsets
    assert all(token["text"] == TEXT[token["start"] : token["stop"]] for token in listed)
    assert [set(token) for token in listed] == [{"id", "text", "special", "start", "stop"}] * len(
        listed
    )
    assert not any(token["special"] for token in listed)
    assert listed[-1]["stop"] == len(TEXT)
    assert not engine.batches


@pytest.mark.anyio
async def test_special_tokens(service: tuple[httpx.AsyncClient, FakeEngine]) -> None:
    """Special tokens are listed unless they are left out: by name, without a place."""
    client, _ = service
    bare = await tokens(client, inputs=[TEXT, "a"], add_special_tokens=False)
    for fields in ({}, {"add_special_tokens": True}, {"add_special_tokens": None}):
        framed = await tokens(client, inputs=[TEXT, "a"], **fields)
        for listed, text in zip(framed, bare, strict=True):
            special = [token for token in listed if token["special"]]
            assert [token for token in listed if not token["special"]] == text
            assert special
            assert all(token["start"] is None and token["stop"] is None for token in special)
            assert all(token["text"].startswith("[") for token in special)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("fields", "task"),
    [
        ({"prompt_name": "query"}, "retrieval.query"),
        ({"prompt_name": "clustering"}, "clustering"),
        ({"model": "taskvec-mini:retrieval.passage"}, "retrieval.passage"),
    ],
)
async def test_with_a_prompt_it_lists_what_is_embedded(
    service: tuple[httpx.AsyncClient, FakeEngine], fields: dict[str, Any], task: str
) -> None:
    """With a task the ids are those that the engine gets; places count from the prompt on."""
    client, engine = service
    texts = [TEXT, "a", "word " * 300]
    listed = await tokens(client, inputs=texts, **fields)
    await client.post("/v1/embeddings", json={"input": texts, "task": task})
    assert [[token["id"] for token in text] for text in listed] == [
        ids.tolist() for ids in engine.batches[-1].ids
    ]
    first = [token for token in listed[1] if not token["special"]]
    assert first[0]["start"] == 0
    assert first[0]["text"] in ("Query", "Document")
    assert first[-1]["text"] == "a"
    plain = await tokens(client, inputs="a", model="taskvec-mini", prompt_name=None)
    assert [t["text"] for t in plain[0] if not t["special"]] == ["a"]


@pytest.mark.anyio
async def test_long_texts_are_listed_whole(
    service: tuple[httpx.AsyncClient, FakeEngine],
) -> None:
    """A text beyond the model's limit is listed to its end, so that a client can split it."""
    client, _ = service
    (listed, blank) = await tokens(client, inputs=["a b " * 5000, " "], add_special_tokens=False)
    assert len(listed) == 10_000
    assert listed[-1]["stop"] == 19_999
    assert blank == []


@pytest.mark.anyio
@pytest.mark.parametrize("characters", [10, 2000])
async def test_large_answers_are_written_in_a_thread(
    service: tuple[httpx.AsyncClient, FakeEngine],
    monkeypatch: pytest.MonkeyPatch,
    characters: int,
) -> None:
    """What is written in the event loop is bounded in bytes: one token may be a long word."""
    client, _ = service
    sizes: list[int] = []
    run = LargeWork.run

    async def recorded(self: LargeWork, size: int, work: Callable[[], Any]) -> Any:
        sizes.append(size)
        return await run(self, size, work)

    monkeypatch.setattr(LargeWork, "run", recorded)
    texts = ["\u0142" * characters + " a"] * 30
    answer = await client.post(PATH, json={"inputs": texts, "add_special_tokens": False})
    written = [size for size in sizes if size > len(answer.request.content)]
    assert "".join(token["text"] for token in answer.json()[7]) == texts[7].replace(" ", "")
    assert bool(written) == (characters == 2000)
    if written:
        assert len(answer.content) < written[0] < 3 * len(answer.content)


def test_pieces_of_an_answer_are_bounded_in_bytes() -> None:
    """Long tokens are written in more calls, each of which holds the interpreter lock."""
    text = "\u6f22" * 100_000
    ends = np.arange(10_000, 100_001, 10_000)
    spans = np.column_stack([ends - 10_000, ends]).astype(np.int32)
    pieces = list(_tokens(TokenSpans(text, np.arange(10, dtype=np.int32), spans)))
    assert max(map(len, pieces)) < DUMP_BYTES + 4 * 10_000
    tokens = json.loads(b"[" + b",".join(pieces) + b"]")
    assert [(token["id"], token["start"], token["stop"]) for token in tokens] == [
        (i, *span) for i, span in enumerate(spans.tolist())
    ]
    assert all(token["text"] == "\u6f22" * 10_000 for token in tokens)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"inputs": None}, "inputs is missing"),
    ({"inputs": ""}, "inputs is an empty string: send a text."),
    ({"inputs": []}, "empty list"),
    ({"inputs": ["a", ""]}, "inputs[1] is an empty string"),
    ({"inputs": ["a", 1]}, "inputs[1] must be a string"),
    ({"inputs": [["a", "b"]]}, "inputs[0] must be a string"),
    ({"inputs": {"text": "a"}}, "inputs must be a string"),
    ({"inputs": ["a"] * 2049}, "inputs has 2049 items: at most 2048"),
    ({"inputs": ["a", "x" * 300_000]}, "inputs[1] has no place from character 0"),
    ({"inputs": "x" * 300_000}, "inputs has no place from character 0"),
    ({"inputs": ["a b c d " * 70_000]}, "more than 262144 tokens"),
    ({"add_special_tokens": "yes"}, "add_special_tokens must be true or false"),
    ({"prompt_name": "poem"}, "no task 'poem'"),
    ({"prompt_name": "query", "model": "taskvec-mini:clustering"}, "name one"),
    ({"model": "gpt"}, "There is no model 'gpt'"),
    ({"task": "clustering"}, "task is not served: name the task by prompt_name"),
    ({"truncate": True}, "truncate is not served: every token is listed"),
    ({"parameters": {"a": 1}}, "parameters is not served"),
]


@pytest.mark.anyio
@pytest.mark.parametrize(("fields", "part"), BAD, ids=lambda value: str(value)[:60])
async def test_bad_input(
    service: tuple[httpx.AsyncClient, FakeEngine], fields: dict[str, Any], part: str
) -> None:
    """A field of another type, or a value that is not served, is refused in the API's form."""
    client, _ = service
    answer = await client.post(PATH, json={"inputs": "a"} | fields)
    assert answer.status_code == (404 if "no model" in part else 400), answer.text
    assert part in tei_message(answer.json())


@pytest.mark.anyio
async def test_it_is_work_like_any_other(default_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """It needs a key, counts against its requests, appears in the metrics, and can be off."""
    avoid_the_end_of_a_minute()
    file = tmp_path / "keys.toml"
    file.write_text(entry("web", "s3cret", requests_per_minute=2))
    key = {"authorization": "Bearer s3cret"}
    async with fake_service(default_checkpoint, keys_file=file) as (client, _):
        refused = await client.post(PATH, json={"inputs": "a"})
        assert refused.status_code == 401
        assert "API key" in tei_message(refused.json())
        wrong = {"authorization": "Bearer other"}
        answer = await client.post(PATH, json={"inputs": "a"}, headers=wrong)
        assert "Unknown API key" in tei_message(answer.json())
        for status in (200, 200, 429):
            answer = await client.post(PATH, json={"inputs": "a"}, headers=key)
            assert answer.status_code == status
        assert int(answer.headers["retry-after"]) >= 1
        page = (await client.get("/metrics")).text
        series = "taskvec_dialect_requests_total"
        assert total(page, series, 'dialect="tei",status="200"') == 2
        assert total(page, series, 'dialect="tei",status="401"') == 2
        assert total(page, "taskvec_memory_held_bytes") == 0
    async with fake_service(default_checkpoint, dialects="openai") as (client, _):
        assert (await client.post(PATH, json={"inputs": "a"})).status_code == 404


@pytest.mark.anyio
async def test_deadlines_and_memory(default_checkpoint: Checkpoint) -> None:
    """A request whose time is over is a 504, and an answer beyond the memory budget a 429."""
    large = {"inputs": ["a b c " * 10_000] * 4}
    async with fake_service(default_checkpoint) as (client, _):
        late = {"x-request-timeout-ms": "1"}
        answer = await client.post(PATH, json=large, headers=late)
        assert answer.status_code == 504
        assert "passed before its texts were tokenised" in tei_message(answer.json())
        assert (await client.post(PATH, json={"inputs": "a"})).status_code == 200
        answer = await client.delete(PATH)
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    engine = FakeEngine(default_checkpoint.card, delay=3.0)
    async with fake_service(default_checkpoint, engine, memory_budget=8 << 20) as (client, _):
        body = {"input": ["word " * 2000] * 100}
        held = asyncio.create_task(client.post("/v1/embeddings", json={**body, "truncate": True}))
        while not engine.batches:
            await asyncio.sleep(0.01)
        answer = await client.post(PATH, json=large)
        assert answer.status_code == 429
        assert "MB" in tei_message(answer.json())
        assert (await held).status_code == 200


@pytest.mark.anyio
async def test_odd_bodies(default_checkpoint: Checkpoint) -> None:
    """Bodies that nobody would send on purpose: described answers, never a 500."""
    chance = random.Random(20_260_101)
    odd: list[Any] = [
        *(None, True, 0, -1, 1.5, 10**400, "", " ", "\0", "a" * 5000, "\ud800", "query", "\u202e"),
        *([], [[]], {}, ["a", 1], [1], [None], ["a", " "], ["\ud800"], ["\U0001f600" * 2000]),
    ]
    fields = ["inputs", "add_special_tokens", "prompt_name", "model", "truncate", "parameters"]
    async with fake_service(default_checkpoint, max_texts=50) as (client, _):
        openapi = (await client.get("/openapi.json")).json()
        described = openapi["paths"][PATH]["post"]["responses"]
        seen = set()
        for number in range(examples(1000)):
            body: dict[str, Any] = {"inputs": ["a", "b"]}
            for _ in range(chance.randint(1, 3)):
                body[chance.choice(fields)] = chance.choice(odd)
            content = json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")
            if number % 5 == 0:
                at = chance.randrange(len(content))
                content = content[:at] + chance.randbytes(2) + content[at + 1 :]
            answer = await client.post(PATH, content=content)
            seen.add(answer.status_code)
            assert str(answer.status_code) in described, (content, answer.text)
            assert answer.status_code < 500, (content, answer.text)
            if answer.status_code != 200:
                assert len(tei_message(answer.json())) < 1000
        assert {200, 400} <= seen
