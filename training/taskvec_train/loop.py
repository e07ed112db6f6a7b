"""The training loop, for a CPU, a GPU, or several GPUs under torchrun.

accelerate chooses the device and averages gradients over processes. Everything that determines a
step is a function of its number, so that a stage resumes from a saved state bit for bit (on one
device).
"""

from __future__ import annotations

import datetime as dt
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn

from taskvec_train.batch_sources import BatchSource, Tensors
from taskvec_train.errors import TrainingError
from taskvec_train.files import atomic_file, disk_error
from taskvec_train.metrics import MetricsWriter
from taskvec_train.objectives import Objective
from taskvec_train.recipe import Steps

STATES = "states"
_STATE = re.compile(r"step-(\d+)\.pt")
_PREFETCH_BATCHES = 4
_PROCESS_GROUP_TIMEOUT = dt.timedelta(days=7)
"""Long, because other processes wait while the main one computes the teacher's vectors."""

Validate = Callable[[], Mapping[str, float]]
"""Returns metrics of held-out data by name."""


def new_accelerator(*, cpu: bool = False) -> Accelerator:
    """Return an accelerator for the device, with deterministic algorithms.

    Deterministic algorithms are slightly slower on a GPU, but make runs repeatable.

    Args:
        cpu: True ignores a GPU.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return Accelerator(
        cpu=cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=_PROCESS_GROUP_TIMEOUT)]
    )


@dataclass(frozen=True)
class Stage:
    """One training stage.

    Attributes:
        title: shown in progress and plots.
        folder: of its states and metrics.
        objective: the module to train; its parameters that require gradients are trained.
        source: its batches.
        options: number of steps, learning rate and schedule.
        seed: of all random numbers.
        validate: called whenever a state is saved; None for no validation.
        snapshot_step: the weights after this step are saved in ``kept.pt``; 0 for no snapshot.
    """

    title: str
    folder: Path
    objective: Objective
    source: BatchSource
    options: Steps
    seed: int
    validate: Validate | None = None
    snapshot_step: int = 0

    @property
    def snapshot_file(self) -> Path:
        """File with the weights of ``snapshot_step``, by name."""
        return self.folder / "kept.pt"

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters that require gradients, by name."""
        named = self.objective.named_parameters()
        return {name: value for name, value in named if value.requires_grad}


def train(stage: Stage, accelerator: Accelerator) -> None:
    """Train a stage; resume from its newest saved state if there is one.

    Args:
        stage: the stage to train.
        accelerator: device and processes.

    Raises:
        TrainingError: the loss is not finite, or a state cannot be read or written.
    """
    options, last = stage.options, stage.options.steps
    stage.objective.to(accelerator.device)
    optimizer = _optimizer(stage, fused=accelerator.device.type == "cuda")
    step = load_state(stage, optimizer)
    # With one process, accelerate wraps only the optimizer; with several, the objective as well.
    model, optimizer = accelerator.prepare(stage.objective, optimizer)
    if options.compile:
        stage.objective.student.compile(dynamic=True)
    if options.checkpointing:
        _enable_checkpointing(stage.objective.student)
    model.train()
    batches = _prefetch(stage.source, accelerator.device, step * options.accumulate)
    is_main = accelerator.is_main_process
    with (
        MetricsWriter(stage.folder, stage.title, step=step, steps=options.steps)
        if is_main
        else nullcontext() as metrics
    ):
        log = _Log(metrics)
        while step < last:
            torch.manual_seed(stage.seed * 1_000_003 + step)
            rate = _set_rate(optimizer, options, step)
            for micro_batch in range(options.accumulate):
                batch = next(batches)
                synchronise = micro_batch + 1 == options.accumulate
                with nullcontext() if synchronise else accelerator.no_sync(model):
                    loss, terms = model(batch)
                    accelerator.backward(loss / options.accumulate)
                log.add(loss, terms, batch)
            accelerator.clip_grad_norm_(stage.trained().values(), options.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            save = step == last or step % options.save_every == 0
            if save or step % options.log_every == 0:
                validated = stage.validate() if save and stage.validate else {}
                log.write(step, rate, validated, where=stage.title)
            if step == stage.snapshot_step and is_main:
                _save(_trained_weights(stage), stage.snapshot_file)
            if save and is_main:
                save_state(stage, optimizer, step)
            if metrics is not None:
                metrics.advance(step)
                if save:
                    metrics.flush()
    accelerator.wait_for_everyone()


class _Log:
    """Sums of losses since the last row, on the device, so that steps need not wait for them."""

    def __init__(self, metrics: MetricsWriter | None) -> None:
        self._metrics = metrics
        self._start = time.monotonic()
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._tokens = torch.zeros((), dtype=torch.int64)

    def add(self, loss: Tensor, terms: Mapping[str, Tensor], batch: Tensors) -> None:
        """Add the losses and tokens of one batch."""
        for name, value in {"loss": loss.detach(), **terms}.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value
            self._counts[name] = self._counts.get(name, 0) + 1
        for name, value in batch.items():
            if name.endswith("lengths"):
                self._tokens = self._tokens + value.sum()

    def write(self, step: int, rate: float, validated: Mapping[str, float], where: str) -> None:
        """Write a row of means since the last row.

        Raises:
            TrainingError: the loss is not finite.
        """
        means = {name: float(value) / self._counts[name] for name, value in self._sums.items()}
        if not math.isfinite(means["loss"]):
            raise TrainingError(
                f"{where}: the loss is {means['loss']} at step {step}: lower lr, or raise "
                "warmup; the state of an earlier step is kept."
            )
        if self._metrics is not None:
            seconds = time.monotonic() - self._start
            row = {"step": step, **means, **validated, "lr": rate, "tokens": int(self._tokens)}
            self._metrics.write(row | {"seconds": round(seconds, 3)})
        self._clear()


def _prefetch(source: BatchSource, device: torch.device, number: int) -> Iterator[Tensors]:
    """Yield batches on the device from ``number`` on; a thread prepares the next ones."""
    pinned = device.type == "cuda"

    def load(index: int) -> Tensors:
        batch = source.batch(index)
        return {name: t.pin_memory() for name, t in batch.items()} if pinned else batch

    with ThreadPoolExecutor(1, "batches") as thread:
        pending = [thread.submit(load, number + i) for i in range(_PREFETCH_BATCHES)]
        while True:
            number += 1
            batch = pending.pop(0).result()
            pending.append(thread.submit(load, number + _PREFETCH_BATCHES - 1))
            yield {name: t.to(device, non_blocking=pinned) for name, t in batch.items()}


def _optimizer(stage: Stage, *, fused: bool) -> torch.optim.Optimizer:
    """Return AdamW; the embedding table and psi may have their own rates; vectors do not decay."""
    options = stage.options
    own_rates = {"embed_tokens.weight": options.embedding_lr, "projection": options.projection_lr}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in stage.trained().items():
        rate = next((r for end, r in own_rates.items() if r and name.endswith(end)), options.lr)
        decay = options.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": rate, "weight_decay": decay, "top": rate}
            for (rate, decay), parameters in groups.items()
        ],
        betas=(0.9, 0.98),
        fused=fused,
    )


