"""The student before training: its tokenizer, its weights, its projection to the teacher."""

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
_WORDS_AT_ONCE = 1024


def new_student(
    shape: Backbone, teacher: Teacher, texts: Iterable[str], least: int, seed: int
) -> tuple[Model, Tensor, dict[str, Any]]:
    """A student that knows the teacher's words before it is trained.

    Each piece of the trimmed vocabulary goes through the teacher alone; its vector, less the mean
    of all and projected on their principal directions, is its embedding. Layer 0 attends evenly
    and passes values through, the other layers start close to doing nothing: the last token's
    state is about the mean of the text's words.

    Args:
        shape: the backbone; its vocabulary is replaced by the trimmed one.
        teacher: of WordPiece tokens.
        texts: the corpus that decides which pieces are kept.
        least: how often a piece must occur in it.
        seed: of the random weights.

    Returns:
        The model in float32, the projection psi [teacher, hidden] that undoes the one of the
        embeddings, and tokenizer.json.

    Raises:
        TrainingError: the teacher's tokenizer cannot be trimmed, or the shape is wider than it.
    """
    if shape.hidden > teacher.dimension:
        raise TrainingError(
            f"A student {shape.hidden} wide cannot start from a teacher's words of "
            f"{teacher.dimension} dimensions: make it narrower, or name a wider teacher."
        )
    tokenizer = trimmed_tokenizer(teacher.tokenizer, texts, least)
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    vectors = _word_vectors(teacher, list(vocabulary))
    vectors -= vectors.mean(0)  # what all words share says nothing, and would drown the rest
    vectors[vocabulary[END]] = 0  # pooled: what the text says is added to nothing
    directions = _top_directions(vectors, shape.hidden)
    torch.manual_seed(seed)
    model = new_backbone(replace(shape, vocabulary=len(vocabulary)))
    _prepare(model)
    with torch.no_grad():
        embedded = vectors @ directions.T
        embedded *= 1 / embedded.square().mean().sqrt().clamp_min(1e-6)
        model.embed_tokens.weight.copy_(embedded)
    return model, directions.T.contiguous(), tokenizer


def _word_vectors(teacher: Teacher, pieces: list[str]) -> Tensor:
    """Each vocabulary piece through the teacher: float32 [pieces, dimension]."""
    tokenizer = Tokenizer.from_file(str(teacher.tokenizer))
    start, end = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id(END)
    ids = np.array([[start, tokenizer.token_to_id(piece), end] for piece in pieces])
    lengths = np.full(len(ids), 3)
    parts = [
        teacher.embed(ids[first : first + _WORDS_AT_ONCE], lengths[first : first + _WORDS_AT_ONCE])
        for first in track(range(0, len(ids), _WORDS_AT_ONCE), "words", transient=True)
    ]
    return torch.cat(parts).float().cpu().clone()


def _top_directions(vectors: Tensor, count: int) -> Tensor:
    """The eigenvectors of ``V^T V`` with the largest eigenvalues: [count, dimension]."""
    moments = vectors.double().T @ vectors.double()
    _, columns = torch.linalg.eigh(moments)
    top: Tensor = columns.T.flip(0)[:count].float()
    return top


def _prepare(model: Model) -> None:
    """Layer 0 averages its values; every layer's other contributions start small."""
    layers: Any = model.layers
    for number, layer in enumerate(layers):
        attention, mlp = layer.self_attn, layer.mlp
        torch.nn.init.normal_(mlp.down_proj.weight, std=1e-3)
        torch.nn.init.normal_(attention.o_proj.weight, std=1e-3)
        if number:
            continue
        _evenly_attending(attention)
        groups = attention.num_key_value_groups
        with torch.no_grad():
            # Values of one key head serve `groups` query heads: their sum gives each value back.
            torch.nn.init.eye_(attention.v_proj.weight)
            out = attention.v_proj.weight.T.reshape(model.config.hidden_size, -1)
            heads = out.reshape(len(out), -1, attention.head_dim)
            repeated = heads.repeat_interleave(groups, dim=1).reshape(len(out), -1) / groups
            attention.o_proj.weight.copy_(repeated)


def _evenly_attending(attention: Any) -> None:
    if hasattr(attention, "q_norm"):
        torch.nn.init.constant_(attention.q_norm.weight, 0.1)
    else:
        torch.nn.init.normal_(attention.q_proj.weight, std=1e-3)


def with_adapter(model: Model, name: str, rank: int, alpha: int, seed: int) -> PeftModel:
    """A frozen backbone with one new LoRA adapter on every linear layer; B is zero."""
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
    """Write a student that ``open_base`` reads, with its projection beside it."""
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
