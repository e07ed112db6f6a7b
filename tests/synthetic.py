"""Checkpoints with random weights in the layouts of jina-embeddings-v5-text.

Used by tests (a few narrow layers) and by loadtest (the real shapes).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from taskvec.checkpoint.open import DEFAULT_MODEL, open_checkpoint

ADAPTERS = ("retrieval", "text-matching", "clustering", "classification")


@dataclass(frozen=True)
class Shape:
    """Sizes that determine the tensors of a checkpoint."""

    architecture: str
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    norm_eps: float
    rope_theta: float
    max_positions: int
    rank: int = 32


SMALL = Shape("qwen3", 151_936, 1024, 28, 16, 8, 128, 3072, 1e-6, 3_500_000.0, 32_768)
"""jina-embeddings-v5-text-small: Qwen3-0.6B."""

NANO = Shape("eurobert", 128_256, 768, 12, 12, 12, 64, 3072, 1e-5, 1_000_000.0, 8192)
"""jina-embeddings-v5-text-nano: EuroBERT-210m."""

TINY_SMALL = replace(
    SMALL, hidden=128, layers=3, heads=4, kv_heads=2, head_dim=64, intermediate=192, rank=8
)
TINY_NANO = replace(
    NANO, hidden=96, layers=3, heads=3, kv_heads=3, head_dim=32, intermediate=128, rank=8
)


def write_checkpoint(
    folder: Path,
    shape: Shape,
    *,
    jina: bool = True,
    adapters: tuple[str, ...] = ADAPTERS,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    key_prefix: str = "",
    tokenizer: Path | None = None,
    seed: int = 0,
) -> Path:
    """Write a checkpoint.

    Args:
        folder: created if it does not exist.
        shape: sizes of the tensors.
        jina: True for model type ``jina_embeddings_v5``, False for the plain backbone's.
        adapters: names; each gets its own random weights.
        dtype: dtype of all tensors.
        shards: number of weight files; more than one adds an index.
        key_prefix: prefix of every key of the backbone, for example ``model.``.
        tokenizer: tokenizer.json to copy; None for that of the default model.
        seed: seed of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = torch.Generator().manual_seed(seed)
    backbone = _backbone(shape, random)
    tensors = {key_prefix + name: tensor.to(dtype) for name, tensor in backbone.items()}
    _save_sharded(folder, tensors, shards)
    _write(folder / "config.json", _config(shape, jina=jina, adapters=adapters))
    _write(
        folder / "config_sentence_transformers.json",
        {"prompts": {"query": "Query: ", "document": "Document: "}, "default_prompt_name": None},
    )
    source = tokenizer or open_checkpoint(DEFAULT_MODEL).tokenizer
    shutil.copy(source, folder / "tokenizer.json")
    _write(folder / "tokenizer_config.json", {"model_max_length": 10**30})
    for name in adapters:
        write_adapter(folder / "adapters" / name, shape, random, dtype=dtype)
    return folder


def write_adapter(
    folder: Path,
    shape: Shape,
    random: torch.Generator,
    *,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> None:
    """Write one LoRA adapter, large enough to change every vector."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for layer in range(shape.layers):
        for module, (out, into) in _projections(shape).items():
            key = f"base_model.model.layers.{layer}.{module}.lora"
            lora_a = torch.randn(shape.rank, into, generator=random) * into**-0.5
            lora_b = torch.randn(out, shape.rank, generator=random) * 0.3 * shape.rank**-0.5
            tensors[f"{key}_A.weight"] = lora_a.to(dtype)
            tensors[f"{key}_B.weight"] = lora_b.to(dtype)
    save_file(tensors, folder / "adapter_model.safetensors")
    base = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "r": shape.rank,
        "lora_alpha": shape.rank,
        "lora_dropout": 0.1,
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "target_modules": [name.rpartition(".")[2] for name in _projections(shape)],
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    _write(folder / "adapter_config.json", base | config)


def _backbone(shape: Shape, random: torch.Generator) -> dict[str, torch.Tensor]:
    def normal(*extents: int) -> torch.Tensor:
        return torch.randn(*extents, generator=random) * extents[-1] ** -0.5

    def gains(extent: int) -> torch.Tensor:
        return 1 + 0.1 * torch.randn(extent, generator=random)

    tensors = {
        "embed_tokens.weight": torch.randn(shape.vocabulary, shape.hidden, generator=random),
        "norm.weight": gains(shape.hidden),
    }
    for i in range(shape.layers):
        prefix = f"layers.{i}"
        tensors[f"{prefix}.input_layernorm.weight"] = gains(shape.hidden)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = gains(shape.hidden)
        for name, (out, into) in _projections(shape).items():
            tensors[f"{prefix}.{name}.weight"] = normal(out, into)
        if shape.architecture == "qwen3":
            tensors[f"{prefix}.self_attn.q_norm.weight"] = gains(shape.head_dim)
            tensors[f"{prefix}.self_attn.k_norm.weight"] = gains(shape.head_dim)
    return tensors


def _projections(shape: Shape) -> dict[str, tuple[int, int]]:
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {
        "self_attn.q_proj": (q, shape.hidden),
        "self_attn.k_proj": (kv, shape.hidden),
        "self_attn.v_proj": (kv, shape.hidden),
        "self_attn.o_proj": (shape.hidden, q),
        "mlp.gate_proj": (shape.intermediate, shape.hidden),
        "mlp.up_proj": (shape.intermediate, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.intermediate),
    }


def _config(shape: Shape, *, jina: bool, adapters: tuple[str, ...]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": ["JinaEmbeddingsV5Model"],
        "model_type": "jina_embeddings_v5",
        "task_names": list(adapters),
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.max_positions,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.architecture == "qwen3",
    }
    if shape.architecture == "qwen3" or shape.hidden != shape.heads * shape.head_dim:
        config["head_dim"] = shape.head_dim
    if shape.architecture == "eurobert":
        config |= {"is_decoder": False, "bos_token_id": 128_000, "eos_token_id": 128_001}
    if not jina:
        del config["task_names"]
        names = {"qwen3": "Qwen3Model", "eurobert": "EuroBertModel"}
        config |= {
            "model_type": shape.architecture,
            "architectures": [names[shape.architecture]],
        }
    return config


def _save_sharded(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    names = sorted(tensors)
    files = {
        name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors"
        for i, name in enumerate(names)
    }
    for file in set(files.values()):
        save_file({n: tensors[n] for n in names if files[n] == file}, folder / file)
    _write(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})


def _write(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")
