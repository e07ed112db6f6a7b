"""Forward pass of Qwen3 and EuroBERT over a packed batch on a GPU.

A forward pass is started without waiting for the device (``GpuTransformer.start``), so that the
next batch is packed while the device computes. Small batches replay a CUDA graph: launching their
some hundred kernels one by one takes longer than the kernels.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from taskvec.checkpoint.backbone import Backbone
from taskvec.engines.base import TokenIds
from taskvec.engines.packed import gpu_operations
from taskvec.engines.packed.lora import ALL_OUTPUTS, LoraLinear
from taskvec.engines.packed.packing import Block, Packing, Rows, pack
from taskvec.engines.packed.transformer import Layer

Vectors = NDArray[np.float32]
Ints = NDArray[np.int32] | NDArray[np.int64]

BLOCK_ROWS = 1 << 15
"""Maximum rows of one matrix product."""

TILE_ROWS = (16, 32, 64)
"""Queries per tile of the attention; a text uses the smallest that holds it, or several tiles."""

GRAPH_TOKENS = (32, 64, 128, 256, 512)
"""Token counts of the CUDA graphs; a batch with more tokens is launched kernel by kernel."""

GRAPH_TEXTS = 32
"""Maximum number of texts of a batch that replays a CUDA graph."""


def choose_operations(device: torch.device) -> Any:
    """Return the Triton kernels for a CUDA device if Triton is installed, else plain torch."""
    if device.type == "cuda" and importlib.util.find_spec("triton"):
        from taskvec.engines.packed import gpu_kernels  # noqa: PLC0415 - imports Triton

        return gpu_kernels
    return gpu_operations


@dataclass(frozen=True, slots=True, eq=False)
class _Inputs:
    """One batch on the device; all tensors are int32 and parts of one copied buffer.

    Attributes:
        ids: [rows], token ids.
        positions: [rows], position of each token in its text.
        last: [slots], row of the last token of each text.
        tiles: tiles of the attention, by number of queries.
        last_tiles: the tiles of the last tokens, one per text.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    last: torch.Tensor
    tiles: Sequence[tuple[int, torch.Tensor]]
    last_tiles: torch.Tensor


