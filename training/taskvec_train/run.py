"""A recipe from its first stage to the checkpoint that is served."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from taskvec.checkpoint.backbone import Backbone
from taskvec.checkpoint.hub import open_checkpoint
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
from taskvec_train.stages.distill import distill
from taskvec_train.student import new_student, save_student
from taskvec_train.teacher import Teacher, fast_bfloat16, load_teacher, teacher_dimension
from taskvec_train.workspace import Workspace

CHECKPOINT = "checkpoint"


def run_recipe(recipe: Recipe, data: Path, folder: Path, *, cpu: bool = False) -> Path:
    """Run every stage that is not done yet; returns the folder of the exported checkpoint.

    Args:
        recipe: what to make.
        data: what its paths are relative to.
        folder: of the run: states, metrics, the checkpoint. The same call goes on in it.
        cpu: leave a GPU alone.

    Raises:
        TrainingError: data, teacher, disk or recipe refuse; see the message.
    """
    accelerator = new_accelerator(cpu=cpu)
    device = accelerator.device
    options = recipe.teacher

    def teacher() -> Teacher:
        return load_teacher(options.model, options.max_tokens, device)

    space = Workspace(
        folder,
        data,
        recipe.seed,
        recipe.dimensions,
        TeacherPool(
            folder / "teacher",
            f"{options.model} {options.max_tokens}",
            teacher,
            options.batch_tokens,
        ),
        accelerator,
        fast_bfloat16(device),
    )
    common = recipe.model_dump(mode="json", exclude={"distill", "adapt", "export"})
    made = space.claim(folder / "student", common, str(data.resolve()))
    start = _start(space, recipe, teacher)
    for phase in recipe.distill:
        home = folder / "distill" / phase.name
        made = space.claim(home, made, phase.model_dump(mode="json"))
        start = distill(space, phase, start, recipe.prompts, options)
    base = Base(
        open_base(start),
        load_file(start / "projection.safetensors")["psi"],
        recipe.prompts,
        Prompts(query=options.query_instruction, document=options.document_instruction),
    )
    adapters = {}
    for task in recipe.adapt:
        space.claim(folder / "adapt" / task.name, made, task.model_dump(mode="json"))
        adapters[task.name] = adapt(space, task, base)
    final = folder / CHECKPOINT
    if accelerator.is_main_process:
        export(recipe, start, adapters, final, run=folder)
    accelerator.wait_for_everyone()
    return final


def _start(space: Workspace, recipe: Recipe, teacher: Callable[[], Teacher]) -> Path:
    """The student that stage 1 begins with: pretrained, or filled from the teacher's words."""
    folder = space.folder / "student" / "start"
    with space.accelerator.main_process_first():
        if not folder.is_dir():
            make = _shaped if recipe.student.base is None else _pretrained
            model, psi, tokenizer = make(space, recipe, teacher)
            with whole_folder(folder) as unfinished:
                save_student(unfinished, model, psi, tokenizer)
    return folder


def _pretrained(
    space: Workspace, recipe: Recipe, teacher: Callable[[], Teacher]
) -> tuple[Model, Tensor, Path]:
    try:
        base = open_checkpoint(str(recipe.student.base))
    except CheckpointError as error:
        raise TrainingError(f"student.base: {error}") from None
    del teacher
    torch.manual_seed(space.seed)
    psi = _random_projection(teacher_dimension(recipe.teacher.model), base.backbone.hidden)
    return load_backbone(base), psi, base.tokenizer


def _shaped(
    space: Workspace, recipe: Recipe, teacher: Callable[[], Teacher]
) -> tuple[Model, Tensor, dict[str, Any]]:
    student = recipe.student
    shape = Backbone(
        vocabulary=1,  # known when it is trimmed
        causal=student.architecture == "qwen3",
        qk_norm=student.architecture == "qwen3",
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
    model, psi, tokenizer = new_student(shape, teacher(), texts, student.least_count, recipe.seed)
    if student.projection == "random":
        psi = _random_projection(*psi.shape)
    return model, psi, tokenizer


def _both(pair: Pair) -> tuple[str, str]:
    return pair.anchor, pair.positive


def _random_projection(teacher: int, hidden: int) -> Tensor:
    psi: Tensor = torch.randn(teacher, hidden) * hidden**-0.5
    return psi
