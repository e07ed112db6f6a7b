"""Evaluation of a run: the model, its teacher, its untrained student, other models, BM25."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from heldout import QUERIES, write_all
from taskvec_train.cli import app
from taskvec_train.encoders import EvaluatedEncoder
from taskvec_train.recipe import Prompts
from taskvec_train.teacher import load_teacher


@pytest.fixture(scope="module")
def measured(
    tiny_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, object]]:
    """Return what the command prints, and the content of figures.json."""
    held_out = write_all(tmp_path_factory.mktemp("held-out"))
    recipe = tiny_run.parent / "tiny.toml"
    command = ["measure", str(recipe), "--out", str(tiny_run), "--held-out", str(held_out), "--cpu"]
    result = CliRunner().invoke(app, [*command, "--beside", "shipped=taskvec-mini"])
    assert result.exit_code == 0, result.output
    return result.stdout, json.loads((tiny_run / "figures.json").read_bytes())


def test_every_model_is_measured_on_every_kind(measured: tuple[str, dict[str, object]]) -> None:
    """Every model has results for all kinds of data, every adapter is a task, BM25 is included."""
    _, document = measured
    figures = document["figures"]
    assert isinstance(figures, list)
    kinds = {
        model: {figure["kind"] for figure in figures if figure["model"] == model}
        for model in ("teacher", "untrained", "shipped", "tiny")
    }
    every = {"retrieval", "sts", "classification", "clustering"}
    assert set(map(frozenset, kinds.values())) == {frozenset(every)}
    tasks = {figure["task"] for figure in figures if figure["model"] == "tiny"}
    assert tasks == {"base", "retrieval", "text-matching", "clustering", "classification"}
    assert [figure["data"] for figure in figures if figure["task"] == "bm25"]
    assert all(0 <= v <= 1 for f in figures for n, v in f["measures"].items() if n != "spearman")


def test_the_tables_have_the_values_of_the_json(
    measured: tuple[str, dict[str, object]], tiny_run: Path
) -> None:
    """figures.md is what is printed, has a row for each model and BM25, and marks best values."""
    printed, document = measured
    tables = (tiny_run / "figures.md").read_text()
    assert printed.endswith(tables)
    figures = document["figures"]
    assert isinstance(figures, list)
    (teacher,) = (
        figure["measures"]["ndcg@10"]
        for figure in figures
        if (figure["model"], figure["kind"], figure["output"]) == ("teacher", "retrieval", "float")
    )
    lines = tables.splitlines()
    (row,) = (line for line in lines[: lines.index("", 3)] if line.startswith("| teacher |"))
    assert f"{teacher:.3f}" in row
    for start in ("| bm25 |", "| untrained |", "| shipped, base |", "| tiny, retrieval |"):
        assert any(line.startswith(start) for line in lines)
    assert any(line.startswith("| retrieval, binary |") for line in lines)
    assert "**" in tables


def test_an_encoder_is_measured_with_its_prompts(teacher: Path) -> None:
    """Queries get the query prompt, whatever the order of lengths."""
    encoder = load_teacher(str(teacher), 32, torch.device("cpu"))
    model = EvaluatedEncoder("teacher", encoder, Prompts(query="query ", document=""), 64)
    advanced: list[int] = []
    texts = [f"snow {text}" for text in QUERIES] + ["ice"]
    found = model.embed(texts, "teacher.query", advanced.append)
    plain = EvaluatedEncoder("teacher", encoder, Prompts(query="", document=""), 1 << 20)
    truth = plain.embed([f"query {text}" for text in texts], "teacher.passage", advanced.append)
    assert np.abs(found - truth).max() < 1e-2  # bfloat16, if the processor is fast with it
    assert sum(advanced) == 2 * len(texts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "nowhere"], "run the recipe first"),
        (["--beside", "seed"], "must be NAME=MODEL"),
        (["--held-out", "nowhere"], "nowhere does not exist"),
        (["--beside", "seed=nowhere"], "'nowhere' is neither an existing folder"),
    ],
)
def test_invalid_arguments_are_refused(tiny_run: Path, options: list[str], message: str) -> None:
    """Invalid arguments give one sentence before anything is computed."""
    given = {"--out": str(tiny_run), "--held-out": str(tiny_run)}
    given |= dict(zip(options[::2], options[1::2], strict=True))
    words = [word for option in given.items() for word in option]
    result = CliRunner().invoke(app, ["measure", str(tiny_run.parent / "tiny.toml"), *words])
    assert result.exit_code == 3
    assert message in result.output
