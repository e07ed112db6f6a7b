"""The queue: every text leaves once, big requests block nobody, the counters never drift."""

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
    """Pushes, takes and drops in any order, beside a plain list of what must still wait."""

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
        self.queue.charge(seconds)
        assert len({self.priorities[request] for request, _ in batch}) <= 1, "one class a batch"
        assert bool(batch) == any(self.waiting.values()), "work is never left lying"
        for request, place in batch:
            assert self.waiting[request].pop(0) == place, "once, and in order"
        spent = [self.costs[request][place] for request, place in batch]
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
        left = [self.costs[r][place] for r, places in self.waiting.items() for place in places]
        assert self.queue.texts == len(left)
        assert self.queue.tokens == sum(left)
        waiting = [r for r, places in self.waiting.items() if places]
        assert sorted(self.queue) == waiting
        assert self.queue.oldest == (waiting[0] if waiting else None)

    def teardown(self) -> None:
        while batch := self.queue.take(50):
            for request, place in batch:
                assert self.waiting[request].pop(0) == place
        assert not any(self.waiting.values()), "every text left"
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
    """A batch ends only where the next text in turn does not fit, or nothing is left."""
    queue: FairQueue[int] = FairQueue(quantum)
    costs = dict(enumerate(requests))
    for request, its_costs in costs.items():
        queue.push(request, list(its_costs))
    longest = max(map(max, requests))
    while queue.texts:
        spent = sum(costs[request][place] for request, place in queue.take(budget))
        assert not queue.texts or spent > budget - longest


def test_a_text_longer_than_the_budget_is_taken_alone() -> None:
    """It is neither refused nor mixed, wherever it stands."""
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
    """One text pushed behind two thousand leaves with the very next batch."""
    queue: FairQueue[str] = FairQueue(256)
    queue.push("big", [16] * 2048)
    for n in range(15):
        queue.take(1024)
        queue.push(f"small {n}", [cost])
        batch = queue.take(1024)
        assert (f"small {n}", 0) in batch
        assert any(request == "big" for request, _ in batch), "the big one goes on"


def test_a_crowd_of_newcomers_does_not_starve_a_big_request() -> None:
    """However many small requests keep coming, a big one ends."""
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
    crowd=st.integers(min_value=2, max_value=40),
)
def test_an_endless_crowd_starves_nobody(
    texts: list[int], quantum: int, budget: int, crowd: int
) -> None:
    """While more come than can be served, each request is done when all have had as much as it."""
    queue: FairQueue[int] = FairQueue(quantum)
    arrived: dict[int, int] = {}
    served = 0
    number = 0
    while served < 60 * budget:
        while len(arrived) < crowd:
            number += 1
            queue.push(number, [16] * texts[number % len(texts)])
            arrived[number] = served
        batch = queue.take(budget)
        served += 16 * len(batch)
        for request in {request for request, _ in batch}.difference(queue):
            waited = served - arrived.pop(request)
            tokens = 16 * texts[request % len(texts)]
            assert waited <= crowd * (tokens + quantum + 16) + budget


@given(
    costs=st.lists(st.integers(min_value=1, max_value=50), min_size=2, max_size=4),
    quantum=st.integers(min_value=50, max_value=300),
    budget=st.integers(min_value=300, max_value=1500),
)
def test_big_requests_get_equal_shares(costs: list[int], quantum: int, budget: int) -> None:
    """While several big requests wait, their shares in tokens differ by little over one turn."""
    queue: FairQueue[int] = FairQueue(quantum)
    for request, cost in enumerate(costs):
        queue.push(request, [cost] * 3000)
    shares: Counter[int] = Counter()
    for _ in range(1, 3000 // budget + 2):
        for request, _ in queue.take(budget):
            shares[request] += costs[request]
        served = [shares[request] for request in range(len(costs))]
        # a turn is a quantum, and what is left of one (less than a text) is carried over
        assert max(served) - min(served) <= quantum + max(costs)


def test_an_interactive_text_is_not_mixed_into_a_bulk_batch() -> None:
    """It leaves with the very next batch, alone: it waits for no forward but the present one."""
    queue: FairQueue[str] = FairQueue(256)
    queue.push("big", [16] * 2048, Priority.BULK)
    for n in range(10):
        assert {request for request, _ in queue.take(1024)} == {"big"}
        queue.charge(0.1)
        queue.push(f"small {n}", [16])
        assert queue.take(1024) == [(f"small {n}", 0)]
        queue.charge(0.004)


@pytest.mark.parametrize("cost", [0.001, 0.01, 0.1])
def test_classes_share_the_time_by_weight(cost: float) -> None:
    """While both wait, each gets its weight of the engine's seconds, whatever a batch takes."""
    queue: FairQueue[Priority] = FairQueue(64)
    seconds = {Priority.INTERACTIVE: cost, Priority.BULK: 0.05}
    spent: Counter[Priority] = Counter()
    for priority in [*Priority, *Priority]:
        queue.push(priority, [16] * 4, priority)
    while sum(spent.values()) < 50:
        for priority in {request for request, _ in queue.take(64)}:
            spent[priority] += seconds[priority]
            queue.charge(seconds[priority])
            queue.push(priority, [16] * 4, priority)
    shares = {priority: spent[priority] / sum(spent.values()) for priority in Priority}
    whole = sum(WEIGHTS.values())
    assert shares == pytest.approx({p: WEIGHTS[p] / whole for p in Priority}, abs=0.02)


def test_an_absent_class_saves_little_up() -> None:
    """After hours of bulk alone, interactive work gets a second and then its share."""
    queue: FairQueue[Priority] = FairQueue(64)
    queue.push(Priority.BULK, [64] * 40, Priority.BULK)
    queue.take(64)
    queue.charge(10_000)
    queue.push(Priority.INTERACTIVE, [64] * 40, Priority.INTERACTIVE)
    served = []
    for _ in range(30):
        served.append(queue.take(64)[0][0])
        queue.charge(0.1)
    assert set(served[:10]) == {Priority.INTERACTIVE}
    assert Counter(served[10:]) == {Priority.INTERACTIVE: 16, Priority.BULK: 4}


def test_short_visits_are_not_paid_for() -> None:
    """Interactive texts that come one by one leave at once, as long as they take little."""
    queue: FairQueue[Priority] = FairQueue(64)
    queue.push(Priority.BULK, [64] * 400, Priority.BULK)
    for _ in range(100):
        queue.push(Priority.INTERACTIVE, [16], Priority.INTERACTIVE)
        assert queue.take(64) == [(Priority.INTERACTIVE, 0)]
        queue.charge(0.004)
        assert queue.take(64)[0][0] == Priority.BULK
        queue.charge(0.05)


def test_dropping_counts_what_still_waits() -> None:
    """Texts that were taken are not counted, those that wait are, and others stay."""
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
    """Nothing waits, nothing is taken."""
    queue: FairQueue[str] = FairQueue(20)
    assert queue.take(100) == []
    assert queue.drop(lambda _: True) == []
    assert (queue.texts, queue.tokens) == (0, 0)
