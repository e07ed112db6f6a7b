"""A recipe from its first stage to the checkpoint that is served."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from taskvec.checkpoint.backbone import ARCHITECTURES, Backbone
from taskvec.checkpoint.open import open_checkpoint
from taskvec.errors import CheckpointError
from taskvec_train.backbones import Model, load_backbone, open_base
from taskvec_train.data.readers import read_pairs, read_texts
from taskvec_train.data.records import Pair
from taskvec_train.errors import TrainingError
from taskvec_train.export import export
from taskvec_train.files import whole_folder
from taskvec_train.loop import new_accelerator
from taskvec_train.pool import TeacherPool
from taskvec_train.recipe import Prompts, Recipe
from taskvec_train.stages.adapt import Base, adapt
from taskvec_train.stages.distill import FINAL, distill
from taskvec_train.student import new_student, save_student
from taskvec_train.teacher import fast_bfloat16, load_teacher, teacher_dimension
from taskvec_train.workspace import Workspace

CHECKPOINT = "checkpoint"
START = Path("student", "start")
"""Of a run's folder: the student before training."""


def run_recipe(
    recipe: Recipe,
    data: Path,
    folder: Path,
    *,
    cpu: bool = False,
    figures: str = "",
    train: bool = True,
) -> Path:
    """Run every stage that is not done yet; returns the folder of the exported checkpoint.

    Args:
        recipe: what to make.
        data: what its paths are relative to.
        folder: of the run: states, metrics, the checkpoint. The same call goes on in it.
        cpu: leave a GPU alone.
        figures: Markdown for the model card.
        train: False to refuse a run that is not finished.

    Raises:
        TrainingError: data, teacher, disk or recipe refuse; see the message.
    """
    missing = [stage for stage in _stages(recipe, folder) if not (stage / FINAL).is_dir()]
    if missing and not train:
        raise TrainingError(f"{missing[0]} is not trained yet: run the recipe first.")
    space = open_run(recipe, data, folder, cpu=cpu)
    student, made = distill_recipe(space, recipe)
    base = open_student(student, recipe)
    adapters = {}
    for task in recipe.adapt:
        space.claim(folder / "adapt" / task.name, made, task.model_dump(mode="json"))
        adapters[task.name] = adapt(space, task, base)
    final = folder / CHECKPOINT
    if space.accelerator.is_main_process:
        export(recipe, student, adapters, final, run=folder, data=data, figures=figures)
    space.accelerator.wait_for_everyone()
    return final


def open_run(recipe: Recipe, data: Path, folder: Path, *, cpu: bool = False) -> Workspace:
    """The workspace of a recipe."""
    accelerator = new_accelerator(cpu=cpu)
    teacher = recipe.teacher
    return Workspace(
        folder,
        data,
        recipe.seed,
        recipe.dimensions,
        TeacherPool(
            folder / "teacher",
            f"{teacher.model} {teacher.max_tokens}",
            lambda: load_teacher(teacher.model, teacher.max_tokens, accelerator.device),
            teacher.batch_tokens,
        ),
        accelerator,
        fast_bfloat16(accelerator.device),
    )


def open_student(folder: Path, recipe: Recipe) -> Base:
    """What stage 1 made, to train adapters on."""
    options = recipe.teacher
    return Base(
        open_base(folder),
        load_file(folder / "projection.safetensors")["psi"],
        recipe.prompts,
        Prompts(query=options.query_instruction, document=options.document_instruction),
    )


def distill_recipe(space: Workspace, recipe: Recipe) -> tuple[Path, str]:
    """Stage 1: the folder of the student, and a digest of what made it."""
    common = recipe.model_dump(mode="json", exclude={"name", "distill", "adapt", "export"})
    made = space.claim(space.folder / "student", common, str(space.data.resolve()))
    student = _start(space, recipe)
    for phase in recipe.distill:
        home = space.folder / "distill" / phase.name
        made = space.claim(home, made, phase.model_dump(mode="json"))
        student = distill(space, phase, student, recipe.prompts, recipe.teacher)
    return student, made


def _stages(recipe: Recipe, folder: Path) -> list[Path]:
    phases = [folder / "distill" / phase.name for phase in recipe.distill]
    return [*phases, *(folder / "adapt" / task.name for task in recipe.adapt)]


def _start(space: Workspace, recipe: Recipe) -> Path:
    """The student that stage 1 begins with: pretrained, or filled from the teacher's words."""
    folder = space.folder / START
    with space.accelerator.main_process_first():
        if not folder.is_dir():
            make = _shaped if recipe.student.base is None else _pretrained
            model, psi, tokenizer = make(space, recipe)
            with whole_folder(folder) as unfinished:
                save_student(unfinished, model, psi, tokenizer)
    return folder


def _pretrained(space: Workspace, recipe: Recipe) -> tuple[Model, Tensor, Path]:
    try:
        base = open_checkpoint(str(recipe.student.base))
    except CheckpointError as error:
        raise TrainingError(f"student.base: {error}") from None
    torch.manual_seed(space.seed)
    psi = _random_projection(teacher_dimension(recipe.teacher.model), base.backbone.hidden)
    return load_backbone(base), psi, base.tokenizer


def _shaped(space: Workspace, recipe: Recipe) -> tuple[Model, Tensor, dict[str, Any]]:
    student, options = recipe.student, recipe.teacher
    teacher = load_teacher(options.model, options.max_tokens, space.accelerator.device)
    shape = Backbone(
        vocabulary=1,  # known when it is trimmed
        **ARCHITECTURES[student.architecture]._asdict(),
        **student.model_dump(exclude={"base", "least_count", "projection"}),
    )
    prompts = list(recipe.prompts.model_dump().values()) * student.least_count
    texts = chain(
        prompts,
        *(space.read(phase.texts, read_texts) for phase in recipe.distill),
        *(
            [text for pair in space.read(phase.pairs, read_pairs) for text in _both(pair)]
            for phase in recipe.distill
        ),
    )
    model, psi, tokenizer = new_student(shape, teacher, texts, student.least_count, recipe.seed)
    if student.projection == "random":
        psi = _random_projection(*psi.shape)
    return model, psi, tokenizer


def _both(pair: Pair) -> tuple[str, str]:
    return pair.anchor, pair.positive


def _random_projection(teacher: int, hidden: int) -> Tensor:
    psi: Tensor = torch.randn(teacher, hidden) * hidden**-0.5
    return psi
