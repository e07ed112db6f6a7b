"""Evaluation results of several models, as JSON and as the tables of a model card."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from statistics import fmean

import orjson

from taskvec.core.output_format import OutputType
from taskvec.evaluation.data import RetrievalData
from taskvec.evaluation.models import BASE
from taskvec.evaluation.report import result_fields
from taskvec.evaluation.run import BM25, Result

Rows = dict[str, dict[str, float]]
"""Row -> column -> value."""

_LIBRARIES = ("torch", "transformers", "numpy", "scipy", "scikit-learn", "bm25s")


@dataclass(frozen=True, slots=True)
class ModelResult:
    """One evaluation result of one of several models.

    Attributes:
        model: name of the model.
        dimension: dimensions of the model's full vectors.
        result: score, task, data and output_format.
    """

    model: str
    dimension: int
    result: Result

    @property
    def row(self) -> str:
        """Label of its row in a table."""
        task = self.result.task
        return task if task in {BM25, self.model} else f"{self.model}, {task}"

    @property
    def full(self) -> bool:
        """True for float vectors of all dimensions, and for BM25."""
        output_format = self.result.format
        return output_format is None or (
            output_format.dimensions == self.dimension
            and output_format.types[0] is OutputType.FLOAT
        )


def as_json(results: Sequence[ModelResult]) -> bytes:
    """Return all results as JSON, with the library versions."""
    document = {
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in _LIBRARIES},
        "figures": [{"model": entry.model, **result_fields(entry.result)} for entry in results],
    }
    return orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def as_markdown(results: Sequence[ModelResult], model: str) -> str:
    """Return the tables of a model card: retrieval, all kinds of data, and smaller vectors.

    Args:
        results: see ``taskvec_train.measure.measure``.
        model: the model in the table of smaller vectors.
    """
    parts = [
        ("Searches, nDCG@10", _retrieval_rows(results)),
        ("Tasks, mean over the data of each kind", _rows_by_kind(results)),
        (
            f"Smaller vectors of {model}: nDCG@10, mean over all searches",
            _smaller_rows(results, model),
        ),
    ]
    return "\n\n".join(f"{title}:\n\n{_table(rows)}" for title, rows in parts if rows)


def _retrieval_rows(results: Sequence[ModelResult]) -> Rows:
    """Return nDCG@10 of the rows that have a result for every retrieval data set."""
    names = _data_names(results, RetrievalData.kind)
    rows = _by_row(entry for entry in results if entry.result.data in names)
    return {
        row: {name.rpartition("/")[2]: value for name, value in cells.items()}
        for row, cells in rows.items()
        if len(cells) == len(names)
    }


def _rows_by_kind(results: Sequence[ModelResult]) -> Rows:
    """Return the mean of each kind over the data sets that every row has a result for."""
    rows = {row: cells for row, cells in _by_row(results).items() if row != BM25}
    means: Rows = {row: {} for row in rows}
    for kind in dict.fromkeys(entry.result.kind for entry in results):
        names = _data_names(results, kind)
        shared = [name for name in names if all(name in cells for cells in rows.values())]
        measure = next(e.result.score.measures for e in results if e.result.kind == kind)
        column = f"{kind}, {next(iter(measure))}"
        for row, cells in rows.items() if shared else ():
            means[row][column] = fmean(cells[name] for name in shared)
    return means


def _smaller_rows(results: Sequence[ModelResult], model: str) -> Rows:
    """Return mean nDCG@10 by adapter and output type (rows) and dimensions (columns)."""
    names = set(_data_names(results, RetrievalData.kind))
    found: dict[tuple[str, str], dict[str, float]] = {}
    for entry in results:
        result = entry.result
        if entry.model == model and result.format is not None and result.data in names:
            cell = f"{result.task}, {result.output}", str(result.format.dimensions)
            found.setdefault(cell, {})[result.data] = result.score.value
    rows: Rows = {}
    for (row, column), cells in found.items():
        if cells.keys() == names and not row.startswith(f"{BASE},"):
            rows.setdefault(row, {})[column] = fmean(cells.values())
    return rows


def _by_row(results: Iterable[ModelResult]) -> Rows:
    """Return the scores of full float vectors: row -> data set -> value."""
    rows: Rows = {}
    for entry in results:
        if entry.full and entry.result.queries is None:
            rows.setdefault(entry.row, {})[entry.result.data] = entry.result.score.value
    return rows


def _data_names(results: Iterable[ModelResult], kind: str) -> list[str]:
    return list(dict.fromkeys(e.result.data for e in results if e.result.kind == kind))


def _table(rows: Rows) -> str:
    """Return a Markdown table; the best value of each column is bold."""
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
