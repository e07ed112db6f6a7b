"""Where each token of a batch lies: all texts end to end, sorted by adapter.

On a CPU, oneDNN compiles a kernel for every new matrix shape, at about a millisecond each: more
than the multiplication itself. So row counts there are rounded up to few different ones with rows
that belong to no text; nothing ever reads what is computed for them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from taskvec.checkpoint.backbone import Backbone
from taskvec.engines.base import TokenIds

Rows = NDArray[np.int64]

FEW_ROW_COUNTS: list[int] = [
    1,
    2,
    4,
    8,
    *range(16, 128, 16),
    *range(128, 1024, 64),
    *range(1024, 8193, 256),
]
"""Row counts worth a kernel of their own: at most 12 % above what is asked, from 128 rows on."""


@dataclass(frozen=True, slots=True)
class Block:
    """Neighbouring rows of one adapter."""

    adapter: str | None
    rows: slice


@dataclass(frozen=True, slots=True, eq=False)
class Packing:
    """A batch laid out in rows, and its texts in slots: one slot a text, in the order of the rows.

    Attributes:
        order: [texts] for each text in packed order, its index in the batch.
        lengths: [texts] tokens of each text, in packed order.
        starts: [texts] row of each text's first token.
        slots: [texts] slot of each text.
        ids: int32 [rows] token ids; 0 where a row belongs to no text.
        positions: [rows] place of each token in its text.
        last: [slots] row of each text's last token; 0 where a slot belongs to no text.
        blocks: cover the rows.
        slot_blocks: cover the slots.
    """

    order: Rows
    lengths: Rows
    starts: Rows
    slots: Rows
    ids: TokenIds
    positions: Rows
    last: Rows
    blocks: Sequence[Block]
    slot_blocks: Sequence[Block]


def pack(
    ids: Sequence[TokenIds], adapters: Sequence[str | None], *, block_rows: int, rounded: bool
) -> Packing:
    """Lay out a batch.

    Args:
        ids: one int32 array a text.
        adapters: the adapter of each text.
        block_rows: most rows of a block.
        rounded: True rounds row counts up to few different ones.
    """
    order = sorted(range(len(ids)), key=lambda i: (adapters[i] or "", -len(ids[i])))
    lengths = np.array([len(ids[i]) for i in order], dtype=np.int64)
    runs = [(name, len(list(run))) for name, run in groupby(adapters[i] for i in order)]
    starts, blocks, rows = _place(runs, lengths, block_rows, rounded=rounded)
    slots, slot_blocks, slot_count = _place(
        runs, np.ones_like(lengths), block_rows, rounded=rounded
    )
    flat = np.zeros(rows, dtype=np.int32)
    positions = np.zeros(rows, dtype=np.int64)
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    filled = np.repeat(starts, lengths) + within
    flat[filled] = np.concatenate([ids[i] for i in order])
    positions[filled] = within
    last = np.zeros(slot_count, dtype=np.int64)
    last[slots] = starts + lengths - 1
    return Packing(
        order=np.array(order, dtype=np.int64),
        lengths=lengths,
        starts=starts,
        slots=slots,
        ids=flat,
        positions=positions,
        last=last,
        blocks=blocks,
        slot_blocks=slot_blocks,
    )


def rounded_up(count: int) -> int:
    """The least of the few row counts that holds this many rows."""
    if count > FEW_ROW_COUNTS[-1]:
        return count
    return FEW_ROW_COUNTS[bisect_left(FEW_ROW_COUNTS, count)]


def _place(
    runs: Sequence[tuple[str | None, int]], lengths: Rows, block_rows: int, *, rounded: bool
) -> tuple[Rows, list[Block], int]:
    """First row of each text, the blocks over all rows, and how many rows there are."""
    starts = np.empty_like(lengths)
    blocks: list[Block] = []
    row = text = 0
    for adapter, texts in runs:
        mine = lengths[text : text + texts]
        starts[text : text + texts] = row + np.cumsum(mine) - mine
        text += texts
        left = int(mine.sum())
        while left > 0:
            real = min(left, block_rows)
            taken = rounded_up(real) if rounded else real
            blocks.append(Block(adapter, slice(row, row + taken)))
            row += taken
            left -= real
    return starts, blocks, row


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
