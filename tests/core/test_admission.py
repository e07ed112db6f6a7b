"""The token budget: who is admitted, who is refused, and when those are told to come back."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskvec.core.admission import (
    MAX_RETRY_AFTER,
    MIN_BUDGET,
    UNMEASURED_BUDGET,
    Admission,
    batch_priority,
)
from taskvec.errors import QueueFullError
from taskvec.priority import Priority

INTERACTIVE, BULK = Priority


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def refusal(admission: Admission, tokens: int) -> QueueFullError:
    with pytest.raises(QueueFullError) as refused, admission.admit(tokens, INTERACTIVE):
        pytest.fail("admitted")
    return refused.value


def retry_after(admission: Admission, tokens: int) -> float:
    seconds = refusal(admission, tokens).retry_after
    assert seconds is not None
    return seconds


def work(admission: Admission, clock: Clock, *, tokens: int, seconds: float) -> None:
    """Embed so many tokens in so many seconds, with nothing else going on."""
    with admission.admit(tokens, INTERACTIVE):
        clock.now += seconds


def fail(admission: Admission, clock: Clock, *, tokens: int, seconds: float) -> None:
    """Fail after so many seconds."""
    with admission.admit(tokens, INTERACTIVE):
        clock.now += seconds
        raise RuntimeError


def test_requests_share_the_budget_to_the_last_token(clock: Clock) -> None:
    """What fits is admitted, one token more is refused, and leaving makes room."""
    admission = Admission(100, clock=clock)
    with admission.admit(60, INTERACTIVE):
        with admission.admit(40, INTERACTIVE):
            assert admission.tokens == 100
            assert refusal(admission, 1).code == "queue_full"
        assert refusal(admission, 41).status == 429
        with admission.admit(40, INTERACTIVE):
            assert admission.tokens == 100
    assert admission.tokens == 0


def test_a_refusal_names_the_numbers(clock: Clock) -> None:
    """The message says what is queued, what was asked and what the limit is."""
    admission = Admission(100, clock=clock)
    with admission.admit(70, INTERACTIVE):
        message = refusal(admission, 31).message
    assert [number in message for number in ("70 interactive tokens", "31 more", "100")] == [
        True
    ] * 3


def test_a_refused_request_holds_no_room(clock: Clock) -> None:
    """Refusals leave the budget as it was."""
    admission = Admission(100, clock=clock)
    with admission.admit(50, INTERACTIVE):
        for _ in range(10):
            refusal(admission, 51)
        assert admission.tokens == 50
        with admission.admit(50, INTERACTIVE):
            pass


def test_a_request_beyond_the_budget_is_admitted_alone(clock: Clock) -> None:
    """A request larger than the whole budget waits for an empty queue, not for ever."""
    admission = Admission(100, clock=clock)
    with admission.admit(1, INTERACTIVE):
        refusal(admission, 5000)
    with admission.admit(5000, INTERACTIVE):
        refusal(admission, 1)
    assert admission.tokens == 0


def test_failure_gives_the_room_back(clock: Clock) -> None:
    """Room is freed however the request ends."""
    admission = Admission(100, clock=clock)
    with pytest.raises(RuntimeError), admission.admit(100, INTERACTIVE):
        raise RuntimeError
    with admission.admit(100, INTERACTIVE):
        assert admission.tokens == 100


def test_without_experience_the_guess_is_a_second(clock: Clock) -> None:
    """Before anything has been answered, clients are asked back after one second."""
    admission = Admission(100, clock=clock)
    with admission.admit(100, INTERACTIVE):
        assert retry_after(admission, 100) == 1.0


def test_the_guess_follows_the_measured_rate(clock: Clock) -> None:
    """At 10 tokens a second, room for 50 more tokens comes after 5 seconds."""
    admission = Admission(100, clock=clock)
    work(admission, clock, tokens=100, seconds=10)
    with admission.admit(100, INTERACTIVE):
        assert retry_after(admission, 50) == pytest.approx(5)
        assert retry_after(admission, 20) == pytest.approx(2)


def test_the_guess_is_never_longer_than_emptying_the_queue(clock: Clock) -> None:
    """A request beyond the budget needs an empty queue, and no more than that."""
    admission = Admission(100, clock=clock)
    work(admission, clock, tokens=100, seconds=10)
    with admission.admit(80, INTERACTIVE):
        assert retry_after(admission, 100_000) == pytest.approx(8)


def test_idle_time_does_not_slow_the_rate(clock: Clock) -> None:
    """Only time in which something was being embedded counts."""
    admission = Admission(100, clock=clock)
    work(admission, clock, tokens=100, seconds=10)
    clock.now += 3600
    work(admission, clock, tokens=100, seconds=10)
    with admission.admit(100, INTERACTIVE):
        assert retry_after(admission, 50) == pytest.approx(5)


def test_requests_at_the_same_time_share_the_clock(clock: Clock) -> None:
    """Seconds that several requests spend together are counted once."""
    admission = Admission(100, clock=clock)
    with admission.admit(50, INTERACTIVE):
        clock.now += 5
        with admission.admit(50, INTERACTIVE):
            clock.now += 5
    with admission.admit(100, INTERACTIVE):
        assert retry_after(admission, 50) == pytest.approx(5)


def test_what_failed_is_no_work_done(clock: Clock) -> None:
    """Cancelled and failed tokens took time and gave nothing: the guess gets longer."""
    admission = Admission(100, clock=clock)
    work(admission, clock, tokens=100, seconds=10)
    with pytest.raises(RuntimeError):
        fail(admission, clock, tokens=100, seconds=10)
    with admission.admit(100, INTERACTIVE):
        assert retry_after(admission, 50) > 6


def test_old_rates_are_forgotten(clock: Clock) -> None:
    """After a few minutes of faster work the guess follows the new rate."""
    admission = Admission(100, clock=clock)
    work(admission, clock, tokens=100, seconds=100)
    for _ in range(200):
        work(admission, clock, tokens=100, seconds=1)
    with admission.admit(100, INTERACTIVE):
        assert retry_after(admission, 100) == pytest.approx(1, rel=0.1)


def test_the_guess_has_bounds(clock: Clock) -> None:
    """Never under a second, never above what the OpenAI SDK obeys."""
    slow, fast = Admission(100, clock=clock), Admission(100, clock=clock)
    work(slow, clock, tokens=1, seconds=1000)
    work(fast, clock, tokens=100, seconds=0.001)
    with slow.admit(100, INTERACTIVE), fast.admit(100, INTERACTIVE):
        assert retry_after(slow, 100) == MAX_RETRY_AFTER
        assert retry_after(fast, 100) == 1.0


@given(
    wanted=st.lists(
        st.tuples(
            st.integers(min_value=1, max_value=150),
            st.booleans(),
            st.floats(min_value=0, max_value=1e4),
        ),
        max_size=40,
    )
)
def test_the_budget_holds_whatever_comes_and_goes(wanted: list[tuple[int, bool, float]]) -> None:
    """Over any history, what is held is the sum of those within, and within the budget."""
    clock = Clock()
    admission = Admission(100, clock=clock)
    inside: list[tuple[int, ExitStack]] = []
    for tokens, leave, seconds in wanted:
        clock.now += seconds
        if leave and inside:
            inside.pop(0)[1].close()
        stack = ExitStack()
        if inside and admission.tokens + tokens > 100:
            assert 1 <= retry_after(admission, tokens) <= MAX_RETRY_AFTER
        else:
            stack.enter_context(admission.admit(tokens, INTERACTIVE))
            inside.append((tokens, stack))
        held = [held for held, _ in inside]
        assert admission.tokens == sum(held)
        assert sum(held) <= 100 or len(held) == 1
    for _, stack in inside:
        stack.close()
    assert admission.tokens == 0


def test_the_budget_is_what_the_engine_does_in_some_seconds(clock: Clock) -> None:
    """Without a fixed limit the budget follows the engine's measured speed."""
    admission = Admission(seconds=10, clock=clock)
    assert admission.budget == UNMEASURED_BUDGET
    admission.set_rate(tokens=10, seconds=5)
    assert admission.budget == MIN_BUDGET
    admission.set_rate(tokens=50_000, seconds=5)
    assert admission.budget == 100_000
    with admission.admit(100_000, INTERACTIVE):
        assert refusal(admission, 1).retry_after == pytest.approx(1)


