"""The operations of the forward pass on a GPU, in plain torch.

They are used where Triton is not installed, and the tests compare ``gpu_kernels`` with them.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """Write the RMSNorm of each row: ``weight * x / sqrt(mean(x**2) + eps)``.

    Zhang and Sennrich, arXiv 1910.07467.

    Args:
        x: [rows, width].
        weight: [width].
        eps: added to the mean square.
        out: [rows, width].
    """
    out.copy_(functional.rms_norm(x.float(), weight.shape, weight.float(), eps))


def rotate_heads(  # noqa: PLR0917 - the tensors of one operation
    heads: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norms: torch.Tensor | None,
    eps: float,
) -> None:
    """Apply per-head norms and then rotary positions in place (Su et al., arXiv 2104.09864).

    The layout is half-split: dimension i is rotated with dimension i + head_dim / 2.

    Args:
        heads: [rows, heads, head_dim]; the rows may be strided.
        positions: int32 [rows].
        cos: float32 [positions, head_dim / 2].
        sin: float32 [positions, head_dim / 2].
        norms: [heads, head_dim], RMSNorm weights; None for no norms.
        eps: added to the mean square of each head.
    """
    values = heads.float()
    if norms is not None:
        values = functional.rms_norm(values, values.shape[-1:], None, eps) * norms.float()
    left, right = values.chunk(2, -1)
    index = positions.long()
    cosine, sine = cos[index][:, None], sin[index][:, None]
    heads.copy_(torch.cat((left * cosine - right * sine, right * cosine + left * sine), -1))


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """Write ``silu(gate) * up``.

    Args:
        gate_up: [rows, 2 * width], gate and then up.
        out: [rows, width].
    """
    gate, up = gate_up.float().chunk(2, -1)
    out.copy_(functional.silu(gate) * up)


def attend(  # noqa: PLR0917 - the tensors of one operation
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tiles: torch.Tensor,
    tile_rows: int,
    out: torch.Tensor,
    *,
    causal: bool,
) -> None:
    """Compute attention within each text, tile by tile of its queries.

    Args:
        q: [query rows, heads, head_dim].
        k: [tokens, kv_heads, head_dim], rows strided as those of v.
        v: [tokens, kv_heads, head_dim].
        tiles: int32 [tiles, 4]: row of the first query, its position in the text, row of the
            text's first token, and length of the text; length 0 for an unused tile.
        tile_rows: maximum queries of a tile, a power of two, at least 16.
        out: [query rows, heads * head_dim].
        causal: True if a query sees only keys up to its own position.
    """
    shared = q.shape[1] // k.shape[1]
    for q_row, first, kv_row, length in tiles.tolist():
        count = min(tile_rows, length - first)
        if count <= 0:
            continue
        query = q[q_row : q_row + count].float().transpose(0, 1)
        keys, values = (
            side[kv_row : kv_row + length].float().repeat_interleave(shared, 1).transpose(0, 1)
            for side in (k, v)
        )
        scores = query @ keys.transpose(1, 2) * q.shape[-1] ** -0.5
        if causal:
            positions = torch.arange(length, device=q.device)
            scores.masked_fill_(positions > positions[first : first + count, None], -torch.inf)
        mixed = scores.softmax(-1) @ values
        out[q_row : q_row + count] = mixed.transpose(0, 1).reshape(count, -1).to(out.dtype)
