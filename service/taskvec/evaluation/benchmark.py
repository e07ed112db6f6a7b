"""Run the public benchmark MTEB, through its own package, on a model under evaluation."""

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

from taskvec.core.output_format import OutputFormat, OutputType
from taskvec.errors import InvalidRequestError
from taskvec.evaluation.data import embeddable
from taskvec.evaluation.formats import Matrix, comparable_rows, formats_of
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
"""Adapter for each type of MTEB task."""

_DEFAULT_ADAPTER = "text-matching"
"""Adapter for all other types: pairs, bitexts, summaries."""


class MtebEncoder(AbsEncoder):
    """A model behind MTEB's encoder interface: one output format, an adapter for each task."""

    mteb_model_meta: ModelMeta

    def __init__(
        self, model: Model, output_format: OutputFormat, adapter: str | None = None
    ) -> None:
        """Wrap a model.

        Args:
            model: the model under evaluation.
            output_format: dimensions and output type of the vectors.
            adapter: adapter for every task; None to choose by the type of task.

        Raises:
            InvalidRequestError: the model does not have this adapter.
        """
        self._sides = sides_of(model.tasks)
        if adapter is not None and adapter not in self._sides:
            raise InvalidRequestError(
                f"The model has no task {adapter!r}: choose from {', '.join(self._sides)}."
            )
        self._model = model
        self._format = output_format
        (kind,) = output_format.types
        self._adapter = adapter
        name = model.name if "/" in model.name else f"taskvec/{model.name}"
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": name,
                "revision": f"{adapter or 'fitting'}-{output_format.dimensions}-{kind.value}",
                "similarity_fn_name": ScoringFunction.COSINE,
                "embed_dim": output_format.dimensions,
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
        """Return rows [texts, dimensions] for one MTEB task; see ``comparable_rows``."""
        texts = [embeddable(text) for batch in inputs for text in batch["text"]]
        query, passage = self._sides[self.adapter_for(task_metadata.type)]
        task = query if prompt_type is PromptType.query else passage
        return comparable_rows(self._model.embed(texts, task, lambda _: None), self._format)

    def adapter_for(self, kind: str) -> str:
        """Return the adapter for a type of task; a model with a single adapter uses that one.

        Raises:
            InvalidRequestError: the model has several adapters, but not the one for this type.
        """
        if self._adapter is not None:
            return self._adapter
        wanted = _ADAPTERS.get(kind, _DEFAULT_ADAPTER)
        if wanted in self._sides:
            return wanted
        if len(self._sides) == 1:
            return next(iter(self._sides))
        raise InvalidRequestError(
            f"MTEB's {kind} needs the task {wanted}, but the model has {', '.join(self._sides)}: "
            "choose one with --task."
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
    """Run MTEB tasks by name, and those of a benchmark, and print their main scores.

    Raises:
        InvalidRequestError: a name is unknown to MTEB, or the adapter or dimensions to the model.
    """
    (output_format,) = formats_of(model.dimension, [dimensions] if dimensions else [], [output])
    encoder = MtebEncoder(model, output_format, adapter)
    named = _named(tasks, benchmark)
    Console().print(benchmark_table(named, run_benchmark(encoder, named, folder)))


def run_benchmark(encoder: MtebEncoder, tasks: Sequence[AbsTask], folder: Path) -> ModelResult:
    """Run MTEB tasks; results of this format that are in the folder already are reused."""
    return mteb.evaluate(encoder, tasks, cache=mteb.ResultCache(folder))


def benchmark_table(tasks: Sequence[AbsTask], result: ModelResult) -> Table:
    """Return a table of the main score of each task."""
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
        message = str(error.args[0]).removeprefix("KeyError: ")
        raise InvalidRequestError(f"MTEB: {message}") from None
    return named
