"""Render the report of a load test as one HTML file without external resources."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

from thresholds import LATENCY_MAX_LOAD, REFUSAL_MIN_LOAD

CURVES = {"p99_ms": "#c0392b", "p90_ms": "#e08e0b", "p50_ms": "#2471a3"}

TEMPLATE = Path(__file__).with_name("page.html")


def page(result: dict[str, Any]) -> str:
    """Return the HTML of a result of load.py."""
    template = jinja2.Template(
        TEMPLATE.read_text(), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return template.render(
        result=result,
        plot=plot,
        latency_max_load=LATENCY_MAX_LOAD,
        refusal_min_load=REFUSAL_MIN_LOAD,
    )


def plot(scenario: dict[str, Any]) -> Markup:
    """Plot latency against offered load as SVG."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for name, colour in CURVES.items():
        points = [
            (level["offered"], level[name])
            for level in scenario["levels"]
            if level[name] is not None
        ]
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            marker="o",
            color=colour,
            label=name.removesuffix("_ms"),
        )
    axes.axvline(scenario["capacity_requests_a_second"], color="grey", ls=":", label="capacity")
    axes.axhline(scenario["p99_bound_ms"], color="grey", ls="--", label="maximum p99")
    axes.set(xlabel="offered requests/s", ylabel="ms", yscale="log", xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    text = io.StringIO()
    # Glyphs as paths, a fixed salt and no date, so that equal results give equal files.
    with mpl.rc_context({"svg.hashsalt": "taskvec", "svg.fonttype": "path"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return Markup(text.getvalue()[text.getvalue().index("<svg") :])  # noqa: S704 - our own numbers
