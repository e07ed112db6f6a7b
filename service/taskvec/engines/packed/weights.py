"""Load the weights of a checkpoint into a Transformer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open

from taskvec.checkpoint.adapters import Adapter
from taskvec.checkpoint.backbone import Backbone
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.engines.packed.device import (
    forward_threads,
    is_out_of_memory,
    limit_kernel_cache,
)
from taskvec.engines.packed.gpu import GpuTransformer
from taskvec.engines.packed.lora import LoraLinear, LowRank
from taskvec.engines.packed.transformer import Layer, Transformer
from taskvec.errors import StartError

AnyTransformer = Transformer | GpuTransformer
"""The forward pass of a device: ``Transformer`` on a CPU, ``GpuTransformer`` otherwise."""

ReadTensor = Callable[[Path, str], torch.Tensor]
"""Returns the tensor with a key in a file."""

ReadWeight = Callable[[str], torch.Tensor]
"""Returns the backbone tensor with a name, on the device."""

STACKED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Field of ``Layer`` -> the modules of the checkpoint that are stacked to it, in this order."""


def load_transformer(
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    dtype: torch.dtype,
    merge: bool,
    threads: int = 0,
) -> AnyTransformer:
    """Load the backbone and every adapter.

    Args:
        checkpoint: a checkpoint whose tensors have been checked.
        device: device of the weights.
        dtype: bfloat16, float16 or float32. Adapters are always merged in float32.
        merge: True to merge each adapter into a copy of the weights, False to keep its low-rank
            factors.
        threads: processor threads of a forward pass; 0 for one per available core.
    """
    limit_kernel_cache()
    with ExitStack() as files:
        read = _reader(files)

        def tensor(name: str) -> torch.Tensor:
            # A tensor of safetensors maps the file, which would stay open without the clone.
            return read(*checkpoint.weights[name]).to(device, dtype).clone()

        layers = [
            _layer(tensor, f"layers.{i}", checkpoint.backbone)
            for i in range(checkpoint.backbone.layers)
        ]
        for adapter in checkpoint.adapters:
            for i, layer in enumerate(layers):
                _add_adapter(layer, i, adapter, read, checkpoint.backbone, merge=merge)
        embedding, final_norm = tensor("embed_tokens.weight"), tensor("norm.weight")
        if device.type != "cpu":
            return _for_gpu(
                GpuTransformer(checkpoint.backbone, embedding, layers, final_norm),
                checkpoint.card.adapters or [None],
            )
        cores = threads or forward_threads()
        return Transformer(checkpoint.backbone, embedding, layers, final_norm, cores)


def _for_gpu(transformer: GpuTransformer, adapters: Sequence[str | None]) -> GpuTransformer:
    """Compile the kernels and capture the graphs of a transformer.

    Raises:
        StartError: Triton is installed and cannot compile.
    """
    try:
        transformer.capture(adapters)
    except Exception as error:
        if is_out_of_memory(error) or not transformer.uses_triton:
            raise
        raise StartError(
            f"Triton cannot compile the kernels for {transformer.device} ({error}): install a C "
            "compiler and set TRITON_CACHE_DIR to a writable folder, or uninstall Triton, which is "
            "many times slower."
        ) from error
    return transformer


def _reader(files: ExitStack) -> ReadTensor:
    opened: dict[Path, safe_open] = {}

    def read(file: Path, key: str) -> torch.Tensor:
        if file not in opened:
            opened[file] = files.enter_context(safe_open(file, framework="pt"))
        tensor: torch.Tensor = opened[file].get_tensor(key)  # type: ignore[no-untyped-call]
        return tensor

    return read


def _layer(tensor: ReadWeight, prefix: str, backbone: Backbone) -> Layer:
    def linear(name: str) -> LoraLinear:
        weights = [tensor(f"{prefix}.{module}.weight") for module in STACKED[name]]
        return LoraLinear(torch.cat(weights) if len(weights) > 1 else weights[0])

    return Layer(
        input_norm=tensor(f"{prefix}.input_layernorm.weight"),
        qk_norm=_head_norms(tensor, prefix, backbone) if backbone.qk_norm else None,
        mlp_norm=tensor(f"{prefix}.post_attention_layernorm.weight"),
        qkv=linear("qkv"),
        o=linear("o"),
        gate_up=linear("gate_up"),
        down=linear("down"),
    )


def _head_norms(tensor: ReadWeight, prefix: str, backbone: Backbone) -> torch.Tensor:
    q, k = (tensor(f"{prefix}.self_attn.{name}_norm.weight") for name in "qk")
    return torch.cat((q.expand(backbone.heads, -1), k.expand(backbone.kv_heads, -1)))


def _add_adapter(
    layer: Layer,
    index: int,
    adapter: Adapter,
    read: ReadTensor,
    backbone: Backbone,
    *,
    merge: bool,
) -> None:
    """Add an adapter to a layer, with its factors stacked in the order of the weights.

    lora_b becomes block-diagonal, so that the factors of a module change only its outputs.
    """
    device = layer.input_norm.device
    for name, modules in STACKED.items():
        lora_as, lora_bs = [], []
        for module in modules:
            out, _ = backbone.projections[module]
            keys = adapter.keys.get((index, module))
            if keys is None:
                lora_bs.append(torch.empty(0, out, device=device))
                continue
            lora_a, lora_b = (read(adapter.weights, key).to(device, torch.float32) for key in keys)
            lora_as.append(lora_a)
            lora_bs.append(lora_b.T * adapter.scale)
        if lora_as:
            factors = LowRank(
                torch.cat(lora_as),
                torch.block_diag(*lora_bs),  # type: ignore[no-untyped-call]
            )
            getattr(layer, name).add(adapter.name, factors, merge=merge)
