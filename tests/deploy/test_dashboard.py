"""The dashboard is what its generator writes, and every query of it can show something."""

from __future__ import annotations

import itertools
import json
import re
import runpy

import pytest

from conftest import repository
from promql import Scrape

FOLDER = repository() / "deploy" / "grafana"
DASHBOARD = json.loads((FOLDER / "taskvec.json").read_text())
PANELS = DASHBOARD["panels"]
TARGETS = [target for panel in PANELS for target in panel.get("targets", [])]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}

# The parts of the service that somebody looks for, and a series that shows each.
ASKED_FOR = {
    "traffic by task": "taskvec_requests_total",
    "latency by stage": "taskvec_stage_seconds_bucket",
    "queued tokens": "taskvec_queue_tokens",
    "queue age": "taskvec_queue_oldest_seconds",
    "batch fill": "taskvec_batch_fill_ratio_bucket",
    "rejections": "taskvec_rejected_total",
    "engine state": "taskvec_engine_state",
    "per key": "taskvec_key_tokens_total",
}


def test_the_dashboard_is_up_to_date() -> None:
    """taskvec.json is what `make docs` would write."""
    for file, content in runpy.run_path(str(FOLDER / "render.py"))["pages"]().items():
        assert file.read_text() == content, "run `make docs`"


@pytest.mark.parametrize("expression", sorted({target["expr"] for target in TARGETS}))
def test_queries_parse_and_read_series_that_exist(expression: str) -> None:
    """With its variables filled in, each is PromQL and names series and labels of a scrape."""
    assert Scrape().faults(filled(expression)) == []


@pytest.mark.parametrize("question", ASKED_FOR)
def test_what_people_look_for_is_shown(question: str) -> None:
    """Each of the series that tell how the service does is in some panel."""
    assert any(ASKED_FOR[question] in target["expr"] for target in TARGETS)


def test_legends_name_labels_that_queries_keep() -> None:
    """A label in a legend survives the query's aggregation, so that lines can be told apart."""
    for target in TARGETS:
        labels = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        kept = re.search(r"by \(([^)]*)\)", target["expr"])
        if kept:
            assert labels == set(kept[1].split(", ")) - {"le"}, target["expr"]
        elif "sum(" in target["expr"] or "max(" in target["expr"]:
            assert labels == set(), target["expr"]


def test_variables_are_declared_and_used() -> None:
    """Queries use Grafana's own variables and the dashboard's, and no variable is idle."""
    text = json.dumps([PANELS, [variable.get("query") for variable in VARIABLES.values()]])
    used = set(re.findall(r"\$\{?(\w+)", text))
    assert used - set(VARIABLES) == {"__rate_interval"}
    assert set(VARIABLES) - used == set()
    for variable in VARIABLES.values():
        if variable["type"] == "query":
            selector, label = re.fullmatch(
                r"label_values\((.*), (\w+)\)", variable["query"]
            ).groups()
            assert label == variable["name"]
            assert Scrape().faults(filled(selector)) == []


def test_panels_have_a_place_of_their_own() -> None:
    """Ids differ, nothing overlaps, and nothing leaves the grid."""
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    places = [panel["gridPos"] for panel in PANELS]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in itertools.combinations(places, 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)


def filled(expression: str) -> str:
    """An expression with values for Grafana's variables."""
    return re.sub(r"\$\{?\w+\}?", ".*", expression.replace("$__rate_interval", "5m"))
