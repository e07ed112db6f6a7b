"""The recipes in the repository, and what is said of wrong ones."""

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
def test_every_recipe_is_one(file: Path) -> None:
    """Each file can be read, and is about four adapters."""
    recipe = read_recipe(file)
    losses = [task.loss for task in recipe.adapt]
    assert losses == ["retrieval", "text-matching", "clustering", "classification"]


@pytest.mark.parametrize("size", ["small", "nano"])
def test_a_dry_run_of_the_papers_recipes(
    size: str, teacher: Path, data: Path, tmp_path: Path
) -> None:
    """On a tiny checkpoint of its architecture: data flows, losses fall, the engine loads it."""
    shape = replace(TINY_SMALL if size == "small" else TINY_NANO, vocabulary=200)
    base = write_checkpoint(
        tmp_path / "base", shape, jina=False, adapters=(), tokenizer=teacher / "tokenizer.json"
    )
    file = repository() / "training" / "recipes" / f"jina-v5-{size}.toml"
    whole = read_recipe(file)
    changes = [f"student.base='{base}'", f"teacher.model='{teacher}'", "teacher.max_tokens=64"]
    changes += ["dimensions=[32, 64]", "export.dtype='float32'"]
    stages = [("distill", phase) for phase in whole.distill]
    stages += [("adapt", task) for task in whole.adapt]
    for kind, stage in stages:
        place = f"{kind}.{stage.name}"
        changes += [change.format(place) for change in SHORT]
        changes += [
            f"{place}.{kind_of_record}=['{kind_of_record}.jsonl']"
            for kind_of_record in ("texts", "pairs", "scored", "labelled")
            if getattr(stage, kind_of_record, ())
        ]
        small = {"distill": ("batch_tokens=1024", "min_tokens=4"), "adapt": ("batch=40", "rank=4")}
        changes += [f"{place}.{change}" for change in small[kind]]
    recipe = read_recipe(file, changes)
    folder = run_recipe(recipe, data, tmp_path / "run", cpu=True)
    for kind, stage in stages:
        rows = read_metrics(tmp_path / "run" / kind / stage.name)
        losses = [row["loss"] for row in rows]
        if stage.name != "text-matching":  # its batches are of two kinds
            assert np.mean(losses[-3:]) < np.mean(losses[:3]), stage.name
    assert json.loads((folder / "config.json").read_text())["rope_theta"] == whole.export.rope_theta
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
    ("change", "said"),
    [
        ("distill.words.stepz=3", r"distill\.0\.stepz: Extra inputs are not permitted"),
        ("distill.words.steps=0", r"distill\.0\.steps: .*greater than or equal to 1"),
        ("adapt.retrieval.pairs=[]", r"adapt\.0\.retrieval\.pairs: .*at least 1"),
        ("adapt.retrieval.loss='other'", "'retrieval', 'text-matching'"),
        ("adapt.clustering.labelled=[]", "name texts, labelled or both"),
        ("adapt.clustering.name='retrieval'", "two stages have one name"),
        ("student.base='x'", "base is a whole model: leave out"),
        ("distill.none.steps=3", "--set .* cannot be applied"),
        ("distill.words.steps", "--set .* cannot be applied"),
        ("seed='a'", "seed: .*integer"),
    ],
)
def test_a_wrong_recipe_is_refused_by_key(recipe_file: Path, change: str, said: str) -> None:
    """The message names the file, the key and what is wrong with it."""
    with pytest.raises(RecipeError, match=said):
        read_recipe(recipe_file, [change])


def test_a_file_that_is_no_recipe(tmp_path: Path) -> None:
    """No such file, another encoding and no TOML are told apart."""
    file = tmp_path / "recipe.toml"
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(file)
    file.write_bytes(b"\xff")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(file)
    file.write_text("name = ")
    with pytest.raises(RecipeError, match="is no TOML"):
        read_recipe(file)
