"""The commands `corpus` and `mine`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import typer
from typer.testing import CliRunner

from taskvec_train.data import Pair, read_pairs
from taskvec_train.data.commands import corpus, mine
from taskvec_train.exit import FAILED

app = typer.Typer()
app.command()(corpus)
app.command()(mine)

PAIRS = [
    ("what barks", "A dog is a tame animal that barks at strangers."),
    ("what purrs", "A cat is a small beast that purrs when it is fed."),
]


def arguments(folder: Path) -> list[str]:
    """Write pairs and vectors; return the arguments of the command that mines them."""
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
    """The written file has the pairs in order, each with its negatives."""
    result = CliRunner().invoke(app, arguments(tmp_path), catch_exceptions=False)
    assert result.exit_code == 0
    (barks, dog), (purrs, cat) = PAIRS
    assert read_pairs(tmp_path / "mined.jsonl") == [
        Pair(barks, dog, (cat,)),
        Pair(purrs, cat, (dog,)),
    ]


def test_mine_with_bad_vectors_writes_nothing(tmp_path: Path):
    """Vectors with another number of rows are refused, and no file is written."""
    command = arguments(tmp_path)
    np.save(tmp_path / "anchors.npy", np.ones((3, 2), np.float32))
    result = CliRunner().invoke(app, command)
    assert result.exit_code == FAILED
    assert "anchors.npy: has the shape (3, 2), but must have 2 rows" in result.stderr
    assert not (tmp_path / "mined.jsonl").exists()


def test_a_corpus_does_not_replace_a_folder(tmp_path: Path):
    """An existing folder is refused before anything is downloaded."""
    command = ["corpus", "--out", str(tmp_path), "--work", str(tmp_path / "work")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == FAILED
    assert "already exists" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_is_reported(tmp_path: Path):
    """A file that cannot be written gives one sentence and the usual exit code."""
    command = arguments(tmp_path)
    (tmp_path / "mined.jsonl").mkdir()
    result = CliRunner().invoke(app, command)
    assert result.exit_code == FAILED
    assert "No incomplete file was left" in result.stderr
    assert not list(tmp_path.glob("*.partial"))
