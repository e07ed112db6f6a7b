"""How well vectors do what they are for: numpy in, numbers out."""

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

from taskvec.core.postprocess import MIN_NORM
from taskvec.evaluation.data import LabelledTexts, RetrievalData
from taskvec.evaluation.formats import Matrix

SCORES_AT_ONCE = 1 << 24
"""Scores that are held at a time: 64 MiB."""

CLUSTERINGS = 10
"""K-means ends in another place from another start: the mean of so many is taken."""

PROBE_C = 4.0
"""Inverse strength of the probe's penalty: of 1, 4, 16, 64 and 256, the best or near it for 200 and
2,000 texts, 32 to 256 dimensions, float and binary. With less, too little is learnt of few texts;
with more, many dimensions are learnt by heart, and seem worse than few."""


@dataclass(frozen=True, slots=True)
class Score:
    """One measurement.

    Attributes:
        measures: name -> value; the first is the one that counts.
        error: standard error of the first; over texts or queries drawn anew, and for clusterings
            over starts.
    """

    measures: dict[str, float]
    error: float

    @property
    def value(self) -> float:
        """The measure that counts."""
        return next(iter(self.measures.values()))


def rank_quality(scores: Iterable[NDArray[np.floating]], data: RetrievalData) -> Score:
    """nDCG@10, recall@10 and recall@100, means over queries.

    Args:
        scores: [documents] for each query.
        data: which documents belong to which query.
    """
    placed = [
        place(row, judged, twin)
        for row, judged, twin in zip(scores, data.judged, data.twins, strict=True)
    ]
    gains = np.array([ndcg(documents, 10) for documents in placed])
    measures = {"ndcg@10": float(gains.mean())}
    for k in (10, 100):
        measures[f"recall@{k}"] = float(np.mean([recall(documents, k) for documents in placed]))
    return Score(measures, float(gains.std() / math.sqrt(len(gains))))


def dot_products(queries: Matrix, documents: Matrix) -> Iterable[Matrix]:
    """Rows of ``queries @ documents.T``, some at a time."""
    step = max(1, SCORES_AT_ONCE // len(documents))
    for begin in range(0, len(queries), step):
        yield from queries[begin : begin + step] @ documents.T


def order_quality(left: Matrix, right: Matrix, scores: Sequence[float]) -> Score:
    """Spearman's rank correlation of dot products with human scores; ties have their mean rank.

    The error is that of Bonett and Wright (Psychometrika 65, 2000).
    """
    likeness = np.vecdot(left, right)
    # All alike has no order, and no correlation: 0.
    constant = bool((likeness == likeness[0]).all())
    value = 0.0 if constant else float(spearmanr(likeness, scores).statistic)
    error = (1 - value**2) * math.sqrt((1 + value**2 / 2) / max(len(scores) - 3, 1))
    return Score({"spearman": value}, error)


def probe_quality(
    train: Matrix, train_labels: Sequence[str], test: Matrix, test_labels: Sequence[str]
) -> Score:
    """Accuracy and macro F1, on test texts, of a logistic regression that saw the others.

    Rows are scaled to length 1, so that the regression's penalty means the same for every form.
    """
    probe = LogisticRegression(C=PROBE_C, max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # good enough, and the same every time
        guesses = probe.fit(_unit(train), train_labels).predict(_unit(test))
    accuracy = float((guesses == np.array(test_labels)).mean())
    f1 = float(f1_score(test_labels, guesses, average="macro"))
    error = math.sqrt(accuracy * (1 - accuracy) / len(test))
    return Score({"accuracy": accuracy, "f1": f1}, error)


def cluster_quality(rows: Matrix, labelled: LabelledTexts, seed: int) -> Score:
    """V-measure of k-means with as many clusters as there are labels: the mean over ten starts.

    V-measure is the harmonic mean of homogeneity and completeness (Rosenberg and Hirschberg,
    EMNLP 2007).
    """
    clusters = len(set(labelled.labels))
    values = []
    for start in range(seed, seed + CLUSTERINGS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than clusters
            found = KMeans(clusters, n_init=1, random_state=start).fit_predict(rows)
        values.append(v_measure_score(labelled.labels, found))
    error = float(np.std(values, ddof=1) / math.sqrt(len(values)))
    return Score({"v_measure": float(np.mean(values))}, error)


def _unit(rows: Matrix) -> Matrix:
    unit: Matrix = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), MIN_NORM)
    return unit


class Placed(NamedTuple):
    """Where a relevant document came out for a query.

    Attributes:
        grade: how relevant it is, above 0.
        above: documents that score higher.
        level: documents that score the same, itself included.
    """

    grade: int
    above: int
    level: int


def place(
    scores: NDArray[np.floating], judged: Mapping[int, int], twin: int | None = None
) -> list[Placed]:
    """Where the relevant documents of one query came out.

    Args:
        scores: [documents].
        judged: document -> grade.
        twin: a document that does not count unless it is judged: BEIR has queries that are
            documents, too, and leaves out those.
    """
    if twin is not None and twin not in judged:
        scores = np.delete(scores, twin)
        judged = {document - (document > twin): grade for document, grade in judged.items()}
    return [
        Placed(
            grade,
            int(np.count_nonzero(scores > scores[document])),
            int(np.count_nonzero(scores == scores[document])),
        )
        for document, grade in judged.items()
        if grade > 0
    ]


def ndcg(placed: list[Placed], k: int) -> float:
    """Normalised discounted cumulative gain of the first k, in 0..1.

    ``sum of grade / log2(rank + 1)`` over the first k ranks, over the same for the best order: the
    linear gain of trec_eval, pytrec_eval and BEIR.
    """
    discounts = 1 / np.log2(np.arange(2, k + 2))
    until = np.concatenate([[0.0], np.cumsum(discounts)])
    gain = sum(
        grade * (until[min(k, above + level)] - until[min(k, above)]) / level
        for grade, above, level in placed
    )
    best = sorted((document.grade for document in placed), reverse=True)[:k]
    return float(gain / np.dot(best, discounts[: len(best)]))


def recall(placed: list[Placed], k: int) -> float:
    """The share of the relevant documents among the first k, in 0..1."""
    found = sum((min(k, above + level) - min(k, above)) / level for _, above, level in placed)
    return found / len(placed)


def bm25_scores(data: RetrievalData) -> Iterator[NDArray[np.floating]]:
    """Scores [documents] for each query: Lucene's BM25, k1 1.5, b 0.75, English stop words."""
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
