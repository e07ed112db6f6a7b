"""Packing: every token has one row, and every text one slot, in a block of its adapter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import examples
from taskvec.engines.base import TokenIds
from taskvec.engines.packed.packing import ROW_COUNTS, Block, Packing, pack, round_up_rows

NAMES = st.sampled_from([None, "retrieval", "text-matching", "clustering", "a"])
TEXTS = st.lists(st.tuples(st.integers(min_value=1, max_value=300), NAMES), min_size=1, max_size=40)
BLOCK_ROWS = st.sampled_from([1, 7, 48, 256, 1024, 1 << 16])


def numbered(lengths: Sequence[int]) -> list[TokenIds]:
    """Return texts with different ids for all tokens, starting at 1."""
    ends = np.cumsum(lengths)
    return [
        np.arange(end - length + 1, end + 1, dtype=np.int32)
        for length, end in zip(lengths, ends, strict=True)
    ]


def adapters_of(rows: int, blocks: Sequence[Block]) -> list[str | None]:
    """Return the adapter of each row; fails if blocks have gaps or overlap."""
    adapters: list[str | None] = []
    for block in blocks:
        assert block.rows.start == len(adapters)
        assert block.rows.stop > block.rows.start
        adapters += [block.adapter] * (block.rows.stop - block.rows.start)
    assert len(adapters) == rows
    return adapters


@settings(max_examples=examples(200))
@given(texts=TEXTS, block_rows=BLOCK_ROWS, round_up=st.booleans())
def test_every_token_has_one_row(
    texts: list[tuple[int, str | None]], block_rows: int, round_up: bool
) -> None:
    """The ids of each text are in consecutive rows of its adapter, with positions from 0."""
    lengths, adapters = [length for length, _ in texts], [adapter for _, adapter in texts]
    ids = numbered(lengths)
    packing = pack(ids, adapters, block_rows=block_rows, round_up=round_up)
    row_adapters = adapters_of(len(packing.ids), packing.blocks)
    slot_adapters = adapters_of(len(packing.last), packing.slot_blocks)
    assert sorted(packing.order) == list(range(len(texts)))
    taken = np.zeros(len(packing.ids), dtype=bool)
    for i, text in enumerate(packing.order):
        start, length, slot = packing.starts[i], packing.lengths[i], packing.slots[i]
        rows = slice(start, start + length)
        assert packing.ids[rows].tolist() == ids[text].tolist()
        assert packing.positions[rows].tolist() == list(range(len(ids[text])))
        assert set(row_adapters[rows]) == {adapters[text]}
        assert packing.last[slot] == start + length - 1
        assert slot_adapters[slot] == adapters[text]
        assert not taken[rows].any()
        taken[rows] = True
    assert len(set(packing.slots)) == len(texts)
    assert taken.sum() == sum(lengths)
    assert not packing.ids[~taken].any(), "padding rows have a valid id"
    assert not packing.positions[~taken].any()


@given(texts=TEXTS, block_rows=BLOCK_ROWS)
def test_texts_are_sorted_by_length(texts: list[tuple[int, str | None]], block_rows: int) -> None:
    """Texts of one adapter are sorted by decreasing length."""
    packing, adapters = packed(texts, block_rows, round_up=True)
    for before, after in zip(range(len(texts) - 1), range(1, len(texts)), strict=True):
        if adapters[packing.order[before]] == adapters[packing.order[after]]:
            assert packing.lengths[before] >= packing.lengths[after]


@given(texts=TEXTS, block_rows=BLOCK_ROWS)
def test_without_rounding_there_is_no_padding(
    texts: list[tuple[int, str | None]], block_rows: int
) -> None:
    """Without rounding, there is one row per token and one slot per text."""
    packing, _ = packed(texts, block_rows, round_up=False)
    assert len(packing.ids) == sum(length for length, _ in texts)
    assert packing.starts.tolist() == (np.cumsum(packing.lengths) - packing.lengths).tolist()
    assert packing.slots.tolist() == list(range(len(texts)))
    assert packing.last.tolist() == (np.cumsum(packing.lengths) - 1).tolist()
    for block in (*packing.blocks, *packing.slot_blocks):
        assert block.rows.stop - block.rows.start <= block_rows


@given(texts=TEXTS, block_rows=st.sampled_from([48, 256, 1024, 8192]))
def test_rounded_blocks_have_few_sizes(
    texts: list[tuple[int, str | None]], block_rows: int
) -> None:
    """Rounded blocks have the allowed row counts, and only the last of an adapter has padding."""
    packing, adapters = packed(texts, block_rows, round_up=True)
    for blocks, sizes in (
        (packing.blocks, packing.lengths),
        (packing.slot_blocks, np.ones(len(texts), int)),
    ):
        needed: dict[str | None, int] = {}
        for text, size in zip(packing.order, sizes, strict=True):
            needed[adapters[text]] = needed.get(adapters[text], 0) + int(size)
        for block in blocks:
            count = block.rows.stop - block.rows.start
            assert count in ROW_COUNTS
            assert count == round_up_rows(min(block_rows, needed[block.adapter]))
            needed[block.adapter] -= min(block_rows, needed[block.adapter])
        assert set(needed.values()) == {0}


@pytest.mark.parametrize(
    ("count", "rounded"),
    [(1, 1), (3, 4), (9, 16), (17, 32), (113, 128), (129, 192), (961, 1024), (1025, 1280)],
)
def test_rounding_up(count: int, rounded: int) -> None:
    """Counts are rounded up to the next allowed count."""
    assert round_up_rows(count) == rounded


@given(count=st.integers(min_value=1, max_value=20_000))
def test_rounding_up_is_bounded(count: int) -> None:
    """The result is at least the count and bounded; counts beyond the largest are unchanged."""
    rounded = round_up_rows(count)
    assert rounded >= count
    if count > ROW_COUNTS[-1]:
        assert rounded == count
    else:
        assert rounded in ROW_COUNTS
        assert rounded <= max(count + 63, 1.25 * count, 2 * count if count < 16 else 0)


def packed(
    texts: list[tuple[int, str | None]], block_rows: int, *, round_up: bool
) -> tuple[Packing, list[str | None]]:
    adapters = [adapter for _, adapter in texts]
    ids = numbered([length for length, _ in texts])
    return pack(ids, adapters, block_rows=block_rows, round_up=round_up), adapters
