"""docs/metrics.md agrees with the declared metrics."""

from __future__ import annotations

import re
import runpy

import pytest

from conftest import repository
from taskvec.metrics.registry import Metrics

PAGES = runpy.run_path(str(repository() / "docs" / "render_metrics.py"))["pages"]()


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.name)
def test_generated_pages_are_up_to_date(file: object) -> None:
    """docs/metrics.md is what `make docs` writes."""
    assert file.read_text() == PAGES[file], "run `make docs`"


def test_every_series_has_its_row() -> None:
    """The table lists each metric family of a scrape once, under the name that queries use."""
    (page,) = PAGES.values()
    rows = re.findall(r"^\| `(taskvec_\w+)` \|", page, re.MULTILINE)
    families = re.findall(r"^# TYPE (taskvec_\w+) ", scrape(), re.MULTILINE)
    assert sorted(rows) == sorted(name for name in families if not name.endswith("_created"))


def scrape() -> str:
    """Return a scrape that includes the series of one engine server."""
    metrics = Metrics(["clustering"])
    metrics.server_changed("http://engine", serving=True)
    return metrics.render("ready").decode()
