"""Quality metrics of vectors, and the BM25 baseline: numpy arrays in, scores out.

One function for each kind of data, each returning a ``Score``:

* retrieval: nDCG and recall of documents ranked by dot product, or by BM25
* sts: Spearman's correlation of dot products with human scores
* classification: accuracy and macro F1 of a logistic regression on the vectors
* clustering: V-measure of k-means

The functions know nothing of models, tasks or output types: vectors come as float32 rows that can
be compared by their dot product (see ``taskvec.evaluation.formats``).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import bm25s
import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, v_measure_score

from taskvec.core.output_format import MIN_NORM
from taskvec.evaluation.data import LabelledTexts, RetrievalData
from taskvec.evaluation.formats import Matrix

MAX_SCORES = 1 << 24
"""float32 scores of queries and documents in memory at a time: 64 MiB."""

KMEANS_RUNS = 10
"""Runs of k-means from different starts; their mean is reported, since results depend on it."""

PROBE_C = 4.0
"""Inverse regularisation strength of the logistic regression. Of 1, 4, 16, 64 and 256 it is the
best or near the best for 200 and 2,000 texts, 32 to 256 dimensions, float and binary. Lower values
underfit few texts; higher values overfit many dimensions, which then score below few."""


@dataclass(frozen=True, slots=True)
class Score:
    """One measurement.

    Attributes:
        measures: name -> value; the first is the main one.
        error: standard error of the main measure: over a new sample of texts or queries, or, for
            clustering, over the starts of k-means.
    """

    measures: dict[str, float]
    error: float

    @property
    def value(self) -> float:
        """The main measure."""
        return next(iter(self.measures.values()))


def retrieval_score(scores: Iterable[NDArray[np.floating]], data: RetrievalData) -> Score:
    """Return nDCG@10, recall@10 and recall@100, means over queries.

    Args:
        scores: [documents] for each query, higher is better.
        data: the queries and their relevant documents.
    """
    ranked = [
        rank_relevant(row, grades, identical)
        for row, grades, identical in zip(scores, data.qrels, data.identical_ids, strict=True)
    ]
    gains = np.array([ndcg(documents, 10) for documents in ranked])
    measures = {"ndcg@10": float(gains.mean())}
    for k in (10, 100):
        measures[f"recall@{k}"] = float(np.mean([recall(documents, k) for documents in ranked]))
    return Score(measures, float(gains.std() / math.sqrt(len(gains))))


def dot_products(queries: Matrix, documents: Matrix) -> Iterable[Matrix]:
    """Yield the rows of ``queries @ documents.T``, computing at most ``MAX_SCORES`` at a time."""
    step = max(1, MAX_SCORES // len(documents))
    for start in range(0, len(queries), step):
        yield from queries[start : start + step] @ documents.T


def bm25_scores(data: RetrievalData) -> Iterator[NDArray[np.floating]]:
    """Yield BM25 scores [documents] for each query: Lucene's variant, k1 1.5, b 0.75.

    English stop words are removed.
    """
    index = bm25s.BM25()
    index.index(_words(data.documents), show_progress=False)
    for words in _words(data.queries):
        known = [word for word in words if word in index.vocab_dict]
        yield index.get_scores(known) if known else np.zeros(len(data.documents), dtype=np.float32)


def _words(texts: object) -> list[list[str]]:
    words: list[list[str]] = bm25s.tokenize(
        texts, stopwords="en", return_ids=False, show_progress=False
    )
    return words


class RankedDocument(NamedTuple):
    """The rank of a relevant document for one query.

    Attributes:
        grade: its relevance, above 0.
        higher: number of documents with a higher score.
        tied: number of documents with the same score, itself included.
    """

    grade: int
    higher: int
    tied: int


def rank_relevant(
    scores: NDArray[np.floating], grades: Mapping[int, int], identical: int | None = None
) -> list[RankedDocument]:
    """Return the ranks of one query's relevant documents.

    Args:
        scores: [documents].
        grades: document -> grade; documents with a grade of 0 are not relevant.
        identical: the document with the query's own id; it is left out unless it has a grade. BEIR
            has data whose queries are documents, and leaves these out (ignore_identical_ids).
    """
    if identical is not None and identical not in grades:
        scores = np.delete(scores, identical)
        grades = {document - (document > identical): grade for document, grade in grades.items()}
    return [
        RankedDocument(
            grade,
            int(np.count_nonzero(scores > scores[document])),
            int(np.count_nonzero(scores == scores[document])),
        )
        for document, grade in grades.items()
        if grade > 0
    ]


def ndcg(ranked: list[RankedDocument], k: int) -> float:
    """Return the normalised discounted cumulative gain at k, in 0..1.

    ``sum of grade / log2(rank + 1)`` over the first k ranks, divided by the same sum for the ideal
    order: the linear gain of trec_eval, pytrec_eval and BEIR. Tied documents share the mean gain of
    their ranks.
    """
    discounts = 1 / np.log2(np.arange(2, k + 2))
    cumulated = np.concatenate([[0.0], np.cumsum(discounts)])
    gain = sum(
        grade * (cumulated[min(k, higher + tied)] - cumulated[min(k, higher)]) / tied
        for grade, higher, tied in ranked
    )
    ideal = sorted((document.grade for document in ranked), reverse=True)[:k]
    return float(gain / np.dot(ideal, discounts[: len(ideal)]))


def recall(ranked: list[RankedDocument], k: int) -> float:
    """Return the share of the relevant documents among the first k, in 0..1."""
    found = sum((min(k, higher + tied) - min(k, higher)) / tied for _, higher, tied in ranked)
    return found / len(ranked)


def sts_score(left: Matrix, right: Matrix, scores: Sequence[float]) -> Score:
    """Return Spearman's rank correlation of dot products with human scores.

    Ties get their mean rank. The standard error is that of Bonett and Wright (Psychometrika 65,
    2000).

    Args:
        left: [pairs, d], the first text of each pair.
        right: [pairs, d], the second text.
        scores: [pairs], human similarity scores in any unit.
    """
    products = np.vecdot(left, right)
    # The correlation of a constant is undefined; it counts as 0.
    constant = bool((products == products[0]).all())
    value = 0.0 if constant else float(spearmanr(products, scores).statistic)
    error = (1 - value**2) * math.sqrt((1 + value**2 / 2) / max(len(scores) - 3, 1))
    return Score({"spearman": value}, error)


def classification_score(
    train: Matrix, train_labels: Sequence[str], test: Matrix, test_labels: Sequence[str]
) -> Score:
    """Return accuracy and macro F1 of a logistic regression, trained on one part of the texts.

    Rows are scaled to length 1, so that the regularisation is the same for every output type.
    """
    probe = LogisticRegression(C=PROBE_C, max_iter=1000)
    with warnings.catch_warnings():
        # An unfinished optimisation is close enough, and deterministic.
        warnings.simplefilter("ignore", ConvergenceWarning)
        predicted = probe.fit(_unit(train), train_labels).predict(_unit(test))
    accuracy = float((predicted == np.array(test_labels)).mean())
    f1 = float(f1_score(test_labels, predicted, average="macro"))
    error = math.sqrt(accuracy * (1 - accuracy) / len(test))
    return Score({"accuracy": accuracy, "f1": f1}, error)


def _unit(rows: Matrix) -> Matrix:
    unit: Matrix = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), MIN_NORM)
    return unit


def clustering_score(rows: Matrix, labelled: LabelledTexts, seed: int) -> Score:
    """Return the V-measure of k-means, the mean over ``KMEANS_RUNS`` starts.

    V-measure is the harmonic mean of homogeneity and completeness (Rosenberg and Hirschberg,
    EMNLP 2007).

    Args:
        rows: [texts, d].
        labelled: the texts' labels; k is the number of distinct labels.
        seed: of the first start; each further start adds 1.
    """
    clusters = len(set(labelled.labels))
    values = []
    for start in range(seed, seed + KMEANS_RUNS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than clusters
            found = KMeans(clusters, n_init=1, random_state=start).fit_predict(rows)
        values.append(v_measure_score(labelled.labels, found))
    error = float(np.std(values, ddof=1) / math.sqrt(len(values)))
    return Score({"v_measure": float(np.mean(values))}, error)
