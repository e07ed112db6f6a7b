"""A task of one's own: one more adapter on a model that is already trained."""

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
from taskvec_train.encoders import BaseEncoder
from taskvec_train.errors import TrainingError
from taskvec_train.export import check_served, copy_adapter
from taskvec_train.files import whole_folder
from taskvec_train.loop import new_accelerator
from taskvec_train.pool import TeacherPool
from taskvec_train.recipe import AnyAdapter, Prompts
from taskvec_train.stages.adapt import Base, adapt
from taskvec_train.teacher import fast_bfloat16
from taskvec_train.workspace import Workspace

_BATCH_TOKENS = 8192


def open_model(name: str) -> Checkpoint:
    """The model that gets an adapter: a folder, a hub id, or the built-in one.

    Raises:
        TrainingError: it is missing or damaged, or cannot be served.
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
    """Train an adapter and put it beside the model's others; returns the model's folder.

    The model itself is the teacher, its vectors the ones to keep close to.

    Args:
        base: the model.
        task: what to train; its name is the folder's and the task's.
        out: the model's own folder, which gets the new adapter at one stroke, or a new folder,
            which gets a copy of the model with it.
        data: what the task's paths are relative to.
        seed: of all that is drawn.
        cpu: leave a GPU alone.
        work: keeps states of the run, to go on from; a temporary folder if None.

    Raises:
        TrainingError: the model has such an adapter, or data or disk refuse; see the message.
    """
    if task.name in base.card.adapters:
        raise TrainingError(
            f"{base.folder} has an adapter {task.name!r} already: choose another name for --task, "
            "or remove that folder."
        )
    accelerator = new_accelerator(cpu=cpu)
    device = accelerator.device
    hidden = base.backbone.hidden
    prompts = Prompts(**{k: v for k, v in base.prompts.items() if k in ("query", "document")})

    def itself() -> BaseEncoder:
        return BaseEncoder(load_backbone(base).to(device), base, device)

    with _room(work) as folder:
        space = Workspace(
            folder,
            data,
            seed,
            base.card.matryoshka or (hidden,),
            TeacherPool(folder / "teacher", "base", itself, _BATCH_TOKENS),
            accelerator,
            fast_bfloat16(device),
        )
        space.claim(folder / "adapt" / task.name, task.model_dump(mode="json"), str(base.folder))
        own = task.prompts or prompts
        # What the teacher sees is what the student sees: the text with its prompt.
        trained = adapt(space, task, Base(base, torch.eye(hidden), prompts, own))
        if accelerator.is_main_process:
            if out.resolve() == base.folder.resolve():
                _add(trained, out, task.name)
            else:
                with whole_folder(out) as unfinished:
                    shutil.copytree(base.folder, unfinished, dirs_exist_ok=True)
                    _add(trained, unfinished, task.name)
                    check_served(unfinished)
        accelerator.wait_for_everyone()
    return out


def _add(trained: Path, model: Path, name: str) -> None:
    with whole_folder(model / "adapters" / name) as unfinished:
        copy_adapter(trained, unfinished, torch.float32)


@contextmanager
def _room(work: Path | None) -> Iterator[Path]:
    if work is not None:
        yield work
        return
    with tempfile.TemporaryDirectory(prefix="taskvec-train-") as folder:
        yield Path(folder)
