"""The fair queue: every text is taken once, shares are fair, and counters are exact."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from taskvec.engines.packed.scheduler import WEIGHTS, FairQueue
from taskvec.priority import Priority

COSTS = st.lists(st.integers(min_value=1, max_value=60), min_size=1, max_size=12)


class AnyHistory(RuleBasedStateMachine):
    """Pushes, takes and drops in any order, compared with plain lists of waiting texts."""

    @initialize(quantum=st.integers(min_value=1, max_value=80))
    def start(self, quantum: int) -> None:
        self.queue: FairQueue[int] = FairQueue(quantum)
        self.costs: dict[int, list[int]] = {}
        self.waiting: dict[int, list[int]] = {}
        self.priorities: dict[int, Priority] = {}

    @rule(costs=COSTS, priority=st.sampled_from(Priority))
    def push(self, costs: list[int], priority: Priority) -> None:
        request = len(self.costs)
        self.costs[request] = costs
        self.waiting[request] = list(range(len(costs)))
        self.priorities[request] = priority
        self.queue.push(request, list(costs), priority)

    @rule(
        budget=st.integers(min_value=1, max_value=200),
        seconds=st.floats(min_value=0, max_value=10),
    )
    def take(self, budget: int, seconds: float) -> None:
        batch = self.queue.take(budget)
        if batch:
            self.queue.charge(self.priorities[batch[0][0]], seconds)
        assert len({self.priorities[request] for request, _ in batch}) <= 1, "a batch has one class"
        assert bool(batch) == any(self.waiting.values()), "a batch is empty only if the queue is"
        for request, index in batch:
            assert self.waiting[request].pop(0) == index, "once, and in order"
        spent = [self.costs[request][index] for request, index in batch]
        assert sum(spent) <= budget or len(spent) == 1

    @rule(remainder=st.integers(min_value=0, max_value=3))
    def drop(self, remainder: int) -> None:
        dropped = self.queue.drop(lambda request: request % 4 == remainder)
        expected = {r: len(w) for r, w in self.waiting.items() if r % 4 == remainder and w}
        assert len(dropped) == len(dict(dropped))
        assert dict(dropped) == expected
        for request in expected:
            self.waiting[request] = []

    @invariant()
    def counters_are_the_sums(self) -> None:
        if not hasattr(self, "queue"):
            return
        left = [self.costs[r][i] for r, indices in self.waiting.items() for i in indices]
        assert self.queue.texts == len(left)
        assert self.queue.tokens == sum(left)
        waiting = [r for r, indices in self.waiting.items() if indices]
        assert sorted(self.queue) == waiting
        assert self.queue.oldest == (waiting[0] if waiting else None)

    def teardown(self) -> None:
        while batch := self.queue.take(50):
            for request, index in batch:
                assert self.waiting[request].pop(0) == index
        assert not any(self.waiting.values()), "every text was taken"
        assert (self.queue.texts, self.queue.tokens) == (0, 0)


TestAnyHistory = AnyHistory.TestCase


@given(
    requests=st.lists(COSTS, min_size=1, max_size=8),
    quantum=st.integers(min_value=1, max_value=500),
    budget=st.integers(min_value=1, max_value=500),
)
def test_batches_are_as_full_as_they_can_be(
    requests: list[list[int]], quantum: int, budget: int
) -> None:
    """A batch ends only if the next text does not fit or the queue is empty."""
    queue: FairQueue[int] = FairQueue(quantum)
    costs = dict(enumerate(requests))
    for request, its_costs in costs.items():
        queue.push(request, list(its_costs))
    longest = max(map(max, requests))
    while queue.texts:
        spent = sum(costs[request][index] for request, index in queue.take(budget))
        assert not queue.texts or spent > budget - longest


def test_a_text_longer_than_the_budget_is_taken_alone() -> None:
    """A text longer than the budget is taken in a batch of its own."""
    queue: FairQueue[str] = FairQueue(25)
    queue.push("a", [10, 500, 10])
    queue.push("b", [10])
    batches = []
    while batch := queue.take(100):
        batches.append(batch)
    assert [("a", 1)] in batches
    assert sorted(chain.from_iterable(batches)) == [("a", 0), ("a", 1), ("a", 2), ("b", 0)]


@pytest.mark.parametrize("cost", [1, 16, 120])
def test_a_newcomer_is_in_the_next_batch(cost: int) -> None:
    """One text that is pushed after two thousand is in the next batch."""
    queue: FairQueue[str] = FairQueue(256)
    queue.push("big", [16] * 2048)
    for n in range(15):
        queue.take(1024)
        queue.push(f"small {n}", [cost])
        batch = queue.take(1024)
        assert (f"small {n}", 0) in batch
        assert any(request == "big" for request, _ in batch), "the big request continues"


def test_new_requests_do_not_starve_a_big_request() -> None:
    """A big request finishes while small requests arrive all the time."""
    queue: FairQueue[object] = FairQueue(64)
    queue.push("big", [16] * 100)
    taken = 0
    for n in range(2000):
        queue.push(n, [16] * 4)
        queue.push(-n - 1, [16] * 4)
        taken += sum(request == "big" for request, _ in queue.take(256))
    assert taken == 100


@given(
    texts=st.lists(st.integers(min_value=1, max_value=12), min_size=1, max_size=20),
    quantum=st.integers(min_value=16, max_value=300),
    budget=st.integers(min_value=100, max_value=500),
    waiting_requests=st.integers(min_value=2, max_value=40),
)
def test_overload_starves_no_request(
    texts: list[int], quantum: int, budget: int, waiting_requests: int
) -> None:
    """Under overload, each request is done when all have received as many tokens."""
    queue: FairQueue[int] = FairQueue(quantum)
    arrived: dict[int, int] = {}
    served = 0
    number = 0
    while served < 60 * budget:
        while len(arrived) < waiting_requests:
            number += 1
            queue.push(number, [16] * texts[number % len(texts)])
            arrived[number] = served
        batch = queue.take(budget)
        served += 16 * len(batch)
        for request in {request for request, _ in batch}.difference(queue):
            waited = served - arrived.pop(request)
            tokens = 16 * texts[request % len(texts)]
            assert waited <= waiting_requests * (tokens + quantum + 16) + budget


@given(
    costs=st.lists(st.integers(min_value=1, max_value=50), min_size=2, max_size=4),
    quantum=st.integers(min_value=50, max_value=300),
    budget=st.integers(min_value=300, max_value=1500),
)
def test_big_requests_get_equal_shares(costs: list[int], quantum: int, budget: int) -> None:
    """Token shares of several big requests differ by about one quantum at most."""
    queue: FairQueue[int] = FairQueue(quantum)
    for request, cost in enumerate(costs):
        queue.push(request, [cost] * 3000)
    shares: Counter[int] = Counter()
    for _ in range(1, 3000 // budget + 2):
        for request, _ in queue.take(budget):
            shares[request] += costs[request]
        served = [shares[request] for request in range(len(costs))]
        # plus less than one text, because the rest of a quantum is carried over
        assert max(served) - min(served) <= quantum + max(costs)


def test_an_interactive_text_is_not_mixed_into_a_bulk_batch() -> None:
    """An interactive text is taken alone in the next batch, so it waits for one forward only."""
    queue: FairQueue[str] = FairQueue(256)
    queue.push("big", [16] * 2048, Priority.BULK)
    for n in range(10):
        assert {request for request, _ in queue.take(1024)} == {"big"}
        queue.charge(Priority.BULK, 0.1)
        queue.push(f"small {n}", [16])
        assert queue.take(1024) == [(f"small {n}", 0)]
        queue.charge(Priority.INTERACTIVE, 0.004)


@pytest.mark.parametrize("cost", [0.001, 0.01, 0.1])
def test_classes_share_the_time_by_weight(cost: float) -> None:
    """While both classes wait, they share the engine's seconds by weight."""
    queue: FairQueue[Priority] = FairQueue(64)
    seconds = {Priority.INTERACTIVE: cost, Priority.BULK: 0.05}
    spent: Counter[Priority] = Counter()
    for priority in [*Priority, *Priority]:
        queue.push(priority, [16] * 4, priority)
    while sum(spent.values()) < 50:
        for priority in {request for request, _ in queue.take(64)}:
            spent[priority] += seconds[priority]
            queue.charge(priority, seconds[priority])
            queue.push(priority, [16] * 4, priority)
    shares = {priority: spent[priority] / sum(spent.values()) for priority in Priority}
    whole = sum(WEIGHTS.values())
    assert shares == pytest.approx({p: WEIGHTS[p] / whole for p in Priority}, abs=0.02)


