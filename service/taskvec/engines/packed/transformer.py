"""Forward pass of Qwen3 and EuroBERT over a packed batch on a CPU.

Linear layers and norms run over blocks of rows. A block has one adapter. Its size keeps the
activations in the CPU cache and in the free lists of the allocator: mapping new memory pages takes
longer than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from taskvec.checkpoint.backbone import Backbone
from taskvec.concurrency import lower_priority
from taskvec.engines.base import TokenIds, do_nothing
from taskvec.engines.packed.attention import GroupedAttention
from taskvec.engines.packed.lora import LoraLinear
from taskvec.engines.packed.packing import MAX_SHARDS, Block, Packing, pack, shard

CosSin = tuple[torch.Tensor, torch.Tensor]
"""Rotary position factors of rows: cos and signed sin, each [rows, 1, head_dim]."""

MAX_ACTIVATION_ELEMENTS = 3 << 20
"""Maximum elements of the widest activation of one block: 6 MiB in bfloat16."""

CHUNK_ELEMENTS = 1 << 18
"""Elements per chunk of norms and rotations: one MiB in float32, which fits the cache."""


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one transformer layer.

    Attributes:
        input_norm: [hidden], RMSNorm weights before attention.
        qkv: query, key and value projections, stacked in this order.
        qk_norm: [heads + kv_heads, head_dim], norms of the queries and then of the keys; None if
            the backbone has no such norms.
        o: output projection of the attention.
        mlp_norm: [hidden], RMSNorm weights before the MLP.
        gate_up: gate and up projections of the MLP, stacked in this order.
        down: down projection of the MLP.
    """

    input_norm: torch.Tensor
    qkv: LoraLinear
    qk_norm: torch.Tensor | None
    o: LoraLinear
    mlp_norm: torch.Tensor
    gate_up: LoraLinear
    down: LoraLinear


