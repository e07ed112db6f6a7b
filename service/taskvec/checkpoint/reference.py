"""Reference implementation of the model in numpy and float32, which every engine must match.

It works without torch, so that a gateway can check its servers. Weights are read layer by layer: a
0.6B model takes seconds and a few hundred megabytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from taskvec.checkpoint.backbone import Backbone
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.checkpoint.files import TensorReader

Matrix = NDArray[np.float32]


def reference_vectors(
    checkpoint: Checkpoint, texts: Sequence[NDArray[np.int32]], adapters: Sequence[str | None]
) -> Matrix:
    """Embed texts one by one in float32.

    Args:
        checkpoint: the model.
        texts: int32 token ids [length] of each text.
        adapters: the adapter of each text; None for the bare backbone.

    Returns:
        float32 [texts, hidden], the last token's hidden state after the final norm, not
        normalised.
    """
    return _Reference(checkpoint, texts, adapters).run()


class _Reference:
    """One forward pass; all texts are concatenated to one [tokens, hidden] matrix."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        texts: Sequence[NDArray[np.int32]],
        adapters: Sequence[str | None],
    ) -> None:
        self._backbone: Backbone = checkpoint.backbone
        self._checkpoint = checkpoint
        self._tensors = TensorReader()
        self._ids = np.concatenate(texts).astype(np.int64)
        ends = np.cumsum([len(text) for text in texts])
        self._texts = [slice(end - len(text), end) for end, text in zip(ends, texts, strict=True)]
        self._by_adapter = {
            adapter.name: np.concatenate(
                [
                    np.arange(text.start, text.stop)
                    for text, name in zip(self._texts, adapters, strict=True)
                    if name == adapter.name
                ]
                or [np.empty(0, dtype=np.int64)]
            )
            for adapter in checkpoint.adapters
        }

    def run(self) -> Matrix:
        hidden = self._weight("embed_tokens", rows=self._ids)
        for layer in range(self._backbone.layers):
            prefix = f"layers.{layer}"
            hidden += self._attention(
                layer, self._norm(hidden, self._weight(f"{prefix}.input_layernorm"))
            )
            hidden += self._mlp(
                layer, self._norm(hidden, self._weight(f"{prefix}.post_attention_layernorm"))
            )
        last = hidden[[text.stop - 1 for text in self._texts]]
        return self._norm(last, self._weight("norm"))

    def _weight(self, name: str, rows: NDArray[np.int64] | None = None) -> Matrix:
        return self._tensors.read(*self._checkpoint.weights[f"{name}.weight"], rows)

    def _norm(self, values: Matrix, gain: Matrix) -> Matrix:
        scale = np.sqrt(np.mean(values**2, axis=-1, keepdims=True) + self._backbone.norm_eps)
        normed: Matrix = (values / scale * gain).astype(np.float32)
        return normed

    def _linear(self, layer: int, module: str, values: Matrix) -> Matrix:
        """Return ``x W^T``, plus ``scale (x A^T) B^T`` for texts with an adapter for this layer."""
        result: Matrix = values @ self._weight(f"layers.{layer}.{module}").T
        for adapter in self._checkpoint.adapters:
            rows, keys = self._by_adapter[adapter.name], adapter.keys.get((layer, module))
            if keys is not None and len(rows):
                lora_a, lora_b = (self._tensors.read(adapter.weights, key) for key in keys)
                result[rows] += np.float32(adapter.scale) * (values[rows] @ lora_a.T @ lora_b.T)
        return result

    def _attention(self, layer: int, values: Matrix) -> Matrix:
        shape = self._backbone
        q, k, v = (
            self._linear(layer, f"self_attn.{name}_proj", values).reshape(-1, heads, shape.head_dim)
            for name, heads in (("q", shape.heads), ("k", shape.kv_heads), ("v", shape.kv_heads))
        )
        if shape.qk_norm:
            q = self._norm(q, self._weight(f"layers.{layer}.self_attn.q_norm"))
            k = self._norm(k, self._weight(f"layers.{layer}.self_attn.k_norm"))
        mixed = np.empty_like(q)
        for text in self._texts:
            mixed[text] = self._attend(q[text], k[text], v[text])
        return self._linear(layer, "self_attn.o_proj", mixed.reshape(len(values), -1))

    def _attend(self, q: Matrix, k: Matrix, v: Matrix) -> Matrix:
        """Apply RoPE and compute attention within one text.

        Args:
            q: [length, heads, head_dim].
            k: [length, kv_heads, head_dim].
            v: [length, kv_heads, head_dim].
        """
        shape, length = self._backbone, len(q)
        angles = np.arange(length)[:, None] * shape.rope_theta ** (
            -np.arange(0, shape.head_dim, 2) / shape.head_dim
        )
        cos, sin = (np.tile(of(angles), 2)[:, None].astype(np.float32) for of in (np.cos, np.sin))
        q, k = (part * cos + _rotated(part) * sin for part in (q, k))
        k, v = (np.repeat(values, shape.heads // shape.kv_heads, axis=1) for values in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) * np.float32(shape.head_dim**-0.5)
        if shape.causal:
            scores += np.triu(np.full((length, length), -np.inf, dtype=np.float32), 1)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        attended: Matrix = np.einsum("hqk,khd->qhd", weights, v)
        return attended

    def _mlp(self, layer: int, values: Matrix) -> Matrix:
        gate = self._linear(layer, "mlp.gate_proj", values)
        up = self._linear(layer, "mlp.up_proj", values)
        return self._linear(layer, "mlp.down_proj", gate * (0.5 + 0.5 * np.tanh(0.5 * gate)) * up)


def _rotated(values: Matrix) -> Matrix:
    first, second = np.split(values, 2, axis=-1)
    return np.concatenate([-second, first], axis=-1)
