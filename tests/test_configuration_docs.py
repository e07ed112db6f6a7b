"""The generated configuration pages agree with the settings."""

from __future__ import annotations

import runpy

import pytest

from conftest import repository

PAGES = runpy.run_path(str(repository() / "docs" / "render_configuration.py"))["pages"]()


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.name)
def test_generated_pages_are_up_to_date(file: object) -> None:
    """docs/configuration.md and .env.example equal the output of `make docs`."""
    assert file.read_text() == PAGES[file], "run `make docs`"
