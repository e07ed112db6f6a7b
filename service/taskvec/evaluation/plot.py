"""Quality against bytes per vector, as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from taskvec.evaluation.run import BM25, Result

PANEL = (3.4, 2.8)
"""Inches."""


def plot(results: Sequence[Result], title: str) -> bytes:
    """One panel for each data set (down) and task (across), one line for each output type.

    Args:
        results: see ``evaluate``.
        title: above all panels.

    Returns:
        A PNG.
    """
    data = list(dict.fromkeys(result.data for result in results))
    tasks = list(dict.fromkeys(result.task for result in results if result.form))
    size = PANEL[0] * len(tasks), PANEL[1] * len(data) + 0.8
    figure = Figure(size, layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(len(data), len(tasks), sharex=True, sharey="row", squeeze=False)
    for row, name in zip(panels, data, strict=True):
        mine = [result for result in results if result.data == name]
        for axes, task in zip(row, tasks, strict=True):
            _draw(axes, [result for result in mine if result.task in (task, BM25)])
            axes.set_title(f"{name}\n{task}", fontsize=9)
        row[0].set_ylabel(next(iter(mine[0].score.measures)))
    for axes in panels[-1]:
        axes.set_xlabel("bytes per vector")
    lines = {line.get_label(): line for axes in panels.flat for line in axes.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=2 * len(tasks))
    image = BytesIO()
    figure.savefig(image, format="png", dpi=150)
    return image.getvalue()


def _draw(axes: Axes, results: Sequence[Result]) -> None:
    for output in dict.fromkeys(result.output for result in results):
        points = sorted(
            (result.form.bytes, result.score.value)
            for result in results
            if result.form and result.output == output
        )
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=output)
        else:
            value = next(result.score.value for result in results if result.output == output)
            axes.axhline(value, color="gray", linestyle="--", label=output)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda bytes_, _: f"{bytes_:g}"))
    axes.grid(alpha=0.3)
