"""Every task on all data, in every form; each text is embedded once a task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from taskvec.core.postprocess import OutputType
from taskvec.errors import InvalidRequestError
from taskvec.evaluation.data import ClassificationData, Data, PairData, RetrievalData
from taskvec.evaluation.formats import Form, Matrix
from taskvec.evaluation.metrics import (
    Score,
    bm25_scores,
    cluster_quality,
    dot_products,
    order_quality,
    probe_quality,
    rank_quality,
)
from taskvec.evaluation.models import Model, Sides, sides_of

BM25 = "bm25"

Watch = Callable[[str, int], Callable[[int], None]]
"""Told what begins and of how many steps; returns what is told of steps done."""


@dataclass(frozen=True, slots=True)
class Result:
    """One score.

    Attributes:
        data: name of the data.
        kind: ``retrieval``, ``sts``, ``classification`` or ``clustering``.
        task: the adapter, ``base``, or ``bm25``.
        form: of the vectors; None for ``bm25``.
        queries: the queries' output type where it is another than the documents'.
    """

    data: str
    kind: str
    task: str
    score: Score
    form: Form | None = None
    queries: OutputType | None = None

    @property
    def output(self) -> str:
        """What to call the output type."""
        if self.form is None:
            return self.task
        asked = f", {self.queries.value} queries" if self.queries else ""
        return f"{self.form.output.value}{asked}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is evaluated.

    Attributes:
        tasks: adapters; all where empty.
        seed: of the k-means starts.
        bm25: also score retrieval by BM25.
    """

    data: Sequence[Data]
    forms: Sequence[Form]
    tasks: Sequence[str] = ()
    seed: int = 0
    bm25: bool = False
    watch: Watch = field(default=lambda _what, _steps: lambda _done: None)


def evaluate(model: Model, plan: Plan) -> Iterator[Result]:
    """Score a model.

    Raises:
        InvalidRequestError: a task that the model has not.
        TaskvecError: what the model's ``embed`` raises.
    """
    sides = sides_of(model.tasks)
    for task in plan.tasks:
        if task not in sides:
            raise InvalidRequestError(f"There is no task {task!r}: it has {', '.join(sides)}.")
    for data in plan.data:
        if plan.bm25 and isinstance(data, RetrievalData):
            yield _bm25(data, plan.watch)
        for task in plan.tasks or sides:
            for form, queries, score in _scores(model, data, sides[task], task, plan):
                yield Result(data.name, data.kind, task, score, form, queries)


def _bm25(data: RetrievalData, watch: Watch) -> Result:
    done = watch(f"{data.name}: {BM25}", 1)
    result = Result(data.name, data.kind, BM25, rank_quality(bm25_scores(data), data))
    done(1)
    return result


def _scores(
    model: Model, data: Data, sides: Sides, task: str, plan: Plan
) -> Iterator[tuple[Form, OutputType | None, Score]]:
    advance = plan.watch(f"{data.name}: embedding as {task}", data.texts)

    def embed(texts: Sequence[str]) -> Matrix:
        return model.embed(texts, sides.passage, advance)

    if isinstance(data, RetrievalData):
        documents = embed(data.documents)
        queries = model.embed(data.queries, sides.query, advance)
        measured = _retrieval(queries, documents, data, plan.forms)
    elif isinstance(data, PairData):
        left, right = embed(data.left), embed(data.right)
        measured = (
            (form, None, order_quality(form.rows(left), form.rows(right), data.scores))
            for form in plan.forms
        )
    elif isinstance(data, ClassificationData):
        train, test = embed(data.train.texts), embed(data.test.texts)
        measured = (
            (
                form,
                None,
                probe_quality(
                    form.rows(train), data.train.labels, form.rows(test), data.test.labels
                ),
            )
            for form in plan.forms
        )
    else:
        texts = embed(data.labelled.texts)
        measured = (
            (form, None, cluster_quality(form.rows(texts), data.labelled, plan.seed))
            for form in plan.forms
        )
    done = plan.watch(f"{data.name}: measuring {task}", len(plan.forms))
    for form, queries_as, score in measured:
        yield form, queries_as, score
        done(queries_as is None)


def _retrieval(
    queries: Matrix, documents: Matrix, data: RetrievalData, forms: Sequence[Form]
) -> Iterator[tuple[Form, OutputType | None, Score]]:
    """Binary documents are asked with float queries, too, which cost no memory in an index."""
    for form in forms:
        stored = form.rows(documents)
        yield form, None, rank_quality(dot_products(form.rows(queries), stored), data)
        if form.output.packed:
            exact = Form(form.dimensions, OutputType.FLOAT).rows(queries)
            yield form, OutputType.FLOAT, rank_quality(dot_products(exact, stored), data)