class GpuTransformer:
    """The backbone and its adapters, loaded on one GPU."""

    max_started = 2
    """Forward passes started before the first is finished: one is packed during another."""

    def __init__(
        self,
        backbone: Backbone,
        embedding: torch.Tensor,
        layers: Sequence[Layer],
        final_norm: torch.Tensor,
        operations: Any = None,
    ) -> None:
        """Combine loaded weights.

        Args:
            backbone: the shape.
            embedding: [vocabulary, hidden]; its device and dtype are those of the forward pass.
            layers: the transformer layers, in order.
            final_norm: [hidden], RMSNorm weights after the last layer.
            operations: the module of the operations; None to choose by device.
        """
        self.backbone = backbone
        self.layers = tuple(layers)
        self.device = embedding.device
        self.dtype = embedding.dtype
        self.block_rows = BLOCK_ROWS
        self.threads = 1
        self._embedding = embedding
        self._final_norm = final_norm
        self._ops = operations or choose_operations(self.device)
        self._pinned = self.device.type == "cuda"
        self._cos, self._sin = _rotary_tables(backbone, self.device)
        self._graphs: dict[tuple[str | None, int], _Graph] = {}

    def embed(self, ids: Sequence[TokenIds], adapters: Sequence[str | None]) -> Vectors:
        """See ``Transformer.embed``."""
        return self.start(ids, adapters)()

    @torch.inference_mode()
    def start(
        self, ids: Sequence[TokenIds], adapters: Sequence[str | None]
    ) -> Callable[[], Vectors]:
        """Start a forward pass; the returned function waits for its result (see ``embed``)."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # for this thread: kernels, events and graphs
        packing = pack(ids, adapters, block_rows=self.block_rows, round_up=False)
        graph = self._graph_for(packing)
        if graph is not None:
            return _in_order(graph.replay(packing), packing.order)
        inputs = self._copy(packing.ids, packing.positions, packing.last, _tiles(packing), packing)
        vectors = self.forward(inputs, packing.blocks, packing.slot_blocks)
        return _in_order(self.copy_back(vectors), packing.order)

    def capture(self, adapters: Sequence[str | None]) -> None:
        """Compile the kernels, and capture the CUDA graphs for small batches of each adapter.

        Does nothing with plain torch, whose attention waits for the device.
        """
        if not self.uses_triton:
            return
        self._compile(adapters[0])
        pool = None
        for tokens in reversed(GRAPH_TOKENS):  # the largest first: the others reuse its memory
            for adapter in adapters:
                graph = _Graph(self, adapter, tokens, pool)
                pool = graph.graph.pool()
                self._graphs[adapter, tokens] = graph

    @property
    def uses_triton(self) -> bool:
        """Whether the operations are Triton kernels."""
        return self._ops is not gpu_operations

    def _compile(self, adapter: str | None) -> None:
        """Embed a text of each tile size, so that no request waits for a compiler."""
        for rows in TILE_ROWS:
            self.embed([np.zeros(rows, np.int32)], [adapter])

    def _graph_for(self, packing: Packing) -> _Graph | None:
        rows, texts = len(packing.ids), len(packing.last)
        if rows > GRAPH_TOKENS[-1] or texts > GRAPH_TEXTS or len(packing.blocks) > 1:
            return None
        tokens = next(size for size in GRAPH_TOKENS if rows <= size)
        return self._graphs.get((packing.blocks[0].adapter, tokens))

    def _copy(
        self,
        ids: TokenIds,
        positions: Rows,
        last: Rows,
        tiles: Sequence[tuple[int, Rows]],
        packing: Packing,
    ) -> _Inputs:
        """Copy a batch to the device in one transfer."""
        sizes = [size for size, _ in tiles]
        tables = [table for _, table in tiles]
        parts: list[Ints] = [ids, positions, last, *tables, _last_tiles(packing)]
        host = torch.empty(
            sum(part.size for part in parts), dtype=torch.int32, pin_memory=self._pinned
        )
        np.concatenate([part.reshape(-1) for part in parts], out=host.numpy(), casting="unsafe")
        copied = host.to(self.device, non_blocking=True)
        on_device = [
            part.view(shape)
            for part, shape in zip(
                torch.split(copied, [part.size for part in parts]),
                [part.shape for part in parts],
                strict=True,
            )
        ]
        return _Inputs(
            on_device[0],
            on_device[1],
            on_device[2],
            list(zip(sizes, on_device[3:-1], strict=True)),
            on_device[-1],
        )

    def copy_back(self, vectors: torch.Tensor) -> Callable[[], Vectors]:
        """Start to copy vectors to the host; the returned function waits for them."""
        host = torch.empty(vectors.shape, dtype=torch.float32, pin_memory=self._pinned)
        host.copy_(vectors, non_blocking=True)
        if not self._pinned:
            return host.numpy
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()

        def wait() -> Vectors:
            done.synchronize()
            return host.numpy()

        return wait

    def forward(
        self, inputs: _Inputs, blocks: Sequence[Block], slot_blocks: Sequence[Block]
    ) -> torch.Tensor:
        """Return the last token's hidden state of each slot, float32 [slots, hidden]."""
        shape = self.backbone
        x = self._embedding.index_select(0, inputs.ids)
        rows = len(x)
        q_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        normed = torch.empty_like(x)
        qkv = x.new_empty(rows, q_width + 2 * kv_width)
        attended = x.new_empty(rows, q_width)
        gate_up = x.new_empty(rows, 2 * shape.intermediate)
        activated = x.new_empty(rows, shape.intermediate)
        heads = qkv.view(rows, -1, shape.head_dim)
        q, k, v = torch.split(heads, [shape.heads, shape.kv_heads, shape.kv_heads], 1)
        rotated = heads[:, : shape.heads + shape.kv_heads]
        for layer in self.layers[:-1]:
            self._norm(x, layer.input_norm, normed)
            self._linear(layer.qkv, normed, qkv, blocks)
            self._rotate(rotated, inputs.positions, layer.qk_norm)
            for tile_rows, tiles in inputs.tiles:
                self._ops.attend(q, k, v, tiles, tile_rows, attended, causal=shape.causal)
            self._finish_layer(layer, x, attended, normed, gate_up, activated, blocks)

        # Only the last tokens are read: the last layer computes just keys and values for others.
        layer = self.layers[-1]
        self._norm(x, layer.input_norm, normed)
        keys_values = slice(q_width, None)
        self._linear(layer.qkv, normed, qkv[:, keys_values], blocks, keys_values)
        norms = layer.qk_norm
        q_norms, k_norms = (
            (None, None) if norms is None else (norms[: shape.heads], norms[shape.heads :])
        )
        self._rotate(k, inputs.positions, k_norms)
        x = x.index_select(0, inputs.last)
        slots = len(x)
        last_q = x.new_empty(slots, shape.heads, shape.head_dim)
        last_normed = normed.index_select(0, inputs.last)
        flat = last_q.view(slots, -1)
        self._linear(layer.qkv, last_normed, flat, slot_blocks, slice(0, q_width))
        self._rotate(last_q, inputs.positions.index_select(0, inputs.last), q_norms)
        attended = torch.empty_like(flat)
        self._ops.attend(last_q, k, v, inputs.last_tiles, TILE_ROWS[0], attended, causal=False)
        self._finish_layer(
            layer, x, attended, last_normed, gate_up[:slots], activated[:slots], slot_blocks
        )
        vectors = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        self._norm(x, self._final_norm, vectors)
        return vectors

    def _norm(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        self._ops.rms_norm(x, weight, self.backbone.norm_eps, out)

    def _rotate(
        self, heads: torch.Tensor, positions: torch.Tensor, norms: torch.Tensor | None
    ) -> None:
        eps = self.backbone.norm_eps
        self._ops.rotate_heads(heads, positions, self._cos, self._sin, norms, eps)

    def _finish_layer(  # noqa: PLR0917 - the buffers of one forward pass
        self,
        layer: Layer,
        x: torch.Tensor,
        attended: torch.Tensor,
        normed: torch.Tensor,
        gate_up: torch.Tensor,
        activated: torch.Tensor,
        blocks: Sequence[Block],
    ) -> None:
        """Add the projected attention output and then the MLP output to x in place."""
        self._linear(layer.o, attended, x, blocks, add=True)
        self._norm(x, layer.mlp_norm, normed)
        self._linear(layer.gate_up, normed, gate_up, blocks)
        self._ops.silu_mul(gate_up, activated)
        self._linear(layer.down, activated, x, blocks, add=True)

    @staticmethod
    def _linear(
        linear: LoraLinear,
        x: torch.Tensor,
        out: torch.Tensor,
        blocks: Sequence[Block],
        outputs: slice = ALL_OUTPUTS,
        *,
        add: bool = False,
    ) -> None:
        """Write the layer's outputs, or add them to ``out``; rows of a block share an adapter.

        Low-rank adapters are two thin products per block, after one product for all rows.
        """
        merged = [linear.merged.get(block.adapter) for block in blocks]
        whole = all(weight is None for weight in merged)
        parts = (
            [(slice(None), linear.weight)]
            if whole
            else [
                (block.rows, linear.weight if weight is None else weight)
                for block, weight in zip(blocks, merged, strict=True)
            ]
        )
        for rows, weight in parts:
            transposed = weight[outputs].t()
            if add:
                out[rows].addmm_(x[rows], transposed)
            else:
                torch.mm(x[rows], transposed, out=out[rows])
        for block in blocks:
            factors = linear.low_rank.get(block.adapter)
            if factors is not None:
                low = x[block.rows] @ factors.lora_a.t()
                out[block.rows].addmm_(low, factors.lora_b[:, outputs])


class _Graph:
    """CUDA graph of the forward pass for up to ``tokens`` tokens and one adapter."""

    def __init__(
        self, transformer: GpuTransformer, adapter: str | None, tokens: int, pool: Any
    ) -> None:
        self._tokens = tokens
        self._tile_rows = min(TILE_ROWS[-1], tokens)
        self._tile_count = GRAPH_TEXTS + tokens // self._tile_rows
        sizes = [tokens, tokens, GRAPH_TEXTS, 4 * self._tile_count, 4 * GRAPH_TEXTS]
        self._host = torch.zeros(sum(sizes), dtype=torch.int32, pin_memory=True)
        self._parts = [part.numpy() for part in torch.split(self._host, sizes)]
        self._device_buffer = torch.zeros_like(self._host, device=transformer.device)
        ids, positions, last, tiles, last_tiles = torch.split(self._device_buffer, sizes)
        inputs = _Inputs(
            ids, positions, last, [(self._tile_rows, tiles.view(-1, 4))], last_tiles.view(-1, 4)
        )
        blocks = [Block(adapter, slice(0, tokens))]
        slot_blocks = [Block(adapter, slice(0, GRAPH_TEXTS))]

        def forward() -> torch.Tensor:
            return transformer.forward(inputs, blocks, slot_blocks)

        with torch.inference_mode():
            forward()  # compiles the kernels
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=pool):
                self._vectors = forward()
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._transformer = transformer

    def replay(self, packing: Packing) -> Callable[[], Vectors]:
        """Start the forward pass of a batch that fits."""
        self._copied.synchronize()  # the previous copy may still read the host's buffer
        (_, tiles), *_ = _tiles(packing, self._tile_rows)
        values: list[Ints] = [packing.ids, packing.positions, packing.last, tiles]
        values.append(_last_tiles(packing))
        for part, value in zip(self._parts, values, strict=True):
            part[: value.size] = value.reshape(-1)
            part[value.size :] = 0
        self._device_buffer.copy_(self._host, non_blocking=True)
        self._copied.record()
        self.graph.replay()
        return self._transformer.copy_back(self._vectors[: len(packing.last)])


