"""Pack the texts of a batch into one matrix, and shard a batch over processor threads.

``pack`` concatenates all texts, sorted by adapter, to one [tokens, hidden] matrix without padding
within texts. On a CPU, oneDNN compiles a kernel for every new matrix shape, which takes about a
millisecond: more than the multiplication. Row counts are therefore rounded up to a few values there
with padding rows. The results of padding rows are never read.

``shard`` divides a batch into parts of equal work that separate threads compute.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from taskvec.checkpoint.backbone import Backbone
from taskvec.engines.base import TokenIds

Rows = NDArray[np.int64]

ROW_COUNTS: list[int] = [
    1,
    2,
    4,
    8,
    *range(16, 128, 16),
    *range(128, 1024, 64),
    *range(1024, 8193, 256),
]
"""Row counts for which a kernel is compiled. Steps grow with the count, so that the counts are few
and padding is a small share of the rows: 8 % on average from 128 to 1,024 rows."""

MIN_SHARD_MULTIPLY_ADDS = 1 << 29
"""Multiply-adds per shard: smaller shards finish within milliseconds and do not need a thread."""

MAX_SHARDS = 4
"""Maximum number of shards: each is driven by Python code, which runs one thread at a time."""

MAX_SHARD_RATIO = 1.5
"""Maximum work of the largest shard, relative to an equal share. If it is exceeded, for example by
one long text, the batch stays whole and every thread works on each operation."""


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive rows with the same adapter."""

    adapter: str | None
    rows: slice


@dataclass(frozen=True, slots=True, eq=False)
class Packing:
    """A packed batch: one row per token, and one slot per text for the last layer.

    Rows and slots have the same order of texts, and both may contain padding.

    Attributes:
        order: int64 [texts], index in the batch of each text in packed order.
        lengths: int64 [texts], tokens of each text in packed order.
        starts: int64 [texts], row of the first token of each text.
        slots: int64 [texts], slot of each text.
        ids: int32 [rows], token ids; 0 for padding.
        positions: int64 [rows], position of each token in its text; 0 for padding.
        last: int64 [slots], row of the last token of each text; 0 for padding.
        blocks: consecutive blocks that cover all rows.
        slot_blocks: consecutive blocks that cover all slots.
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
    ids: Sequence[TokenIds], adapters: Sequence[str | None], *, block_rows: int, round_up: bool
) -> Packing:
    """Pack a batch.

    Args:
        ids: int32 token ids [length] of each text.
        adapters: the adapter of each text.
        block_rows: maximum rows of a block, before rounding up.
        round_up: True to round the row count of each block up to one of ``ROW_COUNTS``.
    """
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    names = sorted(set(adapters), key=lambda name: name or "")
    numbers = {name: i for i, name in enumerate(names)}
    adapter_numbers = np.fromiter(map(numbers.__getitem__, adapters), np.int64, len(ids))
    order = np.lexsort((-lengths, adapter_numbers))
    lengths = lengths[order]
    runs = list(zip(names, np.bincount(adapter_numbers).tolist(), strict=True))
    starts, blocks, rows = _assign_rows(runs, lengths, block_rows, round_up=round_up)
    slots, slot_blocks, slot_count = _assign_rows(
        runs, np.ones_like(lengths), block_rows, round_up=round_up
    )
    packed_ids = np.zeros(rows, dtype=np.int32)
    positions = np.zeros(rows, dtype=np.int64)
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    token_rows = np.repeat(starts, lengths) + within
    packed_ids[token_rows] = np.concatenate([ids[i] for i in order.tolist()])
    positions[token_rows] = within
    last = np.zeros(slot_count, dtype=np.int64)
    last[slots] = starts + lengths - 1
    return Packing(
        order=order,
        lengths=lengths,
        starts=starts,
        slots=slots,
        ids=packed_ids,
        positions=positions,
        last=last,
        blocks=blocks,
        slot_blocks=slot_blocks,
    )


def round_up_rows(count: int) -> int:
    """Return the smallest of ``ROW_COUNTS`` that is at least ``count``; larger counts unchanged."""
    if count > ROW_COUNTS[-1]:
        return count
    return ROW_COUNTS[bisect_left(ROW_COUNTS, count)]


class Shards(NamedTuple):
    """The shards of a batch.

    Attributes:
        shards: the texts of each shard, as indices into the batch; a text is in one shard.
        threads: processor threads for each shard.
    """

    shards: Sequence[Sequence[int]]
    threads: int


def shard(
    ids: Sequence[TokenIds], adapters: Sequence[str | None], backbone: Backbone, threads: int
) -> Shards:
    """Divide a batch into shards of equal work, in the order of adapter and length.

    Args:
        ids: token ids [length] of each text; at least one text.
        adapters: the adapter of each text.
        backbone: determines the work per token.
        threads: processor threads to use, at least 1.
    """
    all_texts = range(len(ids))
    lengths = np.array([len(text) for text in ids], dtype=np.int64)
    attention = backbone.layers * backbone.heads * backbone.head_dim
    work = lengths * (backbone.linear_parameters + attention * lengths)
    total = int(work.sum())
    if total <= MIN_SHARD_MULTIPLY_ADDS:
        return Shards([all_texts], 1)
    count = min(threads, MAX_SHARDS, -(-total // MIN_SHARD_MULTIPLY_ADDS))
    order = sorted(all_texts, key=lambda i: (adapters[i] or "", -len(ids[i])))
    midpoints = np.cumsum(work[order]) - work[order] / 2
    bounds = np.searchsorted(midpoints * (count / total), np.arange(count + 1)).tolist()
    shards = [order[first:last] for first, last in pairwise(bounds) if first < last]
    largest = max(int(work[texts].sum()) for texts in shards)
    if largest * count > MAX_SHARD_RATIO * total:
        return Shards([all_texts], threads)
    return Shards(shards, max(1, threads // len(shards)))


def _assign_rows(
    runs: Sequence[tuple[str | None, int]], lengths: Rows, block_rows: int, *, round_up: bool
) -> tuple[Rows, list[Block], int]:
    """Assign rows to texts.

    Args:
        runs: adapter and number of texts of each run of texts with one adapter.
        lengths: [texts], rows of each text.
        block_rows: see ``pack``.
        round_up: see ``pack``.

    Returns:
        The first row of each text, the blocks that cover all rows, and the number of rows.
    """
    starts = np.empty_like(lengths)
    blocks: list[Block] = []
    row = text = 0
    for adapter, texts in runs:
        run_lengths = lengths[text : text + texts]
        starts[text : text + texts] = row + np.cumsum(run_lengths) - run_lengths
        text += texts
        left = int(run_lengths.sum())
        while left > 0:
            used = min(left, block_rows)
            rows = round_up_rows(used) if round_up else used
            blocks.append(Block(adapter, slice(row, row + rows)))
            row += rows
            left -= used
    return starts, blocks, row
