"""Minutes counted in this process: the same count as the limits library's."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from taskvec.auth.rate_limit import MINUTE, LocalWindows

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
def test_it_counts_as_a_plain_list_would(steps: list[tuple[float, int]], limit: int) -> None:
    """Whatever comes when: what passes is what the sum over this minute and the last lets pass."""
    now = 1_000_000 * MINUTE
    windows = LocalWindows(lambda: now)
    passed: list[tuple[int, int]] = []
    for pause, amount in steps:
        now += pause
        minute, into = divmod(now, MINUTE)
        current = sum(a for m, a in passed if m == minute)
        before = sum(a for m, a in passed if m == minute - 1)
        used = int(before * (MINUTE - into) / MINUTE) + current
        taken, usage = windows.take(WEB, limit, amount)
        assert taken == (used + amount <= limit)
        if taken:
            passed.append((int(minute), amount))
        assert usage.used == used + (amount if taken else 0)


def test_what_was_used_fades() -> None:
    """A full minute leaves half its room after half of the next one, and all of it after two."""
    now = 60 * MINUTE
    windows = LocalWindows(lambda: now)
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
