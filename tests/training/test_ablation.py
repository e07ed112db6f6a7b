"""Ablation: an adapter without each of its losses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from heldout import write_retrieval
from taskvec_train.ablation import variants_of
from taskvec_train.cli import app
from taskvec_train.metrics import read_metrics
from taskvec_train.recipe import read_recipe

QUICK = ["--set", "adapt.retrieval.steps=4"]


def test_every_variant_is_trained_with_every_seed(
    tiny_run: Path, data: Path, tmp_path: Path
) -> None:
    """The table has a row for each variant with its deviation; a left-out loss is not computed."""
    held_out = write_retrieval(tmp_path / "search")
    command = ["ablate", str(tiny_run.parent / "tiny.toml"), "--data", str(data), "--cpu"]
    command += ["--out", str(tiny_run), "--held-out", str(held_out), "--seeds", "2", *QUICK]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    lines = (tiny_run / "ablation.md").read_text().splitlines()
    rows = [line.split(" | ")[0].strip("| ") for line in lines[2:]]
    assert rows == ["all losses", "no infonce", "no distill", "no gor"]
    assert all("±" in cell for line in lines[2:] for cell in line.split(" | ")[1:])
    document = json.loads((tiny_run / "ablation.json").read_bytes())
    trained = {figure["task"] for figure in document["figures"]}
    assert len(trained) == 8
    (last, *_) = read_metrics(tiny_run / "adapt" / "retrieval-no-gor-1")
    assert "gor" not in last
    assert "infonce" in last
    weights = [
        (tiny_run / f"adapt/retrieval-no-gor-{seed}/final/adapter_model.safetensors").read_bytes()
        for seed in (1, 2)
    ]
    assert weights[0] != weights[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter", "nowhere"], "no adapter 'nowhere': choose from retrieval"),
        (["--adapter", "clustering"], "has only the loss distill"),
    ],
)
def test_an_adapter_that_cannot_be_ablated_is_refused(
    tiny_run: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    """An unknown adapter, or one with a single loss, is refused before anything is trained."""
    command = ["ablate", str(tiny_run.parent / "tiny.toml"), "--data", str(tmp_path)]
    command += ["--out", str(tmp_path / "run"), "--held-out", str(tmp_path), *options]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 3
    assert message in result.output
    assert not (tmp_path / "run").exists()


def test_the_adapter_with_all_losses_is_a_variant(recipe_file: Path) -> None:
    """Variants have the recipe's seed and the following ones, with and without each loss."""
    variants = variants_of(read_recipe(recipe_file), "text-matching", 3)
    assert [variant.seed for variant in variants if variant.losses == "all losses"] == [1, 2, 3]
    assert {variant.losses for variant in variants} == {
        *("all losses", "no cosent", "no infonce", "no distill"),
    }
