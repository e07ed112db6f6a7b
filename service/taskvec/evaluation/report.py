"""Reports of an evaluation: tables, JSON, a plot, and the progress bar while it runs.

The plot shows the main measure against the bytes of a vector. Files are written atomically.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import orjson
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from taskvec import __version__
from taskvec.errors import InvalidRequestError
from taskvec.evaluation.data import Data
from taskvec.evaluation.models import Model
from taskvec.evaluation.run import BM25, ProgressCallback, Result

TABLE_MEASURES = ("ndcg@10", "recall@100", "spearman", "accuracy", "v_measure")
"""Measures that get a table; JSON contains all."""

PANEL_INCHES = (3.4, 2.8)
"""Width and height of one panel of the plot."""


def tables(data: Iterable[Data], results: Sequence[Result]) -> Iterator[tuple[str, Table]]:
    """Yield a title and a table for each data set and measure: output types by dimensions.

    The best task of each output type and number of dimensions is bold.
    """
    for item in data:
        own = [result for result in results if result.data == item.name]
        error = max(result.score.error for result in own)
        for position, measure in enumerate(own[0].score.measures):
            if measure in TABLE_MEASURES:
                error_note = "" if position else f", standard error up to {error:.3f}"
                title = f"{item.name}: {measure} ({item.kind}, {item.texts} texts{error_note})"
                yield title, _table(own, measure)


def _table(results: Sequence[Result], measure: str) -> Table:
    widths = sorted({result.format.dimensions for result in results if result.format}, reverse=True)
    table = Table("task", "output")
    for width in widths:
        table.add_column(str(width), justify="right")
    best: dict[tuple[str, int], float] = {}
    rows: dict[tuple[str, str], dict[int, float]] = {}
    for result in results:
        value = result.score.measures[measure]
        width = result.format.dimensions if result.format else widths[0]
        rows.setdefault((result.task, result.output), {})[width] = value
        best[result.output, width] = max(value, best.get((result.output, width), value))
    last = ""
    for (task, output), values in rows.items():
        cells = [_cell(values.get(width), best.get((output, width))) for width in widths]
        table.add_row("" if task == last else task, output, *cells)
        last = task
    return table


def _cell(value: float | None, best: float | None) -> Text:
    if value is None:
        return Text()
    return Text(f"{value:.3f}", style="bold" if value == best else "")


def as_json(
    model: Model, source: str, data: Sequence[Data], results: Sequence[Result], seed: int
) -> bytes:
    """Return all results as JSON, with the model, the data and the library versions.

    Args:
        model: the evaluated model.
        source: its folder, hub id or URL.
        data: the data sets.
        results: see ``taskvec.evaluation.run.evaluate``.
        seed: of the k-means starts.
    """
    document: dict[str, Any] = {
        "model": {"name": model.name, "source": source, "dimension": model.dimension},
        "taskvec": __version__,
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in ("numpy", "scipy", "scikit-learn")},
        "seed": seed,
        "data": [{"name": item.name, "kind": item.kind, "texts": item.texts} for item in data],
        "results": [result_fields(result) for result in results],
    }
    return orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def result_fields(result: Result) -> dict[str, Any]:
    """Return the JSON fields of one result."""
    return {
        "data": result.data,
        "kind": result.kind,
        "task": result.task,
        "dimensions": result.format.dimensions if result.format else None,
        "output": result.output,
        "bytes": result.format.bytes if result.format else None,
        "measures": result.score.measures,
        "standard_error": result.score.error,
    }


def plot(results: Sequence[Result], title: str) -> bytes:
    """Draw the main measure against the bytes per vector.

    Args:
        results: see ``taskvec.evaluation.run.evaluate``.
        title: shown above all panels.

    Returns:
        A PNG: a row of panels for each data set, a column for each task, a line for each output
        type.
    """
    data = list(dict.fromkeys(result.data for result in results))
    tasks = list(dict.fromkeys(result.task for result in results if result.format))
    size = PANEL_INCHES[0] * len(tasks), PANEL_INCHES[1] * len(data) + 0.8
    figure = Figure(size, layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(len(data), len(tasks), sharex=True, sharey="row", squeeze=False)
    for row, name in zip(panels, data, strict=True):
        own = [result for result in results if result.data == name]
        for axes, task in zip(row, tasks, strict=True):
            _draw(axes, [result for result in own if result.task in (task, BM25)])
            axes.set_title(f"{name}\n{task}", fontsize=9)
        row[0].set_ylabel(next(iter(own[0].score.measures)))
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
            (result.format.bytes, result.score.value)
            for result in results
            if result.format and result.output == output
        )
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=output)
        else:
            value = next(result.score.value for result in results if result.output == output)
            axes.axhline(value, color="gray", linestyle="--", label=output)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda bytes_, _: f"{bytes_:g}"))
    axes.grid(alpha=0.3)


def check_writable(path: Path) -> None:
    """Check that a file can be written, before a long evaluation starts.

    Raises:
        InvalidRequestError: its folder does not exist or is not writable.
    """
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise InvalidRequestError(
            f"{path} cannot be written: its folder must exist and be writable."
        )


def write_atomically(path: Path, content: bytes) -> None:
    """Write a temporary file and rename it, so that no reader sees a partial file.

    Raises:
        InvalidRequestError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InvalidRequestError(f"{path} cannot be written: {error.strerror}.") from None


@contextmanager
def progress_bar() -> Iterator[ProgressCallback]:
    """Show one progress bar on standard error if that is a terminal."""
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )
    with bars:
        bar = bars.add_task("", total=None)

        def start(title: str, steps: int) -> Callable[[int], None]:
            bars.reset(bar, description=title, total=steps)
            return lambda done: bars.advance(bar, done)

        yield start
