"""``taskvec eval`` and ``taskvec eval-mteb``: from their options to what they print and write."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from taskvec.core.postprocess import OutputType
from taskvec.evaluation.data import find_data
from taskvec.evaluation.formats import forms_of
from taskvec.evaluation.models import LoadedModel, Model
from taskvec.evaluation.report import as_json, plot, progress, require_place, tables, write_whole
from taskvec.evaluation.run import Plan, evaluate
from taskvec.evaluation.service import Service

PLAIN_WIDTH = 120
"""Columns of a table that goes to no terminal."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where the model is.

    Attributes:
        model: a folder, a hub id or a name; not read where there is a URL.
        url: a running service; None for a model in this process.
        revision: see ``Embedder``.
        device: see there.
        dtype: see there.
    """

    model: str
    url: str | None
    revision: str | None
    device: str
    dtype: str

    @contextmanager
    def opened(self) -> Iterator[Model]:
        """The model, for as long as it is used.

        Raises:
            CheckpointError: it cannot be loaded.
            UnavailableError: the service does not answer.
        """
        if self.url is not None:
            yield Service(self.url)
            return
        from taskvec.library import Embedder  # noqa: PLC0415 - torch, which a service spares

        with Embedder(
            self.model, revision=self.revision, device=self.device, dtype=self.dtype
        ) as embedder:
            yield LoadedModel(embedder)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What ``taskvec eval`` is asked for; empty ``tasks`` and ``dimensions`` mean all."""

    data: Sequence[Path]
    tasks: Sequence[str]
    dimensions: Sequence[int]
    outputs: Sequence[OutputType]
    bm25: bool
    json: Path | None
    plot: Path | None
    seed: int


def run(request: Request, source: Source) -> None:
    """Evaluate, print tables, write files.

    Raises:
        TaskvecError: data, options or the service are at fault; the message says where.
        CheckpointError: see ``Source.opened``.
    """
    for file in (request.json, request.plot):
        if file is not None:
            require_place(file)
    data = find_data(request.data)
    with source.opened() as model, progress() as watch:
        dimensions = request.dimensions or model.matryoshka
        plan = Plan(
            data=data,
            forms=forms_of(model.dimension, dimensions, request.outputs),
            tasks=request.tasks,
            seed=request.seed,
            bm25=request.bm25,
            watch=watch,
        )
        results = list(evaluate(model, plan))
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    for title, table in tables(data, results):
        console.print(title, table, sep="\n", highlight=False, markup=False)
    if request.json is not None:
        place = source.url or source.model
        write_whole(request.json, as_json(model, place, data, results, request.seed))
    if request.plot is not None:
        write_whole(request.plot, plot(results, model.name))
