"""Grouped attention compared with softmax(q k / sqrt(d)) v, computed per token in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from conftest import examples
from taskvec.checkpoint.backbone import Backbone
from taskvec.engines.packed.attention import MIN_FUSED_TOKENS, GroupedAttention
from taskvec.engines.packed.packing import Packing, pack

DIFFERENCE = 2e-5
Heads = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """Random queries, keys and values for a packed batch."""

    packing: Packing
    backbone: Backbone
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @property
    def attention(self) -> GroupedAttention:
        return GroupedAttention(self.packing, self.backbone, torch.float32, lambda: None)


def backbone(heads: int, kv_heads: int, head_dim: int, *, causal: bool) -> Backbone:
    """Return a backbone for attention, which does not read the other numbers."""
    return Backbone(
        architecture="qwen3" if causal else "eurobert",
        vocabulary=10,
        hidden=heads * head_dim,
        layers=1,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=8,
        norm_eps=1e-6,
        rope_theta=1e4,
        max_positions=4096,
        causal=causal,
        qk_norm=causal,
    )


def random_case(
    lengths: Sequence[int], shape: Backbone, *, adapters: int = 1, round_up: bool = True
) -> Case:
    ids = [np.zeros(length, np.int32) for length in lengths]
    names = [f"adapter {i % adapters}" for i in range(len(lengths))]
    packing = pack(ids, names, block_rows=256, round_up=round_up)
    random = torch.Generator().manual_seed(sum(lengths))
    rows = len(packing.ids)
    q, k, v = (
        torch.randn(rows, heads, shape.head_dim, generator=random)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    return Case(packing, shape, 2 * q, k, v)


def attended(query: Heads, keys: Heads, values: Heads) -> Heads:
    """Compute the attention of one token: query [heads, d], keys and values [n, kv_heads, d]."""
    heads, head_dim = query.shape
    shared = heads // keys.shape[1]
    mixed = np.zeros((heads, head_dim))
    for head in range(heads):
        own = keys[:, head // shared], values[:, head // shared]
        scores = own[0] @ query[head] / math.sqrt(head_dim)
        weights = np.exp(scores - scores.max())
        mixed[head] = (weights / weights.sum()) @ own[1]
    return mixed.reshape(-1)


def double(case: Case) -> tuple[Heads, Heads, Heads]:
    return case.q.double().numpy(), case.k.double().numpy(), case.v.double().numpy()


def max_error_of_attend(case: Case, *, sample: int = 40) -> float:
    """Return the largest error of ``attend``, for the first, last and some tokens of each text."""
    got = case.attention.attend(case.q, case.k, case.v).numpy()
    assert got.shape == (len(case.packing.ids), case.backbone.heads * case.backbone.head_dim)
    q, k, v = double(case)
    random = np.random.default_rng(0)
    worst = 0.0
    for start, length in zip(case.packing.starts, case.packing.lengths, strict=True):
        chosen = random.permutation(length)[:sample]
        for within in {0, length - 1, *chosen}:
            end = start + (within + 1 if case.backbone.causal else length)
            truth = attended(q[start + within], k[start:end], v[start:end])
            worst = max(worst, float(np.abs(got[start + within] - truth).max()))
    return worst


def max_error_of_attend_last(case: Case) -> float:
    """Return the largest error of ``attend_last``."""
    packing = case.packing
    last = torch.from_numpy(packing.last)
    got = case.attention.attend_last(case.q.index_select(0, last), case.k, case.v).numpy()
    assert got.shape == (len(packing.last), case.backbone.heads * case.backbone.head_dim)
    q, k, v = double(case)
    worst = 0.0
    for start, length, slot in zip(packing.starts, packing.lengths, packing.slots, strict=True):
        rows = slice(start, start + length)
        truth = attended(q[packing.last[slot]], k[rows], v[rows])
        worst = max(worst, float(np.abs(got[slot] - truth).max()))
    return worst


SHAPES = [(4, 2, 16), (4, 4, 8), (6, 1, 8), (1, 1, 32)]
MIXED = [1, 2, 7, 8, 9, 31, 63, 64, 65, 100, 128, 129, 200, 319, 320, 321, 500, 700]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
def test_all_lengths_at_once(heads: int, kv_heads: int, head_dim: int, causal: bool) -> None:
    """Short, padded and long texts of one batch attend only to themselves."""
    case = random_case(MIXED, backbone(heads, kv_heads, head_dim, causal=causal), adapters=3)
    assert max_error_of_attend(case) <= DIFFERENCE
    assert max_error_of_attend_last(case) <= DIFFERENCE


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@settings(max_examples=examples(40))
@given(
    lengths=st.lists(
        st.integers(min_value=1, max_value=90)
        | st.integers(min_value=MIN_FUSED_TOKENS - 3, max_value=MIN_FUSED_TOKENS + 3)
        | st.integers(min_value=1, max_value=700),
        min_size=1,
        max_size=20,
    ),
    round_up=st.booleans(),
    adapters=st.integers(min_value=1, max_value=4),
)
def test_any_batch(causal: bool, lengths: list[int], round_up: bool, adapters: int) -> None:
    """Attention is correct for any lengths, with and without padding rows."""
    shape = backbone(4, 2, 8, causal=causal)
    case = random_case(lengths, shape, adapters=adapters, round_up=round_up)
    assert max_error_of_attend(case, sample=3) <= DIFFERENCE
    assert max_error_of_attend_last(case) <= DIFFERENCE


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize("lengths", [[12] * 300, [1] * 70, [300] * 30, list(range(40, 61)) * 4])
def test_full_groups(lengths: list[int], causal: bool) -> None:
    """Attention is correct for many texts of equal or similar length, in several groups."""
    case = random_case(lengths, backbone(4, 2, 8, causal=causal))
    assert max_error_of_attend(case, sample=2) <= DIFFERENCE
    assert max_error_of_attend_last(case) <= DIFFERENCE


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
def test_padding_rows_do_not_change_texts(causal: bool) -> None:
    """Infinities in padding rows do not change the attention of texts."""
    case = random_case([3, 5, 70, 321], backbone(4, 2, 8, causal=causal), adapters=4)
    packing = case.packing
    padding = torch.ones(len(packing.ids), dtype=torch.bool)
    for start, length in zip(packing.starts, packing.lengths, strict=True):
        padding[start : start + length] = False
    assert padding.any()
    for rows in (case.q, case.k, case.v):
        rows[padding] = math.inf
    assert max_error_of_attend(case) <= DIFFERENCE
    assert max_error_of_attend_last(case) <= DIFFERENCE


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
def test_large_scores_stay_finite(causal: bool) -> None:
    """Scores of several hundred do not overflow."""
    case = random_case([9, 40, 330], backbone(4, 2, 8, causal=causal))
    case.q.mul_(100)
    got = case.attention.attend(case.q, case.k, case.v)
    assert torch.isfinite(got).all()
    assert max_error_of_attend(case) <= 1e-3
