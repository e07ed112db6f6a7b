"""JSON bodies: how deep, how many values, and what is counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import fake_service
from holds import longest_hold
from taskvec.api.json_pieces import (
    SCAN_BYTES,
    InvalidJsonError,
    TooManyValuesError,
    has_more_values,
    parse_in_pieces,
)
from taskvec.api.request import parse
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.errors import InvalidRequestError

PATH = "/v1/embeddings"
TEXTS = st.text(st.sampled_from('a",:[]{}\\/\n\u2028ü'), max_size=8)
VALUES = st.recursive(
    st.none() | st.integers() | TEXTS,
    lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner),
)


def size(value: Any) -> int:
    """Commas, colons and opening brackets of a value, counted the slow way."""
    if isinstance(value, dict):
        return 1 + len(value) + max(0, len(value) - 1) + sum(map(size, value.values()))
    if isinstance(value, list):
        return 1 + max(0, len(value) - 1) + sum(map(size, value))
    return 0


@given(VALUES, st.booleans())
def test_values_are_counted_outside_of_strings(value: Any, escaped: bool) -> None:
    """The count is exact, whatever is in the strings and however it is escaped."""
    body = json.dumps(value, ensure_ascii=escaped).encode()
    exact = size(value)
    assert not has_more_values(body, exact)
    if exact:
        assert has_more_values(body, exact - 1)


@pytest.mark.parametrize("before", range(1, 9))
@pytest.mark.parametrize("end", ['\\\\", [1', '\\", [1,', '\\\\\\\\\\", [",', ", [1"])
def test_a_large_body_is_counted_in_pieces(before: int, end: str) -> None:
    """The count is exact wherever a piece ends: in a string, before a quote, in an escape."""
    inside = "a" * (SCAN_BYTES - before - len('["')) + end
    body = json.dumps([inside, [1, 2], "x" * SCAN_BYTES, {"b": "c,"}]).encode()
    exact = size([inside, [1, 2], "", {"b": "c,"}])
    assert not has_more_values(body, exact)
    assert has_more_values(body, exact - 1)


@pytest.mark.parametrize("item", [b"[]", b"{}", b'"a"', b"1", b'{"a":1}'])
def test_too_many_values_are_refused_before_they_are_made(item: bytes) -> None:
    """Any kind of value counts; the refusal names the limit."""
    body = b"[" + b",".join([item] * 5000) + b"]"
    with pytest.raises(InvalidRequestError, match="more than 4000 JSON values") as refusal:
        parse(body, 4000)
    assert refusal.value.code == "too_many_values"
    assert len(parse(body, 40_000)) == 5000


@pytest.mark.parametrize("around", ["[%s]", '{"a": %s}'])
def test_nesting_is_bounded(around: str) -> None:
    """1,024 levels are read, one more is a refusal that says so."""
    body = "1"
    for _ in range(1024):
        body = around.replace("%s", body)
    assert parse(body.encode(), 10_000)
    with pytest.raises(InvalidRequestError, match=r"(?i)recursion|nest|depth") as refusal:
        parse(around.replace("%s", body).encode(), 10_000)
    assert refusal.value.code == "invalid_json"


@pytest.mark.anyio
async def test_the_service_bounds_values(default_checkpoint: Checkpoint) -> None:
    """The bound holds on the route; as many token ids as a request may have are below it."""
    many = b'{"input": "a", "user": [' + b"1," * 300_000 + b"1]}"
    async with fake_service(default_checkpoint) as (client, _):
        refused = await client.post(PATH, content=many)
    assert (refused.status_code, refused.json()["code"]) == (400, "too_many_values")
    ids = {"input": [[7] * 500] * 700}
    async with fake_service(default_checkpoint, token_input="accept") as (client, _):  # noqa: S106 - a setting
        assert (await client.post(PATH, json=ids)).status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("coding", "status"),
    [("gzip", 415), ("br", 415), ("deflate, gzip", 415), ("identity", 200), ("", 200)],
)
async def test_compressed_bodies_are_refused(
    default_checkpoint: Checkpoint, coding: str, status: int
) -> None:
    """What is declared as compressed is a 415 that says what to do, and is not unpacked."""
    async with fake_service(default_checkpoint) as (client, _):
        answer = await client.post(
            PATH, content=b'{"input": "a"}', headers={"content-encoding": coding}
        )
    assert answer.status_code == status
    if status == 415:
        assert answer.json()["code"] == "unsupported_content_encoding"
        assert "Content-Encoding" in answer.json()["detail"]


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """JSON of any form, or one with a byte changed, removed or added."""
    pieces = st.sampled_from(
        ['"', "\\", "\n", "é", "\u1680", "\U0001f600", "u", "d83d", ",", "[", "a" * 99]
    )
    texts = st.lists(pieces, max_size=30).map("".join)
    numbers = st.lists(st.sampled_from([1, 22, -3, 1.5, 1e30]), max_size=30)
    values = st.recursive(
        texts | numbers | st.none(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    )
    body = json.dumps(
        draw(values), ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 300]))
    ).encode()
    if draw(st.booleans()):
        at = draw(st.integers(0, len(body) - 1))
        removed = draw(st.integers(0, 2))
        added = draw(st.sampled_from([b"", *(bytes([byte]) for byte in b'"\\,[]{}:u d\xc3\x80')]))
        body = body[:at] + added + body[at + removed :]
    return body


@given(bodies())
def test_a_body_parsed_in_pieces_is_read_as_orjson_reads_it(body: bytes) -> None:
    """The value is the same, and what orjson refuses is refused, wherever a piece ends."""
    expected: object = InvalidJsonError
    with suppress(orjson.JSONDecodeError):
        expected = orjson.loads(body)
    if expected is InvalidJsonError:
        with pytest.raises(InvalidJsonError):
            parse_in_pieces(body, 10_000, 10_000, piece=40)
    else:
        assert parse_in_pieces(body, 10_000, 10_000, piece=40) == expected


@pytest.mark.parametrize(
    "body",
    [
        b'["' + b'","' * 10_000 + b'"]',
        b"[" + b"[]," * 10_000 + b"[]]",
        b"[" + b"{}," * 10_000 + b"{}]",
        b"[" + b"null," * 10_000 + b"null]",
        b"[" + b"1," * 30_000 + b"1]",
    ],
    ids=["strings", "lists", "objects", "nulls", "numbers"],
)
def test_pieces_count_values_of_every_kind(body: bytes) -> None:
    """Beyond the maximum, nothing is parsed."""
    with pytest.raises(TooManyValuesError):
        parse_in_pieces(body, 4000, 20_000)
    assert len(parse_in_pieces(body, 10_010, 40_000)) > 10_000


@pytest.mark.parametrize("gap", [b"", b" ", b"\n" * 1000])
@pytest.mark.parametrize("after", [b"", b', "b": 2', b', "a": {}'])
def test_an_array_is_no_key(gap: bytes, after: bytes) -> None:
    """An array of numbers in the place of a key is refused, also if a later key replaces it."""
    numbers = b"[" + b"100," * 20 + b"100]"
    with pytest.raises(InvalidJsonError):
        parse_in_pieces(b'{"a": {' + numbers + gap + b": 1}" + after + b"}", 100, 100)


def test_numbers_of_other_fields_count_as_values() -> None:
    """An array that is no input is accepted in a large body as in a small one."""
    body = {"input": ["x" * 2_000_000], "metadata": list(range(100, 900))}
    assert parse(json.dumps(body).encode(), 10_000) == body


def test_a_number_of_megabytes_is_refused() -> None:
    """It would be read in one call."""
    with pytest.raises(InvalidRequestError, match="more than 100 characters"):
        parse(b'{"input": ' + b"1" * (2 << 20) + b"}", 10_000)


HOLD = 0.010
"""Seconds for which a call may keep other threads from running."""

MEGABYTES = 16 << 20


BODIES: dict[str, Callable[[], bytes]] = {
    "texts": lambda: b'{"input": ["' + b'","'.join([b"word " * 1600] * 2048) + b'"]}',
    "line breaks": lambda: b'{"input": "' + b"\\n" * (MEGABYTES // 2) + b'"}',
    "escapes": lambda: b'{"input": "' + b"\\u00e9" * (MEGABYTES // 6) + b'"}',
    "token ids": lambda: (
        b'{"input": [' + b",".join([b"[" + b"12345," * 300 + b"1]"] * 2048) + b"]}"
    ),
    "long words in no string": lambda: (
        b'{"input": ["a"], "x": [' + (b"a" * 99 + b",") * (MEGABYTES // 100) + b"1]}"
    ),
    "spaces": lambda: b'{"input": ["a"' + b" " * MEGABYTES + b"]}",
}
"""Functions, since every process that collects the tests would hold the bodies."""


@pytest.mark.parametrize("name", BODIES)
def test_no_call_holds_the_interpreter_lock_for_long(name: str) -> None:
    """While a large body is parsed, other threads run; the best of some tries shows it."""
    body = BODIES[name]()

    def read() -> None:
        with suppress(InvalidRequestError):
            parse(body, 25_000, 1 << 22)

    assert any(longest_hold(read) < HOLD for _ in range(20))
