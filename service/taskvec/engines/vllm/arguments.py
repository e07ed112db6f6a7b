"""The arguments under which vLLM serves a checkpoint with an adapter per request.

The same for vLLM in this process and for a vLLM server: ``taskvec engine-args`` prints them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from taskvec.checkpoint.checkpoint import Checkpoint

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM accepts as max_lora_rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmOptions:
    """How vLLM runs; 0 stands for what suits the device.

    Attributes:
        dtype: ``auto`` (bfloat16), ``bfloat16``, ``float16`` or ``float32``.
        max_tokens: longest text; 0 for the model's own limit.
        max_batch_tokens: most tokens in one forward.
        max_batch_texts: most texts in one forward.
        memory_share: share of the device's memory (on a CPU: of the RAM) that vLLM may take.
        tensor_parallel: devices that one copy of the model is split over.
        data_parallel: copies of the model.
        extra: further engine arguments by vLLM's own names; they win over all others.
    """

    dtype: str = "auto"
    max_tokens: int = 0
    max_batch_tokens: int = 0
    max_batch_texts: int = 0
    memory_share: float = 0.0
    tensor_parallel: int = 1
    data_parallel: int = 1
    extra: Mapping[str, Any] = field(default_factory=dict)


def engine_arguments(
    checkpoint: Checkpoint, folder: Path, options: VllmOptions, *, gpu: bool
) -> dict[str, Any]:
    """VLLM's engine arguments, by the names of its AsyncEngineArgs.

    Args:
        checkpoint: what is served.
        folder: its plain copy, see ``checkpoint.plain``.
        options: what the operator chose.
        gpu: whether it runs on a GPU.
    """
    longest = checkpoint.card.max_tokens
    longest = min(options.max_tokens or longest, longest)
    batch = options.max_batch_tokens or (32_768 if gpu else 4096)
    if not checkpoint.backbone.causal:
        batch = max(batch, longest)  # a bidirectional text cannot be cut into chunks
    arguments: dict[str, Any] = {
        "model": str(folder),
        "runner": "pooling",
        "convert": "embed",
        "pooler_config": {"pooling_type": "LAST"},
        "dtype": "bfloat16" if options.dtype == "auto" else options.dtype,
        "max_model_len": longest,
        "max_num_batched_tokens": batch,
        "max_num_seqs": options.max_batch_texts or (1024 if gpu else 256),
        "gpu_memory_utilization": options.memory_share or (0.9 if gpu else 0.3),
        "tensor_parallel_size": options.tensor_parallel,
        "data_parallel_size": options.data_parallel,
        "skip_tokenizer_init": True,  # only token ids come in
        "scheduling_policy": "priority",
        "enable_prefix_caching": False,  # texts rarely share one, and its timing tells tenants
    }
    if not gpu:
        arguments["enforce_eager"] = True
    adapters = checkpoint.adapters
    if adapters:
        rank = max(adapter.rank for adapter in adapters)
        modules = sorted(name.rpartition(".")[2] for name in checkpoint.backbone.projections)
        arguments |= {
            "enable_lora": True,
            "max_loras": len(adapters),  # fewer would serve the tasks one after another
            "max_cpu_loras": len(adapters),
            "max_lora_rank": next((r for r in LORA_RANKS if r >= rank), rank),
            "lora_target_modules": modules,  # else the embedding table is wrapped, too
        }
    return arguments | dict(options.extra)


def server_command(
    checkpoint: Checkpoint, folder: Path, options: VllmOptions, *, gpu: bool
) -> list[str]:
    """The ``vllm serve`` command line for a checkpoint, word by word."""
    arguments = engine_arguments(checkpoint, folder, options, gpu=gpu)
    # Routes of the server that we do not use need a tokenizer; and a gateway's requests to it have
    # no priorities: it sends a few bulk texts at a time.
    for name in {"skip_tokenizer_init", "scheduling_policy"} - set(options.extra):
        del arguments[name]
    words = ["vllm", "serve", arguments.pop("model"), "--served-model-name", checkpoint.card.name]
    for name, value in arguments.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        else:
            words += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    if checkpoint.adapters:
        homes = (
            f"{adapter.name}={adapter.weights.parent.absolute()}" for adapter in checkpoint.adapters
        )
        words += ["--lora-modules", *homes]
    return words
