"""What several tests of training share."""

from __future__ import annotations

from pathlib import Path

import pytest

from taskvec_train.recipe import read_recipe
from taskvec_train.run import run_recipe
from tinytraining import write_data, write_recipe, write_teacher


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT."""
    return write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of every kind of record."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def tiny_run(teacher: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of all stages."""
    room = tmp_path_factory.mktemp("tiny")
    recipe = read_recipe(write_recipe(room / "tiny.toml", teacher))
    run_recipe(recipe, data, room / "run", cpu=True)
    return room / "run"


@pytest.fixture
def recipe_file(tmp_path: Path, teacher: Path) -> Path:
    """A recipe with all stages."""
    return write_recipe(tmp_path / "tiny.toml", teacher)
