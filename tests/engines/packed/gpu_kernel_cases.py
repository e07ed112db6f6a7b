"""The Triton kernels, run by Triton's interpreter, compared with the same in plain torch.

``test_gpu_kernels.py`` runs them in a process of its own.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import numpy as np
import pytest
import torch

from taskvec.engines.packed import gpu_operations
from taskvec.engines.packed.gpu import _last_tiles, _tiles
from taskvec.engines.packed.packing import pack

DIFFERENCE = 5e-6
LENGTHS = [1, 2, 15, 16, 17, 32, 33, 64, 65, 150]


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    """Import the kernels."""
    return importlib.import_module("taskvec.engines.packed.gpu_kernels")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [96, 128, 200])
def test_rms_norm(kernels: ModuleType, width: int) -> None:
    x, weight = random(7, width), random(width, seed=1)
    ours, theirs = torch.full((7, width), torch.nan), torch.empty(7, width)
    kernels.rms_norm(x, weight, 1e-6, ours)
    gpu_operations.rms_norm(x, weight, 1e-6, theirs)
    assert theirs.abs().max() > 1
    assert (ours - theirs).abs().max() <= DIFFERENCE


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("head_dim", [32, 48])
def test_rotate_heads_changes_only_its_heads(
    kernels: ModuleType, head_dim: int, normed: bool
) -> None:
    rows, heads, rotated = 37, 8, 5
    norms = random(rotated, head_dim, seed=1) if normed else None
    positions = torch.arange(rows, dtype=torch.int32) % 11
    cos, sin = random(11, head_dim // 2, seed=2), random(11, head_dim // 2, seed=3)
    before = random(rows, heads, head_dim)
    ours, theirs = before.clone(), before.clone()
    kernels.rotate_heads(ours[:, :rotated], positions, cos, sin, norms, 1e-6)
    gpu_operations.rotate_heads(theirs[:, :rotated], positions, cos, sin, norms, 1e-6)
    assert (theirs[:, :rotated] - before[:, :rotated]).abs().max() > 1
    assert (ours - theirs).abs().max() <= DIFFERENCE
    assert torch.equal(ours[:, rotated:], before[:, rotated:])


@pytest.mark.parametrize("width", [200, 1024, 1500])
def test_silu_mul(kernels: ModuleType, width: int) -> None:
    gate_up = random(9, 2 * width)
    ours, theirs = torch.full((9, width), torch.nan), torch.empty(9, width)
    kernels.silu_mul(gate_up, ours)
    gpu_operations.silu_mul(gate_up, theirs)
    assert (ours - theirs).abs().max() <= DIFFERENCE


@pytest.mark.parametrize("shape", [(4, 2, 64), (3, 3, 32), (2, 1, 80)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tile_rows", [None, 16, 64])
def test_attend(
    kernels: ModuleType,
    shape: tuple[int, int, int],
    causal: bool,
    tile_rows: int | None,
) -> None:
    heads, kv_heads, head_dim = shape
    packing = pack(
        [np.zeros(length, np.int32) for length in LENGTHS],
        [None] * len(LENGTHS),
        block_rows=1 << 16,
        round_up=False,
    )
    rows = len(packing.ids)
    qkv = random(rows, heads + 2 * kv_heads, head_dim)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
    ours = torch.full((rows, heads * head_dim), torch.nan)
    theirs = torch.empty(rows, heads * head_dim)
    for size, table in _tiles(packing, tile_rows):
        unused = np.zeros((2, 4), np.int64)
        tiles = torch.from_numpy(np.concatenate((table, unused))).int()
        kernels.attend(q, k, v, tiles, size, ours, causal=causal)
        gpu_operations.attend(q, k, v, tiles, size, theirs, causal=causal)
    assert (ours - theirs).abs().max() <= DIFFERENCE
    # Plain torch, one text at a time, without tiles.
    for start, length in zip(packing.starts.tolist(), packing.lengths.tolist(), strict=True):
        text = slice(start, start + length)
        truth = torch.nn.functional.scaled_dot_product_attention(
            q[text].transpose(0, 1),
            k[text].transpose(0, 1),
            v[text].transpose(0, 1),
            is_causal=causal,
            enable_gqa=True,
        )
        expected = truth.transpose(0, 1).reshape(length, -1)
        assert (theirs[text] - expected).abs().max() <= DIFFERENCE


def test_attend_of_the_last_tokens(kernels: ModuleType) -> None:
    """The queries of the last tokens are in a matrix of their own."""
    lengths = LENGTHS[::-1]
    packing = pack(
        [np.zeros(length, np.int32) for length in lengths],
        [None] * len(lengths),
        block_rows=1 << 16,
        round_up=False,
    )
    q, k, v = random(len(packing.ids), 3, 2, 32).unbind(1)
    last = q.index_select(0, torch.from_numpy(packing.last))
    tiles = torch.from_numpy(_last_tiles(packing)).int()
    ours, theirs = torch.full((len(lengths), 64), torch.nan), torch.empty(len(lengths), 64)
    kernels.attend(last, k, v, tiles, 16, ours, causal=False)
    gpu_operations.attend(last, k, v, tiles, 16, theirs, causal=False)
    assert (ours - theirs).abs().max() <= DIFFERENCE
