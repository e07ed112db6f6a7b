"""The commands that make data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import typer
from typer.testing import CliRunner

from taskvec_train.data import Pair, read_pairs
from taskvec_train.data.commands import corpus, mine
from taskvec_train.failures import FAILED

app = typer.Typer()
app.command()(corpus)
app.command()(mine)

PAIRS = [
    ("what barks", "A dog is a tame animal that barks at strangers."),
    ("what purrs", "A cat is a small beast that purrs when it is fed."),
]


def arguments(folder: Path) -> list[str]:
    """Write pairs and vectors, and return the command that mines them."""
    lines = (json.dumps({"anchor": anchor, "positive": text}) for anchor, text in PAIRS)
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    np.save(folder / "anchors.npy", np.array([[1, 0], [0, 1]], np.float32))
    np.save(folder / "positives.npy", np.array([[0.9, 0.4], [0.4, 0.9]], np.float32))
    return [
        "mine",
        *("--pairs", str(folder / "pairs.jsonl"), "--out", str(folder / "mined.jsonl")),
        *("--anchors", str(folder / "anchors.npy")),
        *("--positives", str(folder / "positives.npy")),
    ]


def test_mine_writes_pairs_that_can_be_read(tmp_path: Path):
    """The command's file has the pairs in order, each with its negatives."""
    result = CliRunner().invoke(app, arguments(tmp_path), catch_exceptions=False)
    assert result.exit_code == 0
    (barks, dog), (purrs, cat) = PAIRS
    assert read_pairs(tmp_path / "mined.jsonl") == [
        Pair(barks, dog, (cat,)),
        Pair(purrs, cat, (dog,)),
    ]


def test_mine_with_bad_vectors_writes_nothing(tmp_path: Path):
    """Vectors of another number of rows are refused, and no file is left behind."""
    command = arguments(tmp_path)
    np.save(tmp_path / "anchors.npy", np.ones((3, 2), np.float32))
    result = CliRunner().invoke(app, command)
    assert result.exit_code == FAILED
    assert "anchors.npy: has the shape (3, 2), wanted are 2 rows" in result.stderr
    assert not (tmp_path / "mined.jsonl").exists()


def test_a_corpus_is_not_built_over_something(tmp_path: Path):
    """A folder that is there is refused before anything is fetched."""
    command = ["corpus", "--out", str(tmp_path), "--work", str(tmp_path / "work")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == FAILED
    assert "exists already" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_is_reported(tmp_path: Path):
    """An error of the system is told in a sentence, and exits like every failure."""
    command = arguments(tmp_path)
    (tmp_path / "mined.jsonl").mkdir()
    result = CliRunner().invoke(app, command)
    assert result.exit_code == FAILED
    assert "Nothing half-written was left" in result.stderr
    assert not list(tmp_path.glob("*.partial"))
