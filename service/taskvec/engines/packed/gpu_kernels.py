"""Triton kernels of the forward pass on a GPU; ``gpu_operations`` has the same in plain torch.

Each kernel reads its inputs and writes its outputs once. Arithmetic is in float32; results are
rounded once to the dtype of the output.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROTATED_ROWS = 16
"""Rows of one program of ``rotate_heads``."""

SILU_ELEMENTS = 1024
"""Elements of one program of ``silu_mul``."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """See ``gpu_operations.rms_norm``."""
    rows, width = x.shape
    columns = triton.next_power_of_2(width)
    _rms_norm[(rows,)](x, weight, out, x.stride(0), out.stride(0), width, eps, columns, num_warps=4)


@triton.jit
def _rms_norm(x, weight, out, x_stride, out_stride, width, eps, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < width
    values = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    weights = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / width + eps)
    normed = values * scale * weights
    tl.store(out + row * out_stride + column, normed.to(out.dtype.element_ty), mask=inside)


def rotate_heads(
    heads: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norms: torch.Tensor | None,
    eps: float,
) -> None:
    """See ``gpu_operations.rotate_heads``."""
    rows, count, head_dim = heads.shape
    half = head_dim // 2
    _rotate_heads[(triton.cdiv(rows, ROTATED_ROWS), count)](
        heads,
        positions,
        cos,
        sin,
        heads if norms is None else norms,
        heads.stride(0),
        rows,
        eps,
        half,
        triton.next_power_of_2(half),
        ROTATED_ROWS,
        norms is not None,
        num_warps=4,
    )


@triton.jit
def _rotate_heads(
    heads,
    positions,
    cos,
    sin,
    norms,
    stride,
    rows,
    eps,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    NORMS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows)[:, None] & (column < HALF)
    left_at = heads + row.to(tl.int64)[:, None] * stride + head * 2 * HALF + column
    right_at = left_at + HALF
    left = tl.load(left_at, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(right_at, mask=inside, other=0.0).to(tl.float32)
    if NORMS:
        squares = tl.sum(left * left, 1) + tl.sum(right * right, 1)
        scale = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
        norm_at = norms + head * 2 * HALF + column
        left *= scale * tl.load(norm_at, mask=column < HALF, other=0.0).to(tl.float32)
        right *= scale * tl.load(norm_at + HALF, mask=column < HALF, other=0.0).to(tl.float32)
    position = tl.load(positions + row, mask=row < rows, other=0)[:, None] * HALF + column
    cosine = tl.load(cos + position, mask=inside, other=0.0)
    sine = tl.load(sin + position, mask=inside, other=0.0)
    dtype = heads.dtype.element_ty
    tl.store(left_at, (left * cosine - right * sine).to(dtype), mask=inside)
    tl.store(right_at, (right * cosine + left * sine).to(dtype), mask=inside)


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """See ``gpu_operations.silu_mul``."""
    rows, width = out.shape
    _silu_mul[(rows, triton.cdiv(width, SILU_ELEMENTS))](
        gate_up, out, gate_up.stride(0), out.stride(0), width, SILU_ELEMENTS, num_warps=4
    )


@triton.jit
def _silu_mul(gate_up, out, in_stride, out_stride, width, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    gate = tl.load(gate_up + row * in_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * in_stride + width + column, mask=inside, other=0.0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    tl.store(out + row * out_stride + column, result.to(out.dtype.element_ty), mask=inside)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tiles: torch.Tensor,
    tile_rows: int,
    out: torch.Tensor,
    *,
    causal: bool,
) -> None:
    """See ``gpu_operations.attend``."""
    _, heads, head_dim = q.shape
    precision = "ieee" if q.dtype == torch.float32 else "tf32"
    _attend[(len(tiles), heads)](
        q,
        k,
        v,
        out,
        tiles,
        q.stride(0),
        k.stride(0),
        out.stride(0),
        head_dim**-0.5 * 1.4426950408889634,
        heads // k.shape[1],
        head_dim,
        max(16, triton.next_power_of_2(head_dim)),
        tile_rows,
        min(tile_rows, 32 if head_dim > 64 else 64),  # keys of one step
        causal,
        precision,
        num_warps=4 if tile_rows >= 64 else 2,
        num_stages=2 if q.dtype == torch.float32 else 3,  # 99 KiB of shared memory
    )


@triton.jit
def _attend(
    q,
    k,
    v,
    out,
    tiles,
    q_stride,
    kv_stride,
    out_stride,
    scale,
    Q_PER_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Flash attention (Dao, arXiv 2307.08691): an online softmax over the keys of the text.
    tile = tiles + tl.program_id(0) * 4
    head = tl.program_id(1)
    q_row = tl.load(tile).to(tl.int64)
    first = tl.load(tile + 1)
    kv_row = tl.load(tile + 2).to(tl.int64)
    length = tl.load(tile + 3)
    if first < length:
        row = tl.arange(0, ROWS)
        column = tl.arange(0, COLUMNS)
        real = first + row < length
        q_at = q + (q_row + row)[:, None] * q_stride + head * HEAD_DIM + column[None, :]
        inside = real[:, None] & (column < HEAD_DIM)[None, :]
        query = tl.load(q_at, mask=inside, other=0.0)
        kv_head = head // Q_PER_KV
        k_at = k + kv_row * kv_stride + kv_head * HEAD_DIM
        v_at = v + kv_row * kv_stride + kv_head * HEAD_DIM
        greatest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        mixed = tl.zeros([ROWS, COLUMNS], tl.float32)
        end = length
        if CAUSAL:
            end = tl.minimum(length, first + ROWS)
        for start in range(0, end, KEYS):
            key = start + tl.arange(0, KEYS)
            present = key < length
            at = key.to(tl.int64) * kv_stride
            keys = tl.load(
                k_at + at[None, :] + column[:, None],
                mask=present[None, :] & (column < HEAD_DIM)[:, None],
                other=0.0,
            )
            scores = tl.dot(query, keys, input_precision=PRECISION) * scale
            visible = present[None, :]
            if CAUSAL:
                visible = visible & (first + row[:, None] >= key[None, :])
            scores = tl.where(visible, scores, float("-inf"))
            new_greatest = tl.maximum(greatest, tl.max(scores, 1))
            weights = tl.exp2(scores - new_greatest[:, None])
            correction = tl.exp2(greatest - new_greatest)
            total = total * correction + tl.sum(weights, 1)
            values = tl.load(
                v_at + at[:, None] + column[None, :],
                mask=present[:, None] & (column < HEAD_DIM)[None, :],
                other=0.0,
            )
            mixed = mixed * correction[:, None]
            mixed = tl.dot(weights.to(values.dtype), values, mixed, input_precision=PRECISION)
            greatest = new_greatest
        out_at = out + (q_row + row)[:, None] * out_stride + head * HEAD_DIM + column[None, :]
        tl.store(out_at, (mixed / total[:, None]).to(out.dtype.element_ty), mask=inside)
