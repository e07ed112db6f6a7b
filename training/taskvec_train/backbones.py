"""The student's two shapes in transformers: Qwen3 (causal) and EuroBERT (bidirectional)."""

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
    """A backbone of random weights, in float32."""
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
        "pad_token_id": None,  # row 0 would not be trained otherwise
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "sdpa",
    }
    if shape.causal:
        return Qwen3Model(Qwen3Config(**common, use_cache=False, tie_word_embeddings=True))
    return EuroBertModel(EuroBertConfig(**common, attention_dropout=0.0, mask_token_id=0))


def open_base(folder: Path) -> Checkpoint:
    """A checkpoint to train on, checked as the service checks it.

    Raises:
        TrainingError: it is missing, damaged, or of a kind that is not served.
    """
    try:
        return read_checkpoint(folder, folder.name)
    except CheckpointError as error:
        raise TrainingError(str(error)) from None


def load_backbone(base: Checkpoint) -> Model:
    """The backbone of a checkpoint, in float32, without its adapters."""
    model = new_backbone(base.backbone)
    tensors: dict[str, Tensor] = {}
    for file in sorted({file for file, _ in base.weights.values()}):
        loaded = load_file(file)
        tensors |= {
            name: loaded[key].float()
            for name, (place, key) in base.weights.items()
            if place == file
        }
    model.load_state_dict(tensors)
    return model


def set_rope_theta(model: Model, theta: float) -> None:
    """Turn positions by other angles: training uses a smaller theta than serving."""
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": theta}
    device = model.embed_tokens.weight.device
    kind: Any = type(model.rotary_emb)
    model.rotary_emb = kind(model.config).to(device)


def last_states(model: nn.Module, ids: Tensor, lengths: Tensor, *, causal: bool) -> Tensor:
    """The state of each text's last token, as the service pools it.

    Args:
        model: a backbone, or a LoRA around one.
        ids: [texts, length], padded on the right.
        lengths: [texts].
        causal: right padding needs no mask then: nothing before it sees it.

    Returns:
        float32 [texts, hidden], not normalised.
    """
    mask = None
    if not causal:
        mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    picked: Tensor = states[torch.arange(len(ids), device=ids.device), lengths - 1]
    return picked.float()
