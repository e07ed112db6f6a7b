"""From a checkpoint's safetensors to a Transformer, on a device and in a number type."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open

from taskvec.checkpoint.adapters import Adapter
from taskvec.checkpoint.layout import Checkpoint
from taskvec.engines.packed.projection import LowRank, Projection
from taskvec.engines.packed.transformer import Layer, Transformer

TensorReader = Callable[[Path, str], torch.Tensor]


def load_transformer(
    checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype, merge: bool
) -> Transformer:
    """Load the backbone and every adapter.

    Args:
        checkpoint: already checked, so every tensor is there and fits.
        device: where the weights go.
        dtype: bfloat16, float16 or float32; merging is summed in float32 all the same.
        merge: True gives each adapter full weights of its own, False keeps its low-rank factors.
    """
    with ExitStack() as files:
        read = _reader(files)

        def tensor(name: str) -> torch.Tensor:
            # clone: safetensors maps the file, and a mapped tensor would keep it open
            return read(*checkpoint.weights[name]).to(device, dtype).clone()

        layers = [
            _layer(tensor, f"layers.{i}", qk_norm=checkpoint.backbone.qk_norm)
            for i in range(checkpoint.backbone.layers)
        ]
        for adapter in checkpoint.adapters:
            _add_adapter(layers, adapter, read, device, merge=merge)
        return Transformer(
            checkpoint.backbone, tensor("embed_tokens.weight"), layers, tensor("norm.weight")
        )


def _reader(files: ExitStack) -> TensorReader:
    opened: dict[Path, safe_open] = {}

    def read(file: Path, key: str) -> torch.Tensor:
        if file not in opened:
            opened[file] = files.enter_context(safe_open(file, framework="pt"))
        tensor: torch.Tensor = opened[file].get_tensor(key)  # type: ignore[no-untyped-call]
        return tensor

    return read


def _layer(tensor: Callable[[str], torch.Tensor], prefix: str, *, qk_norm: bool) -> Layer:
    def projection(name: str) -> Projection:
        return Projection(tensor(f"{prefix}.{name}.weight"))

    return Layer(
        input_norm=tensor(f"{prefix}.input_layernorm.weight"),
        q=projection("self_attn.q_proj"),
        k=projection("self_attn.k_proj"),
        v=projection("self_attn.v_proj"),
        o=projection("self_attn.o_proj"),
        q_norm=tensor(f"{prefix}.self_attn.q_norm.weight") if qk_norm else None,
        k_norm=tensor(f"{prefix}.self_attn.k_norm.weight") if qk_norm else None,
        mlp_norm=tensor(f"{prefix}.post_attention_layernorm.weight"),
        gate=projection("mlp.gate_proj"),
        up=projection("mlp.up_proj"),
        down=projection("mlp.down_proj"),
    )


def _add_adapter(
    layers: list[Layer], adapter: Adapter, read: TensorReader, device: torch.device, *, merge: bool
) -> None:
    for (layer, module), (key_a, key_b) in adapter.keys.items():
        down = read(adapter.weights, key_a).to(device, torch.float32)
        up = read(adapter.weights, key_b).to(device, torch.float32).T.contiguous() * adapter.scale
        layers[layer].projections[module].add(adapter.name, LowRank(down, up), merge=merge)
