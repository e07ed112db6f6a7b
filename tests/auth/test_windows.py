"""Sliding windows in memory: the same counts as in the limits library."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from taskvec.auth.rate_limit import MINUTE, SlidingWindows

WEB = ("web", "requests")


@given(
    steps=st.lists(
        st.tuples(
            st.floats(min_value=0, max_value=3 * MINUTE),
            st.integers(min_value=1, max_value=40),
        ),
        max_size=60,
    ),
    limit=st.integers(min_value=40, max_value=100),
)
def test_it_counts_as_a_list_of_all_amounts(steps: list[tuple[float, int]], limit: int) -> None:
    """For any sequence of amounts, the windows agree with a sum over all that passed before."""
    now = 1_000_000 * MINUTE
    windows = SlidingWindows(lambda: now)
    passed: list[tuple[int, int]] = []
    for pause, amount in steps:
        now += pause
        minute, elapsed = divmod(now, MINUTE)
        current = sum(a for m, a in passed if m == minute)
        previous = sum(a for m, a in passed if m == minute - 1)
        used = int(previous * (MINUTE - elapsed) / MINUTE) + current
        taken, usage = windows.take(WEB, limit, amount)
        assert taken == (used + amount <= limit)
        if taken:
            passed.append((int(minute), amount))
        assert usage.used == used + (amount if taken else 0)


def test_usage_expires_evenly() -> None:
    """Of a full minute half is available again after 1.5 minutes, and everything after two."""
    now = 60 * MINUTE
    windows = SlidingWindows(lambda: now)
    assert windows.take(WEB, 100, 100)[0]
    taken, usage = windows.take(WEB, 100, 1)
    assert not taken
    assert usage.seconds_until(0) == 2 * MINUTE
    assert usage.seconds_until(50) == 1.5 * MINUTE
    now += 1.5 * MINUTE
    assert windows.take(WEB, 100, 50)[0]
    assert not windows.take(WEB, 100, 1)[0]
    now += 5 * MINUTE
    assert windows.take(WEB, 100, 100)[0]
