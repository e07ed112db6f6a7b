"""Attention over a packed batch on a CPU.

Queries, keys and values are packed rows [tokens, heads, head_dim]. Each text attends only to
itself. Texts of similar length are gathered into small padded groups, and whole groups are
multiplied at once: calling torch's fused kernel once per text takes twice as long for short texts
(docs/adr/0003-grouped-attention.md has the figures). From ``MIN_FUSED_TOKENS`` tokens on, the fused
kernel is faster and is used for each text.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from taskvec.checkpoint.backbone import Backbone
from taskvec.engines.packed.packing import Packing, Rows

MIN_FUSED_TOKENS = 320
"""Texts with at least this many tokens use torch's fused attention, one call per text."""

MIN_LENGTH_RATIO = 0.85
"""Minimum length of a text in a group, relative to the longest text of the group."""

GROUP_SIZES = [1, 4, 16, 64, 256]
"""Allowed numbers of texts in a group. They are few because memory grows with every new matrix
shape: sixteen sizes took a hundred megabytes more and were not faster."""

MAX_GROUP_SCORES = 1 << 21
"""Maximum attention scores of one group: 4 MiB in bfloat16, so that they stay in the CPU cache."""


MAX_FUSED_SCORES = 1 << 27
"""Maximum attention scores of one call of the fused kernel, unless one key and value head has more:
a text of 8,192 tokens takes a call for every two query heads, and can be paused between them."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Texts of similar length, padded to one width.

    Attributes:
        rows: [texts * kv_heads * width], index of each (text, kv head, position) in the packed
            [tokens * kv_heads] rows; padding repeats the last token of the text.
        width: the longest length, rounded up.
        slots: [texts], slot of each text.
        padding_mask: [texts * kv_heads, 1, width], -inf for padding keys and 0 for others; None
            without padding.
    """

    rows: torch.Tensor
    width: int
    slots: torch.Tensor
    padding_mask: torch.Tensor | None


