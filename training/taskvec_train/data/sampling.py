"""Deterministic samples of a corpus, with records from all of its files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from taskvec_train.data.records import Labelled, Pair, Scored

Record = TypeVar("Record", str, Pair, Scored, Labelled)

POWER = 0.75
"""A file of n records has the weight ``n ** POWER``, so that large files do not dominate."""


def sample(files: Sequence[Sequence[Record]], max_records: int) -> list[Record]:
    """Return at most ``max_records`` records, in their order.

    Records are chosen by a hash of their text (for pairs, of the positive). So pairs and texts of
    one corpus are mostly sampled together, and a smaller sample is a subset of a larger one.

    Args:
        files: the records of each file.
        max_records: number of records in total; rounding may give slightly fewer.
    """
    sizes = np.array([len(records) for records in files], dtype=np.float64)
    taken = _shares(sizes, max_records)
    return [
        record for records, n in zip(files, taken, strict=True) for record in _first(records, n)
    ]


def _shares(sizes: np.ndarray[tuple[int], np.dtype[np.float64]], max_records: int) -> list[int]:
    """Return the number of records of each file, by its weight; the excess goes to other files."""
    taken = np.zeros_like(sizes)
    while (left := max_records - taken.sum()) >= 1 and (taken < sizes).any():
        weights = np.where(taken < sizes, sizes**POWER, 0.0)
        taken = np.minimum(sizes, taken + left * weights / weights.sum())
    return [int(count) for count in taken]


def _first(records: Sequence[Record], count: int) -> list[Record]:
    """Return the ``count`` records with the smallest hashes, in their order."""
    hashes = [hashlib.blake2b(_text(record).encode(), digest_size=8).digest() for record in records]
    chosen = sorted(range(len(records)), key=hashes.__getitem__)[:count]
    return [records[i] for i in sorted(chosen)]


def _text(record: str | Pair | Scored | Labelled) -> str:
    match record:
        case str():
            return record
        case Pair():
            return record.positive
        case Scored():
            return record.a
        case Labelled():
            return record.text
