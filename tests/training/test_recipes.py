"""The recipes in the repository, and errors of invalid ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import repository
from oracle import Oracle
from synthetic import TINY_NANO, TINY_SMALL, write_checkpoint
from taskvec.checkpoint.checkpoint import read_checkpoint
from taskvec.engines.packed.weights import load_transformer
from taskvec_train.errors import RecipeError
from taskvec_train.metrics import read_metrics
from taskvec_train.recipe import read_recipe
from taskvec_train.run import run_recipe

RECIPES = sorted((repository() / "training" / "recipes").glob("*.toml"))
SHORT = [
    "{}.steps=9",
    "{}.warmup=1",
    "{}.log_every=1",
    "{}.lr=2e-3",
    "{}.schedule='constant'",
]


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_is_valid(file: Path) -> None:
    """Each file is a valid recipe with four adapters."""
    recipe = read_recipe(file)
    losses = [task.loss for task in recipe.adapt]
    assert losses == ["retrieval", "text-matching", "clustering", "classification"]


@pytest.mark.parametrize("size", ["small", "nano"])
def test_a_dry_run_of_the_papers_recipes(
    size: str, teacher: Path, data: Path, tmp_path: Path
) -> None:
    """On a tiny checkpoint of its architecture, losses fall and the engine's vectors are right."""
    shape = replace(TINY_SMALL if size == "small" else TINY_NANO, vocabulary=200)
    base = write_checkpoint(
        tmp_path / "base", shape, jina=False, adapters=(), tokenizer=teacher / "tokenizer.json"
    )
    file = repository() / "training" / "recipes" / f"jina-v5-{size}.toml"
    original = read_recipe(file)
    changes = [f"student.base='{base}'", f"teacher.model='{teacher}'", "teacher.max_tokens=64"]
    changes += ["dimensions=[32, 64]", "export.dtype='float32'"]
    stages = [("distill", phase) for phase in original.distill]
    stages += [("adapt", task) for task in original.adapt]
    for kind, stage in stages:
        key = f"{kind}.{stage.name}"
        changes += [change.format(key) for change in SHORT]
        changes += [
            f"{key}.{kind_of_record}=['{kind_of_record}.jsonl']"
            for kind_of_record in ("texts", "pairs", "scored", "labelled")
            if getattr(stage, kind_of_record, ())
        ]
        small = {"distill": ("batch_tokens=1024", "min_tokens=4"), "adapt": ("batch=40", "rank=4")}
        changes += [f"{key}.{change}" for change in small[kind]]
    recipe = read_recipe(file, changes)
    folder = run_recipe(recipe, data, tmp_path / "run", cpu=True)
    for kind, stage in stages:
        rows = read_metrics(tmp_path / "run" / kind / stage.name)
        losses = [row["loss"] for row in rows]
        if stage.name != "text-matching":  # it has two kinds of batches
            assert np.mean(losses[-3:]) < np.mean(losses[:3]), stage.name
    assert (
        json.loads((folder / "config.json").read_text())["rope_theta"] == original.export.rope_theta
    )
    checkpoint = read_checkpoint(folder, size)
    transformer = load_transformer(
        checkpoint, device=torch.device("cpu"), dtype=torch.float32, merge=True
    )
    adapters = [None, *checkpoint.card.adapters]
    ids = [np.arange(3, 3 + 4 * n, dtype=np.int32) for n in range(1, 1 + len(adapters))]
    vectors = transformer.embed(ids, adapters)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    oracle = Oracle(folder, shape.architecture, checkpoint.card.adapters, tmp_path)
    truth = [oracle.embed(text, adapter) for text, adapter in zip(ids, adapters, strict=True)]
    assert np.abs(vectors - np.stack(truth)).max() < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("distill.words.stepz=3", r"distill\.0\.stepz: Extra inputs are not permitted"),
        ("distill.words.steps=0", r"distill\.0\.steps: .*greater than or equal to 1"),
        ("adapt.retrieval.pairs=[]", r"adapt\.0\.retrieval\.pairs: .*at least 1"),
        ("adapt.retrieval.loss='other'", "'retrieval', 'text-matching'"),
        ("adapt.clustering.labelled=[]", "set texts, labelled or both"),
        ("adapt.clustering.name='retrieval'", "two stages have the same name"),
        ("student.base='x'", "base is a complete model: remove"),
        ("distill.none.steps=3", "--set .* cannot be applied"),
        ("distill.words.steps", "--set .* cannot be applied"),
        ("seed='a'", "seed: .*integer"),
    ],
)
def test_an_invalid_recipe_names_the_key(recipe_file: Path, change: str, message: str) -> None:
    """The message names the invalid key and the reason."""
    with pytest.raises(RecipeError, match=message):
        read_recipe(recipe_file, [change])


def test_an_unreadable_recipe_is_refused(tmp_path: Path) -> None:
    """A missing file, another encoding and invalid TOML are errors."""
    file = tmp_path / "recipe.toml"
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(file)
    file.write_bytes(b"\xff")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(file)
    file.write_text("name = ")
    with pytest.raises(RecipeError, match="is not valid TOML"):
        read_recipe(file)
