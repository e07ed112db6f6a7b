"""JSON bodies: how deep, how many values, and what is counted."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import fake_service
from taskvec.api.request import SCAN_BYTES, has_more_values, parse
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