def test_the_credit_of_an_empty_class_is_limited() -> None:
    """After hours of bulk work, interactive work gets one second and then its share."""
    queue: FairQueue[Priority] = FairQueue(64)
    queue.push(Priority.BULK, [64] * 40, Priority.BULK)
    queue.take(64)
    queue.charge(Priority.BULK, 10_000)
    queue.push(Priority.INTERACTIVE, [64] * 40, Priority.INTERACTIVE)
    served = []
    for _ in range(30):
        served.append(queue.take(64)[0][0])
        queue.charge(served[-1], 0.1)
    assert set(served[:10]) == {Priority.INTERACTIVE}
    assert Counter(served[10:]) == {Priority.INTERACTIVE: 16, Priority.BULK: 4}


@pytest.mark.parametrize("earlier", Priority)
def test_a_class_that_comes_late_does_not_make_up_for_the_past(earlier: Priority) -> None:
    """After hours of one class alone, the other begins while it has nothing, and both share."""
    (later,) = set(Priority) - {earlier}
    queue: FairQueue[Priority] = FairQueue(64)
    queue.push(earlier, [64], earlier)
    queue.take(64)
    queue.charge(earlier, 10_000)
    queue.push(later, [64] * 400, later)
    queue.take(64)
    queue.charge(later, 0.1)
    queue.push(earlier, [64] * 400, earlier)
    served: Counter[Priority] = Counter()
    for _ in range(100):
        priority = queue.take(64)[0][0]
        served[priority] += 1
        queue.charge(priority, 0.1)
    assert served[Priority.INTERACTIVE] == pytest.approx(80, abs=10)


