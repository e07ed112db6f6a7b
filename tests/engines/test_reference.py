"""The numpy reference computes the same vectors as transformers and peft."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from oracle import Oracle
from synthetic import ADAPTERS, TINY_NANO, TINY_SMALL, Shape, write_adapter, write_checkpoint
from taskvec.checkpoint.checkpoint import Checkpoint, read_checkpoint
from taskvec.checkpoint.open import DEFAULT_MODEL, open_checkpoint
from taskvec.checkpoint.reference import reference_vectors
from taskvec.engines.base import TokenIds
from taskvec.engines.packed.weights import load_transformer

DIFFERENCE = 1e-5
LENGTHS = (1, 1, 2, 3, 5, 8, 13, 16, 17, 24, 31, 32, 33, 40, 41)
SHAPES = {
    "small": replace(TINY_SMALL, vocabulary=2000),
    "nano": TINY_NANO,  # transformers requires the padding id to be in the vocabulary
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def mixed_batch(checkpoint: Checkpoint) -> tuple[list[TokenIds], list[str | None]]:
    """Return texts of every length with every adapter and without, in random order."""
    random = np.random.default_rng(11)
    names: list[str | None] = [None, *checkpoint.card.adapters]
    pairs = [(length, name) for length in LENGTHS for name in names]
    chosen = [pairs[i] for i in random.permutation(len(pairs))]
    vocabulary = checkpoint.backbone.vocabulary
    ids = [random.integers(0, vocabulary, length, dtype=np.int32) for length, _ in chosen]
    return ids, [name for _, name in chosen]


def check_against_oracle(checkpoint: Checkpoint, room: Path) -> None:
    """Compare the reference for a mixed batch with the oracle for each text."""
    names = checkpoint.card.adapters
    oracle = Oracle(checkpoint.folder, checkpoint.backbone.architecture, names, room)
    ids, adapters = mixed_batch(checkpoint)
    assert set(adapters) == {None, *names}
    truth = [oracle.embed(text, name) for text, name in zip(ids, adapters, strict=True)]
    given = unit(reference_vectors(checkpoint, ids, adapters))
    assert given.shape == (len(ids), checkpoint.backbone.hidden)
    assert np.abs(given - np.stack(truth)).max() <= DIFFERENCE


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return normalised vectors."""
    scaled: NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return scaled


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_equals_the_oracle(tmp_path: Path, shape: Shape, dtype: torch.dtype) -> None:
    """For both architectures and every stored dtype, components differ by at most 1e-5."""
    folder = write_checkpoint(tmp_path / "checkpoint", shape, dtype=dtype, seed=4)
    check_against_oracle(read_checkpoint(folder, "tiny"), tmp_path)


@shapes
def test_it_reads_shards(tmp_path: Path, shape: Shape) -> None:
    """Weights in three files and with a key prefix give the same vectors."""
    folder = write_checkpoint(tmp_path / "checkpoint", shape, shards=3, key_prefix="model.", seed=5)
    assert len(list(folder.glob("model-*.safetensors"))) == 3
    check_against_oracle(read_checkpoint(folder, "tiny"), tmp_path)


def test_the_default_model_equals_the_oracle(tmp_path: Path) -> None:
    """Components for the checkpoint in the package differ by at most 1e-5."""
    check_against_oracle(open_checkpoint(DEFAULT_MODEL), tmp_path)


@shapes
def test_adapters_of_some_layers_and_other_scales(tmp_path: Path, shape: Shape) -> None:
    """Adapters for some modules, and adapters scaled by alpha or rsLoRA, are applied correctly."""
    folder = write_checkpoint(tmp_path / "checkpoint", shape, adapters=ADAPTERS[:3], seed=6)
    random = torch.Generator().manual_seed(6)
    homes = [folder / "adapters" / name for name in ADAPTERS[:3]]
    write_adapter(homes[0], shape, random, lora_alpha=3 * shape.rank)
    write_adapter(homes[1], shape, random, lora_alpha=5, use_rslora=True)
    write_adapter(homes[2], shape, random, target_modules=["q_proj", "down_proj"])
    file = homes[2] / "adapter_model.safetensors"
    kept = {k: v for k, v in load_file(file).items() if "q_proj" in k or "down_proj" in k}
    save_file(kept, file)
    checkpoint = read_checkpoint(folder, "tiny")
    scales = [adapter.scale for adapter in checkpoint.adapters]
    assert scales == pytest.approx([3, 5 / math.sqrt(shape.rank), 1])
    check_against_oracle(checkpoint, tmp_path)


