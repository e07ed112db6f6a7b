"""Arguments for vLLM to serve a checkpoint with one adapter per request.

They are the same for vLLM in this process and for a vLLM server; ``taskvec engine-args`` prints
them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from taskvec.checkpoint.checkpoint import Checkpoint

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts for max_lora_rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmOptions:
    """Options of vLLM; 0 selects the default of the device.

    Attributes:
        dtype: ``auto`` (bfloat16), ``bfloat16``, ``float16`` or ``float32``.
        max_tokens: longest text in tokens; 0 for the limit of the model.
        max_batch_tokens: maximum tokens of one forward pass.
        max_batch_texts: maximum texts of one forward pass.
        memory_share: share of the device's memory (on a CPU: of the RAM) that vLLM may use.
        tensor_parallel: number of devices for one copy of the model.
        data_parallel: number of copies of the model.
        extra: further engine arguments by vLLM's names; they override all others.
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
    """Return vLLM's engine arguments, by the names of its AsyncEngineArgs.

    Args:
        checkpoint: the checkpoint to serve.
        folder: its copy for vLLM; see ``checkpoint.vllm_copy``.
        options: the options of the operator.
        gpu: True if vLLM runs on a GPU.
    """
    model_limit = checkpoint.card.max_tokens
    max_tokens = min(options.max_tokens or model_limit, model_limit)
    batch = options.max_batch_tokens or (32_768 if gpu else 4096)
    if not checkpoint.backbone.causal:
        batch = max(batch, max_tokens)  # vLLM cannot compute a bidirectional text in chunks
    arguments: dict[str, Any] = {
        "model": str(folder),
        "runner": "pooling",
        "convert": "embed",
        "pooler_config": {"pooling_type": "LAST"},
        "dtype": "bfloat16" if options.dtype == "auto" else options.dtype,
        "max_model_len": max_tokens,
        "max_num_batched_tokens": batch,
        "max_num_seqs": options.max_batch_texts or (1024 if gpu else 256),
        "gpu_memory_utilization": options.memory_share or (0.9 if gpu else 0.3),
        "tensor_parallel_size": options.tensor_parallel,
        "data_parallel_size": options.data_parallel,
        "skip_tokenizer_init": True,  # requests contain token ids
        "scheduling_policy": "priority",
        "enable_prefix_caching": False,  # rare hits, whose timing leaks across tenants
    }
    if not gpu:
        arguments["enforce_eager"] = True
    adapters = checkpoint.adapters
    if adapters:
        rank = max(adapter.rank for adapter in adapters)
        modules = sorted(name.rpartition(".")[2] for name in checkpoint.backbone.projections)
        arguments |= {
            "enable_lora": True,
            "max_loras": len(adapters),  # with fewer, tasks would run one after another
            "max_cpu_loras": len(adapters),
            "max_lora_rank": next((r for r in LORA_RANKS if r >= rank), rank),
            "lora_target_modules": modules,  # otherwise the embedding table is wrapped as well
        }
    return arguments | dict(options.extra)


def server_command(
    checkpoint: Checkpoint, folder: Path, options: VllmOptions, *, gpu: bool
) -> list[str]:
    """Return the words of the ``vllm serve`` command line for a checkpoint."""
    arguments = engine_arguments(checkpoint, folder, options, gpu=gpu)
    # Other routes of the server need a tokenizer. Requests of a gateway do not have priorities:
    # it limits the number of bulk calls instead.
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
        modules = (
            f"{adapter.name}={adapter.weights.parent.absolute()}" for adapter in checkpoint.adapters
        )
        words += ["--lora-modules", *modules]
    return words
