"""Train one more adapter, for a user's own task, on a finished model."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.checkpoint.open import open_checkpoint
from taskvec.errors import CheckpointError
from taskvec_train.backbones import load_backbone
from taskvec_train.context import RunContext
from taskvec_train.encoders import BaseEncoder
from taskvec_train.errors import TrainingError
from taskvec_train.export import check_served, copy_adapter
from taskvec_train.files import atomic_folder
from taskvec_train.loop import new_accelerator
from taskvec_train.recipe import AnyAdapter, Prompts
from taskvec_train.stages.adapt import Base, adapt
from taskvec_train.teacher import bfloat16_is_fast
from taskvec_train.teacher_cache import TeacherCache

_BATCH_TOKENS = 8192


def open_model(name: str) -> Checkpoint:
    """Open a model: a folder, a hub id, or the built-in one.

    Raises:
        TrainingError: it is missing, damaged or unsupported.
    """
    try:
        return open_checkpoint(name)
    except CheckpointError as error:
        raise TrainingError(str(error)) from None


def add_adapter(
    base: Checkpoint,
    task: AnyAdapter,
    *,
    out: Path,
    data: Path,
    seed: int = 0,
    cpu: bool = False,
    work: Path | None = None,
) -> Path:
    """Train an adapter and add it to the model; returns the model's folder.

    The teacher is the model's own backbone, so that the adapter stays close to its vectors.

    Args:
        base: the model.
        task: the adapter's recipe; its name becomes the task's name and the adapter's folder.
        out: the model's own folder, to which the adapter is added atomically, or a new folder for
            a copy of the model with the adapter.
        data: folder that the recipe's paths are relative to.
        seed: of all random numbers.
        cpu: True ignores a GPU.
        work: folder for the training states, which make the run resumable; None for a temporary
            folder.

    Raises:
        TrainingError: the model has an adapter of this name, the data is invalid, or a file cannot
            be written.
    """
    if task.name in base.card.adapters:
        raise TrainingError(
            f"{base.folder} already has an adapter {task.name!r}: choose another name for --task, "
            "or remove that adapter's folder."
        )
    accelerator = new_accelerator(cpu=cpu)
    device = accelerator.device
    hidden = base.backbone.hidden
    prompts = Prompts(**{k: v for k, v in base.prompts.items() if k in ("query", "document")})

    def load_base() -> BaseEncoder:
        return BaseEncoder(load_backbone(base).to(device), base, device)

    with _work_folder(work) as folder:
        context = RunContext(
            folder,
            data,
            seed,
            base.card.matryoshka or (hidden,),
            TeacherCache(folder / "teacher", "base", load_base, _BATCH_TOKENS),
            accelerator,
            bfloat16_is_fast(device),
        )
        context.claim(folder / "adapt" / task.name, task.model_dump(mode="json"), str(base.folder))
        own = task.prompts or prompts
        # The teacher gets the same input as the student: the text with its prompt.
        trained = adapt(context, task, Base(base, torch.eye(hidden), prompts, own))
        if accelerator.is_main_process:
            if out.resolve() == base.folder.resolve():
                _add(trained, out, task.name)
            else:
                with atomic_folder(out) as unfinished:
                    shutil.copytree(base.folder, unfinished, dirs_exist_ok=True)
                    _add(trained, unfinished, task.name)
                    check_served(unfinished)
        accelerator.wait_for_everyone()
    return out


def _add(trained: Path, model: Path, name: str) -> None:
    with atomic_folder(model / "adapters" / name) as unfinished:
        copy_adapter(trained, unfinished, torch.float32)


@contextmanager
def _work_folder(work: Path | None) -> Iterator[Path]:
    if work is not None:
        yield work
        return
    with tempfile.TemporaryDirectory(prefix="taskvec-train-") as folder:
        yield Path(folder)
