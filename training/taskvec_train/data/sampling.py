"""A sample of a corpus: fewer records, of all its files, the same ones each time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from taskvec_train.data.records import Labelled, Pair, Scored

Record = TypeVar("Record", str, Pair, Scored, Labelled)

POWER = 0.75
"""A file of n records is drawn from as if it had ``n ** POWER``: large files crowd out no other."""


def sample(files: Sequence[Sequence[Record]], most: int) -> list[Record]:
    """At most about ``most`` records, in their order.

    Which ones is decided by a hash of their text (of pairs the positive), so pairs and texts of
    one corpus are mostly sampled together, and a smaller sample is a part of a larger one.

    Args:
        files: the records of each file.
        most: of all of them.
    """
    sizes = np.array([len(records) for records in files], dtype=np.float64)
    taken = _shares(sizes, most)
    return [
        record for records, n in zip(files, taken, strict=True) for record in _first(records, n)
    ]


def _shares(sizes: np.ndarray[tuple[int], np.dtype[np.float64]], most: int) -> list[int]:
    """How many of each file: by ``size ** POWER``, what is more than a file has going to others."""
    taken = np.zeros_like(sizes)
    while (left := most - taken.sum()) >= 1 and (taken < sizes).any():
        weights = np.where(taken < sizes, sizes**POWER, 0.0)
        taken = np.minimum(sizes, taken + left * weights / weights.sum())
    return [int(count) for count in taken]


def _first(records: Sequence[Record], count: int) -> list[Record]:
    """So many records with the smallest hashes."""
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
