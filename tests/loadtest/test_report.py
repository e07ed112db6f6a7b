"""The report page and the tables of the load tests."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import report
from page import page
from report import compared, table, write_result


def result() -> dict[str, Any]:
    """Return a result of load.py with one level at which no request succeeded."""
    levels = [
        {
            "load": load,
            "offered": load * 100,
            "answered": load * 100,
            "texts": load * 100,
            "requests": 600,
            "outcomes": {"200": 600},
            "p50_ms": 5.0,
            "p90_ms": 8.0,
            "p99_ms": 20.5,
            "late_p99_ms": 0.5,
            "generator_cores": 0.1,
        }
        for load in (0.25, 0.5)
    ]
    nothing = dict.fromkeys(("p50_ms", "p90_ms", "p99_ms"))
    levels.append({**levels[0], "load": 1.2, "outcomes": {"429": 600}, **nothing})
    return {
        "date": "2026-01-01",
        "command": "python loadtest/load.py",
        "machine": {"processor": "a processor", "cores": 2},
        "model": "<taskvec-mini>",
        "seconds": 60.0,
        "scenarios": {
            name: {
                "clients": 16,
                "capacity_requests_a_second": 100.0,
                "capacity_texts_a_second": 100.0,
                "p99_bound_ms": 250.0,
                "levels": levels,
            }
            for name in ("interactive", "bulk")
        },
        "resident_megabytes": {"start": 350, "most": 400},
        "notes": [],
        "broken": ["bulk at 1.20 of the capacity: no request succeeded."],
    }


def test_a_result_names_no_folder_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command of a result can be read elsewhere."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["loadtest/x.py", "--before", "/home/me/other", "../too"])
    result = json.loads(write_result("x", {}, show=False).read_bytes())
    assert result["command"] == "python loadtest/x.py --before other ../too"


def test_the_page_has_no_external_resources() -> None:
    """Plots are inline; there are no scripts and no external styles or images."""
    shown = page(result())
    assert shown.count("<svg") == 2
    assert "<script" not in shown
    assert re.findall(r"""(?:src|href)\s*=\s*["'](?!#)""", shown) == []
    assert re.findall(r"""@import|url\((?!#)""", shown) == []


def test_the_page_shows_every_level_and_what_was_missed() -> None:
    """A level without successful requests has a row, and names are escaped."""
    shown = page(result())
    assert "Thresholds missed" in shown
    assert "no request succeeded" in shown
    assert shown.count("429: 600") == 2
    assert "&lt;taskvec-mini&gt;" in shown
    assert "<taskvec-mini>" not in shown


def test_a_page_without_misses_says_so() -> None:
    """Without missed thresholds the page says so, and without memory figures it omits them."""
    shown = page(result() | {"broken": [], "resident_megabytes": None})
    assert "All thresholds are met" in shown
    assert "Resident memory" not in shown


def test_servers_are_compared_round_by_round() -> None:
    """Ratios are computed in each round, not from the medians."""
    figures = compared({"taskvec": [10.0, 20.0, 90.0], "vllm": [5.0, 40.0, 30.0]})
    assert figures["taskvec"]["median"] == 20.0
    assert figures["taskvec_over_vllm"] == {"min": 0.5, "median": 2.0, "max": 3.0}


def test_a_comparison_reads_as_a_table() -> None:
    """The table has a row per figure and a column per server and ratio."""
    rows = {"p50_ms": compared({"taskvec": [10.0], "vllm": [20.0]})}
    assert table(rows).splitlines() == [
        "| | taskvec | vllm | taskvec_over_vllm |",
        "|---|---|---|---|",
        "| p50_ms | 10.0 | 20.0 | 0.5 |",
    ]
