"""A batch cut into parts, which threads embed side by side.

Threads that share every step of a forward wait for each other hundreds of times; where something
else wants a core, each wait is a time slice. Parts wait for each other once
(docs/adr/0011-parts.md has the figures).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from taskvec.checkpoint.backbone import Backbone
from taskvec.engines.base import TokenIds

SMALL_FORWARD = 1 << 29
"""Multiply-adds that are not worth a second thread: some milliseconds."""

MOST_PARTS = 4
"""Parts are driven in Python, where only one thread at a time can be."""

UNEVEN = 1.5
"""A part this much larger than its share, such as one long text, is no gain: all in one part then,
with every thread in each step."""


class Cut(NamedTuple):
    """How a batch is shared out.

    Attributes:
        parts: the texts of each part, as indices into the batch; each text is in one of them.
        threads: processor threads within each part.
    """

    parts: Sequence[Sequence[int]]
    threads: int


def cut(
    ids: Sequence[TokenIds], adapters: Sequence[str | None], backbone: Backbone, threads: int
) -> Cut:
    """Share a batch out among threads: like adapters and lengths stay together.

    Args:
        ids: one array a text; at least one.
        adapters: the adapter of each text.
        backbone: says what a token costs.
        threads: processor threads to use, at least 1.
    """
    everything = range(len(ids))
    lengths = np.array([len(text) for text in ids], dtype=np.int64)
    attention = backbone.layers * backbone.heads * backbone.head_dim
    work = lengths * (backbone.linear_parameters + attention * lengths)
    total = int(work.sum())
    if total <= SMALL_FORWARD:
        return Cut([everything], 1)
    count = min(threads, MOST_PARTS, -(-total // SMALL_FORWARD))
    order = sorted(everything, key=lambda i: (adapters[i] or "", -len(ids[i])))
    middles = np.cumsum(work[order]) - work[order] / 2
    bounds = np.searchsorted(middles * (count / total), np.arange(count + 1)).tolist()
    parts = [order[first:last] for first, last in pairwise(bounds) if first < last]
    largest = max(int(work[part].sum()) for part in parts)
    if largest * count > UNEVEN * total:
        return Cut([everything], threads)
    return Cut(parts, max(1, threads // len(parts)))
