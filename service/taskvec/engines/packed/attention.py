"""Attention over texts that lie end to end.

The queries, keys and values of a batch come as rows [tokens, heads, head_dim]; every text attends
to itself alone. Two ways to do it, with one interface:

* ``VarlenAttention`` hands the text boundaries to one CUDA kernel;
* ``GroupedAttention`` gathers texts of like length into small padded groups and multiplies whole
  groups at once. On a CPU the fused kernel called per text costs twice as much, for short texts
  (docs/adr/0003-grouped-attention.md has the figures); from ``FUSED_FROM`` tokens on it wins.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from taskvec.checkpoint.backbone import Backbone
from taskvec.engines.packed.packing import Packing, Rows

FUSED_FROM = 320
"""Texts of at least this many tokens go through torch's fused attention one by one."""

LIKE_LENGTH = 0.85
"""A text joins a group if it is at least this share of the group's longest."""

FEW_COUNTS = [1, 4, 16, 64, 256]
"""Numbers of texts in a group: few, because memory grows with every new shape. With sixteen it took
a hundred megabytes more, and the few were no slower."""

GROUP_SCORES = 1 << 21
"""Most attention scores in one group: 4 MiB of bf16, so that they stay in cache."""


class Attention(Protocol):
    """Attention within each text of one batch."""

    def every(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attend from every token.

        Args:
            q: [tokens, heads, head_dim].
            k: [tokens, kv_heads, head_dim].
            v: [tokens, kv_heads, head_dim].

        Returns:
            [tokens, heads * head_dim].
        """

    def last(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attend from the last token of each text: q and the result have one row a slot."""


def plan_attention(
    packing: Packing, backbone: Backbone, device: torch.device, dtype: torch.dtype
) -> Attention:
    """The attention within the texts of a packed batch."""
    if device.type == "cuda" and dtype != torch.float32:
        return VarlenAttention(packing, backbone, device)
    return GroupedAttention(packing, backbone, device, dtype)


@dataclass(frozen=True, slots=True)
class _Group:
    """Texts of like length, padded to the longest.

    Attributes:
        rows: [texts * kv_heads * width] index of each (text, kv head, position) in the packed
            [tokens * kv_heads] rows; padding repeats the text's last token.
        width: the longest length, rounded up.
        slots: [texts] the texts' slots.
        padding: [texts * kv_heads, 1, width], -inf where a key is padding; None where none is.
    """

    rows: torch.Tensor
    width: int
    slots: torch.Tensor
    padding: torch.Tensor | None


class GroupedAttention:
    """Texts of like length multiplied together; long texts one by one."""

    def __init__(
        self,
        packing: Packing,
        backbone: Backbone,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._heads = backbone.heads
        self._kv_heads = backbone.kv_heads
        self._shared = backbone.heads // backbone.kv_heads
        self._head_dim = backbone.head_dim
        self._scale = backbone.head_dim**-0.5
        self._causal = backbone.causal
        lengths, starts, slots = packing.lengths, packing.starts, packing.slots
        by_length = np.argsort(-lengths, kind="stable")
        n_long = int(np.searchsorted(-lengths[by_length], -FUSED_FROM, side="right"))
        long, short = by_length[:n_long], by_length[n_long:]
        self._long = [(int(starts[i]), int(starts[i] + lengths[i]), int(slots[i])) for i in long]
        # For each row that is produced, long texts first: the packed row it is for, or -1.
        targets = [np.arange(a * self._kv_heads, b * self._kv_heads) for a, b, _ in self._long]
        slot_order = [slots[long]]
        self._groups: list[_Group] = []
        for width, members in _like_lengths(lengths, short, self._heads):
            within = np.arange(width)
            real = within < lengths[members, None]
            tokens = starts[members, None] + np.minimum(within, lengths[members, None] - 1)
            rows = tokens[:, None, :] * self._kv_heads + np.arange(self._kv_heads)[:, None]
            targets.append(np.where(real[:, None, :], rows, -1).reshape(-1))
            slot_order.append(slots[members])
            self._groups.append(
                _Group(
                    rows=torch.from_numpy(rows.reshape(-1)).to(device),
                    width=width,
                    slots=torch.from_numpy(slots[members]).to(device),
                    padding=self._padding(real, device, dtype),
                )
            )
        self._back = _inverse(np.concatenate(targets), len(packing.ids) * self._kv_heads, device)
        self._slot_back = _inverse(np.concatenate(slot_order), len(packing.last), device)
        widest = max((group.width for group in self._groups), default=0)
        self._future = _causal_mask(widest, self._shared, device, dtype) if self._causal else None

    def _padding(
        self, real: NDArray[np.bool_], device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor | None:
        if real.all():
            return None
        mask = torch.zeros(real.shape, dtype=dtype)
        mask.masked_fill_(torch.from_numpy(~real), float("-inf"))
        return mask.repeat_interleave(self._kv_heads, 0)[:, None, :].to(device)

    def every(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See ``Attention.every``."""
        wide = self._shared * self._head_dim
        rows = [self._fused(q[a:b], k[a:b], v[a:b], causal=self._causal) for a, b, _ in self._long]
        rows = [part.reshape(-1, wide) for part in rows]
        q_rows = q.view(-1, wide)
        k_rows, v_rows = k.reshape(-1, self._head_dim), v.reshape(-1, self._head_dim)
        for group in self._groups:
            width = group.width
            queries = q_rows.index_select(0, group.rows).view(
                -1, width * self._shared, self._head_dim
            )
            keys = k_rows.index_select(0, group.rows).view(-1, width, self._head_dim)
            values = v_rows.index_select(0, group.rows).view(-1, width, self._head_dim)
            # A causal text needs no padding mask: its padding lies in every real token's future.
            mask = group.padding
            if self._future is not None:
                mask = self._future[: width * self._shared, :width]
            rows.append(self._weighted(queries, keys, values, mask).view(-1, wide))
        produced = torch.cat(rows) if len(rows) > 1 else rows[0]
        return produced.index_select(0, self._back).view(q.shape[0], -1)

    def last(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See ``Attention.last``."""
        rows = [
            self._fused(q[i : i + 1], k[a:b], v[a:b], causal=False).reshape(1, -1)
            for a, b, i in self._long
        ]
        k_rows, v_rows = k.reshape(-1, self._head_dim), v.reshape(-1, self._head_dim)
        for group in self._groups:
            queries = q.index_select(0, group.slots).view(-1, self._shared, self._head_dim)
            keys = k_rows.index_select(0, group.rows).view(-1, group.width, self._head_dim)
            values = v_rows.index_select(0, group.rows).view(-1, group.width, self._head_dim)
            rows.append(self._weighted(queries, keys, values, group.padding).view(-1, q[0].numel()))
        return torch.cat(rows).index_select(0, self._slot_back)

    def _weighted(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        keys = k.transpose(1, 2)
        if mask is None:
            scores = torch.bmm(q * self._scale, keys)
        else:
            scores = torch.baddbmm(mask, q, keys, alpha=self._scale)
        return torch.bmm(scores.softmax(-1), v)

    def _fused(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool
    ) -> torch.Tensor:
        mixed = functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            is_causal=causal,
            enable_gqa=self._shared > 1,
        )
        return mixed[0].transpose(0, 1)


class VarlenAttention:
    """The text boundaries handed to torch's variable-length kernel (CUDA, half precision)."""

    def __init__(self, packing: Packing, backbone: Backbone, device: torch.device) -> None:
        lengths = packing.lengths  # nothing is rounded up here: rows and slots have no gaps
        bounds = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        self._bounds = torch.from_numpy(bounds).to(device)
        self._texts = torch.arange(len(lengths) + 1, dtype=torch.int32, device=device)
        self._longest = int(lengths.max())
        self._shared = backbone.heads // backbone.kv_heads
        self._window = (-1, 0) if backbone.causal else (-1, -1)

    def every(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See ``Attention.every``."""
        return self._attend(
            q, k, v, q_bounds=self._bounds, q_longest=self._longest, window=self._window
        )

    def last(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See ``Attention.last``."""
        return self._attend(q, k, v, q_bounds=self._texts, q_longest=1, window=(-1, -1))

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        q_bounds: torch.Tensor,
        q_longest: int,
        window: tuple[int, int],
    ) -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415 - CUDA builds only

        if self._shared > 1:  # the kernel's own grouping arrived only with torch 2.12
            k, v = (part.repeat_interleave(self._shared, 1) for part in (k, v))
        mixed = varlen_attn(
            q.contiguous(),
            k.contiguous(),
            v.contiguous(),
            q_bounds,
            self._bounds,
            q_longest,
            self._longest,
            window_size=window,
        )
        return cast("torch.Tensor", mixed).reshape(q.shape[0], -1)


def _like_lengths(lengths: Rows, longest_first: Rows, heads: int) -> Iterator[tuple[int, Rows]]:
    """Cut texts, longest first, into groups: (width, texts), with bounded score matrices.

    Widths and numbers of texts take few different values, for the reason given in ``packing``.
    """
    start = 0
    while start < len(longest_first):
        longest = int(lengths[longest_first[start]])
        width = _rounded_width(longest)
        most = max(1, GROUP_SCORES // (heads * width * width))
        rest = lengths[longest_first[start : start + most]]
        alike = int(np.searchsorted(-rest, -LIKE_LENGTH * longest, side="right"))
        texts = FEW_COUNTS[bisect_right(FEW_COUNTS, alike) - 1]
        yield width, longest_first[start : start + texts]
        start += texts


def _rounded_width(length: int) -> int:
    step = 8 if length <= 64 else 16 if length <= 128 else 32
    return -(-length // step) * step


def _inverse(targets: Rows, size: int, device: torch.device) -> torch.Tensor:
    """[size]: which produced row each target takes; 0 for targets that nothing is produced for."""
    inverse = np.zeros(size, dtype=np.int64)
    real = np.flatnonzero(targets >= 0)
    inverse[targets[real]] = real
    return torch.from_numpy(inverse).to(device)


def _causal_mask(width: int, shared: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """[width * shared, width]: -inf where a key lies in the future; ``shared`` rows a position."""
    mask = torch.full((width, width), float("-inf"), device=device, dtype=dtype).triu(1)
    return mask.repeat_interleave(shared, 0)