def test_a_plain_backbone_equals_the_oracle(tmp_path: Path) -> None:
    """A checkpoint without adapters gives the vectors of the backbone."""
    shape = SHAPES["nano"]
    folder = write_checkpoint(tmp_path / "checkpoint", shape, jina=False, adapters=())
    check_against_oracle(read_checkpoint(folder, "tiny"), tmp_path)


def test_other_rope_and_norm_constants(tmp_path: Path) -> None:
    """rope_theta and the epsilon of the norms are read from the config."""
    shape = replace(SHAPES["small"], rope_theta=50.0, norm_eps=0.5)
    folder = write_checkpoint(tmp_path / "checkpoint", shape, seed=8)
    check_against_oracle(read_checkpoint(folder, "tiny"), tmp_path)


@shapes
def test_vectors_are_not_normalised(tmp_path: Path, shape: Shape) -> None:
    """Vectors have the norms of the packed engine's vectors."""
    checkpoint = read_checkpoint(write_checkpoint(tmp_path / "checkpoint", shape), "tiny")
    ids, adapters = mixed_batch(checkpoint)
    transformer = load_transformer(
        checkpoint, device=torch.device("cpu"), dtype=torch.float32, merge=False
    )
    wanted = np.linalg.norm(transformer.embed(ids, adapters), axis=1)
    given = reference_vectors(checkpoint, ids, adapters)
    assert given.dtype == np.float32
    assert np.linalg.norm(given, axis=1) == pytest.approx(wanted, rel=1e-4)
    assert wanted.min() > 2


@shapes
def test_a_batch_changes_no_vector(tmp_path: Path, shape: Shape) -> None:
    """A text has the same vector alone and in a mixed batch."""
    checkpoint = read_checkpoint(write_checkpoint(tmp_path / "checkpoint", shape), "tiny")
    ids, adapters = mixed_batch(checkpoint)
    together = unit(reference_vectors(checkpoint, ids, adapters))
    for i in range(0, len(ids), 5):
        alone = unit(reference_vectors(checkpoint, [ids[i]], [adapters[i]]))
        assert np.abs(together[i] - alone[0]).max() <= DIFFERENCE


@shapes
def test_ids_are_not_changed(tmp_path: Path, shape: Shape) -> None:
    """Read-only ids are accepted, and a second call gives exactly the same vectors."""
    checkpoint = read_checkpoint(write_checkpoint(tmp_path / "checkpoint", shape), "tiny")
    ids, adapters = mixed_batch(checkpoint)
    for text in ids:
        text.flags.writeable = False
    first = reference_vectors(checkpoint, ids, adapters)
    assert np.array_equal(first, reference_vectors(checkpoint, ids, adapters))


@shapes
def test_large_negative_gates_do_not_overflow(tmp_path: Path, shape: Shape) -> None:
    """Gates far below zero, as in large models, do not overflow."""
    folder = write_checkpoint(tmp_path / "checkpoint", shape)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if "gate_proj" in name:
            tensors[name] *= 100
    save_file(tensors, folder / "model.safetensors")
    ids = [np.arange(40, dtype=np.int32)]
    vectors = reference_vectors(read_checkpoint(folder, "tiny"), ids, [None])
    assert np.isfinite(vectors).all()


def test_the_checkpoints_have_jinas_model_type(tmp_path: Path) -> None:
    """The synthetic checkpoints of both architectures have Jina's model type."""
    for name, architecture in {"small": "qwen3", "nano": "eurobert"}.items():
        folder = write_checkpoint(tmp_path / name, SHAPES[name])
        assert json.loads((folder / "config.json").read_text())["model_type"].startswith("jina")
        assert read_checkpoint(folder, name).backbone.architecture == architecture
