"""Training metrics: a CSV file, TensorBoard, a plot, and a progress bar or log lines."""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from taskvec_train.files import atomic_file

METRICS = "metrics.csv"


class MetricsWriter:
    """Writes rows of metrics to metrics.csv, TensorBoard, a plot and the progress bar.

    A stage that resumes from a step drops the rows after it.
    """

    def __init__(self, folder: Path, title: str, *, step: int, steps: int) -> None:
        """Open the files of a stage.

        Args:
            folder: of the stage.
            title: label of the progress bar.
            step: number of steps already done.
            steps: number of the last step.
        """
        self._file = folder / METRICS
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step)
        self._rows = [row for row in read_metrics(folder) if row["step"] <= step]
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            disable=not sys.stderr.isatty(),
        )
        self._title, self._steps = title, steps
        self._task = self._bar.add_task(title, total=steps, completed=step)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
        self._board.close()

    def advance(self, step: int) -> None:
        """Update the progress bar."""
        self._bar.update(self._task, completed=step)

    def write(self, row: Mapping[str, float]) -> None:
        """Add a row of metrics by name; ``step`` is its step."""
        step = int(row["step"])
        self._rows.append(dict(row))
        for name, value in row.items():
            if name != "step":
                self._board.add_scalar(name, value, step)
        self._bar.update(self._task, description=f"{self._title} {row['loss']:.4f}")

    def flush(self) -> None:
        """Write all rows to disk and plot them; without a terminal, print a line of progress."""
        self._board.flush()
        if not self._rows:
            return
        columns = list(dict.fromkeys(name for row in self._rows for name in row))
        with atomic_file(self._file) as unfinished, unfinished.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(self._rows)
        draw_losses(self._rows, self._title, self._file.with_name("loss.png"))
        if self._bar.disable:
            last = self._rows[-1]
            line = f"{self._title}: step {last['step']:,.0f} of {self._steps:,}"
            self._bar.console.out(f"{line}, loss {last['loss']:.4f}", highlight=False)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Return the rows of a stage's metrics.csv; an empty list if there is no file."""
    file = folder / METRICS
    if not file.is_file():
        return []
    with file.open(newline="") as stream:
        return [
            {name: float(value) for name, value in row.items() if value}
            for row in csv.DictReader(stream)
        ]


def draw_losses(rows: list[dict[str, float]], title: str, file: Path) -> None:
    """Plot every loss and validation metric against the step."""
    names = dict.fromkeys(name for row in rows for name in row)
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name in names:
        if name not in ("step", "lr", "seconds", "tokens"):
            points = [(row["step"], row[name]) for row in rows if name in row]
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1)
    axes.set(xlabel="step", title=title)
    axes.legend(frameon=False)
    with atomic_file(file) as unfinished:
        figure.savefig(unfinished, format="png", dpi=120)
