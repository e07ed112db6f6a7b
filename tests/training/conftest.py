"""Fixtures for the tests of training."""

from __future__ import annotations

from pathlib import Path

import pytest

from taskvec_train.recipe import read_recipe
from taskvec_train.run import run_recipe
from tinytraining import write_data, write_recipe, write_teacher


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny BERT."""
    return write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with files of every kind of record."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def tiny_run(teacher: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run of all stages."""
    folder = tmp_path_factory.mktemp("tiny")
    recipe = read_recipe(write_recipe(folder / "tiny.toml", teacher))
    run_recipe(recipe, data, folder / "run", cpu=True)
    return folder / "run"


@pytest.fixture
def recipe_file(tmp_path: Path, teacher: Path) -> Path:
    """Return a recipe file with all stages."""
    return write_recipe(tmp_path / "tiny.toml", teacher)
