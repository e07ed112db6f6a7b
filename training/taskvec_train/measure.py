"""Measure a finished run on held-out data, beside what its model is compared with.

That is BM25, the teacher, the student before training, and other checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from taskvec.checkpoint.open import open_checkpoint
from taskvec.core.job import OutputType
from taskvec.errors import CheckpointError, TaskvecError
from taskvec.evaluation.data import Data, RetrievalData, find_data
from taskvec.evaluation.formats import Form, forms_of
from taskvec.evaluation.models import LoadedModel, Model, sides_of
from taskvec.evaluation.run import Plan, ProgressCallback, evaluate
from taskvec.library import Embedder
from taskvec_train.backbones import load_backbone, open_base
from taskvec_train.encoders import BaseEncoder, MeasuredEncoder
from taskvec_train.errors import TrainingError
from taskvec_train.figures import Figure
from taskvec_train.loop import new_accelerator
from taskvec_train.recipe import Prompts, Recipe
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
) -> Iterator[list[Figure]]:
    """Measure everything there is to compare, one model after another.

    Every adapter is measured on the search with the most documents and, by whole float vectors, on
    all that is no search; on the other searches those with two sides are, which `base` has.

    Args:
        recipe: of the run.
        run: its folder.
        held_out: data that no stage has seen.
        beside: more checkpoints by name: folders or hub ids.
        cpu: leave a GPU alone.
        progress: notified of progress.

    Yields:
        What one model scored: the teacher with BM25, the untrained student, each checkpoint.

    Raises:
        TrainingError: the run is not finished, or data or a checkpoint cannot be read.
    """
    if not (run / CHECKPOINT).is_dir():
        raise TrainingError(f"{run / CHECKPOINT} is not there: run the recipe first.")
    with as_training_errors():
        for place in beside.values():
            open_checkpoint(place)
        data = find_data([held_out])
        for encoder in _encoders(recipe, run, cpu=cpu):
            bm25 = encoder.name == TEACHER
            yield list(_measured(encoder.name, encoder, data, progress, bm25=bm25))
        for name, place in {**beside, recipe.name: str(run / CHECKPOINT)}.items():
            with Embedder(place, device="cpu" if cpu else "auto") as embedder:
                yield list(_measured(name, LoadedModel(embedder), data, progress))


@contextmanager
def as_training_errors() -> Iterator[None]:
    """Data that cannot be read and checkpoints that cannot be served, told as training tells it."""
    try:
        yield
    except (TaskvecError, CheckpointError) as error:
        raise TrainingError(str(error)) from None


def _encoders(recipe: Recipe, run: Path, *, cpu: bool) -> Iterator[MeasuredEncoder]:
    """The teacher, then the student before training."""
    device, options = new_accelerator(cpu=cpu).device, recipe.teacher
    instructions = Prompts(query=options.query_instruction, document=options.document_instruction)
    teacher = load_teacher(options.model, options.max_tokens, device)
    yield MeasuredEncoder(TEACHER, teacher, instructions, options.batch_tokens)
    start = open_base(run / START)
    student = BaseEncoder(load_backbone(start).to(device), start, device)
    yield MeasuredEncoder(UNTRAINED, student, recipe.prompts, options.batch_tokens)


def _measured(
    name: str, model: Model, data: Sequence[Data], progress: ProgressCallback, *, bm25: bool = False
) -> Iterator[Figure]:
    searches = [item for item in data if isinstance(item, RetrievalData)]
    broadest = max(searches, key=lambda item: len(item.documents), default=None)
    forms = forms_of(model.dimension, model.matryoshka, OUTPUTS)
    two_sided = [task for task, sides in sides_of(model.tasks).items() if len(set(sides)) > 1]
    for item in data:
        is_search = isinstance(item, RetrievalData)
        plan = Plan(
            data=[item],
            forms=forms if is_search else [Form(model.dimension, OutputType.FLOAT)],
            tasks=two_sided if is_search and item is not broadest else (),
            bm25=bm25,
            progress=progress,
        )
        for result in evaluate(model, plan):
            yield Figure(name, model.dimension, result)
