"""BM25: what words alone find."""

from __future__ import annotations

from collections.abc import Iterator

import bm25s
import numpy as np
from numpy.typing import NDArray

from taskvec.evaluation.data import RetrievalData


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
