"""A linear layer that any task's adapter can be asked of."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.nn import functional

EVERYTHING = slice(None)


@dataclass(frozen=True, slots=True)
class LowRank:
    """An adapter's factors for one layer: ``y += (x @ down.T) @ up``.

    Attributes:
        down: [rank, in], PEFT's lora_A.
        up: [rank, out], PEFT's lora_B transposed and scaled.
    """

    down: torch.Tensor
    up: torch.Tensor

    def merged_into(self, weight: torch.Tensor) -> torch.Tensor:
        """The full weight [out, in] with this adapter inside, summed in float32."""
        change = self.up.float().T @ self.down.float()
        return (weight.float() + change).to(weight.dtype)


@dataclass(frozen=True, slots=True)
class Projection:
    """``y = x @ W.T`` for the backbone, or with one adapter's change to W.

    Linear layers that read the same input are one Projection, their weights stacked: on short
    texts most of a product's time is the call.

    Attributes:
        weight: the backbone's [out, in].
        merged: adapter -> its own full weight.
        low_rank: adapter -> its factors, where it is not merged.
    """

    weight: torch.Tensor
    merged: dict[str | None, torch.Tensor] = field(default_factory=dict)
    low_rank: dict[str | None, LowRank] = field(default_factory=dict)

    def add(self, adapter: str, factors: LowRank, *, merge: bool) -> None:
        """Make an adapter available."""
        if merge:
            self.merged[adapter] = factors.merged_into(self.weight)
        else:
            dtype = self.weight.dtype
            self.low_rank[adapter] = LowRank(factors.down.to(dtype), factors.up.to(dtype))

    def __call__(
        self, x: torch.Tensor, adapter: str | None, outputs: slice = EVERYTHING
    ) -> torch.Tensor:
        """[rows, in] -> [rows, out], or only these outputs.

        An adapter without weights here leaves the backbone's.
        """
        y = functional.linear(x, self.merged.get(adapter, self.weight)[outputs])
        factors = self.low_rank.get(adapter)
        if factors is not None:
            y.addmm_(functional.linear(x, factors.down), factors.up[:, outputs])
        return y
