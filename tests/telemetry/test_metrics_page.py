"""The page about the series and the series say the same."""

from __future__ import annotations

import re
import runpy

import pytest

from conftest import repository
from taskvec.telemetry.metrics import Metrics

SCRIPT = runpy.run_path(str(repository() / "docs" / "render_metrics.py"))
PAGES = SCRIPT["pages"]()


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.name)
def test_generated_pages_are_up_to_date(file: object) -> None:
    """docs/metrics.md is what `make docs` would write."""
    assert file.read_text() == PAGES[file], "run `make docs`"


def test_every_series_has_its_row() -> None:
    """The table lists each family of a scrape once, under the name that queries use."""
    (page,) = PAGES.values()
    rows = re.findall(r"^\| `(taskvec_\w+)` \|", page, re.MULTILINE)
    families = re.findall(r"^# TYPE (taskvec_\w+) ", scrape(), re.MULTILINE)
    assert sorted(rows) == sorted(name for name in families if not name.endswith("_created"))


@pytest.mark.parametrize("alert", SCRIPT["ALERTS"], ids=lambda alert: alert.name)
def test_alerts_read_series_that_exist(alert: object) -> None:
    """Each name in an alert's expression is one of a scrape, and so are its labels' names."""
    page = scrape()
    names = SCRIPT["names_in"](alert.expression)
    assert names
    for name in names:
        assert re.search(rf"^{name}[{{ ]", page, re.MULTILINE), name
    for label in re.findall(r"[{,](\w+)=~?\"", alert.expression):
        assert re.search(rf"\b{label}=\"", page), label


def scrape() -> str:
    """A page with a server of the remote engine in it."""
    metrics = Metrics(["clustering"])
    metrics.server_changed("http://engine", serving=True)
    return metrics.render("ready").decode()
