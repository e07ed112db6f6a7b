"""Shares of clients: one client alone may fill the queue, and cannot keep others out of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskvec.api.auth import client_name
from taskvec.core.admission import Admission
from taskvec.core.client_shares import current_client
from taskvec.errors import QueueFullError
from taskvec.priority import Priority

BUDGET = 1000


@contextmanager
def admitted(admission: Admission, client: str, tokens: int) -> Iterator[None]:
    current_client.set(client)
    admission.require_room(Priority.INTERACTIVE)
    with admission.admit(tokens, Priority.INTERACTIVE):
        yield


def admits(admission: Admission, client: str, tokens: int) -> bool:
    try:
        with admitted(admission, client, tokens):
            return True
    except QueueFullError:
        return False


def test_a_client_alone_may_fill_the_queue() -> None:
    """Without others there are no shares: the whole budget, and not more."""
    admission = Admission(BUDGET)
    with admitted(admission, "a", 600), admitted(admission, "a", 400):
        assert not admits(admission, "a", 1)
    assert admits(admission, "a", 1000)


def test_a_client_that_fills_the_queue_keeps_nobody_out() -> None:
    """Another client is admitted up to its share, and the one above its share is refused."""
    admission = Admission(BUDGET)
    with admitted(admission, "a", 600), admitted(admission, "a", 400):
        assert not admits(admission, "a", 1)
        with admitted(admission, "b", 300):
            assert admits(admission, "b", 200)
            assert not admits(admission, "b", 201)
            assert not admits(admission, "a", 1)
            assert admits(admission, "c", 700)
            assert not admits(admission, "d", 701)  # more than one budget beyond the budget


def test_a_first_request_is_not_larger_than_the_queue() -> None:
    """A full queue does not admit a new client's request that is larger than the whole budget."""
    admission = Admission(BUDGET)
    with admitted(admission, "a", 1000):
        assert admits(admission, "b", 1000)
        assert not admits(admission, "b", 1001)


def test_places_are_shared_as_well() -> None:
    """A client with all the requests that a class may have leaves others their part."""
    admission = Admission(1 << 30, max_requests=4)
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(admitted(admission, "a", 1))
        assert not admits(admission, "a", 1)
        for _ in range(2):
            stack.enter_context(admitted(admission, "b", 1))
        assert not admits(admission, "b", 1)
        for client in ("c", "d"):
            stack.enter_context(admitted(admission, client, 1))
        assert not admits(admission, "e", 1)


def test_a_full_class_is_not_the_other_class() -> None:
    """Shares are of a class: what a client holds of one does not count in the other."""
    admission = Admission(BUDGET)
    current_client.set("a")
    with admission.admit(BUDGET, Priority.BULK):
        assert admits(admission, "a", BUDGET)


def test_a_large_request_does_not_close_its_class() -> None:
    """After a refusal for want of room, requests that fit are admitted, read or not."""
    admission = Admission(BUDGET)
    with admitted(admission, "a", 500):
        assert not admits(admission, "a", 600)
        assert admission.accepting
        assert admits(admission, "a", 400)
        with admitted(admission, "a", 450):
            assert not admits(admission, "a", 100)
            assert not admission.accepting
            assert not admits(admission, "a", 10)
        assert admission.accepting


@given(
    st.lists(
        st.tuples(st.sampled_from("abcdefgh"), st.integers(1, BUDGET), st.booleans()), max_size=60
    )
)
def test_what_is_admitted_is_bounded(requests: list[tuple[str, int, bool]]) -> None:
    """Whoever asks for whatever in whatever order: two budgets at most, and nothing is left."""
    admission = Admission(BUDGET)
    running: list[ExitStack] = []
    for client, tokens, ends in requests:
        stack = ExitStack()
        try:
            stack.enter_context(admitted(admission, client, tokens))
            running.append(stack)
        except QueueFullError:
            pass
        if ends and running:
            running.pop(0).close()
        assert admission.tokens <= 2 * BUDGET
    for stack in running:
        stack.close()
    assert admission.tokens == 0
    assert admission.accepting
    assert admits(admission, "a", BUDGET)


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("10.0.0.7", "10.0.0.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:0db8:0001:0002"),
        ("2001:db8:1:2::1", "2001:0db8:0001:0002"),
        ("::ffff:10.0.0.7", "10.0.0.7"),
        ("not:an:address", "no address"),
    ],
)
def test_a_client_without_a_key_is_its_address(address: str, name: str) -> None:
    """In IPv6 a client has a network of addresses."""
    assert client_name({"client": (address, 5000)}, None) == name
    assert client_name({"client": None}, None) == ""
