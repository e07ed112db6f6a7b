"""Linear layers of the backbone with their LoRA adapters; each call applies at most one."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.nn import functional

ALL_OUTPUTS = slice(None)


@dataclass(frozen=True, slots=True)
class LowRank:
    """LoRA factors of one adapter for one layer: ``y += (x @ lora_a.T) @ lora_b``.

    Attributes:
        lora_a: [rank, in].
        lora_b: [rank, out], transposed and multiplied by the scale of the adapter.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor

    def merged_into(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight [out, in] plus this adapter, added in float32."""
        delta = self.lora_b.float().T @ self.lora_a.float()
        return (weight.float() + delta).to(weight.dtype)


@dataclass(frozen=True, slots=True)
class LoraLinear:
    """Linear layer ``y = x @ W.T`` of the backbone, and its LoRA adapters.

    Linear layers with the same input are stacked to one LoraLinear: with short texts most of the
    time of a matrix product is the call.

    Attributes:
        weight: [out, in], of the backbone.
        merged: adapter -> weight [out, in] with the adapter added.
        low_rank: adapter -> its factors, if it is not merged.
    """

    weight: torch.Tensor
    merged: dict[str | None, torch.Tensor] = field(default_factory=dict)
    low_rank: dict[str | None, LowRank] = field(default_factory=dict)

    def add(self, adapter: str, factors: LowRank, *, merge: bool) -> None:
        """Add an adapter, merged into a copy of the weight or as low-rank factors."""
        if merge:
            self.merged[adapter] = factors.merged_into(self.weight)
        else:
            dtype = self.weight.dtype
            self.low_rank[adapter] = LowRank(factors.lora_a.to(dtype), factors.lora_b.to(dtype))

    def __call__(
        self, x: torch.Tensor, adapter: str | None, outputs: slice = ALL_OUTPUTS
    ) -> torch.Tensor:
        """Apply the layer.

        Args:
            x: [rows, in].
            adapter: None, or an adapter without weights for this layer, applies the backbone only.
            outputs: the outputs to compute.

        Returns:
            [rows, outputs].
        """
        y = functional.linear(x, self.merged.get(adapter, self.weight)[outputs])
        factors = self.low_rank.get(adapter)
        if factors is not None:
            y.addmm_(functional.linear(x, factors.lora_a), factors.lora_b[:, outputs])
        return y
