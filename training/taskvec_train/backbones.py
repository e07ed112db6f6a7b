"""Student backbones in transformers: Qwen3 (causal) and EuroBERT (bidirectional)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import EuroBertConfig, EuroBertModel, Qwen3Config, Qwen3Model

from taskvec.checkpoint.backbone import Backbone
from taskvec.checkpoint.checkpoint import Checkpoint, read_checkpoint
from taskvec.errors import CheckpointError
from taskvec_train.errors import TrainingError

Model = Qwen3Model | EuroBertModel


def new_backbone(shape: Backbone) -> Model:
    """Return a backbone with random weights, in float32."""
    common: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate,
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "max_position_embeddings": shape.max_positions,
        "pad_token_id": None,  # otherwise row 0 of the embedding table is not trained
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "sdpa",
    }
    if shape.causal:
        return Qwen3Model(Qwen3Config(**common, use_cache=False, tie_word_embeddings=True))
    return EuroBertModel(EuroBertConfig(**common, attention_dropout=0.0, mask_token_id=0))


def open_base(folder: Path) -> Checkpoint:
    """Open a checkpoint to train on, with the service's checks.

    Raises:
        TrainingError: it is missing, damaged or unsupported.
    """
    try:
        return read_checkpoint(folder, folder.name)
    except CheckpointError as error:
        raise TrainingError(str(error)) from None


def load_backbone(base: Checkpoint) -> Model:
    """Load the backbone of a checkpoint without its adapters, in float32."""
    model = new_backbone(base.backbone)
    tensors: dict[str, Tensor] = {}
    for file in sorted({file for file, _ in base.weights.values()}):
        loaded = load_file(file)
        tensors |= {
            name: loaded[key].float()
            for name, (source, key) in base.weights.items()
            if source == file
        }
    model.load_state_dict(tensors)
    return model


def set_rope_theta(model: Model, theta: float) -> None:
    """Set the base of the rotary position embedding; training uses a smaller one than serving."""
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": theta}
    device = model.embed_tokens.weight.device
    kind: Any = type(model.rotary_emb)
    model.rotary_emb = kind(model.config).to(device)


def last_states(model: nn.Module, ids: Tensor, lengths: Tensor, *, causal: bool) -> Tensor:
    """Return the hidden state of each text's last token: last-token pooling, as in the service.

    Args:
        model: a backbone, or a PEFT model around one.
        ids: int64 [texts, length], padded on the right.
        lengths: int64 [texts].
        causal: True for causal attention, which needs no mask for right padding.

    Returns:
        float32 [texts, hidden], not normalised.
    """
    mask = None
    if not causal:
        mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    picked: Tensor = states[torch.arange(len(ids), device=ids.device), lengths - 1]
    return picked.float()
