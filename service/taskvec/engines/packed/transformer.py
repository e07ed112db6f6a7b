"""One transformer for both backbones, over texts that lie end to end.

Linear layers and norms run over blocks of rows. A block belongs to one adapter and is small enough
that its activations stay in cache and in the allocator's free lists: on a CPU, fresh pages cost
more than the arithmetic on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from taskvec.checkpoint.backbone import Backbone
from taskvec.engines.base import TokenIds
from taskvec.engines.packed.attention import plan_attention
from taskvec.engines.packed.lora import Projection
from taskvec.engines.packed.packing import MOST_PARTS, Block, Packing, cut, pack

Turns = tuple[torch.Tensor, torch.Tensor]
"""cos and signed sin of each row's position: [rows, 1, head_dim] each."""

WIDEST_ACTIVATION = 3 << 20
"""Most elements of one block's widest activation: 6 MiB of bf16."""

PIECE = 1 << 18
"""Elements that norms and rotations work on at a time, on a CPU: a megabyte of float32."""


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one transformer layer.

    Attributes:
        input_norm: [hidden].
        qkv: queries, keys and values, stacked in this order.
        qk_norm: [heads + kv_heads, head_dim], the queries' norms and then the keys'; None where
            the backbone has none.
        o: the attention's output.
        mlp_norm: [hidden].
        gate_up: the MLP's gate and what it gates, stacked.
        down: the MLP's output.
    """

    input_norm: torch.Tensor
    qkv: Projection
    qk_norm: torch.Tensor | None
    o: Projection
    mlp_norm: torch.Tensor
    gate_up: Projection
    down: Projection


def block_rows(backbone: Backbone) -> int:
    """Rows of one block on a CPU: 1,024 at the width of Qwen3-0.6B, more for narrower models."""
    widest = max(backbone.intermediate, backbone.heads * backbone.head_dim)
    return min(2048, max(256, WIDEST_ACTIVATION // widest // 256 * 256))


class Transformer:
    """The backbone and its adapters, ready to embed."""

    def __init__(
        self,
        backbone: Backbone,
        embedding: torch.Tensor,
        layers: Sequence[Layer],
        final_norm: torch.Tensor,
        threads: int,
    ) -> None:
        """Wire loaded weights together.

        Args:
            backbone: the shape.
            embedding: [vocabulary, hidden]; its device and dtype are the engine's.
            layers: in order.
            final_norm: [hidden].
            threads: processor threads of a batch that is worth them.
        """
        self.threads = threads
        self.backbone = backbone
        self.layers = tuple(layers)
        self._embedding = embedding
        self._final_norm = final_norm
        self.device = embedding.device
        self.dtype = embedding.dtype
        on_cpu = self.device.type == "cpu"
        self.block_rows = block_rows(backbone) if on_cpu else 1 << 16
        self._cos = self._sin = torch.empty(0)
        self._norm_floor = torch.tensor(backbone.norm_eps**0.5, device=self.device)
        self._others = ThreadPoolExecutor(MOST_PARTS - 1, thread_name_prefix="packed-part")

    def embed(self, ids: Sequence[TokenIds], adapters: Sequence[str | None]) -> NDArray[np.float32]:
        """The last token's hidden state of each text, after the final norm.

        Args:
            ids: one int32 array [length] a text.
            adapters: the adapter of each text; None for the bare backbone.

        Returns:
            float32 [texts, hidden], in the order given, not normalised.
        """
        self._extend_rotations(max(map(len, ids)))
        if self.device.type != "cpu":
            return self._forward(ids, adapters)
        parts, threads = cut(ids, adapters, self.backbone, self.threads)
        result = np.empty((len(ids), self.backbone.hidden), dtype=np.float32)

        def embed_part(part: Sequence[int]) -> None:
            torch.set_num_threads(threads)  # of this thread alone
            result[part] = self._forward([ids[i] for i in part], [adapters[i] for i in part])

        before = torch.get_num_threads()
        others = [self._others.submit(embed_part, part) for part in parts[1:]]
        try:
            embed_part(parts[0])
        finally:
            torch.set_num_threads(before)
            wait(others)
        for other in others:
            other.result()
        return result

    @torch.inference_mode()
    def _forward(
        self, ids: Sequence[TokenIds], adapters: Sequence[str | None]
    ) -> NDArray[np.float32]:
        packing = pack(ids, adapters, block_rows=self.block_rows, rounded=self.device.type == "cpu")
        last = self._index(packing.last)
        turns = self._rotations(packing)
        attention = plan_attention(packing, self.backbone, self.device, self.dtype)

        x = self._embedding.index_select(0, self._index(packing.ids))
        for layer in self.layers[:-1]:
            q, k, v = self._attention_inputs(layer, x, packing.blocks, turns, "qkv")
            self._mix(layer, x, attention.every(q, k, v), packing.blocks)
        # Only the last tokens are read: the last layer computes keys and values for all, no more.
        layer = self.layers[-1]
        k, v = self._attention_inputs(layer, x, packing.blocks, turns, "kv")
        x = x.index_select(0, last)
        last_turns = turns[0].index_select(0, last), turns[1].index_select(0, last)
        (q,) = self._attention_inputs(layer, x, packing.slot_blocks, last_turns, "q")
        self._mix(layer, x, attention.last(q, k, v), packing.slot_blocks)
        x = x.index_select(0, self._index(packing.slots)).float()
        vectors = self._norm(x, self._final_norm.float())
        result = np.empty((len(ids), self.backbone.hidden), dtype=np.float32)
        result[packing.order] = vectors.cpu().numpy()
        return result

    def _index(self, rows: NDArray[np.int64] | NDArray[np.int32]) -> torch.Tensor:
        return torch.from_numpy(rows).to(self.device)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm over the last axis, piece by piece: its float32 temporaries stay in cache.

        Zhang and Sennrich, arXiv 1910.07467: ``weight * x / sqrt(mean(x**2) + eps)``.
        """
        normed = [self._norm_piece(piece, weight) for (piece,) in self._pieces(x)]
        return normed[0] if len(normed) == 1 else torch.cat(normed)

    def _norm_piece(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if self.device.type != "cpu":
            normed = functional.rms_norm(x, (x.shape[-1],), None, self.backbone.norm_eps)
            return normed * weight
        # torch's own takes half as long again on a CPU: it allocates where this works in place.
        y = x.to(torch.float32, copy=True)
        size = torch.linalg.vector_norm(y, dim=-1, keepdim=True).mul_(x.shape[-1] ** -0.5)
        return y.div_(torch.hypot(size, self._norm_floor)).mul_(weight).to(x.dtype)

    def _pieces(self, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """The tensors cut alike along their rows, or as they are where they are small."""
        rows = len(tensors[0])
        step = max(1, PIECE * rows // tensors[0].numel()) if self.device.type == "cpu" else rows
        if rows <= step:
            yield tensors
            return
        for start in range(0, rows, step):
            yield tuple(tensor[start : start + step] for tensor in tensors)

    def _attention_inputs(
        self, layer: Layer, x: torch.Tensor, blocks: Sequence[Block], turns: Turns, wanted: str
    ) -> list[torch.Tensor]:
        """Those of q, k and v that are wanted, neighbours: each [rows, its heads, head_dim]."""
        shape = self.backbone
        counts = {"q": shape.heads, "k": shape.kv_heads, "v": shape.kv_heads}
        first = 0 if wanted[0] == "q" else shape.heads
        sizes = [counts[name] for name in wanted]
        outputs = slice(first * shape.head_dim, (first + sum(sizes)) * shape.head_dim)
        turning = sum(counts[name] for name in wanted if name != "v")
        norms = None if layer.qk_norm is None else layer.qk_norm[first : first + turning]
        results = [x.new_empty(len(x), size, shape.head_dim) for size in sizes]
        for block in blocks:
            seen = self._norm(x[block.rows], layer.input_norm)
            heads = layer.qkv(seen, block.adapter, outputs).view(len(seen), -1, shape.head_dim)
            places = [result[block.rows] for result in results]
            if wanted[-1] == "v":
                places.pop().copy_(heads[:, turning:])
            cos, sin = turns
            self._rotate(heads[:, :turning], norms, cos[block.rows], sin[block.rows], places)
        return results

    def _rotate(
        self,
        heads: torch.Tensor,
        head_norms: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        results: Sequence[torch.Tensor],
    ) -> None:
        """Per-head norm, then rotary positions (Su et al., arXiv 2104.09864; half-split layout).

        The heads are split among the results.
        """
        sizes = [result.shape[1] for result in results]
        for part, part_cos, part_sin, *outs in self._pieces(heads, cos, sin, *results):
            piece = part if head_norms is None else self._norm_piece(part, head_norms)
            turned = torch.roll(piece, self.backbone.head_dim // 2, -1).mul_(part_sin)
            pairs = zip(torch.split(piece, sizes, 1), torch.split(turned, sizes, 1), strict=True)
            for (still, moved), out in zip(pairs, outs, strict=True):
                torch.addcmul(moved, still, part_cos, out=out)

    def _mix(
        self, layer: Layer, x: torch.Tensor, mixed: torch.Tensor, blocks: Sequence[Block]
    ) -> None:
        """Add what attention found, then the MLP's answer to it, to x in place."""
        for block in blocks:
            rows = x[block.rows]
            rows += layer.o(mixed[block.rows], block.adapter)
            seen = self._norm(rows, layer.mlp_norm)
            gate, up = layer.gate_up(seen, block.adapter).chunk(2, -1)
            rows += layer.down(functional.silu(gate).mul_(up), block.adapter)

    @torch.inference_mode()
    def _extend_rotations(self, longest: int) -> None:
        """Make the tables of cos and signed sin reach the longest text."""
        if longest > len(self._cos):
            size = 1 << (longest - 1).bit_length()
            half = torch.arange(0, self.backbone.head_dim, 2, device=self.device).float()
            frequency = 1.0 / (self.backbone.rope_theta ** (half / self.backbone.head_dim))
            angle = torch.outer(torch.arange(size, device=self.device).float(), frequency)
            cos = torch.cat((angle.cos(), angle.cos()), -1).to(self.dtype)
            sin = torch.cat((-angle.sin(), angle.sin()), -1).to(self.dtype)
            self._cos, self._sin = cos, sin  # both or none, should memory run out

    def _rotations(self, packing: Packing) -> Turns:
        """Cos and signed sin of each row."""
        rows = self._index(packing.positions)
        return self._cos.index_select(0, rows)[:, None], self._sin.index_select(0, rows)[:, None]
