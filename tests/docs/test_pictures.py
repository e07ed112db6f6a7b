"""Pictures of the documentation that are drawn from results."""

from __future__ import annotations

import copy
import json
import runpy

import pytest

from conftest import repository

DRAWING = runpy.run_path(str(repository() / "docs" / "render_peers.py"))
PAGES = DRAWING["pages"]()
RESULT = json.loads(DRAWING["RESULT"].read_text())


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.name)
def test_the_committed_picture_is_up_to_date(file: object) -> None:
    """docs/peers.svg is what `make docs` would write."""
    assert file.read_text() == PAGES[file], "run `make docs`"


def test_the_picture_follows_the_result() -> None:
    """Another throughput in the result gives another picture."""
    result = copy.deepcopy(RESULT)
    figures = result["mini"]["bulk"]["texts_a_second"]
    figures["taskvec"] = {name: 2 * value for name, value in figures["taskvec"].items()}
    assert DRAWING["picture"](result) != DRAWING["picture"](RESULT)


def test_the_picture_has_a_row_for_each_model() -> None:
    """A result with two models is drawn with the panels of both."""
    result = RESULT | {"qwen3-0.6b": RESULT["mini"]}
    both, one = (DRAWING["picture"](each).count('id="axes_') for each in (result, RESULT))
    assert both == 2 * one > 0
