"""Ablation: train an adapter without each of its losses, with several seeds, and compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev

from taskvec.evaluation.data import find_data
from taskvec.evaluation.formats import formats_of
from taskvec.evaluation.models import LoadedModel
from taskvec.evaluation.run import Plan, ProgressCallback, evaluate
from taskvec.library import Embedder
from taskvec_train.errors import RecipeError
from taskvec_train.export import export
from taskvec_train.measure import OUTPUTS, as_training_errors
from taskvec_train.recipe import AnyAdapter, Recipe
from taskvec_train.results import ModelResult
from taskvec_train.run import distill_recipe, open_run, open_student
from taskvec_train.stages.adapt import adapt, loss_weights

ALL_LOSSES = "all losses"
CHECKPOINT_FOLDER = Path("ablation", "checkpoint")
"""Below a run's folder: one checkpoint with every variant as an adapter."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One adapter of the comparison.

    Attributes:
        losses: label in tables.
        seed: of its training.
        task: its recipe, under a name that is unique among the variants.
    """

    losses: str
    seed: int
    task: AnyAdapter


def variants_of(recipe: Recipe, adapter: str, seeds: int) -> list[Variant]:
    """Return variants with all losses and without each of them, for each seed.

    Raises:
        RecipeError: the recipe has no such adapter, or the adapter has only one loss.
    """
    found = [task for task in recipe.adapt if task.name == adapter]
    if not found:
        names = ", ".join(task.name for task in recipe.adapt)
        raise RecipeError(f"The recipe has no adapter {adapter!r}: choose from {names}.")
    (task,) = found
    losses = [name for name, weight in loss_weights(task).items() if weight]
    if len(losses) < 2:
        raise RecipeError(
            f"The adapter {adapter!r} has only the loss {losses[0]}: there is none to leave out."
        )
    without: Mapping[str, Mapping[str, float]] = {
        ALL_LOSSES: {},
        **{f"no {n}": {n: 0.0} for n in losses},
    }
    return [
        Variant(
            label,
            seed,
            task.model_copy(
                update={**change, "name": f"{adapter}-{label.replace(' ', '-')}-{seed}"}
            ),
        )
        for label, change in without.items()
        for seed in range(recipe.seed, recipe.seed + seeds)
    ]


def ablate(
    recipe: Recipe,
    variants: Sequence[Variant],
    *,
    data: Path,
    folder: Path,
    held_out: Path,
    cpu: bool = False,
    progress: ProgressCallback = lambda _title, _steps: lambda _done: None,
) -> list[ModelResult]:
    """Train the variants that are not trained yet, and evaluate all of them.

    Args:
        recipe: the recipe of the run.
        variants: see ``variants_of``.
        data: folder that the recipe's paths are relative to.
        folder: of the run; its student, teacher vectors, tokens and negatives are reused.
        held_out: evaluation data that no stage has seen.
        cpu: True ignores a GPU.
        progress: notified of progress.

    Returns:
        One result for each variant, data set and form; its model is the variant's label.

    Raises:
        TrainingError: the data or the recipe is invalid, or a file cannot be written.
    """
    context = open_run(recipe, data, folder, cpu=cpu)
    student, digest = distill_recipe(context, recipe)
    base = open_student(student, recipe)
    adapters = {}
    for variant in variants:
        task = variant.task
        context.claim(folder / "adapt" / task.name, digest, task.model_dump(mode="json"))
        adapters[task.name] = adapt(replace(context, seed=variant.seed), task, base)
    (folder / CHECKPOINT_FOLDER).parent.mkdir(exist_ok=True)
    export(recipe, student, adapters, folder / CHECKPOINT_FOLDER, run=folder, data=data)
    names = {variant.task.name: variant.losses for variant in variants}
    with as_training_errors():
        found = find_data([held_out])
        with Embedder(str(folder / CHECKPOINT_FOLDER), device="cpu" if cpu else "auto") as embedder:
            model = LoadedModel(embedder)
            plan = Plan(
                data=found,
                formats=formats_of(model.dimension, model.matryoshka, OUTPUTS),
                tasks=list(adapters),
                progress=progress,
            )
            return [
                ModelResult(names[result.task], model.dimension, result)
                for result in evaluate(model, plan)
            ]


def as_markdown(results: Sequence[ModelResult]) -> str:
    """Return a table, losses by output format: means over data, deviations over seeds."""
    scores: dict[tuple[str, str, str], list[float]] = {}
    for model_result in results:
        result = model_result.result
        if result.format is not None and result.queries is None:
            column = f"{result.output} {result.format.dimensions}"
            scores.setdefault((model_result.model, column, result.task), []).append(
                result.score.value
            )
    rows: dict[str, dict[str, list[float]]] = {}
    for (losses, column, _), values in scores.items():
        rows.setdefault(losses, {}).setdefault(column, []).append(fmean(values))
    columns = list(next(iter(rows.values())))
    lines = [f"| | {' | '.join(columns)} |", f"|---{'|---:' * len(columns)}|"]
    for losses, cells in rows.items():
        shown = [_spread(cells[column]) for column in columns]
        lines.append(f"| {losses} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    """Return the mean and standard deviation as text."""
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")
