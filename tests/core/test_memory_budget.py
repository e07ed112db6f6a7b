"""One budget of bytes: what a client may hold, and that everything comes back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskvec.core.memory_budget import FREE_BYTES, MAX_BUDGET, MIN_BUDGET, MemoryBudget
from taskvec.core.memory_budget import default_budget as default
from taskvec.errors import QueueFullError

MB = 1 << 20


def test_one_client_leaves_half_to_others() -> None:
    """A client alone may hold half of the budget, and a newcomer finds room at once."""
    budget = MemoryBudget(100 * MB)
    holds = [budget.hold("hostile") for _ in range(6)]
    for hold in holds[:5]:
        hold.resize(10 * MB)
    with pytest.raises(QueueFullError, match="50 of 100 MB") as refused:
        holds[5].resize(10 * MB)
    assert refused.value.retry_after == 1.0
    assert holds[5].bytes == 0
    budget.hold("newcomer").resize(25 * MB)
    with pytest.raises(QueueFullError):
        budget.hold("newcomer").resize(10 * MB)
    budget.hold("third").resize(12 * MB)


def test_a_request_larger_than_the_budget_is_admitted_alone() -> None:
    """Its size is limited elsewhere, and it can never find more room; beside others it waits."""
    budget = MemoryBudget(10 * MB)
    large, other = budget.hold("a"), budget.hold("b")
    other.resize(MB)
    with pytest.raises(QueueFullError):
        large.resize(64 * MB)
    other.release()
    for size in (5 * MB, 20 * MB, 64 * MB):  # it also may grow
        large.resize(size)
    with pytest.raises(QueueFullError):
        other.resize(MB)
    large.release()
    assert budget.used == 0


def test_short_requests_cost_nothing() -> None:
    """They are not counted, and are admitted even when nothing is left."""
    budget = MemoryBudget(MB)
    budget.hold("a").unread(2 * MB)
    for _ in range(1000):
        budget.hold("b").resize(FREE_BYTES)
    assert budget.used == 2 * MB


def test_unread_answers_count_beyond_a_share() -> None:
    """An answer exists, so it is counted; its client waits until it has read, others do not."""
    budget = MemoryBudget(100 * MB)
    request = budget.hold("slow")
    request.resize(40 * MB)
    unread = request.unread(80 * MB)
    request.release()
    assert budget.used == 80 * MB
    with pytest.raises(QueueFullError):
        budget.hold("slow").resize(MB)
    budget.hold("other").resize(5 * MB)
    unread.release()
    budget.hold("slow").resize(40 * MB)


def test_a_closed_budget_refuses_all_growth() -> None:
    """What is held may shrink; nothing grows, not even the only request."""
    budget = MemoryBudget(100 * MB)
    hold = budget.hold("a")
    hold.resize(20 * MB)
    budget.closed = True
    with pytest.raises(QueueFullError):
        hold.resize(21 * MB)
    hold.resize(19 * MB)
    assert budget.used == 19 * MB


@pytest.mark.parametrize(
    ("total", "budget"),
    [(0, MAX_BUDGET), (1 << 40, MAX_BUDGET), (1200 * MB, 200 * MB), (256 * MB, MIN_BUDGET)],
)
def test_the_default_is_a_share_of_the_limit(total: int, budget: int) -> None:
    """It is a sixth of what the process may have, within bounds."""
    assert default(total) == budget


STEPS = st.lists(
    st.tuples(
        st.integers(0, 9), st.sampled_from(["resize", "release", "unread"]), st.integers(0, 40)
    ),
    max_size=60,
)


@given(STEPS)
def test_what_is_held_is_the_sum(steps: list[tuple[int, str, int]]) -> None:
    """The sum is right after any requests of three clients, and nothing is held at the end."""
    budget = MemoryBudget(100 * MB)
    holds = [budget.hold(f"client {number % 3}") for number in range(10)]
    unread = []
    for number, what, size in steps:
        hold = holds[number]
        if what == "unread":
            unread.append(hold.unread(size * MB))
        elif what == "release":
            hold.release()
        else:
            before = hold.bytes
            alone = budget.used == before
            try:
                hold.resize(size * MB)
            except QueueFullError:
                assert hold.bytes == before
            else:
                own = sum(each.bytes for each in holds[number % 3 :: 3])
                assert size * MB <= before or alone or own <= 100 * MB - budget.used
        assert budget.used == sum(hold.bytes for hold in [*holds, *unread])
    for hold in [*holds, *unread]:
        hold.release()
        hold.release()
    assert budget.used == 0
    assert not budget._clients
