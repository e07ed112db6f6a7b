"""The commands that make data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from taskvec_train.data import DataError, Pair, read_pairs
from taskvec_train.data.commands import corpus, mine

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
    with pytest.raises(DataError, match=r"anchors\.npy"):
        CliRunner().invoke(app, command, catch_exceptions=False)
    assert not (tmp_path / "mined.jsonl").exists()


def test_a_corpus_is_not_built_over_something(tmp_path: Path):
    """A folder that is there is refused before anything is fetched."""
    with pytest.raises(DataError, match="is there already"):
        CliRunner().invoke(
            app,
            ["corpus", "--out", str(tmp_path), "--work", str(tmp_path / "work")],
            catch_exceptions=False,
        )
    assert list(tmp_path.iterdir()) == []
