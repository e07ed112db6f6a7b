"""Ten thousand bodies that nobody would send on purpose: each answered as the contract says."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from conftest import fake_service
from fakes import hashed_vector
from taskvec.checkpoint.checkpoint import Checkpoint

PATH = "/v1/embeddings"
CASES = 10_000
SEED = 20_260_101

VALID: list[dict[str, Any]] = [
    {"input": "a text"},
    {"input": ["one", {"text": "two"}], "task": "clustering", "dimensions": 64},
    {"input": ["a"], "embedding_type": "binary", "normalized": False},
    {"input": "b", "model": "taskvec-mini:classification", "encoding_format": "base64"},
    {"input": ["x"] * 9, "input_type": "query", "truncate": True, "output_dtype": ["int8"]},
    {"input": [[1, 2, 3], [4]], "task_type": "retrieval.query", "user": {"id": [1, None]}},
    {"texts": ["a", {"text": "b", "task": "retrieval.query"}], "embedding_type": ["float", "int8"]},
    {"input": 'ünï \U0001f600 \\ " \n', "truncation": False, "output_dimension": 8},
]
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1.0, 1.5, 1e308, -0.0, 2**31, 2**63, 2**64, 10**400),
    *("", " ", "\0", "a" * 5000, "\ud800", "nul\x00l", "float", "query", "-1", "\u202e\u0301" * 50),
    *([], [[]], [[[]]], {}, {"text": None}, {"text": ["a"]}, {"": {}}, ["a", 1], [1, "a"], [None]),
    *([0] * 3000, ["a"] * 60, [{"text": "a"}] * 3, {"text": {"text": "a"}}, [[1], [2.0]]),
    *(["float", "int8", "base64"], ["int8"] * 9, {"text": "a", "task": "clustering"}),
    [{"text": "a", "input_type": "query"}, "b", {"text": "c", "task": ["poetry"]}],
]
FIELDS = [
    *("input", "model", "task", "task_type", "input_type", "dimensions", "output_dimension"),
    *("encoding_format", "embedding_type", "embedding_types", "encoding_type", "output_dtype"),
    *("normalized", "truncate", "truncation", "user", "", "Input", "\ud800", "unknown"),
    *("texts", "content", "output_dimensionality", "normalize", "late_chunking", "prompt"),
]
HEADERS: list[dict[str, str]] = [
    *({"content-type": kind} for kind in ("text/plain", "", ";", "application/x-ndjson")),
    *(
        {"content-type": kind}
        for kind in ("multipart/form-data", "a/b+json", "APPLICATION/JSON;q=")
    ),
    *({"content-encoding": coding} for coding in ("gzip", "identity", "", "br, gzip", "\xff")),
    *({"content-length": length} for length in ("0", "1", "-1", "1e9", "9" * 30, "\xb2", "")),
    *({"accept": kind} for kind in ("application/octet-stream", "", "*/*", ",;,", "\xff")),
    *({"x-request-timeout-ms": value} for value in ("0", "-1", "1.5", "9" * 40, "\xb2", "60000")),
    *({"x-request-id": value} for value in ("", "a b", "x" * 500, "\xff", "fine")),
]


def dumps(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def with_odd_values(chance: random.Random) -> bytes:
    """A valid body, some of whose fields have values of other kinds."""
    body = dict(chance.choice(VALID))
    for _ in range(chance.randint(1, 3)):
        body[chance.choice(FIELDS)] = chance.choice(ODD)
    return dumps(body)


def with_odd_items(chance: random.Random) -> bytes:
    """An input whose items are of mixed kinds."""
    items = [chance.choice([*ODD, "a", 5, [5]]) for _ in range(chance.randint(1, 5))]
    return dumps({"input": items, "truncate": chance.random() < 0.5})


def with_changed_bytes(chance: random.Random) -> bytes:
    """A valid body with bytes replaced, removed, doubled or put in."""
    body = bytearray(dumps(chance.choice(VALID)))
    for _ in range(chance.randint(1, 8)):
        at = chance.randrange(len(body))
        piece = chance.choice([b"", b'"', b"[", b"}", b",", b"\\u", b"\xff", b"\0", body[at:][:9]])
        body[at : at + chance.randint(0, 3)] = piece or chance.randbytes(chance.randint(0, 4))
        body = body or bytearray(b"{")
    return bytes(body)


def cut_off(chance: random.Random) -> bytes:
    """The beginning of a valid body."""
    body = dumps(chance.choice(VALID))
    return body[: chance.randrange(len(body))]


def nested(chance: random.Random) -> bytes:
    """Lists or objects in one another, closed or not, about as deep as the parser goes."""
    depth = chance.choice([1, 10, 1000, 1022, 1023, 1024, 1025, 5000])
    opened, closed = chance.choice([(b"[", b"]"), (b'{"text":', b"}"), (b'{"input":', b"}")])
    end = closed * (depth if chance.random() < 0.7 else depth - 1)
    return b'{"input":' + opened * depth + chance.choice([b"1", b'"a"', b""]) + end + b"}"


def with_doubled_keys(chance: random.Random) -> bytes:
    """One key several times, with values that differ."""
    key = chance.choice(FIELDS)
    pairs = [dumps({key: chance.choice(ODD)})[1:-1] for _ in range(chance.randint(2, 5))]
    return b"{" + b",".join([b'"input":"a"', *pairs]) + b"}"


def with_huge_numbers(chance: random.Random) -> bytes:
    """Numbers of many digits and exponents where whole numbers belong."""
    number = chance.choice([b"9" * 4000, b"-" + b"1" * 400, b"1e999", b"0." + b"0" * 400 + b"1"])
    number = chance.choice([number, b"1e5", b"-0", b"00", b"+1", b"0x1", b"NaN", b"1_000"])
    where = chance.choice([b'"dimensions":%b,"input":"a"', b'"input":[%b]', b'"input":[[1,%b]]'])
    return b"{" + where % number + b"}"


def noise(chance: random.Random) -> bytes:
    """Bytes of no kind, or text in another encoding than UTF-8."""
    other = '{"input": "ä"}'.encode(chance.choice(["utf-16", "utf-32", "latin-1", "utf-8-sig"]))
    return chance.choice([other, chance.randbytes(chance.randint(0, 200))])


KINDS: list[Callable[[random.Random], bytes]] = [
    *(with_odd_values, with_odd_items, with_changed_bytes, cut_off),
    *(nested, with_doubled_keys, with_huge_numbers, noise),
]


def cases() -> Iterator[tuple[str, bytes, dict[str, str]]]:
    """Each case by its own seed, so that one can be had again without those before it."""
    for number in range(CASES):
        chance = random.Random(SEED + number)
        kind = KINDS[number % len(KINDS)]
        headers = chance.choice(HEADERS) if chance.random() < 0.2 else {}
        yield f"{kind.__name__} {SEED + number}", kind(chance), headers


@pytest.mark.anyio
async def test_every_body_is_answered_as_the_contract_says(default_checkpoint: Checkpoint) -> None:
    """No 500, no undescribed status, every error in its form; afterwards all is as before."""
    async with fake_service(
        default_checkpoint,
        token_input="accept",  # noqa: S106 - a setting
        max_texts=50,
        max_body_bytes=100_000,
    ) as (client, engine):
        document = (await client.get("/openapi.json")).json()
        described = document["paths"][PATH]["post"]["responses"]
        seen: Counter[int] = Counter()
        for name, body, headers in cases():
            given = {k.encode(): v.encode("latin-1") for k, v in headers.items()}
            answer = await client.post(PATH, content=body, headers=given)
            seen[answer.status_code] += 1
            check(name, answer, described)
        assert min(seen[status] for status in (200, 400, 404, 413, 415)) >= 10, seen
        assert seen[200] > CASES / 20, seen
        assert seen[400] > CASES / 3, seen
        await asyncio.sleep(0)
        await check_well(client, engine.model.dimension)
        ids = engine.batches[-1].ids[0]
        adapter = engine.batches[-1].adapter
        vector = hashed_vector(ids, adapter, engine.model.dimension)
        last = (await client.post(PATH, json={"input": "a text"})).json()["data"][0]["embedding"]
        np.testing.assert_allclose(last, vector / np.linalg.norm(vector), atol=1e-6)


def check(name: str, answer: httpx.Response, described: dict[str, Any]) -> None:
    """The answer is one that the document has, in the contract's form."""
    shown = (name, answer.status_code, answer.text[:500])
    assert answer.status_code < 500, shown
    assert str(answer.status_code) in described, shown
    assert answer.headers["content-type"] in described[str(answer.status_code)]["content"], shown
    if answer.status_code == 200:
        return
    body = answer.json()
    assert set(body) == {"error", "detail", "code", "request_id"}, shown
    assert set(body["error"]) == {"message", "type", "param", "code"}, shown
    assert body["detail"] == body["error"]["message"], shown
    assert body["code"] == body["error"]["code"], shown
    assert body["request_id"] == answer.headers["x-request-id"], shown
    assert len(body["detail"]) < 1000, shown


async def check_well(client: httpx.AsyncClient, dimension: int) -> None:
    """A plain request is right, and nothing waits or is in work."""
    answer = await client.post(PATH, json={"input": "a text"})
    assert answer.status_code == 200
    assert len(answer.json()["data"][0]["embedding"]) == dimension
    page = (await client.get("/metrics")).text
    gauges = {
        sample.name: sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name
        in {"taskvec_requests_in_flight", "taskvec_queue_texts", "taskvec_queue_tokens"}
    }
    assert gauges == dict.fromkeys(gauges, 0)
    assert len(gauges) == 3
