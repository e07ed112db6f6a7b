"""Evaluate a finished run on held-out data, and the models that it is compared with.

These are BM25, the teacher, the student before training, and other checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from taskvec.checkpoint.open import open_checkpoint
from taskvec.core.output_format import OutputFormat, OutputType
from taskvec.errors import CheckpointError, TaskvecError
from taskvec.evaluation.data import Data, RetrievalData, find_data
from taskvec.evaluation.formats import formats_of
from taskvec.evaluation.models import LoadedModel, Model, sides_of
from taskvec.evaluation.run import Plan, ProgressCallback, evaluate
from taskvec.library import Embedder
from taskvec_train.backbones import load_backbone, open_base
from taskvec_train.encoders import BaseEncoder, EvaluatedEncoder
from taskvec_train.errors import TrainingError
from taskvec_train.loop import new_accelerator
from taskvec_train.recipe import Prompts, Recipe
from taskvec_train.results import ModelResult
from taskvec_train.run import CHECKPOINT, START
from taskvec_train.teacher import load_teacher

TEACHER, UNTRAINED = "teacher", "untrained"
OUTPUTS = (OutputType.FLOAT, OutputType.INT8, OutputType.BINARY)


def measure(
    recipe: Recipe,
    run: Path,
    held_out: Path,
    beside: Mapping[str, str],
    *,
    cpu: bool = False,
    progress: ProgressCallback = lambda _title, _steps: lambda _done: None,
) -> Iterator[list[ModelResult]]:
    """Evaluate all models, one after another.

    Every adapter is evaluated on the retrieval data with the most documents and, with full float
    vectors, on all other kinds of data. On the remaining retrieval data only adapters with separate
    query and passage tasks are evaluated; `base` is one of them.

    Args:
        recipe: the recipe of the run.
        run: the run's folder.
        held_out: evaluation data that no stage has seen.
        beside: other checkpoints: name -> folder or hub id.
        cpu: True ignores a GPU.
        progress: notified of progress.

    Yields:
        The results of one model: the teacher with BM25, the untrained student, each checkpoint.

    Raises:
        TrainingError: the run is not finished, or the data or a checkpoint is invalid.
    """
    if not (run / CHECKPOINT).is_dir():
        raise TrainingError(f"{run / CHECKPOINT} does not exist: run the recipe first.")
    with as_training_errors():
        for source in beside.values():
            open_checkpoint(source)
        data = find_data([held_out])
        for encoder in _encoders(recipe, run, cpu=cpu):
            bm25 = encoder.name == TEACHER
            yield list(_evaluated(encoder.name, encoder, data, progress, bm25=bm25))
        for name, source in {**beside, recipe.name: str(run / CHECKPOINT)}.items():
            with Embedder(source, device="cpu" if cpu else "auto") as embedder:
                yield list(_evaluated(name, LoadedModel(embedder), data, progress))


@contextmanager
def as_training_errors() -> Iterator[None]:
    """Raise TrainingError for the errors of evaluation data and checkpoints."""
    try:
        yield
    except (TaskvecError, CheckpointError) as error:
        raise TrainingError(str(error)) from None


def _encoders(recipe: Recipe, run: Path, *, cpu: bool) -> Iterator[EvaluatedEncoder]:
    """Yield the teacher, then the student before training."""
    device, options = new_accelerator(cpu=cpu).device, recipe.teacher
    instructions = Prompts(query=options.query_instruction, document=options.document_instruction)
    teacher = load_teacher(options.model, options.max_tokens, device)
    yield EvaluatedEncoder(TEACHER, teacher, instructions, options.batch_tokens)
    start = open_base(run / START)
    student = BaseEncoder(load_backbone(start).to(device), start, device)
    yield EvaluatedEncoder(UNTRAINED, student, recipe.prompts, options.batch_tokens)


def _evaluated(
    name: str, model: Model, data: Sequence[Data], progress: ProgressCallback, *, bm25: bool = False
) -> Iterator[ModelResult]:
    searches = [item for item in data if isinstance(item, RetrievalData)]
    largest = max(searches, key=lambda item: len(item.documents), default=None)
    formats = formats_of(model.dimension, model.matryoshka, OUTPUTS)
    two_sided = [task for task, sides in sides_of(model.tasks).items() if len(set(sides)) > 1]
    for item in data:
        is_retrieval = isinstance(item, RetrievalData)
        plan = Plan(
            data=[item],
            formats=formats
            if is_retrieval
            else [OutputFormat(model.dimension, (OutputType.FLOAT,))],
            tasks=two_sided if is_retrieval and item is not largest else (),
            bm25=bm25,
            progress=progress,
        )
        for result in evaluate(model, plan):
            yield ModelResult(name, model.dimension, result)
