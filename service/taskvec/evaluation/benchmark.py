"""The public benchmark MTEB, by its own package, on any model here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import mteb
from mteb.abstasks import AbsTask
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction
from mteb.results import ModelResult
from mteb.types import PromptType
from rich.console import Console
from rich.table import Table

from taskvec.core.postprocess import OutputType
from taskvec.errors import InvalidRequestError
from taskvec.evaluation.formats import Form, Matrix, forms_of
from taskvec.evaluation.models import Model, sides_of

_ADAPTERS = {
    "Retrieval": "retrieval",
    "Reranking": "retrieval",
    "InstructionRetrieval": "retrieval",
    "InstructionReranking": "retrieval",
    "Clustering": "clustering",
    "Classification": "classification",
    "MultilabelClassification": "classification",
    "Regression": "classification",
}
"""The adapter of each type of task; pairs, bitexts and summaries are matched."""

_OTHERWISE = "text-matching"


class MtebEncoder(AbsEncoder):
    """A model as MTEB wants it: each of its tasks by the adapter made for it, in one form."""

    mteb_model_meta: ModelMeta

    def __init__(self, model: Model, form: Form, adapter: str | None = None) -> None:
        """Wrap a model.

        Args:
            model: what is evaluated.
            form: what is kept of each vector.
            adapter: for every task; None for the one that fits.

        Raises:
            InvalidRequestError: there is no such adapter.
        """
        self._sides = sides_of(model.tasks)
        if adapter is not None and adapter not in self._sides:
            raise InvalidRequestError(
                f"There is no task {adapter!r}: it has {', '.join(self._sides)}."
            )
        self._model = model
        self._form = form
        self._adapter = adapter
        name = model.name if "/" in model.name else f"taskvec/{model.name}"
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": name,
                "revision": f"{adapter or 'fitting'}-{form.dimensions}-{form.output.value}",
                "similarity_fn_name": ScoringFunction.COSINE,
                "embed_dim": form.dimensions,
            }
        )

    def encode(
        self,
        inputs: Iterable[Any],
        *,
        task_metadata: TaskMetadata,
        prompt_type: PromptType | None = None,
        **_: Any,
    ) -> Matrix:
        """Rows [texts, dimensions] for one task; see ``Form.rows``."""
        texts = [text or " " for batch in inputs for text in batch["text"]]
        query, passage = self._sides[self.adapter_for(task_metadata.type)]
        task = query if prompt_type is PromptType.query else passage
        return self._form.rows(self._model.embed(texts, task, lambda _: None))

    def adapter_for(self, kind: str) -> str:
        """The adapter for a type of task; the only one, where the model has no more.

        Raises:
            InvalidRequestError: the model has several, and none that fits.
        """
        if self._adapter is not None:
            return self._adapter
        wanted = _ADAPTERS.get(kind, _OTHERWISE)
        if wanted in self._sides:
            return wanted
        if len(self._sides) == 1:
            return next(iter(self._sides))
        raise InvalidRequestError(
            f"MTEB's {kind} needs the task {wanted}, and the model has {', '.join(self._sides)}: "
            "choose one by --task."
        )


def run_named(
    model: Model,
    *,
    tasks: Sequence[str],
    benchmark: str | None,
    adapter: str | None,
    dimensions: int | None,
    output: OutputType,
    folder: Path,
) -> None:
    """Run tasks by their names, and those of a benchmark, and print their main scores.

    Raises:
        InvalidRequestError: MTEB knows no such, or the model no such adapter or dimensions.
    """
    (form,) = forms_of(model.dimension, [dimensions] if dimensions else [], [output])
    encoder = MtebEncoder(model, form, adapter)
    named = _named(tasks, benchmark)
    Console().print(benchmark_table(named, run_benchmark(encoder, named, folder)))


def run_benchmark(encoder: MtebEncoder, tasks: Sequence[AbsTask], folder: Path) -> ModelResult:
    """Run tasks; those that the folder has results of, from this form, are not run again."""
    return mteb.evaluate(encoder, tasks, cache=mteb.ResultCache(folder))


def benchmark_table(tasks: Sequence[AbsTask], result: ModelResult) -> Table:
    """The main score of each task."""
    about = {task.metadata.name: task.metadata for task in tasks}
    table = Table("task", "type", "measure", "score")
    for scored in result.task_results:
        task = about[scored.task_name]
        table.add_row(task.name, task.type, task.main_score, f"{scored.get_score():.4f}")
    return table


def _named(tasks: Sequence[str], benchmark: str | None) -> list[AbsTask]:
    try:
        named = [mteb.get_task(name) for name in tasks]
        if benchmark is not None:
            named += mteb.get_benchmark(benchmark).tasks
    except KeyError as error:
        fault = str(error.args[0]).removeprefix("KeyError: ")
        raise InvalidRequestError(f"MTEB: {fault}") from None
    return named
