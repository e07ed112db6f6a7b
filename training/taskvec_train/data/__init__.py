"""Training data: readers, a corpus built from packages, mining of hard negatives."""

from __future__ import annotations

from taskvec_train.data.readers import read_labelled, read_pairs, read_scored, read_texts
from taskvec_train.data.records import DataError, Labelled, Pair, Scored

__all__ = [
    "DataError",
    "Labelled",
    "Pair",
    "Scored",
    "read_labelled",
    "read_pairs",
    "read_scored",
    "read_texts",
]
