"""Run a recipe from its first stage to the exported checkpoint."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from taskvec.checkpoint.backbone import Backbone
from taskvec.checkpoint.open import open_checkpoint
from taskvec.errors import CheckpointError
from taskvec_train.backbones import Model, load_backbone, open_base
from taskvec_train.context import RunContext
from taskvec_train.data.readers import read_pairs, read_texts
from taskvec_train.data.records import Pair
from taskvec_train.errors import TrainingError
from taskvec_train.export import export
from taskvec_train.files import atomic_folder
from taskvec_train.loop import new_accelerator
from taskvec_train.recipe import Prompts, Recipe
from taskvec_train.stages.adapt import Base, adapt
from taskvec_train.stages.distill import FINAL, distill
from taskvec_train.student import new_student, save_student
from taskvec_train.teacher import bfloat16_is_fast, load_teacher, teacher_dimension
from taskvec_train.teacher_cache import TeacherCache

CHECKPOINT = "checkpoint"
START = Path("student", "start")
"""Below a run's folder: the student before training."""


def run_recipe(
    recipe: Recipe,
    data: Path,
    folder: Path,
    *,
    cpu: bool = False,
    figures: str = "",
    train: bool = True,
) -> Path:
    """Run every stage that is not done yet, and export; returns the checkpoint's folder.

    Args:
        recipe: the recipe.
        data: folder that its paths are relative to.
        folder: of the run: states, metrics, the checkpoint. The same call resumes it.
        cpu: True ignores a GPU.
        figures: Markdown with evaluation results for the model card.
        train: False raises an error if a stage is not done, instead of training.

    Raises:
        TrainingError: data, teacher, disk or recipe refuse; see the message.
    """
    missing = [stage for stage in _stages(recipe, folder) if not (stage / FINAL).is_dir()]
    if missing and not train:
        raise TrainingError(f"{missing[0]} is not trained yet: run the recipe first.")
    context = open_run(recipe, data, folder, cpu=cpu)
    student, digest = distill_recipe(context, recipe)
    base = open_student(student, recipe)
    adapters = {}
    for task in recipe.adapt:
        context.claim(folder / "adapt" / task.name, digest, task.model_dump(mode="json"))
        adapters[task.name] = adapt(context, task, base)
    final = folder / CHECKPOINT
    if context.accelerator.is_main_process:
        export(recipe, student, adapters, final, run=folder, data=data, figures=figures)
    context.accelerator.wait_for_everyone()
    return final


def open_run(recipe: Recipe, data: Path, folder: Path, *, cpu: bool = False) -> RunContext:
    """Return the context of a run: folders, accelerator, teacher cache."""
    accelerator = new_accelerator(cpu=cpu)
    teacher = recipe.teacher
    return RunContext(
        folder,
        data,
        recipe.seed,
        recipe.dimensions,
        TeacherCache(
            folder / "teacher",
            f"{teacher.model} {teacher.max_tokens}",
            lambda: load_teacher(teacher.model, teacher.max_tokens, accelerator.device),
            teacher.batch_tokens,
        ),
        accelerator,
        bfloat16_is_fast(accelerator.device),
    )


def open_student(folder: Path, recipe: Recipe) -> Base:
    """Open the student that stage 1 made, to train adapters on."""
    options = recipe.teacher
    return Base(
        open_base(folder),
        load_file(folder / "projection.safetensors")["psi"],
        recipe.prompts,
        Prompts(query=options.query_instruction, document=options.document_instruction),
    )


def distill_recipe(context: RunContext, recipe: Recipe) -> tuple[Path, str]:
    """Run stage 1; return the student's folder and a digest of the recipe that made it."""
    common = recipe.model_dump(mode="json", exclude={"name", "distill", "adapt", "export"})
    digest = context.claim(context.folder / "student", common, str(context.data.resolve()))
    student = _starting_student(context, recipe)
    for phase in recipe.distill:
        stage = context.folder / "distill" / phase.name
        digest = context.claim(stage, digest, phase.model_dump(mode="json"))
        student = distill(context, phase, student, recipe.prompts, recipe.teacher)
    return student, digest


def _stages(recipe: Recipe, folder: Path) -> list[Path]:
    phases = [folder / "distill" / phase.name for phase in recipe.distill]
    return [*phases, *(folder / "adapt" / task.name for task in recipe.adapt)]


def _starting_student(context: RunContext, recipe: Recipe) -> Path:
    """Make the student before training: pretrained, or initialised from the teacher."""
    folder = context.folder / START
    with context.accelerator.main_process_first():
        if not folder.is_dir():
            make = _student_from_shape if recipe.student.base is None else _pretrained_student
            model, psi, tokenizer = make(context, recipe)
            with atomic_folder(folder) as unfinished:
                save_student(unfinished, model, psi, tokenizer)
    return folder


def _pretrained_student(context: RunContext, recipe: Recipe) -> tuple[Model, Tensor, Path]:
    try:
        base = open_checkpoint(str(recipe.student.base))
    except CheckpointError as error:
        raise TrainingError(f"student.base: {error}") from None
    torch.manual_seed(context.seed)
    psi = _random_projection(teacher_dimension(recipe.teacher.model), base.backbone.hidden)
    return load_backbone(base), psi, base.tokenizer


def _student_from_shape(
    context: RunContext, recipe: Recipe
) -> tuple[Model, Tensor, dict[str, Any]]:
    student, options = recipe.student, recipe.teacher
    teacher = load_teacher(options.model, options.max_tokens, context.accelerator.device)
    shape = Backbone(
        vocabulary=1,  # replaced by the trimmed vocabulary's size
        causal=student.architecture == "qwen3",
        qk_norm=student.architecture == "qwen3",
        **student.model_dump(exclude={"base", "least_count", "projection"}),
    )
    prompts = list(recipe.prompts.model_dump().values()) * student.least_count
    texts = chain(
        prompts,
        *(context.read(phase.texts, read_texts) for phase in recipe.distill),
        *(
            [text for pair in context.read(phase.pairs, read_pairs) for text in _pair_texts(pair)]
            for phase in recipe.distill
        ),
    )
    model, psi, tokenizer = new_student(shape, teacher, texts, student.least_count, recipe.seed)
    if student.projection == "random":
        psi = _random_projection(*psi.shape)
    return model, psi, tokenizer


def _pair_texts(pair: Pair) -> tuple[str, str]:
    return pair.anchor, pair.positive


def _random_projection(teacher: int, hidden: int) -> Tensor:
    psi: Tensor = torch.randn(teacher, hidden) * hidden**-0.5
    return psi
