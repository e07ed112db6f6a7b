"""What each loss of a task's mix is good for: the adapter trained without it, by several seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev

from taskvec.evaluation.data import find_data
from taskvec.evaluation.formats import forms_of
from taskvec.evaluation.models import LoadedModel
from taskvec.evaluation.run import Plan, ProgressCallback, evaluate
from taskvec.library import Embedder
from taskvec_train.errors import RecipeError
from taskvec_train.export import export
from taskvec_train.figures import Figure
from taskvec_train.measure import OUTPUTS, as_training_errors
from taskvec_train.recipe import AnyAdapter, Recipe
from taskvec_train.run import distill_recipe, open_run, open_student
from taskvec_train.stages.adapt import adapt, loss_weights

ALL = "all losses"
FOLDER = Path("ablation", "checkpoint")
"""Of a run's folder: one checkpoint with every variant as an adapter."""


@dataclass(frozen=True, slots=True)
class Variant:
    """An adapter to be compared.

    Attributes:
        losses: what it is called in tables.
        seed: of its training.
        task: its recipe; its name is the adapter's.
    """

    losses: str
    seed: int
    task: AnyAdapter


def variants_of(recipe: Recipe, adapter: str, seeds: int) -> list[Variant]:
    """The whole mix, and the mix without each of its losses, with each seed.

    Raises:
        RecipeError: the recipe has no such adapter, or it learns by one loss alone.
    """
    found = [task for task in recipe.adapt if task.name == adapter]
    if not found:
        names = ", ".join(task.name for task in recipe.adapt)
        raise RecipeError(f"The recipe has no adapter {adapter!r}: it has {names}.")
    (task,) = found
    mix = [name for name, weight in loss_weights(task).items() if weight]
    if len(mix) < 2:
        raise RecipeError(
            f"The adapter {adapter!r} learns by {mix[0]} alone: nothing to leave out."
        )
    without: Mapping[str, Mapping[str, float]] = {ALL: {}, **{f"no {n}": {n: 0.0} for n in mix}}
    return [
        Variant(
            losses,
            seed,
            task.model_copy(
                update={**change, "name": f"{adapter}-{losses.replace(' ', '-')}-{seed}"}
            ),
        )
        for losses, change in without.items()
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
) -> list[Figure]:
    """Train what is not trained yet, and measure all of it; a figure's model is its variant.

    Args:
        recipe: whose student is trained, in ``folder``.
        variants: see ``variants_of``.
        data: what the recipe's paths are relative to.
        folder: of the run: its teacher's vectors, tokens and negatives are used.
        held_out: data that no stage has seen.
        cpu: leave a GPU alone.
        progress: notified of progress.

    Raises:
        TrainingError: data, disk or recipe refuse; see the message.
    """
    space = open_run(recipe, data, folder, cpu=cpu)
    student, made = distill_recipe(space, recipe)
    base = open_student(student, recipe)
    adapters = {}
    for variant in variants:
        task = variant.task
        space.claim(folder / "adapt" / task.name, made, task.model_dump(mode="json"))
        adapters[task.name] = adapt(replace(space, seed=variant.seed), task, base)
    (folder / FOLDER).parent.mkdir(exist_ok=True)
    export(recipe, student, adapters, folder / FOLDER, run=folder, data=data)
    names = {variant.task.name: variant.losses for variant in variants}
    with as_training_errors():
        found = find_data([held_out])
        with Embedder(str(folder / FOLDER), device="cpu" if cpu else "auto") as embedder:
            model = LoadedModel(embedder)
            plan = Plan(
                data=found,
                forms=forms_of(model.dimension, model.matryoshka, OUTPUTS),
                tasks=list(adapters),
                progress=progress,
            )
            return [
                Figure(names[result.task], model.dimension, result)
                for result in evaluate(model, plan)
            ]


def as_markdown(figures: Sequence[Figure]) -> str:
    """A table: losses by output type and dimensions; means over data, spread over seeds."""
    scores: dict[tuple[str, str, str], list[float]] = {}
    for figure in figures:
        result = figure.result
        if result.form is not None and result.queries is None:
            column = f"{result.output} {result.form.dimensions}"
            scores.setdefault((figure.model, column, result.task), []).append(result.score.value)
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
    """Mean and standard deviation."""
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")
