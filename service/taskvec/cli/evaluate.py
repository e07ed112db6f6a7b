"""``taskvec eval`` and ``taskvec eval-mteb``: load a model, evaluate it, write reports."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from taskvec.core.output_format import OutputType
from taskvec.evaluation.data import find_data
from taskvec.evaluation.formats import formats_of
from taskvec.evaluation.models import LoadedModel, Model
from taskvec.evaluation.report import (
    as_json,
    check_writable,
    plot,
    progress_bar,
    tables,
    write_atomically,
)
from taskvec.evaluation.run import Plan, evaluate
from taskvec.evaluation.service import ServedModel

PIPE_WIDTH = 120
"""Columns of a table if standard output is not a terminal."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """The model to evaluate: a checkpoint, or a running service.

    Attributes:
        model: a folder, a hub id or a name; ignored if there is a URL.
        url: address of a running service; None to load the model in this process.
        revision: see ``taskvec.library.Embedder``.
        device: see ``taskvec.library.Embedder``.
        dtype: see ``taskvec.library.Embedder``.
        task_name: see ``taskvec.library.Embedder``.
    """

    model: str
    url: str | None
    revision: str | None
    device: str
    dtype: str
    task_name: str | None = None

    @contextmanager
    def open(self) -> Iterator[Model]:
        """Load the model or connect to the service; close it at the end.

        Raises:
            CheckpointError: the model cannot be loaded.
            UnavailableError: the service does not answer.
        """
        if self.url is not None:
            yield ServedModel(self.url)
            return
        # Imports torch, which a running service does not need here.
        from taskvec.library import Embedder  # noqa: PLC0415

        with Embedder(
            self.model,
            revision=self.revision,
            task_name=self.task_name,
            device=self.device,
            dtype=self.dtype,
        ) as embedder:
            yield LoadedModel(embedder)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """Options of ``taskvec eval``.

    Attributes:
        data: files and folders of evaluation data.
        tasks: adapters, or ``base``; empty for all.
        dimensions: numbers of dimensions; empty for the model's Matryoshka dimensions.
        outputs: output types of the vectors.
        bm25: True scores retrieval data with BM25 as well.
        json: file for all results; None for no file.
        plot: PNG file for a plot; None for no file.
        seed: of the k-means starts.
    """

    data: Sequence[Path]
    tasks: Sequence[str]
    dimensions: Sequence[int]
    outputs: Sequence[OutputType]
    bm25: bool
    json: Path | None
    plot: Path | None
    seed: int


def run_eval(options: EvalOptions, source: ModelSource) -> None:
    """Evaluate a model, print tables and write the files.

    Raises:
        TaskvecError: the data, an option or the service is invalid.
        CheckpointError: the model cannot be loaded.
    """
    for file in (options.json, options.plot):
        if file is not None:
            check_writable(file)
    data = find_data(options.data)
    with source.open() as model, progress_bar() as progress:
        dimensions = options.dimensions or model.matryoshka
        plan = Plan(
            data=data,
            formats=formats_of(model.dimension, dimensions, options.outputs),
            tasks=options.tasks,
            seed=options.seed,
            bm25=options.bm25,
            progress=progress,
        )
        results = list(evaluate(model, plan))
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    for title, table in tables(data, results):
        console.print(title, table, sep="\n", highlight=False, markup=False)
    if options.json is not None:
        name = source.url or source.model
        write_atomically(options.json, as_json(model, name, data, results, options.seed))
    if options.plot is not None:
        write_atomically(options.plot, plot(results, model.name))
