"""Quality metrics on vectors with a known result."""

from __future__ import annotations

import numpy as np
import pytest

from taskvec.evaluation.data import LabelledTexts, RetrievalData
from taskvec.evaluation.metrics import (
    MAX_SCORES,
    bm25_scores,
    classification_score,
    clustering_score,
    dot_products,
    retrieval_score,
    sts_score,
)

RNG = np.random.default_rng(0)


def mean_ranks(values: list[float]) -> list[float]:
    """Return ranks from 0, ties at their mean, computed with plain loops."""
    return [
        sum(other < value for other in values) + (values.count(value) - 1) / 2 for value in values
    ]


def spearman(left: list[float], right: list[float]) -> float:
    """Return Pearson's correlation of mean ranks, computed with plain loops."""
    a, b = mean_ranks(left), mean_ranks(right)
    a = [value - sum(a) / len(a) for value in a]
    b = [value - sum(b) / len(b) for value in b]
    product = sum(x * y for x, y in zip(a, b, strict=True))
    return product / (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5


def test_spearman_is_the_correlation_of_ranks() -> None:
    """Spearman is Pearson's correlation of ranks, with ties at their mean rank."""
    left = RNG.integers(-2, 3, (50, 4)).astype(np.float32)
    right = RNG.integers(-2, 3, (50, 4)).astype(np.float32)
    grades = RNG.integers(0, 6, 50).astype(float).tolist()
    products = [
        float(sum(x * y for x, y in zip(a, b, strict=True)))
        for a, b in zip(left.tolist(), right.tolist(), strict=True)
    ]
    score = sts_score(left, right, grades)
    assert score.measures == {"spearman": pytest.approx(spearman(products, grades))}
    assert 0.1 < score.error < 0.2


def test_spearman_of_a_known_example() -> None:
    """Wikipedia's example, IQ and hours of television, gives -29/165."""
    iq = [106, 100, 86, 101, 99, 103, 97, 113, 112, 110]
    hours = [7, 27, 2, 50, 28, 29, 20, 12, 6, 17]
    left = np.array(iq, dtype=np.float32)[:, None]
    score = sts_score(left, np.ones_like(left), hours)
    assert score.value == pytest.approx(-29 / 165)


def test_constant_similarity_scores_0() -> None:
    """A model with one vector for all texts scores 0."""
    rows = np.ones((5, 2), dtype=np.float32)
    assert sts_score(rows, rows, [1, 2, 3, 4, 5]).value == 0


def groups(spread: float) -> tuple[np.ndarray, list[str]]:
    """Return sixty rows around three centres, and their labels."""
    centres = np.eye(3, 8, dtype=np.float32)
    rows = np.repeat(centres, 20, axis=0) + spread * RNG.normal(size=(60, 8))
    return rows.astype(np.float32), [label for label in "abc" for _ in range(20)]


def test_separate_groups_are_classified() -> None:
    """Well separated groups are classified without a mistake, whatever the scale of the rows."""
    rows, labels = groups(spread=0.1)
    score = classification_score(rows[::2], labels[::2], 100 * rows[1::2], labels[1::2])
    assert score.measures == {"accuracy": 1.0, "f1": 1.0}
    assert score.error == 0


def test_an_unseen_label_is_a_mistake() -> None:
    """Texts with an unseen label count as mistakes, and the others are still right."""
    rows, labels = groups(spread=0.1)
    score = classification_score(rows[:40], labels[:40], rows[10:50], labels[10:50])
    assert score.value == 30 / 40


def test_noise_is_classified_by_chance() -> None:
    """Labels that are independent of the rows are predicted at chance level."""
    rows = RNG.normal(size=(600, 8)).astype(np.float32)
    labels = [str(label) for label in RNG.integers(0, 3, 600)]
    score = classification_score(rows[:300], labels[:300], rows[300:], labels[300:])
    assert 0.2 < score.value < 0.46
    assert score.error == pytest.approx((score.value * (1 - score.value) / 300) ** 0.5)


def test_clusters_are_the_groups() -> None:
    """Separate groups are found; noise is not."""
    rows, labels = groups(spread=0.01)
    score = clustering_score(rows, LabelledTexts(labels, labels), seed=0)
    assert score.value > 0.8  # a start may still put two centres into one group
    noise = RNG.normal(size=(60, 8)).astype(np.float32)
    assert clustering_score(noise, LabelledTexts(labels, labels), seed=0).value < 0.3


def test_clusterings_repeat_by_seed() -> None:
    """The same seed gives the same score, another seed another."""
    rows, labels = groups(spread=0.6)
    first, again, other = (
        clustering_score(rows, LabelledTexts(labels, labels), seed) for seed in (1, 1, 100)
    )
    assert first == again
    assert first != other


def test_equal_rows_have_a_v_measure_of_0() -> None:
    """Equal rows have a V-measure of 0, and cause no warning."""
    labels = ["a", "b", "a"]
    rows = np.ones((3, 2), dtype=np.float32)
    assert clustering_score(rows, LabelledTexts(labels, labels), seed=0).value == 0


def test_chunked_products_are_those_of_the_whole() -> None:
    """Chunks give the rows of the whole product, in order."""
    documents = RNG.integers(-3, 4, (MAX_SCORES // 2, 2)).astype(np.float32)
    queries = RNG.integers(-3, 4, (5, 2)).astype(np.float32)
    rows = list(dot_products(queries, documents))
    assert len(rows) == 5
    for query, row in zip(queries, rows, strict=True):
        assert (row == documents @ query).all()


SEARCH = RetrievalData(
    name="search",
    documents=["The cat sat on a mat.", "Dogs bark at cats.", "A ship sails the sea.", "."],
    queries=["ship at sea", "cat", "xylophone"],
    qrels=[{2: 1}, {0: 2, 1: 0}, {3: 1}],
    identical_ids=[None, None, None],
)


def test_retrieval_score_is_the_mean_over_queries() -> None:
    """NDCG and recall are means over queries: two find their document first, one second."""
    scores = [np.array([0.0, 0, 1, 0]), np.array([1.0, 0, 0, 0]), np.array([1.0, 0, 0, 0.5])]
    score = retrieval_score(iter(scores), SEARCH)
    gains = [1, 1, 1 / np.log2(3)]
    assert score.measures["ndcg@10"] == pytest.approx(np.mean(gains))
    assert score.measures["recall@10"] == 1
    assert score.error == pytest.approx(np.std(gains) / 3**0.5)


def test_bm25_finds_words() -> None:
    """Documents with the query's words rank first; unknown words score 0."""
    ship, cat, nothing = bm25_scores(SEARCH)
    assert ship.argmax() == 2
    assert cat.argmax() == 0
    assert not nothing.any()
