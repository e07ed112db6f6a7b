"""nDCG and recall: by hand, against scikit-learn, and against every order of what is tied."""

from __future__ import annotations

import math
from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from taskvec.evaluation.metrics import ndcg, place, recall


def dcg(grades: list[int]) -> float:
    return sum(grade / math.log2(rank + 2) for rank, grade in enumerate(grades))


def mean_over_orders(scores: list[int], grades: list[int], k: int) -> tuple[float, float]:
    """Mean nDCG and recall by plain loops, over each order that the scores allow."""
    orders = [
        order
        for order in permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in pairwise(order))
    ]
    best = dcg(sorted(grades, reverse=True)[:k])
    relevant = sum(grade > 0 for grade in grades)
    gains, found = 0.0, 0.0
    for order in orders:
        first = [grades[document] for document in order[:k]]
        gains += dcg(first) / best
        found += sum(grade > 0 for grade in first) / relevant
    return gains / len(orders), found / len(orders)


def test_ndcg_by_hand() -> None:
    """Grades 3 2 3 0 1 2 in this order: Wikipedia's example, DCG 6.861, ideal 7.141."""
    grades = [3, 2, 3, 0, 1, 2]
    placed = place(np.array([6.0, 5, 4, 3, 2, 1]), dict(enumerate(grades)))
    assert ndcg(placed, 6) == pytest.approx(6.861 / 7.141, abs=1e-3)


def test_recall_by_hand() -> None:
    """Two of three relevant documents among the first two of four."""
    placed = place(np.array([4.0, 3, 2, 1]), {0: 1, 1: 2, 3: 1})
    assert recall(placed, 2) == pytest.approx(2 / 3)
    assert recall(placed, 100) == 1


@given(
    ranked=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=6),
    k=st.integers(1, 7),
)
def test_ties_count_as_the_mean_over_all_orders(ranked: list[tuple[int, int]], k: int) -> None:
    """Tied documents share the mean of what every order of them would give."""
    scores, grades = [score for score, _ in ranked], [grade for _, grade in ranked]
    if not any(grades):
        return
    placed = place(np.array(scores, dtype=np.float32), dict(enumerate(grades)))
    gain, found = mean_over_orders(scores, grades, k)
    assert ndcg(placed, k) == pytest.approx(gain)
    assert recall(placed, k) == pytest.approx(found)


@pytest.mark.parametrize("distinct", [5, 1000], ids=["many ties", "few ties"])
def test_ndcg_is_scikit_learn_s(distinct: int) -> None:
    """scikit-learn, which averages over ties too, gives the same for a hundred documents."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores = rng.integers(0, distinct, 100).astype(np.float32)
        grades = np.where(rng.random(100) < 0.1, rng.integers(1, 4, 100), 0)
        grades[0] = 1
        placed = place(scores, dict(enumerate(grades.tolist())))
        assert ndcg(placed, 10) == pytest.approx(ndcg_score([grades], [scores], k=10))


def test_the_order_of_documents_is_nothing() -> None:
    """A model that scores everything alike gets what chance gives, wherever the answers lie."""
    first = place(np.zeros(1000), {0: 1})
    assert recall(first, 10) == pytest.approx(0.01)
    assert ndcg(first, 10) == ndcg(place(np.zeros(1000), {999: 1}), 10)


def test_the_query_itself_is_no_answer() -> None:
    """A document with the query's own id does not stand above the answers, unless it is one."""
    scores = np.array([0.5, 1.0, 0.7])
    assert ndcg(place(scores, {2: 1}, twin=1), 10) == 1
    assert ndcg(place(scores, {0: 1, 2: 0}, twin=1), 10) == pytest.approx(1 / math.log2(3))
    assert ndcg(place(scores, {1: 1}, twin=1), 10) == 1
    assert ndcg(place(scores, {2: 1}), 10) == pytest.approx(1 / math.log2(3))
