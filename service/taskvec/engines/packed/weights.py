"""From a checkpoint's safetensors to a Transformer, on a device and in a number type."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open

from taskvec.checkpoint.adapters import Adapter
from taskvec.checkpoint.backbone import Backbone
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.engines.packed.device import available_cores, bound_kernels
from taskvec.engines.packed.lora import LowRank, Projection
from taskvec.engines.packed.transformer import Layer, Transformer

TensorReader = Callable[[Path, str], torch.Tensor]
NamedTensor = Callable[[str], torch.Tensor]

STACKED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""The linear layers of a checkpoint that share an input, in the order in which they are stacked."""


def load_transformer(
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    dtype: torch.dtype,
    merge: bool,
    threads: int = 0,
) -> Transformer:
    """Load the backbone and every adapter.

    Args:
        checkpoint: already checked, so every tensor is there and fits.
        device: where the weights go.
        dtype: bfloat16, float16 or float32; merging is summed in float32 all the same.
        merge: True gives each adapter full weights of its own, False keeps its low-rank factors.
        threads: processor threads of a forward; 0 for one per core that the process may use.
    """
    bound_kernels()
    with ExitStack() as files:
        read = _reader(files)

        def tensor(name: str) -> torch.Tensor:
            # clone: safetensors maps the file, and a mapped tensor would keep it open
            return read(*checkpoint.weights[name]).to(device, dtype).clone()

        layers = [
            _layer(tensor, f"layers.{i}", checkpoint.backbone)
            for i in range(checkpoint.backbone.layers)
        ]
        for adapter in checkpoint.adapters:
            for i, layer in enumerate(layers):
                _add_adapter(layer, i, adapter, read, checkpoint.backbone, merge=merge)
        return Transformer(
            checkpoint.backbone,
            tensor("embed_tokens.weight"),
            layers,
            tensor("norm.weight"),
            threads or available_cores(),
        )


def _reader(files: ExitStack) -> TensorReader:
    opened: dict[Path, safe_open] = {}

    def read(file: Path, key: str) -> torch.Tensor:
        if file not in opened:
            opened[file] = files.enter_context(safe_open(file, framework="pt"))
        tensor: torch.Tensor = opened[file].get_tensor(key)  # type: ignore[no-untyped-call]
        return tensor

    return read


def _layer(tensor: NamedTensor, prefix: str, backbone: Backbone) -> Layer:
    def projection(name: str) -> Projection:
        parts = [tensor(f"{prefix}.{module}.weight") for module in STACKED[name]]
        return Projection(torch.cat(parts) if len(parts) > 1 else parts[0])

    return Layer(
        input_norm=tensor(f"{prefix}.input_layernorm.weight"),
        qk_norm=_head_norms(tensor, prefix, backbone) if backbone.qk_norm else None,
        mlp_norm=tensor(f"{prefix}.post_attention_layernorm.weight"),
        qkv=projection("qkv"),
        o=projection("o"),
        gate_up=projection("gate_up"),
        down=projection("down"),
    )


def _head_norms(tensor: NamedTensor, prefix: str, backbone: Backbone) -> torch.Tensor:
    q, k = (tensor(f"{prefix}.self_attn.{name}_norm.weight") for name in "qk")
    return torch.cat((q.expand(backbone.heads, -1), k.expand(backbone.kv_heads, -1)))


def _add_adapter(
    layer: Layer,
    index: int,
    adapter: Adapter,
    read: TensorReader,
    backbone: Backbone,
    *,
    merge: bool,
) -> None:
    """Stack the factors as the weights are: those of each module act on its own outputs alone."""
    device = layer.input_norm.device
    for name, modules in STACKED.items():
        downs, ups = [], []
        for module in modules:
            out, _ = backbone.projections[module]
            keys = adapter.keys.get((index, module))
            if keys is None:
                ups.append(torch.empty(0, out, device=device))
                continue
            down, up = (read(adapter.weights, key).to(device, torch.float32) for key in keys)
            downs.append(down)
            ups.append(up.T * adapter.scale)
        if downs:
            factors = LowRank(torch.cat(downs), torch.block_diag(*ups))  # type: ignore[no-untyped-call]
            getattr(layer, name).add(adapter.name, factors, merge=merge)
