"""What gateways and servers send each other: it comes back as it went, or is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskvec.engines.wire import pack_texts, unpack_texts

INT32 = st.integers(-(2**31), 2**31 - 1)
NAMES = st.none() | st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
TEXTS = st.lists(INT32, min_size=1, max_size=12).map(lambda ids: np.array(ids, dtype=np.int32))
CALLS = st.lists(st.tuples(TEXTS, NAMES), min_size=1, max_size=8)
NUMBERS = st.lists(st.integers(-2, 6) | INT32, max_size=24)
HEADERS = st.sampled_from(["", "a", "a,b", ",a", "a,,b"]) | st.text(max_size=12)


def numbers(*values: int) -> bytes:
    """A body of these little-endian 32-bit numbers."""
    return b"".join(value.to_bytes(4, "little", signed=True) for value in values)


@given(CALLS)
def test_texts_come_back_as_they_went(call: list[tuple[np.ndarray, str | None]]) -> None:
    """Ids, their order and the adapter of each text survive the way, whatever they are."""
    texts, adapters = [text for text, _ in call], [name for _, name in call]
    given_texts, given_adapters = unpack_texts(*pack_texts(texts, adapters))
    assert given_adapters == adapters
    assert [text.tolist() for text in given_texts] == [text.tolist() for text in texts]
    assert {text.dtype for text in given_texts} == {np.dtype(np.int32)}


def test_the_bytes_are_the_documented_ones() -> None:
    """Number of texts; adapter number and length of each; all ids: servers of two versions agree.

    The adapters are numbered in the order of their first text, the bare backbone has no name.
    """
    texts = [np.array(ids, dtype=np.int32) for ids in ([7, 8], [9], [5, 6, 258])]
    header, body = pack_texts(texts, ["clustering", None, "clustering"])
    assert header == "clustering,"
    assert body == numbers(3, 0, 2, 1, 1, 0, 3, 7, 8, 9, 5, 6, 258)


def test_a_thousand_texts_name_their_adapter_once() -> None:
    """The header does not grow with the texts."""
    texts = [np.array([n], dtype=np.int32) for n in range(1000)]
    header, body = pack_texts(texts, ["retrieval", "clustering"] * 500)
    assert header == "retrieval,clustering"
    assert len(body) == 4 * (1 + 3 * 1000)


def test_an_adapter_may_be_named_and_not_used() -> None:
    """A server needs no text for a name in the header."""
    texts, adapters = unpack_texts("a,b,c", numbers(1, 1, 2, 30, 31))
    assert adapters == ["b"]
    assert texts[0].tolist() == [30, 31]


def test_no_text_is_refused() -> None:
    """A call without texts is packed, but never taken for one."""
    with pytest.raises(ValueError, match="0 texts"):
        unpack_texts(*pack_texts([], []))


@pytest.mark.parametrize(
    ("header", "body", "word"),
    [
        ("a", b"", "0 bytes"),
        ("a", b"\x01", "1 bytes"),
        ("a", numbers(1, 0, 1, 5) + b"\x00", "17 bytes"),
        ("a", numbers(0), "0 texts"),
        ("a", numbers(-1, 0, 1, 5), "-1 texts"),
        ("a", numbers(2**31 - 1, 0, 1, 5), "2147483647 texts"),
        ("a", numbers(-(2**31)), "-2147483648 texts"),
        ("a", numbers(2, 0, 1, 5), "2 texts"),
        ("a", numbers(1, 1, 1, 5), "adapter"),
        ("a", numbers(1, -1, 1, 5), "adapter"),
        ("a,b", numbers(1, 2, 1, 5), "adapter"),
        ("", numbers(1, 1, 1, 5), "adapter"),
        ("a", numbers(1, 0, 0), "lengths"),
        ("a", numbers(1, 0, -1), "lengths"),
        ("a", numbers(1, 0, 2, 5), "lengths"),
        ("a", numbers(1, 0, 1, 5, 6), "lengths"),
        ("a", numbers(2, 0, 3, 0, -1, 5, 6), "lengths"),
        ("a", numbers(2, 0, 2, 0, 0, 5, 6), "lengths"),
        ("a", numbers(3, *[0, 2**31 - 1] * 2, 0, 4, 5, 6), "lengths"),
    ],
)
def test_a_wrong_body_is_refused_with_its_fault(header: str, body: bytes, word: str) -> None:
    """What ``pack_texts`` does not make is refused by a sentence that says what is wrong."""
    with pytest.raises(ValueError, match=word):
        unpack_texts(header, body)


def test_a_long_header_is_not_repeated_whole() -> None:
    """The refusal shows the beginning of a header, not a megabyte of it."""
    with pytest.raises(ValueError, match="adapter") as refusal:
        unpack_texts("x" * 1_000_000, numbers(1, 1, 1, 5))
    assert len(str(refusal.value)) < 1000


def check_taken_or_refused(header: str, body: bytes) -> None:
    """Nothing but a ValueError comes out; what is taken uses each id of the body once."""
    try:
        texts, adapters = unpack_texts(header, body)
    except ValueError:
        return
    assert len(texts) == len(adapters) >= 1
    assert min(map(len, texts)) >= 1
    assert set(adapters) <= {name or None for name in header.split(",")}
    taken = np.concatenate(texts).astype("<i4").tobytes()
    assert body[4 * (1 + 2 * len(texts)) :] == taken


@given(HEADERS, st.binary(max_size=80))
def test_arbitrary_bytes_are_taken_or_refused(header: str, body: bytes) -> None:
    """No bytes raise anything but ValueError."""
    check_taken_or_refused(header, body)


@given(HEADERS, NUMBERS)
def test_arbitrary_numbers_are_taken_or_refused(header: str, values: list[int]) -> None:
    """No list of numbers raises anything but ValueError, however near to a right one."""
    check_taken_or_refused(header, numbers(*values))


@given(CALLS, st.data())
def test_a_damaged_call_is_taken_or_refused(
    call: list[tuple[np.ndarray, str | None]], data: st.DataObject
) -> None:
    """A right call with one byte changed, or cut anywhere, raises nothing but ValueError."""
    header, body = pack_texts([text for text, _ in call], [name for _, name in call])
    place = data.draw(st.integers(0, len(body) - 1))
    changed = bytearray(body)
    changed[place] = data.draw(st.integers(0, 255))
    check_taken_or_refused(header, bytes(changed))
    check_taken_or_refused(header, body[:place])
