"""Figures of several models as JSON, and as the tables of a model card."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from statistics import fmean

import orjson

from taskvec.core.job import OutputType
from taskvec.evaluation.data import RetrievalData
from taskvec.evaluation.models import BASE
from taskvec.evaluation.report import result_fields
from taskvec.evaluation.run import BM25, Result

Rows = dict[str, dict[str, float]]
"""Row -> column -> value."""

_LIBRARIES = ("torch", "transformers", "numpy", "scipy", "scikit-learn", "bm25s")


@dataclass(frozen=True, slots=True)
class Figure:
    """One score.

    Attributes:
        model: whose.
        dimension: of the model's whole vectors.
        result: of which adapter, on what, in which form.
    """

    model: str
    dimension: int
    result: Result

    @property
    def row(self) -> str:
        """What to call the row that it is in."""
        task = self.result.task
        return task if task in {BM25, self.model} else f"{self.model}, {task}"

    @property
    def whole(self) -> bool:
        """Whether it is of float vectors of all dimensions; BM25's are."""
        form = self.result.form
        return form is None or (
            form.dimensions == self.dimension and form.output is OutputType.FLOAT
        )


def as_json(figures: Sequence[Figure]) -> bytes:
    """Everything that was measured, and with what."""
    document = {
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in _LIBRARIES},
        "figures": [{"model": figure.model, **result_fields(figure.result)} for figure in figures],
    }
    return orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def as_markdown(figures: Sequence[Figure], model: str) -> str:
    """The tables of a card: searches, each task's measure, and what smaller forms lose.

    Args:
        figures: see ``measure``.
        model: whose smaller forms.
    """
    parts = [
        ("Searches, nDCG@10", _searches(figures)),
        ("Tasks, mean over the data of each kind", _kinds(figures)),
        (f"Smaller vectors of {model}: nDCG@10, mean over all searches", _smaller(figures, model)),
    ]
    return "\n\n".join(f"{title}:\n\n{_table(rows)}" for title, rows in parts if rows)


def _searches(figures: Sequence[Figure]) -> Rows:
    """Of those that were measured on every search."""
    names = _data_of(figures, RetrievalData.kind)
    rows = _by_row(figure for figure in figures if figure.result.data in names)
    return {
        row: {name.rpartition("/")[2]: value for name, value in cells.items()}
        for row, cells in rows.items()
        if len(cells) == len(names)
    }


def _kinds(figures: Sequence[Figure]) -> Rows:
    """The mean of each kind over what every adapter was measured on."""
    rows = {row: cells for row, cells in _by_row(figures).items() if row != BM25}
    means: Rows = {row: {} for row in rows}
    for kind in dict.fromkeys(figure.result.kind for figure in figures):
        names = _data_of(figures, kind)
        shared = [name for name in names if all(name in cells for cells in rows.values())]
        measure = next(f.result.score.measures for f in figures if f.result.kind == kind)
        column = f"{kind}, {next(iter(measure))}"
        for row, cells in rows.items() if shared else ():
            means[row][column] = fmean(cells[name] for name in shared)
    return means


def _smaller(figures: Sequence[Figure], model: str) -> Rows:
    """Adapter and output type by dimensions."""
    names = set(_data_of(figures, RetrievalData.kind))
    found: dict[tuple[str, str], dict[str, float]] = {}
    for figure in figures:
        result = figure.result
        if figure.model == model and result.form is not None and result.data in names:
            place = f"{result.task}, {result.output}", str(result.form.dimensions)
            found.setdefault(place, {})[result.data] = result.score.value
    rows: Rows = {}
    for (row, column), cells in found.items():
        if cells.keys() == names and not row.startswith(f"{BASE},"):
            rows.setdefault(row, {})[column] = fmean(cells.values())
    return rows


def _by_row(figures: Iterable[Figure]) -> Rows:
    """Scores of whole float vectors by data."""
    rows: Rows = {}
    for figure in figures:
        if figure.whole and figure.result.queries is None:
            rows.setdefault(figure.row, {})[figure.result.data] = figure.result.score.value
    return rows


def _data_of(figures: Iterable[Figure], kind: str) -> list[str]:
    return list(dict.fromkeys(f.result.data for f in figures if f.result.kind == kind))


def _table(rows: Rows) -> str:
    """Markdown; the best value of a column is bold."""
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    best = {name: max(cells.get(name, 0.0) for cells in rows.values()) for name in columns}
    lines = [f"| | {' | '.join(columns)} |", f"|---{'|---:' * len(columns)}|"]
    for row, cells in rows.items():
        shown = [_cell(cells.get(name), best[name]) for name in columns]
        lines.append(f"| {row} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _cell(value: float | None, best: float) -> str:
    if value is None:
        return ""
    return f"**{value:.3f}**" if value == best else f"{value:.3f}"