class GroupedAttention:
    """Attention by groups of texts of similar length; long texts are computed one by one."""

    def __init__(
        self,
        packing: Packing,
        backbone: Backbone,
        dtype: torch.dtype,
        step: Callable[[], None],
    ) -> None:
        """Prepare the attention of a batch.

        Args:
            packing: the batch.
            backbone: the shape.
            dtype: dtype of queries, keys and values.
            step: called between the steps of a forward pass; may wait.
        """
        self._step = step
        self._heads = backbone.heads
        self._kv_heads = backbone.kv_heads
        self._q_per_kv = backbone.heads // backbone.kv_heads
        self._head_dim = backbone.head_dim
        self._scale = backbone.head_dim**-0.5
        self._causal = backbone.causal
        lengths, starts, slots = packing.lengths, packing.starts, packing.slots
        by_length = np.argsort(-lengths, kind="stable")
        n_long = int(np.searchsorted(-lengths[by_length], -MIN_FUSED_TOKENS, side="right"))
        long, short = by_length[:n_long], by_length[n_long:]
        self._long = [(int(starts[i]), int(starts[i] + lengths[i]), int(slots[i])) for i in long]
        # Packed row of each computed row, long texts first; -1 for padding.
        targets = [np.arange(a * self._kv_heads, b * self._kv_heads) for a, b, _ in self._long]
        slot_order = [slots[long]]
        self._groups: list[_Group] = []
        for width, members in _length_groups(lengths, short, self._heads):
            within = np.arange(width)
            real = within < lengths[members, None]
            tokens = starts[members, None] + np.minimum(within, lengths[members, None] - 1)
            rows = tokens[:, None, :] * self._kv_heads + np.arange(self._kv_heads)[:, None]
            targets.append(np.where(real[:, None, :], rows, -1).reshape(-1))
            slot_order.append(slots[members])
            self._groups.append(
                _Group(
                    rows=torch.from_numpy(rows.reshape(-1)),
                    width=width,
                    slots=torch.from_numpy(slots[members]),
                    padding_mask=self._padding_mask(real, dtype),
                )
            )
        self._computed_rows = _inverse(np.concatenate(targets), len(packing.ids) * self._kv_heads)
        self._computed_slots = _inverse(np.concatenate(slot_order), len(packing.last))
        widest = max((group.width for group in self._groups), default=0)
        self._causal_mask = _causal_mask(widest, self._q_per_kv, dtype) if self._causal else None

    def _padding_mask(self, real: NDArray[np.bool_], dtype: torch.dtype) -> torch.Tensor | None:
        if real.all():
            return None
        mask = torch.zeros(real.shape, dtype=dtype)
        mask.masked_fill_(torch.from_numpy(~real), float("-inf"))
        return mask.repeat_interleave(self._kv_heads, 0)[:, None, :]

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Compute the attention of every token.

        Args:
            q: [tokens, heads, head_dim].
            k: [tokens, kv_heads, head_dim].
            v: [tokens, kv_heads, head_dim].

        Returns:
            [tokens, heads * head_dim].
        """
        width_per_kv = self._q_per_kv * self._head_dim
        rows = [self._fused(q[a:b], k[a:b], v[a:b], causal=self._causal) for a, b, _ in self._long]
        rows = [text.reshape(-1, width_per_kv) for text in rows]
        q_rows = q.view(-1, width_per_kv)
        k_rows, v_rows = k.reshape(-1, self._head_dim), v.reshape(-1, self._head_dim)
        for group in self._groups:
            self._step()
            width = group.width
            queries = q_rows.index_select(0, group.rows).view(
                -1, width * self._q_per_kv, self._head_dim
            )
            keys = k_rows.index_select(0, group.rows).view(-1, width, self._head_dim)
            values = v_rows.index_select(0, group.rows).view(-1, width, self._head_dim)
            # The causal mask also hides the padding, which follows the tokens of the text.
            mask = group.padding_mask
            if self._causal_mask is not None:
                mask = self._causal_mask[: width * self._q_per_kv, :width]
            rows.append(self._grouped(queries, keys, values, mask).view(-1, width_per_kv))
        computed = torch.cat(rows) if len(rows) > 1 else rows[0]
        return computed.index_select(0, self._computed_rows).view(q.shape[0], -1)

    def attend_last(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Compute the attention of the last token of each text.

        Args:
            q: [slots, heads, head_dim].
            k: [tokens, kv_heads, head_dim].
            v: [tokens, kv_heads, head_dim].

        Returns:
            [slots, heads * head_dim].
        """
        rows = [
            self._fused(q[i : i + 1], k[a:b], v[a:b], causal=False).reshape(1, -1)
            for a, b, i in self._long
        ]
        k_rows, v_rows = k.reshape(-1, self._head_dim), v.reshape(-1, self._head_dim)
        for group in self._groups:
            queries = q.index_select(0, group.slots).view(-1, self._q_per_kv, self._head_dim)
            keys = k_rows.index_select(0, group.rows).view(-1, group.width, self._head_dim)
            values = v_rows.index_select(0, group.rows).view(-1, group.width, self._head_dim)
            rows.append(
                self._grouped(queries, keys, values, group.padding_mask).view(-1, q[0].numel())
            )
        return torch.cat(rows).index_select(0, self._computed_slots)

    def _grouped(
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
        """Return the attention of one text, in steps of some key and value heads."""
        scores = len(q) * len(k) * self._q_per_kv
        heads = max(1, min(self._kv_heads, MAX_FUSED_SCORES // scores))
        parts = []
        for first in range(0, self._kv_heads, heads):
            self._step()
            kv = slice(first, first + heads)
            attended = functional.scaled_dot_product_attention(
                q[:, first * self._q_per_kv : (first + heads) * self._q_per_kv].transpose(0, 1)[
                    None
                ],
                k[:, kv].transpose(0, 1)[None],
                v[:, kv].transpose(0, 1)[None],
                is_causal=causal,
                enable_gqa=self._q_per_kv > 1,
            )
            parts.append(attended[0].transpose(0, 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _length_groups(lengths: Rows, longest_first: Rows, heads: int) -> Iterator[tuple[int, Rows]]:
    """Yield (width, texts) of each group.

    Widths and numbers of texts take few different values, for the reason given in ``packing``.

    Args:
        lengths: [texts], tokens of each text.
        longest_first: indices of the texts to group, by decreasing length.
        heads: query heads, which determine the size of the score matrix.
    """
    start = 0
    while start < len(longest_first):
        longest = int(lengths[longest_first[start]])
        width = _round_up_width(longest)
        max_texts = max(1, MAX_GROUP_SCORES // (heads * width * width))
        candidates = lengths[longest_first[start : start + max_texts]]
        similar = int(np.searchsorted(-candidates, -MIN_LENGTH_RATIO * longest, side="right"))
        texts = GROUP_SIZES[bisect_right(GROUP_SIZES, similar) - 1]
        yield width, longest_first[start : start + texts]
        start += texts


def _round_up_width(length: int) -> int:
    step = 8 if length <= 64 else 16 if length <= 128 else 32
    return -(-length // step) * step


def _inverse(targets: Rows, size: int) -> torch.Tensor:
    """Invert a mapping of indices.

    Args:
        targets: target of each computed row; -1 for none.
        size: number of targets.

    Returns:
        int64 [size], computed row of each target; 0 for targets without one.
    """
    inverse = np.zeros(size, dtype=np.int64)
    real = np.flatnonzero(targets >= 0)
    inverse[targets[real]] = real
    return torch.from_numpy(inverse)


def _causal_mask(width: int, q_per_kv: int, dtype: torch.dtype) -> torch.Tensor:
    """Return [width * q_per_kv, width]: -inf for keys after the query's position, else 0."""
    mask = torch.full((width, width), float("-inf"), dtype=dtype).triu(1)
    return mask.repeat_interleave(q_per_kv, 0)