def test_little_work_does_not_make_the_engine_look_slow(clock: Clock) -> None:
    """One short text at a time shows how long a text takes, and not what the engine can do."""
    admission = Admission(seconds=10, clock=clock)
    admission.set_rate(tokens=50_000, seconds=5)
    for _ in range(10_000):
        work(admission, clock, tokens=10, seconds=0.005)
    assert admission.rate == pytest.approx(10_000)


def test_before_the_engine_is_measured_traffic_sets_no_rate(clock: Clock) -> None:
    """A budget derived from single short texts would refuse the first bulk requests."""
    admission = Admission(seconds=10, clock=clock)
    work(admission, clock, tokens=10, seconds=0.005)
    assert not admission.rate
    assert admission.budget == UNMEASURED_BUDGET


def test_a_fixed_budget_learns_the_rate_from_traffic(clock: Clock) -> None:
    """The engine is not measured then, and Retry-After needs a rate."""
    admission = Admission(100_000, clock=clock)
    work(admission, clock, tokens=50_000, seconds=5)
    assert admission.rate == pytest.approx(10_000)


@pytest.mark.parametrize("rate", [2_000, 40_000])
def test_much_work_shows_what_the_engine_does_now(clock: Clock, rate: int) -> None:
    """An engine that has become slower or faster is known for it after some minutes of load."""
    admission = Admission(seconds=10, clock=clock)
    admission.set_rate(tokens=50_000, seconds=5)
    for _ in range(40):
        work(admission, clock, tokens=80_000, seconds=80_000 / rate)
    assert admission.rate == pytest.approx(rate, rel=0.1)