def _rotary_tables(backbone: Backbone, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin of the rotary angles, each float32 [max_positions, head_dim / 2]."""
    half = torch.arange(0, backbone.head_dim, 2, device=device).float()
    frequency = 1.0 / (backbone.rope_theta ** (half / backbone.head_dim))
    angle = torch.outer(torch.arange(backbone.max_positions, device=device).float(), frequency)
    return angle.cos(), angle.sin()


def _in_order(wait: Callable[[], Vectors], order: Rows) -> Callable[[], Vectors]:
    def result() -> Vectors:
        packed = wait()
        vectors = np.empty_like(packed)
        vectors[order] = packed
        return vectors

    return result


def _tiles(packing: Packing, only: int | None = None) -> list[tuple[int, Rows]]:
    """Return the tiles of the attention, by number of queries; see ``gpu_operations.attend``.

    Args:
        packing: the batch.
        only: queries per tile for all texts; None to choose by the length of each text.
    """
    sizes = np.array(TILE_ROWS if only is None else [only])
    chosen = np.minimum(np.searchsorted(sizes, packing.lengths), len(sizes) - 1)
    tables = []
    for number in np.unique(chosen).tolist():
        size = int(sizes[number])
        texts = np.flatnonzero(chosen == number)
        lengths, starts = packing.lengths[texts], packing.starts[texts]
        counts = -(-lengths // size)
        first = (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)) * size
        start = np.repeat(starts, counts)
        tables.append(
            (size, np.stack((start + first, first, start, np.repeat(lengths, counts)), 1))
        )
    return tables


def _last_tiles(packing: Packing) -> Rows:
    """Return the tiles of the last token of each text, in the order of the slots."""
    slots = np.arange(len(packing.lengths))
    return np.stack((slots, packing.lengths - 1, packing.starts, packing.lengths), 1)
