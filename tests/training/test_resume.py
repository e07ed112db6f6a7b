"""Interrupted runs resume with the same result."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from taskvec_train.errors import TrainingError
from taskvec_train.loop import saved_states
from taskvec_train.metrics import read_metrics
from taskvec_train.recipe import read_recipe
from taskvec_train.run import CHECKPOINT, run_recipe

SHORT = ("adapt=[]", "distill.words.steps=40", "distill.words.save_every=5")


def weights(run: Path) -> dict[str, bytes]:
    """Return every weight file of a run's checkpoint."""
    return {
        str(file.relative_to(run)): file.read_bytes()
        for file in sorted((run / CHECKPOINT).rglob("*.safetensors"))
    }


def command(recipe: Path, data: Path, out: Path, *changes: str) -> list[str]:
    """Return the command line of a run."""
    sets = [part for change in changes for part in ("--set", change)]
    paths = [str(recipe), "--data", str(data), "--out", str(out)]
    return [sys.executable, "-m", "taskvec_train", "run", *paths, "--cpu", *sets]


def test_a_killed_run_ends_with_the_same_bytes(
    recipe_file: Path, data: Path, tmp_path: Path
) -> None:
    """A run that is killed and started again equals an uninterrupted one bit for bit."""
    uninterrupted = run_recipe(
        read_recipe(recipe_file, SHORT), data, tmp_path / "uninterrupted", cpu=True
    )
    killed = tmp_path / "killed"
    with subprocess.Popen(command(recipe_file, data, killed, *SHORT)) as process:
        while process.poll() is None and not saved_states(killed / "distill" / "words"):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert not (killed / CHECKPOINT).exists()
    subprocess.run(command(recipe_file, data, killed, *SHORT), check=True, capture_output=True)
    assert weights(killed) == weights(uninterrupted.parent)
    steps = [row["step"] for row in read_metrics(killed / "distill" / "words")]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("step", [4, 12, 20])
def test_an_adapter_resumes_from_any_state(
    tiny_run: Path, recipe_file: Path, data: Path, tmp_path: Path, step: int
) -> None:
    """Resuming before and after the snapshot step, whose weights are averaged, changes nothing."""
    changes = ["adapt.retrieval.save_every=4", "adapt.retrieval.keep=9"]
    recipe = read_recipe(recipe_file, changes)
    recipe = recipe.model_copy(update={"adapt": recipe.adapt[:1]})
    run = tmp_path / "run"
    for name in ("student", "distill", "teacher", "tokens"):
        shutil.copytree(tiny_run / name, run / name)
    run_recipe(recipe, data, run, cpu=True)
    before = weights(run)
    stage = run / "adapt" / "retrieval"
    shutil.rmtree(stage / "final")
    for number, file in saved_states(stage):
        if number > step:
            file.unlink()
    run_recipe(recipe, data, run, cpu=True)
    assert weights(run) == before


def test_a_damaged_state_is_named(recipe_file: Path, data: Path, tmp_path: Path) -> None:
    """A truncated state is an error that says what to do; without it, the run resumes."""
    recipe = read_recipe(recipe_file, SHORT)
    run_recipe(recipe, data, tmp_path, cpu=True)
    stage = tmp_path / "distill" / "words"
    shutil.rmtree(stage / "final")
    _, newest = saved_states(stage)[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.raises(TrainingError, match="remove it to resume from an earlier state"):
        run_recipe(recipe, data, tmp_path, cpu=True)
    newest.unlink()
    run_recipe(recipe, data, tmp_path, cpu=True)


def test_two_processes_train_one_model(recipe_file: Path, data: Path, tmp_path: Path) -> None:
    """Under torchrun the same command trains one model with two processes."""
    alone = command(recipe_file, data, tmp_path / "run", "adapt=[]", "distill.words.steps=6")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([alone[0], *launcher, *alone[1:]], check=True, capture_output=True)
    rows = read_metrics(tmp_path / "run" / "distill" / "words")
    assert rows[-1]["step"] == 6
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert weights(tmp_path / "run")