def block_rows(backbone: Backbone) -> int:
    """Return the rows of a block: 1,024 for Qwen3-0.6B, more for narrower models."""
    widest = max(backbone.intermediate, backbone.heads * backbone.head_dim)
    return min(2048, max(256, MAX_ACTIVATION_ELEMENTS // widest // 256 * 256))


class Transformer:
    """The backbone and its adapters, loaded in the main memory."""

    max_started = 1
    """Forward passes started before the first is finished: ``start`` computes the result."""

    def __init__(
        self,
        backbone: Backbone,
        embedding: torch.Tensor,
        layers: Sequence[Layer],
        final_norm: torch.Tensor,
        threads: int,
        *,
        step: Callable[[], None] = do_nothing,
        niceness: int = 0,
    ) -> None:
        """Combine loaded weights.

        Args:
            backbone: the shape.
            embedding: [vocabulary, hidden]; its dtype is that of the forward pass.
            layers: the transformer layers, in order.
            final_norm: [hidden], RMSNorm weights after the last layer.
            threads: maximum processor threads of a batch.
            step: see ``in_lane``.
            niceness: see ``in_lane``.
        """
        self.threads = threads
        self.backbone = backbone
        self.layers = tuple(layers)
        self._embedding = embedding
        self._final_norm = final_norm
        self.device = embedding.device
        self.dtype = embedding.dtype
        self.block_rows = block_rows(backbone)
        self._cos_table = self._sin_table = torch.empty(0)
        self._sqrt_norm_eps = torch.tensor(
            backbone.norm_eps**0.5,
        )
        self._step = step
        self._executor = ThreadPoolExecutor(
            MAX_SHARDS - 1,
            thread_name_prefix="packed-shard",
            initializer=partial(lower_priority, niceness),
        )

    def in_lane(self, step: Callable[[], None], niceness: int) -> Transformer:
        """Return a transformer with the same weights, for another thread.

        Args:
            step: called between the steps of a forward pass, from each of its threads; may wait.
            niceness: what its threads add to their nice value; the calling thread adds it itself.
        """
        return Transformer(
            self.backbone,
            self._embedding,
            self.layers,
            self._final_norm,
            self.threads,
            step=step,
            niceness=niceness,
        )

    def start(
        self, ids: Sequence[TokenIds], adapters: Sequence[str | None]
    ) -> Callable[[], NDArray[np.float32]]:
        """Compute a forward pass; the returned function returns its result (see ``embed``)."""
        vectors = self.embed(ids, adapters)
        return lambda: vectors

    def embed(self, ids: Sequence[TokenIds], adapters: Sequence[str | None]) -> NDArray[np.float32]:
        """Return the last token's hidden state of each text, after the final norm.

        Args:
            ids: int32 token ids [length] of each text.
            adapters: the adapter of each text; None for the bare backbone.

        Returns:
            float32 [texts, hidden], in the order of ``ids``, not normalised.
        """
        self._extend_cos_sin(max(map(len, ids)))
        shards, threads = shard(ids, adapters, self.backbone, self.threads)
        result = np.empty((len(ids), self.backbone.hidden), dtype=np.float32)

        def embed_shard(texts: Sequence[int]) -> None:
            torch.set_num_threads(threads)  # applies to the calling thread only
            result[texts] = self._forward([ids[i] for i in texts], [adapters[i] for i in texts])

        previous_threads = torch.get_num_threads()
        futures = [self._executor.submit(embed_shard, texts) for texts in shards[1:]]
        try:
            embed_shard(shards[0])
        finally:
            torch.set_num_threads(previous_threads)
            wait(futures)
        for future in futures:
            future.result()
        return result

    @torch.inference_mode()
    def _forward(
        self, ids: Sequence[TokenIds], adapters: Sequence[str | None]
    ) -> NDArray[np.float32]:
        packing = pack(ids, adapters, block_rows=self.block_rows, round_up=True)
        last = self._index(packing.last)
        cos_sin = self._cos_sin(packing)
        attention = GroupedAttention(packing, self.backbone, self.dtype, self._step)

        x = self._embedding.index_select(0, self._index(packing.ids))
        for layer in self.layers[:-1]:
            q, k, v = self._attention_inputs(layer, x, packing.blocks, cos_sin, "qkv")
            self._finish_layer(layer, x, attention.attend(q, k, v), packing.blocks)
        # Only the last tokens are read: the last layer computes just keys and values for others.
        layer = self.layers[-1]
        k, v = self._attention_inputs(layer, x, packing.blocks, cos_sin, "kv")
        x = x.index_select(0, last)
        last_cos_sin = cos_sin[0].index_select(0, last), cos_sin[1].index_select(0, last)
        (q,) = self._attention_inputs(layer, x, packing.slot_blocks, last_cos_sin, "q")
        self._finish_layer(layer, x, attention.attend_last(q, k, v), packing.slot_blocks)
        x = x.index_select(0, self._index(packing.slots)).float()
        vectors = self._norm(x, self._final_norm.float())
        result = np.empty((len(ids), self.backbone.hidden), dtype=np.float32)
        result[packing.order] = vectors.numpy()
        return result

    def _index(self, rows: NDArray[np.int64] | NDArray[np.int32]) -> torch.Tensor:
        return torch.from_numpy(rows)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Apply RMSNorm over the last axis, in chunks, so that float32 temporaries stay in cache.

        Zhang and Sennrich, arXiv 1910.07467: ``weight * x / sqrt(mean(x**2) + eps)``.
        """
        normed = [self._norm_chunk(chunk, weight) for (chunk,) in self._chunks(x)]
        return normed[0] if len(normed) == 1 else torch.cat(normed)

    def _norm_chunk(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        # rms_norm takes 50 % longer, because it allocates temporaries.
        y = x.to(torch.float32, copy=True)
        rms = torch.linalg.vector_norm(y, dim=-1, keepdim=True).mul_(x.shape[-1] ** -0.5)
        return y.div_(torch.hypot(rms, self._sqrt_norm_eps)).mul_(weight).to(x.dtype)

    def _chunks(self, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield chunks of the same rows of all tensors; small tensors are one chunk."""
        rows = len(tensors[0])
        step = max(1, CHUNK_ELEMENTS * rows // tensors[0].numel())
        if rows <= step:
            yield tensors
            return
        for start in range(0, rows, step):
            yield tuple(tensor[start : start + step] for tensor in tensors)

    def _attention_inputs(
        self, layer: Layer, x: torch.Tensor, blocks: Sequence[Block], cos_sin: CosSin, names: str
    ) -> list[torch.Tensor]:
        """Compute queries, keys and values, with per-head norms and rotary positions.

        Args:
            layer: the layer.
            x: [rows, hidden].
            blocks: blocks that cover the rows.
            cos_sin: rotary position factors of the rows.
            names: the tensors to compute: ``qkv``, ``kv`` or ``q``.

        Returns:
            The tensors in the order of ``names``: q [rows, heads, head_dim], k and v
            [rows, kv_heads, head_dim].
        """
        shape = self.backbone
        counts = {"q": shape.heads, "k": shape.kv_heads, "v": shape.kv_heads}
        first = 0 if names[0] == "q" else shape.heads
        sizes = [counts[name] for name in names]
        outputs = slice(first * shape.head_dim, (first + sum(sizes)) * shape.head_dim)
        rotated = sum(counts[name] for name in names if name != "v")
        norms = None if layer.qk_norm is None else layer.qk_norm[first : first + rotated]
        results = [x.new_empty(len(x), size, shape.head_dim) for size in sizes]
        for block in blocks:
            self._step()
            normed = self._norm(x[block.rows], layer.input_norm)
            heads = layer.qkv(normed, block.adapter, outputs).view(len(normed), -1, shape.head_dim)
            targets = [result[block.rows] for result in results]
            if names[-1] == "v":
                targets.pop().copy_(heads[:, rotated:])
            cos, sin = cos_sin
            self._rotate(heads[:, :rotated], norms, cos[block.rows], sin[block.rows], targets)
        return results

    def _rotate(
        self,
        heads: torch.Tensor,
        head_norms: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        results: Sequence[torch.Tensor],
    ) -> None:
        """Apply per-head norms, then rotary positions (Su et al., arXiv 2104.09864).

        The layout is half-split: dimension i is rotated with dimension i + head_dim / 2.

        Args:
            heads: [rows, heads, head_dim].
            head_norms: [heads, head_dim], RMSNorm weights; None for no norms.
            cos: [rows, 1, head_dim].
            sin: [rows, 1, head_dim], signed.
            results: tensors [rows, some heads, head_dim] to write to; together all heads.
        """
        sizes = [result.shape[1] for result in results]
        for chunk, chunk_cos, chunk_sin, *outs in self._chunks(heads, cos, sin, *results):
            normed = chunk if head_norms is None else self._norm_chunk(chunk, head_norms)
            rolled = torch.roll(normed, self.backbone.head_dim // 2, -1).mul_(chunk_sin)
            pairs = zip(torch.split(normed, sizes, 1), torch.split(rolled, sizes, 1), strict=True)
            for (cos_input, sin_term), out in zip(pairs, outs, strict=True):
                torch.addcmul(sin_term, cos_input, chunk_cos, out=out)

    def _finish_layer(
        self, layer: Layer, x: torch.Tensor, attended: torch.Tensor, blocks: Sequence[Block]
    ) -> None:
        """Add the projected attention output and then the MLP output to x in place."""
        for block in blocks:
            rows = x[block.rows]
            self._step()
            rows += layer.o(attended[block.rows], block.adapter)
            self._step()
            normed = self._norm(rows, layer.mlp_norm)
            gate, up = layer.gate_up(normed, block.adapter).chunk(2, -1)
            self._step()
            rows += layer.down(functional.silu(gate).mul_(up), block.adapter)

    @torch.inference_mode()
    def _extend_cos_sin(self, length: int) -> None:
        """Extend the tables of cos and signed sin to at least ``length`` positions."""
        if length > len(self._cos_table):
            size = 1 << (length - 1).bit_length()
            half = torch.arange(0, self.backbone.head_dim, 2).float()
            frequency = 1.0 / (self.backbone.rope_theta ** (half / self.backbone.head_dim))
            angle = torch.outer(torch.arange(size).float(), frequency)
            cos = torch.cat((angle.cos(), angle.cos()), -1).to(self.dtype)
            sin = torch.cat((-angle.sin(), angle.sin()), -1).to(self.dtype)
            self._cos_table, self._sin_table = cos, sin  # together, in case memory runs out before

    def _cos_sin(self, packing: Packing) -> CosSin:
        """Return the rotary position factors of each row."""
        rows = self._index(packing.positions)
        cos, sin = self._cos_table.index_select(0, rows), self._sin_table.index_select(0, rows)
        return cos[:, None], sin[:, None]
