"""A complete recipe, from data to a checkpoint to serve."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from oracle import Oracle
from synthetic import ADAPTERS
from taskvec.checkpoint.checkpoint import read_checkpoint
from taskvec.engines.packed.weights import load_transformer
from taskvec_train.data.readers import read_pairs
from taskvec_train.errors import TrainingError
from taskvec_train.metrics import read_metrics
from taskvec_train.recipe import read_recipe
from taskvec_train.run import CHECKPOINT, run_recipe
from taskvec_train.tokens import TokenStore


def test_the_student_comes_closer_to_the_teacher(tiny_run: Path) -> None:
    """Stage 1's loss falls, and the cosine to the teacher on held-out texts rises."""
    rows = read_metrics(tiny_run / "distill" / "words")
    assert rows[-1]["distill"] < 0.7 * rows[0]["distill"]
    validated = [row["held_out_cosine_32"] for row in rows if "held_out_cosine_32" in row]
    assert validated[-1] > validated[0]


@pytest.mark.parametrize(
    ("adapter", "loss"),
    [
        ("retrieval", "infonce"),
        ("text-matching", "cosent"),
        ("text-matching", "infonce"),
        ("clustering", "distill"),
        ("classification", "infonce"),
    ],
)
def test_every_adapter_learns(tiny_run: Path, adapter: str, loss: str) -> None:
    """The adapter's losses fall."""
    values = [row[loss] for row in read_metrics(tiny_run / "adapt" / adapter) if loss in row]
    assert np.mean(values[-2:]) < np.mean(values[:2])


def test_hard_negatives_are_mined_once_and_kept(tiny_run: Path, data: Path) -> None:
    """Negatives are positives of other pairs, distinct, and stored once."""
    (file,) = (tiny_run / "mined").iterdir()
    pairs = read_pairs(data / "pairs.jsonl")
    positives = list(dict.fromkeys(pair.positive for pair in pairs))
    mined = np.load(file)
    assert mined.shape == (len(pairs), 4)
    assert (mined >= 0).any()
    for pair, row in zip(pairs, mined.tolist(), strict=True):
        negatives = [positives[index] for index in row if index >= 0]
        assert pair.positive not in negatives
        assert len(set(negatives)) == len(negatives)


def test_metrics_are_kept_as_csv_tensorboard_and_a_plot(tiny_run: Path) -> None:
    """A stage leaves a CSV, a plot and TensorBoard files, and no unfinished file."""
    folder = tiny_run / "adapt" / "retrieval"
    assert (folder / "metrics.csv").read_text().startswith("step,loss,")
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").iterdir())
    assert not [path for path in tiny_run.rglob("*") if path.name.endswith((".part", ".old"))]


def test_the_checkpoint_passes_the_check_of_the_service(tiny_run: Path) -> None:
    """``taskvec check`` accepts the checkpoint, and its card lists adapters and dimensions."""
    command = [sys.executable, "-m", "taskvec", "check", str(tiny_run / CHECKPOINT)]
    subprocess.run([*command, "--device", "cpu"], check=True, capture_output=True)
    card = read_checkpoint(tiny_run / CHECKPOINT, "tiny").card
    assert card.adapters == ADAPTERS
    assert card.matryoshka == (16, 32)
    config = json.loads((tiny_run / CHECKPOINT / "config.json").read_text())
    assert config["model_type"] == "jina_embeddings_v5"
    assert config["rope_theta"] == 200_000


def test_other_users_may_read_the_checkpoint(tiny_run: Path) -> None:
    """All files have the permissions of the umask, so that another user can serve them."""
    checkpoint = tiny_run / CHECKPOINT
    plain = (checkpoint / "config.json").stat().st_mode
    assert {path.stat().st_mode for path in checkpoint.rglob("*.*") if path.is_file()} == {plain}


