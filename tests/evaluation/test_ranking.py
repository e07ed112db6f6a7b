"""nDCG and recall: by hand, against scikit-learn, and against every order of tied documents."""

from __future__ import annotations

import math
from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from taskvec.evaluation.metrics import ndcg, rank_relevant, recall


def dcg(grades: list[int]) -> float:
    return sum(grade / math.log2(rank + 2) for rank, grade in enumerate(grades))


def mean_over_orders(scores: list[int], grades: list[int], k: int) -> tuple[float, float]:
    """Return mean nDCG and recall over every order that the scores allow, with plain loops."""
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
    """Wikipedia's example: grades 3 2 3 0 1 2 in this order, DCG 6.861, ideal 7.141."""
    grades = [3, 2, 3, 0, 1, 2]
    ranked = rank_relevant(np.array([6.0, 5, 4, 3, 2, 1]), dict(enumerate(grades)))
    assert ndcg(ranked, 6) == pytest.approx(6.861 / 7.141, abs=1e-3)


def test_recall_by_hand() -> None:
    """Two of three relevant documents are among the first two of four."""
    ranked = rank_relevant(np.array([4.0, 3, 2, 1]), {0: 1, 1: 2, 3: 1})
    assert recall(ranked, 2) == pytest.approx(2 / 3)
    assert recall(ranked, 100) == 1


@given(
    documents=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=6),
    k=st.integers(1, 7),
)
def test_ties_count_as_the_mean_over_all_orders(documents: list[tuple[int, int]], k: int) -> None:
    """Tied documents count as the mean over every order of them."""
    scores, grades = [score for score, _ in documents], [grade for _, grade in documents]
    if not any(grades):
        return
    ranked = rank_relevant(np.array(scores, dtype=np.float32), dict(enumerate(grades)))
    gain, found = mean_over_orders(scores, grades, k)
    assert ndcg(ranked, k) == pytest.approx(gain)
    assert recall(ranked, k) == pytest.approx(found)


@pytest.mark.parametrize("distinct", [5, 1000], ids=["many ties", "few ties"])
def test_ndcg_is_scikit_learn_s(distinct: int) -> None:
    """scikit-learn, which averages over ties as well, gives the same for a hundred documents."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores = rng.integers(0, distinct, 100).astype(np.float32)
        grades = np.where(rng.random(100) < 0.1, rng.integers(1, 4, 100), 0)
        grades[0] = 1
        ranked = rank_relevant(scores, dict(enumerate(grades.tolist())))
        assert ndcg(ranked, 10) == pytest.approx(ndcg_score([grades], [scores], k=10))


def test_the_order_of_documents_does_not_matter() -> None:
    """A constant score gets the chance level, whatever the positions of the relevant documents."""
    first = rank_relevant(np.zeros(1000), {0: 1})
    assert recall(first, 10) == pytest.approx(0.01)
    assert ndcg(first, 10) == ndcg(rank_relevant(np.zeros(1000), {999: 1}), 10)


def test_the_document_of_the_query_is_left_out() -> None:
    """A document with the query's own id is not ranked, unless it has a grade."""
    scores = np.array([0.5, 1.0, 0.7])
    assert ndcg(rank_relevant(scores, {2: 1}, identical=1), 10) == 1
    assert ndcg(rank_relevant(scores, {0: 1, 2: 0}, identical=1), 10) == pytest.approx(
        1 / math.log2(3)
    )
    assert ndcg(rank_relevant(scores, {1: 1}, identical=1), 10) == 1
    assert ndcg(rank_relevant(scores, {2: 1}), 10) == pytest.approx(1 / math.log2(3))
