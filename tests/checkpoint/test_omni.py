"""Checkpoints of jina-embeddings-v5-omni are refused by name, with the model to use instead."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from synthetic import TINY_NANO, TINY_SMALL, write_checkpoint
from taskvec.checkpoint.checkpoint import read_checkpoint
from taskvec.checkpoint.open import open_checkpoint
from taskvec.errors import CheckpointError

SMALLEST = {"vocabulary": 64, "hidden": 16, "layers": 2, "intermediate": 24, "rank": 4}
QWEN = replace(TINY_SMALL, heads=2, kv_heads=1, head_dim=16, **SMALLEST)
EURO = replace(TINY_NANO, heads=2, kv_heads=2, head_dim=8, **SMALLEST)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "jina_embeddings_v5_omni"},
        {"architectures": ["JinaEmbeddingsV5OmniModel"]},
        {"vision_config": {"hidden_size": 16}},
        {"text_config": {"hidden_size": 16}},
    ],
    ids=lambda config: next(iter(config)),
)
def test_a_config_of_an_omni_model_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    """A model type, a class or the part of another medium in config.json is named."""
    folder = write_checkpoint(tmp_path / "model", QWEN)
    change(folder, **config)
    with pytest.raises(CheckpointError, match="jina-embeddings-v5-omni") as refused:
        read_checkpoint(folder, "m")
    (stated,) = config.values()
    told = next(iter(config)) if isinstance(stated, dict) else str(stated).strip("[]'")
    assert told in str(refused.value)
    assert "jina-embeddings-v5-text-small or jinaai/jina-embeddings-v5-text-nano" in str(
        refused.value
    )


@pytest.mark.parametrize(("shape", "size"), [(QWEN, "small"), (EURO, "nano")])
@pytest.mark.parametrize("prefix", ["language_model.", "text_model.", "model.language_model."])
def test_weights_with_further_towers_are_refused(
    tmp_path: Path, shape: Any, size: str, prefix: str
) -> None:
    """Of an omni repository with a plain config, the first unexpected tensor is named."""
    folder = tmp_path / f"jina-embeddings-v5-omni-{size}"
    write_checkpoint(folder, shape, jina=False, adapters=(), key_prefix=prefix)
    with pytest.raises(CheckpointError, match="jina-embeddings-v5-omni checkpoint") as refused:
        open_checkpoint(str(folder))
    assert f"serve jinaai/jina-embeddings-v5-text-{size}, whose text vectors" in str(refused.value)
    assert "embed_tokens.weight" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_towers_beside_the_text_are_refused(tmp_path: Path) -> None:
    """Text weights with the known names do not make tensors of other media acceptable."""
    folder = tmp_path / "jina-embeddings-v5-omni-small-retrieval"
    write_checkpoint(folder, QWEN, jina=False, adapters=())
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"visual.patch_embed.weight": torch.zeros(4, 4)}, file)
    with pytest.raises(CheckpointError, match=r"omni checkpoint.*'visual\.patch_embed\.weight'"):
        open_checkpoint(str(folder))


def test_text_weights_alone_are_read(tmp_path: Path) -> None:
    """A copy with exactly the tensors and the config of a text model is one, whatever its name."""
    folder = tmp_path / "jina-embeddings-v5-omni-nano-text-matching"
    checkpoint = open_checkpoint(str(write_checkpoint(folder, EURO, jina=False, adapters=())))
    assert checkpoint.merged_task is not None
    assert checkpoint.merged_task.name == "text-matching"


def test_other_models_with_several_media_keep_their_own_error(tmp_path: Path) -> None:
    """An omni model of another family is not called one of Jina's."""
    folder = write_checkpoint(tmp_path / "model", QWEN)
    change(folder, model_type="qwen2_5_omni", architectures=["Qwen2_5OmniModel"])
    with pytest.raises(CheckpointError, match="unknown architecture 'qwen2_5_omni'"):
        read_checkpoint(folder, "m")


def change(folder: Path, **values: Any) -> None:
    """Change values of config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | values))