def test_the_packed_engine_equals_transformers(tiny_run: Path, tmp_path: Path) -> None:
    """Transformers with peft gives the same vectors, for every adapter and the backbone."""
    checkpoint = read_checkpoint(tiny_run / CHECKPOINT, "tiny")
    transformer = load_transformer(
        checkpoint, device=torch.device("cpu"), dtype=torch.float32, merge=False
    )
    random = np.random.default_rng(0)
    ids = [random.integers(0, 40, length, dtype=np.int32) for length in (1, 5, 17, 60, 9)]
    adapters = [None, *checkpoint.card.adapters]
    vectors = transformer.embed(ids, adapters)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    oracle = Oracle(checkpoint.folder, "qwen3", checkpoint.card.adapters, tmp_path)
    truth = [oracle.embed(text, adapter) for text, adapter in zip(ids, adapters, strict=True)]
    assert np.abs(vectors - np.stack(truth)).max() < 1e-5


def test_the_card_states_data_seed_versions_and_recipe(tiny_run: Path, data: Path) -> None:
    """README.md names data, seed, versions, recipe and hashes; DATA.md is the data card."""
    card = (tiny_run / CHECKPOINT / "README.md").read_text()
    for content in ("Words in random order.", "Seed: 1.", "torch 2", '"similarity": 1.0', "sha256"):
        assert content in card
    assert "| distill words | 12 |" in card
    assert "[the data card](DATA.md)" in card
    assert (tiny_run / CHECKPOINT / "DATA.md").read_text() == (data / "card.md").read_text()


def test_the_same_seed_gives_the_same_weights(
    recipe_file: Path, data: Path, tmp_path: Path
) -> None:
    """Two runs with the same seed have the same weights bit for bit."""
    recipe = read_recipe(recipe_file, ["adapt=[]", "distill.words.steps=3"])
    first, second = (run_recipe(recipe, data, tmp_path / name, cpu=True) for name in "ab")
    weights = first / "model.safetensors"
    assert weights.read_bytes() == (second / "model.safetensors").read_bytes()


def test_tokens_are_counted_without_padding(recipe_file: Path, data: Path, tmp_path: Path) -> None:
    """The tokens of a step with all texts are those of all texts on disk."""
    changes = ["adapt=[]", "distill.words.steps=1", "distill.words.batch_tokens=100_000"]
    run_recipe(read_recipe(recipe_file, changes), data, tmp_path / "run", cpu=True)
    (row,) = read_metrics(tmp_path / "run" / "distill" / "words")
    stores = [TokenStore(folder) for folder in (tmp_path / "run" / "tokens").iterdir()]
    assert row["tokens"] == max(store.lengths.sum() for store in stores)


def test_progress_is_printed_without_a_terminal(
    recipe_file: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without a terminal, a line is printed for each saved state, and for the teacher."""
    changes = ["adapt=[]", "distill.words.steps=4", "distill.words.save_every=2"]
    run_recipe(read_recipe(recipe_file, changes), data, tmp_path / "run", cpu=True)
    printed = capfd.readouterr().err
    assert re.findall(r"distill words: step (\d) of 4, loss \d", printed) == ["2", "4"]
    assert re.search(r"teacher: \d+ texts", printed)


def test_a_run_resumes_only_with_its_own_recipe(
    recipe_file: Path, data: Path, tmp_path: Path
) -> None:
    """The same recipe trains nothing again; another seed in the same folder is an error."""
    changes = ["adapt=[]", "distill.words.steps=3"]
    run_recipe(read_recipe(recipe_file, changes), data, tmp_path / "run", cpu=True)
    metrics = tmp_path / "run" / "distill" / "words" / "metrics.csv"
    before = metrics.stat().st_mtime_ns
    run_recipe(read_recipe(recipe_file, changes), data, tmp_path / "run", cpu=True)
    assert metrics.stat().st_mtime_ns == before
    with pytest.raises(TrainingError, match="started with another recipe"):
        run_recipe(read_recipe(recipe_file, [*changes, "seed=2"]), data, tmp_path / "run", cpu=True)