def test_single_interactive_texts_are_served_at_once() -> None:
    """Short interactive texts that arrive one by one are served at once."""
    queue: FairQueue[Priority] = FairQueue(64)
    queue.push(Priority.BULK, [64] * 400, Priority.BULK)
    for _ in range(100):
        queue.push(Priority.INTERACTIVE, [16], Priority.INTERACTIVE)
        assert queue.take(64) == [(Priority.INTERACTIVE, 0)]
        queue.charge(Priority.INTERACTIVE, 0.004)
        assert queue.take(64)[0][0] == Priority.BULK
        queue.charge(Priority.BULK, 0.05)


def test_dropping_counts_waiting_texts() -> None:
    """Dropping a request counts its waiting texts, and other requests remain."""
    queue: FairQueue[str] = FairQueue(20)
    queue.push("a", [10, 10, 10])
    queue.push("b", [5])
    assert queue.take(20) == [("a", 0), ("a", 1)]
    assert queue.drop(lambda request: request == "a") == [("a", 1)]
    assert queue.drop(lambda request: request == "a") == []
    assert (queue.texts, queue.tokens) == (1, 5)
    assert list(queue) == ["b"]
    assert queue.take(20) == [("b", 0)]


def test_an_empty_queue_gives_an_empty_batch() -> None:
    """An empty queue returns an empty batch."""
    queue: FairQueue[str] = FairQueue(20)
    assert queue.take(100) == []
    assert queue.drop(lambda _: True) == []
    assert (queue.texts, queue.tokens) == (0, 0)
