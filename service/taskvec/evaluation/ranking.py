"""Retrieval measures that do not depend on how ties are broken.

Short binary vectors give many documents the same score, and any fixed order among them, such as the
file's, would favour some. So a measure is its mean over all orders of the tied documents (McSherry
and Najork, Computing Information Retrieval Performance Measures Efficiently in the Presence of Tied
Scores, ECIR 2008). As both measures are sums over relevant documents, it is enough to know of each
how many documents are above it and how many are level with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


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