def _set_rate(optimizer: Any, options: Steps, step: int) -> float:
    """Set the learning rates of a step: warm-up, then the schedule; return the first group's."""
    if step < options.warmup:
        factor = (step + 1) / options.warmup
    else:
        done = (step - options.warmup) / max(options.steps - options.warmup, 1)
        factor = {
            "constant": 1.0,
            "linear": 1 - done,
            "cosine": 0.5 + 0.5 * math.cos(math.pi * done),
        }[options.schedule]
    for group in optimizer.param_groups:
        group["lr"] = group["top"] * factor
    return float(optimizer.param_groups[0]["lr"])


def _enable_checkpointing(student: Any) -> None:
    """Enable gradient checkpointing: recompute activations in the backward pass."""
    renamed = getattr(student, "activation_checkpointing_enable", None)  # transformers 5.23
    (renamed or student.gradient_checkpointing_enable)({"use_reentrant": False})


def _trained_weights(stage: Stage) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in stage.trained().items()}


def save_state(stage: Stage, optimizer: Any, step: int) -> None:
    """Save the state after a step, and delete all but the newest ``keep`` states.

    Raises:
        TrainingError: the file cannot be written.
    """
    state = {"step": step, "weights": _trained_weights(stage), "optimizer": optimizer.state_dict()}
    _save(state, stage.folder / STATES / f"step-{step:08}.pt")
    for _, file in saved_states(stage.folder)[: -stage.options.keep]:
        file.unlink()


def _save(tensors: Mapping[str, Any], file: Path) -> None:
    with atomic_file(file) as unfinished:
        try:
            torch.save(tensors, unfinished)
        except RuntimeError as error:  # torch's error for a full disk
            raise disk_error(file, error) from error


def load_state(stage: Stage, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest state; return its step, or 0 if there is no state.

    Raises:
        TrainingError: the state is damaged, or of another model.
    """
    states = saved_states(stage.folder)
    if not states:
        return 0
    step, file = states[-1]
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        load_weights(stage, state["weights"])
    except Exception as error:
        raise TrainingError(
            f"{file} cannot be loaded ({type(error).__name__}: {error}): remove it to resume "
            "from an earlier state."
        ) from error
    return step


def load_weights(stage: Stage, weights: Mapping[str, Tensor]) -> None:
    """Copy weights by name into the trained parameters."""
    trained = stage.trained()
    if trained.keys() != weights.keys():
        raise TrainingError("the weights are of another model")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])


def saved_states(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, file) of a stage's states, oldest first."""
    states = folder / STATES
    files = states.iterdir() if states.is_dir() else []
    found = [(match, file) for file in files if (match := _STATE.fullmatch(file.name))]
    return sorted((int(match[1]), file) for match, file in found)
