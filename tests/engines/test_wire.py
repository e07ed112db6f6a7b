"""The binary format between gateways and servers: round trips and rejected bodies."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskvec.api.errors import error_response
from taskvec.engines.wire import pack_texts, read_text_error, unpack_texts
from taskvec.errors import TaskvecError

INT32 = st.integers(-(2**31), 2**31 - 1)
NAMES = st.none() | st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
TEXTS = st.lists(INT32, min_size=1, max_size=12).map(lambda ids: np.array(ids, dtype=np.int32))
CALLS = st.lists(st.tuples(TEXTS, NAMES), min_size=1, max_size=8)
NUMBERS = st.lists(st.integers(-2, 6) | INT32, max_size=24)
HEADERS = st.sampled_from(["", "a", "a,b", ",a", "a,,b"]) | st.text(max_size=12)


def numbers(*values: int) -> bytes:
    """Return little-endian 32-bit numbers as bytes."""
    return b"".join(value.to_bytes(4, "little", signed=True) for value in values)


@given(CALLS)
def test_round_trip(call: list[tuple[np.ndarray, str | None]]) -> None:
    """Ids, order and adapters of any texts are unchanged after packing and unpacking."""
    texts, adapters = [text for text, _ in call], [name for _, name in call]
    given_texts, given_adapters = unpack_texts(*pack_texts(texts, adapters))
    assert given_adapters == adapters
    assert [text.tolist() for text in given_texts] == [text.tolist() for text in texts]
    assert {text.dtype for text in given_texts} == {np.dtype(np.int32)}


def test_the_bytes_are_documented() -> None:
    """The bytes follow the documented format, so that different versions work together.

    The adapters are numbered in the order of their first text, the bare backbone has no name.
    """
    texts = [np.array(ids, dtype=np.int32) for ids in ([7, 8], [9], [5, 6, 258])]
    header, body = pack_texts(texts, ["clustering", None, "clustering"])
    assert header == "clustering,"
    assert body == numbers(3, 0, 2, 1, 1, 0, 3, 7, 8, 9, 5, 6, 258)


def test_an_adapter_is_in_the_header_once() -> None:
    """The length of the header does not depend on the number of texts."""
    texts = [np.array([n], dtype=np.int32) for n in range(1000)]
    header, body = pack_texts(texts, ["retrieval", "clustering"] * 500)
    assert header == "retrieval,clustering"
    assert len(body) == 4 * (1 + 3 * 1000)


def test_an_adapter_in_the_header_may_be_unused() -> None:
    """The header may contain adapters that are not used by a text."""
    texts, adapters = unpack_texts("a,b,c", numbers(1, 1, 2, 30, 31))
    assert adapters == ["b"]
    assert texts[0].tolist() == [30, 31]


def test_a_body_without_texts_is_rejected() -> None:
    """A request without texts can be packed, and is rejected when unpacked."""
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
def test_an_invalid_body_is_rejected(header: str, body: bytes, word: str) -> None:
    """An invalid header or body is rejected with the reason."""
    with pytest.raises(ValueError, match=word):
        unpack_texts(header, body)


def test_a_long_header_is_truncated_in_the_message() -> None:
    """The message contains only the start of a long header."""
    with pytest.raises(ValueError, match="adapter") as refusal:
        unpack_texts("x" * 1_000_000, numbers(1, 1, 1, 5))
    assert len(str(refusal.value)) < 1000


def check_unpacked_or_rejected(header: str, body: bytes) -> None:
    """Check that unpacking raises only ValueError, or uses each id of the body once."""
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
def test_arbitrary_bytes_are_unpacked_or_rejected(header: str, body: bytes) -> None:
    """Arbitrary bytes raise only ValueError."""
    check_unpacked_or_rejected(header, body)


@given(HEADERS, NUMBERS)
def test_arbitrary_numbers_are_unpacked_or_rejected(header: str, values: list[int]) -> None:
    """Arbitrary numbers raise only ValueError."""
    check_unpacked_or_rejected(header, numbers(*values))


@given(CALLS, st.data())
def test_a_damaged_request_is_unpacked_or_rejected(
    call: list[tuple[np.ndarray, str | None]], data: st.DataObject
) -> None:
    """A valid request with a changed byte or truncated raises only ValueError."""
    header, body = pack_texts([text for text, _ in call], [name for _, name in call])
    index = data.draw(st.integers(0, len(body) - 1))
    changed = bytearray(body)
    changed[index] = data.draw(st.integers(0, 255))
    check_unpacked_or_rejected(header, bytes(changed))
    check_unpacked_or_rejected(header, body[:index])


def rendered(code: str | None, param: str | None) -> str:
    """Return the body of an error response."""
    error = TaskvecError("Not this one.", code=code, param=param)
    return bytes(error_response(error, "an-id").body).decode()


@pytest.mark.parametrize("code", ["vector_not_finite", "out_of_memory"])
def test_an_error_about_one_text_is_read(code: str) -> None:
    """The error of a server about one text keeps its message, code and param."""
    error = read_text_error(rendered(code, "input[12]"))
    assert error is not None
    assert (error.message, error.code, error.param) == ("Not this one.", code, "input[12]")
    assert error.text == 12


@pytest.mark.parametrize(
    "body",
    [
        rendered(None, "input[0]"),
        rendered("vector_not_finite", None),
        rendered("vector_not_finite", "input[-1]"),
        rendered("vector_not_finite", "input[0] "),
        rendered("vector_not_finite", f"input[{'9' * 1000}]"),
        rendered("vector_not_finite", "input[3]")[:-40],
        '{"error": "vector_not_finite"}',
        '{"error": {"code": ["vector_not_finite"], "message": 1, "param": "input[0]"}}',
        "[]",
        "",
    ],
)
def test_other_errors_are_not_about_one_text(body: str) -> None:
    """An error with another code, without a text, or of another form does not count as one."""
    assert read_text_error(body) is None
