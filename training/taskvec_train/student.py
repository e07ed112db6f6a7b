"""The student before training: tokenizer, weights, and projection to the teacher."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.progress import track
from tokenizers import Tokenizer
from torch import Tensor

from taskvec.checkpoint.backbone import Backbone
from taskvec_train.backbones import Model, new_backbone
from taskvec_train.errors import TrainingError
from taskvec_train.teacher import Teacher
from taskvec_train.tensors import save_tensors
from taskvec_train.vocabulary import END, trimmed_tokenizer

LORA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_CHUNK_WORDS = 1024


def new_student(
    shape: Backbone, teacher: Teacher, texts: Iterable[str], min_count: int, seed: int
) -> tuple[Model, Tensor, dict[str, Any]]:
    """Make a student that is initialised from the teacher's word vectors.

    The teacher embeds each piece of the trimmed vocabulary by itself. The centred vectors,
    projected on their principal components, become the student's embedding table. Layer 0 attends
    uniformly and copies values, the other layers start close to the identity, so that the last
    token's state is about the mean of the text's word vectors.

    Args:
        shape: the backbone; its vocabulary size is replaced by that of the trimmed one.
        teacher: with a WordPiece tokenizer.
        texts: the corpus that decides which pieces are kept.
        min_count: minimum number of occurrences of a piece in the corpus.
        seed: of the random weights.

    Returns:
        The model in float32, the projection psi [teacher dimension, hidden] that inverts the
        projection of the embeddings, and the content of tokenizer.json.

    Raises:
        TrainingError: the tokenizer cannot be trimmed, or the shape is wider than the teacher.
    """
    if shape.hidden > teacher.dimension:
        raise TrainingError(
            f"A student of {shape.hidden} dimensions cannot start from a teacher of "
            f"{teacher.dimension}: lower student.hidden, or choose a wider teacher."
        )
    tokenizer = trimmed_tokenizer(teacher.tokenizer, texts, min_count)
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    vectors = _word_vectors(teacher, list(vocabulary))
    vectors -= vectors.mean(0)  # the common component carries no information
    vectors[vocabulary[END]] = 0  # the pooled token adds nothing of its own
    directions = _principal_directions(vectors, shape.hidden)
    torch.manual_seed(seed)
    model = new_backbone(replace(shape, vocabulary=len(vocabulary)))
    _initialise_layers(model)
    with torch.no_grad():
        embedded = vectors @ directions.T
        embedded *= 1 / embedded.square().mean().sqrt().clamp_min(1e-6)
        model.embed_tokens.weight.copy_(embedded)
    return model, directions.T.contiguous(), tokenizer


def _word_vectors(teacher: Teacher, pieces: list[str]) -> Tensor:
    """Embed each vocabulary piece with the teacher; returns float32 [pieces, dimension]."""
    tokenizer = Tokenizer.from_file(str(teacher.tokenizer))
    start, end = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id(END)
    ids = np.array([[start, tokenizer.token_to_id(piece), end] for piece in pieces])
    lengths = np.full(len(ids), 3)
    vectors = [
        teacher.embed(ids[first : first + _CHUNK_WORDS], lengths[first : first + _CHUNK_WORDS])
        for first in track(range(0, len(ids), _CHUNK_WORDS), "words", transient=True)
    ]
    return torch.cat(vectors).float().cpu().clone()


def _principal_directions(vectors: Tensor, count: int) -> Tensor:
    """Return the eigenvectors of ``V^T V`` with the largest eigenvalues: [count, dimension]."""
    moments = vectors.double().T @ vectors.double()
    _, columns = torch.linalg.eigh(moments)
    top: Tensor = columns.T.flip(0)[:count].float()
    return top


def _initialise_layers(model: Model) -> None:
    """Make layer 0 average its values, and all other contributions of all layers small."""
    layers: Any = model.layers
    for number, layer in enumerate(layers):
        attention, mlp = layer.self_attn, layer.mlp
        torch.nn.init.normal_(mlp.down_proj.weight, std=1e-3)
        torch.nn.init.normal_(attention.o_proj.weight, std=1e-3)
        if number:
            continue
        _attend_uniformly(attention)
        groups = attention.num_key_value_groups
        with torch.no_grad():
            # Each value head serves `groups` query heads: the sum of their outputs is the value.
            torch.nn.init.eye_(attention.v_proj.weight)
            out = attention.v_proj.weight.T.reshape(model.config.hidden_size, -1)
            heads = out.reshape(len(out), -1, attention.head_dim)
            repeated = heads.repeat_interleave(groups, dim=1).reshape(len(out), -1) / groups
            attention.o_proj.weight.copy_(repeated)


def _attend_uniformly(attention: Any) -> None:
    if hasattr(attention, "q_norm"):
        torch.nn.init.constant_(attention.q_norm.weight, 0.1)
    else:
        torch.nn.init.normal_(attention.q_proj.weight, std=1e-3)


def with_adapter(model: Model, name: str, rank: int, alpha: int, seed: int) -> PeftModel:
    """Add one LoRA adapter to every linear layer of a frozen backbone; B is 0."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=list(LORA_MODULES),
        task_type="FEATURE_EXTRACTION",
    )
    return get_peft_model(model, config, adapter_name=name)


def save_student(
    folder: Path, model: Model, projection: Tensor, tokenizer: dict[str, Any] | Path
) -> None:
    """Write a student's checkpoint for ``open_base``, and its projection."""
    weights = {
        name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()
    }
    save_tensors(weights, folder / "model.safetensors")
    save_tensors({"psi": projection.contiguous()}, folder / "projection.safetensors")
    model.config.save_pretrained(folder)
    if isinstance(tokenizer, Path):
        text = tokenizer.read_text()
    else:
        text = json.dumps(tokenizer, ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text)
