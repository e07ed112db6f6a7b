"""Run an evaluation: every task on all data, in every output format.

Each text is embedded once for each task; the formats are made from these vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from taskvec.core.output_format import OutputFormat, OutputType
from taskvec.errors import InvalidRequestError
from taskvec.evaluation.data import ClassificationData, Data, PairData, RetrievalData
from taskvec.evaluation.formats import Matrix, comparable_rows
from taskvec.evaluation.metrics import (
    Score,
    bm25_scores,
    classification_score,
    clustering_score,
    dot_products,
    retrieval_score,
    sts_score,
)
from taskvec.evaluation.models import Model, Sides, sides_of

BM25 = "bm25"
"""Name of the BM25 baseline among the tasks."""

ProgressCallback = Callable[[str, int], Callable[[int], None]]
"""Called with the title and number of steps of the work that starts; returns a function that is
called with the number of steps done."""


@dataclass(frozen=True, slots=True)
class Result:
    """One score.

    Attributes:
        data: name of the data.
        kind: ``retrieval``, ``sts``, ``classification`` or ``clustering``.
        task: the adapter, ``base``, or ``bm25``.
        score: its measures.
        format: format of the vectors; None for ``bm25``.
        queries: output type of the queries; None if it is the documents' one.
    """

    data: str
    kind: str
    task: str
    score: Score
    format: OutputFormat | None = None
    queries: OutputType | None = None

    @property
    def output(self) -> str:
        """Label of the output type in reports."""
        if self.format is None:
            return self.task
        suffix = f", {self.queries.value} queries" if self.queries else ""
        return f"{self.format.types[0].value}{suffix}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Options of an evaluation.

    Attributes:
        data: the data sets.
        formats: formats of the vectors.
        tasks: names of adapters; empty for all.
        seed: of the k-means starts.
        bm25: True scores retrieval data with BM25 as well.
        progress: notified of progress.
    """

    data: Sequence[Data]
    formats: Sequence[OutputFormat]
    tasks: Sequence[str] = ()
    seed: int = 0
    bm25: bool = False
    progress: ProgressCallback = field(default=lambda _title, _steps: lambda _done: None)


def evaluate(model: Model, plan: Plan) -> Iterator[Result]:
    """Yield the scores of a model.

    Raises:
        InvalidRequestError: the model does not have one of the tasks.
        TaskvecError: raised by the model's ``embed``.
    """
    sides = sides_of(model.tasks)
    for task in plan.tasks:
        if task not in sides:
            raise InvalidRequestError(
                f"The model has no task {task!r}: choose from {', '.join(sides)}."
            )
    for data in plan.data:
        if plan.bm25 and isinstance(data, RetrievalData):
            yield _bm25(data, plan.progress)
        for task in plan.tasks or sides:
            for fmt, queries, score in _scores(model, data, sides[task], task, plan):
                yield Result(data.name, data.kind, task, score, fmt, queries)


def _bm25(data: RetrievalData, progress: ProgressCallback) -> Result:
    advance = progress(f"{data.name}: {BM25}", 1)
    result = Result(data.name, data.kind, BM25, retrieval_score(bm25_scores(data), data))
    advance(1)
    return result


def _scores(
    model: Model, data: Data, sides: Sides, task: str, plan: Plan
) -> Iterator[tuple[OutputFormat, OutputType | None, Score]]:
    advance = plan.progress(f"{data.name}: embedding as {task}", data.texts)

    def embed(texts: Sequence[str]) -> Matrix:
        return model.embed(texts, sides.passage, advance)

    if isinstance(data, RetrievalData):
        documents = embed(data.documents)
        queries = model.embed(data.queries, sides.query, advance)
        measured = _retrieval(queries, documents, data, plan.formats)
    elif isinstance(data, PairData):
        left, right = embed(data.left), embed(data.right)
        measured = (
            (
                fmt,
                None,
                sts_score(
                    comparable_rows(left, fmt),
                    comparable_rows(right, fmt),
                    data.scores,
                ),
            )
            for fmt in plan.formats
        )
    elif isinstance(data, ClassificationData):
        train, test = embed(data.train.texts), embed(data.test.texts)
        measured = (
            (
                fmt,
                None,
                classification_score(
                    comparable_rows(train, fmt),
                    data.train.labels,
                    comparable_rows(test, fmt),
                    data.test.labels,
                ),
            )
            for fmt in plan.formats
        )
    else:
        texts = embed(data.labelled.texts)
        measured = (
            (
                fmt,
                None,
                clustering_score(comparable_rows(texts, fmt), data.labelled, plan.seed),
            )
            for fmt in plan.formats
        )
    done = plan.progress(f"{data.name}: measuring {task}", len(plan.formats))
    for fmt, queries_as, score in measured:
        yield fmt, queries_as, score
        done(queries_as is None)


def _retrieval(
    queries: Matrix, documents: Matrix, data: RetrievalData, formats: Sequence[OutputFormat]
) -> Iterator[tuple[OutputFormat, OutputType | None, Score]]:
    """Yield format, output type of the queries, and score.

    Binary documents are scored with binary and with float queries: the latter cost an index no
    memory.
    """
    for fmt in formats:
        stored = comparable_rows(documents, fmt)
        yield (
            fmt,
            None,
            retrieval_score(dot_products(comparable_rows(queries, fmt), stored), data),
        )
        if fmt.types[0].packed:
            exact = comparable_rows(queries, OutputFormat(fmt.dimensions, (OutputType.FLOAT,)))
            yield (
                fmt,
                OutputType.FLOAT,
                retrieval_score(dot_products(exact, stored), data),
            )