@pytest.mark.parametrize("large", [1, 4])
def test_large_requests_do_not_make_the_engine_look_slow_until_they_are_answered(
    clock: Clock, large: int
) -> None:
    """Short texts that are answered beside large requests are no measurement, and stay small."""
    admission = Admission(seconds=100, clock=clock)
    admission.set_rate(tokens=512, seconds=0.8)
    for _ in range(5):
        answered_at = clock.now + large * 8192 / 640
        with ExitStack() as stack:
            for _ in range(large):
                stack.enter_context(admission.admit(8192, BULK))
            while clock.now < answered_at:
                assert admission.priority_of(25, INTERACTIVE) is INTERACTIVE
                with admission.admit(25, INTERACTIVE):
                    clock.now += 0.2
        assert admission.rate == pytest.approx(640, rel=0.8)
    assert admission.rate == pytest.approx(640, rel=0.2)


def test_after_a_refusal_the_door_stays_shut_until_there_is_room_for_some(clock: Clock) -> None:
    """What would be refused is refused before it costs any work, and not for ever."""
    admission = Admission(1000, clock=clock)
    admission.require_room(INTERACTIVE)
    with ExitStack() as most, ExitStack() as rest:
        most.enter_context(admission.admit(850, INTERACTIVE))
        rest.enter_context(admission.admit(150, INTERACTIVE))
        admission.require_room(INTERACTIVE)
        refusal(admission, 10)
        with pytest.raises(QueueFullError, match="1000 interactive tokens are queued"):
            admission.require_room(INTERACTIVE)
        rest.close()
        admission.require_room(INTERACTIVE)


def test_bulk_keeps_nobody_else_out(clock: Clock) -> None:
    """Each class has a budget: where bulk is refused, an interactive request is admitted."""
    admission = Admission(100, clock=clock)
    with admission.admit(5000, BULK):
        with pytest.raises(QueueFullError), admission.admit(1, BULK):
            pytest.fail("admitted")
        with pytest.raises(QueueFullError):
            admission.require_room(BULK)
        admission.require_room(INTERACTIVE)
        with admission.admit(100, INTERACTIVE):
            assert admission.tokens == 5100


def test_a_large_request_is_bulk_whatever_it_says(clock: Clock) -> None:
    """Bulk is more than a second of the engine's work, or many tokens if its speed is unknown."""
    admission = Admission(100, clock=clock)
    assert admission.priority_of(MIN_BUDGET, INTERACTIVE) is INTERACTIVE
    assert admission.priority_of(MIN_BUDGET + 1, INTERACTIVE) is BULK
    admission.set_rate(tokens=1000, seconds=1)
    assert admission.priority_of(1000, INTERACTIVE) is INTERACTIVE
    assert admission.priority_of(1001, INTERACTIVE) is BULK
    assert admission.priority_of(1, BULK) is BULK


def test_more_than_a_forward_pass_is_scheduled_as_bulk() -> None:
    """The engine's class is that of the request, or bulk for more than one forward pass."""
    assert batch_priority(500, INTERACTIVE, 500) is INTERACTIVE
    assert batch_priority(501, INTERACTIVE, 500) is BULK
    assert batch_priority(1, BULK, 500) is BULK
    assert batch_priority(10_000, INTERACTIVE, 0) is INTERACTIVE


def test_requests_have_a_limit_however_short_they_are(clock: Clock) -> None:
    """One more than the limit is refused, in words of its own, until a tenth has left; by class."""
    admission = Admission(1000, max_requests=20, clock=clock)
    with ExitStack() as most, ExitStack() as rest:
        for number in range(20):
            stack = most if number < 18 else rest
            stack.enter_context(admission.admit(1, INTERACTIVE))
        admission.require_room(INTERACTIVE)
        refused = refusal(admission, 1)
        assert (refused.status, refused.retry_after) == (429, 1.0)
        assert "20 interactive requests are queued" in refused.message
        with pytest.raises(QueueFullError, match="the limit is 20"):
            admission.require_room(INTERACTIVE)
        with admission.admit(1, BULK):
            assert admission.tokens == 21
        rest.close()
        admission.require_room(INTERACTIVE)
    assert admission.tokens == 0
