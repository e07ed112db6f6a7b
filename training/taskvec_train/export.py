"""Export a checkpoint to serve, in the layout of jina-embeddings-v5-text, with a model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from taskvec.checkpoint.checkpoint import Checkpoint, read_checkpoint
from taskvec.checkpoint.files import PROMPTS_FILE
from taskvec.errors import CheckpointError
from taskvec_train.backbones import open_base
from taskvec_train.card import DATA, model_card
from taskvec_train.data.card import DATA_CARD
from taskvec_train.errors import TrainingError
from taskvec_train.files import atomic_folder
from taskvec_train.recipe import Recipe
from taskvec_train.tensors import save_tensors


def export(
    recipe: Recipe,
    student: Path,
    adapters: Mapping[str, Path],
    folder: Path,
    *,
    run: Path,
    data: Path,
    figures: str = "",
) -> None:
    """Write a checkpoint, atomically replacing an existing one.

    Args:
        recipe: the recipe of the run.
        student: folder of the distilled student.
        adapters: adapter name -> folder of the trained adapter.
        folder: of the checkpoint.
        run: folder of the run, whose metrics go into the model card.
        data: folder of the corpus; its data card, if it has one, is copied as DATA.md.
        figures: Markdown with evaluation results for the model card.

    Raises:
        TrainingError: the checkpoint cannot be served, or a file cannot be written.
    """
    base = open_base(student)
    dtype = getattr(torch, recipe.export.dtype)
    with atomic_folder(folder, replace=True) as unfinished:
        _save(student / "model.safetensors", unfinished / "model.safetensors", dtype)
        shutil.copy(base.tokenizer, unfinished / "tokenizer.json")
        _write(unfinished / "config.json", _config(recipe, base, list(adapters)))
        _write(unfinished / "tokenizer_config.json", _tokenizer_config(recipe, base))
        prompts = {"prompts": recipe.prompts.model_dump()}
        default = {"default_prompt_name": recipe.export.default_prompt}
        _write(unfinished / PROMPTS_FILE, prompts | default | {"similarity_fn_name": "cosine"})
        _write_sentence_transformers(unfinished, base.backbone.hidden)
        for name, source in adapters.items():
            target = unfinished / "adapters" / name
            target.mkdir(parents=True)
            copy_adapter(source, target, dtype)
        if (data / DATA_CARD).is_file():
            shutil.copy(data / DATA_CARD, unfinished / DATA)
        card = model_card(recipe, base.backbone, unfinished, run=run, figures=figures)
        (unfinished / "README.md").write_text(card)
        check_served(unfinished)


def copy_adapter(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Copy an adapter's files into a folder, and convert its weights."""
    _save(source / "adapter_model.safetensors", target / "adapter_model.safetensors", dtype)
    config = json.loads((source / "adapter_config.json").read_text())
    _write(target / "adapter_config.json", config | {"base_model_name_or_path": None})
    if (source / PROMPTS_FILE).is_file():
        shutil.copy(source / PROMPTS_FILE, target)


def check_served(folder: Path) -> Checkpoint:
    """Read a checkpoint with the service's checks.

    Raises:
        TrainingError: the service cannot serve it.
    """
    try:
        return read_checkpoint(folder, folder.name)
    except CheckpointError as error:
        raise TrainingError(f"The checkpoint cannot be served: {error}") from None


def _save(source: Path, file: Path, dtype: torch.dtype) -> None:
    save_tensors({key: value.to(dtype) for key, value in load_file(source).items()}, file)


def _config(recipe: Recipe, base: Checkpoint, adapters: Sequence[str]) -> dict[str, Any]:
    shape = base.backbone
    config: dict[str, Any] = {
        "architectures": ["JinaEmbeddingsV5Model"],
        "model_type": "jina_embeddings_v5",
        "task_names": list(adapters),
        "matryoshka_dimensions": [d for d in recipe.dimensions if d <= shape.hidden],
        "attention_bias": False,
        "dtype": recipe.export.dtype,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.max_positions,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": recipe.export.rope_theta or shape.rope_theta,
        "tie_word_embeddings": shape.causal,
        "vocab_size": shape.vocabulary,
    }
    if shape.causal:
        return config
    # The defaults of transformers may be ids that this vocabulary does not have.
    absent = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return config | {"is_decoder": False, "mask_token_id": 0, **absent}


def _tokenizer_config(recipe: Recipe, base: Checkpoint) -> dict[str, Any]:
    positions = base.backbone.max_positions
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": min(recipe.export.max_tokens or positions, positions),
        "padding_side": "right",
    }


def _write_sentence_transformers(folder: Path, hidden: int) -> None:
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules, indent=2) + "\n")
    (folder / "1_Pooling").mkdir()
    pooling = {
        "word_embedding_dimension": hidden,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": False,
        "pooling_mode_lasttoken": True,
        "include_prompt": True,
    }
    _write(folder / "1_Pooling" / "config.json", pooling)


def _write(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
