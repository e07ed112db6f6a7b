"""The training loop: the same on a CPU, a GPU, or under torchrun on many.

accelerate finds the device and shares the gradients; everything that decides a step is a function
of its number, so a run goes on from any saved state bit for bit (on one device).
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

from taskvec_train.errors import TrainingError
from taskvec_train.files import disk_error, whole_file
from taskvec_train.metrics import Metrics
from taskvec_train.objectives import Objective
from taskvec_train.recipe import Steps
from taskvec_train.sources import Source, Tensors

STATES = "states"
_STATE = re.compile(r"step-(\d+)\.pt")
_BATCHES_AHEAD = 4
_PATIENCE = dt.timedelta(days=7)
"""Other processes wait that long while the first one asks the teacher."""

Measure = Callable[[], Mapping[str, float]]


def new_accelerator(*, cpu: bool = False) -> Accelerator:
    """The device, or this process's part of many.

    Sums are made in a fixed order on a GPU, too: what costs a little there makes runs repeatable.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return Accelerator(cpu=cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)])


@dataclass(frozen=True)
class Run:
    """One stage to be trained.

    Attributes:
        title: for people.
        folder: of its states and metrics.
        objective: whose parameters that ask for gradients are trained.
        source: its batches.
        options: how long and how fast.
        seed: of all that is drawn at random.
        measure: figures on held-out data, made whenever a state is saved.
        kept_step: the weights after this step are kept in ``kept.pt``; 0 for none.
    """

    title: str
    folder: Path
    objective: Objective
    source: Source
    options: Steps
    seed: int
    measure: Measure | None = None
    kept_step: int = 0

    @property
    def kept_file(self) -> Path:
        """Weights of ``kept_step``, by name."""
        return self.folder / "kept.pt"

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name."""
        named = self.objective.named_parameters()
        return {name: value for name, value in named if value.requires_grad}


def train(run: Run, accelerator: Accelerator) -> None:
    """Train a stage, from its newest saved state on if it has one.

    Args:
        run: what to train.
        accelerator: where.

    Raises:
        TrainingError: the loss is no number any more, or the disk refuses a state.
    """
    options, last = run.options, run.options.steps
    run.objective.to(accelerator.device)
    optimizer = _optimizer(run, fused=accelerator.device.type == "cuda")
    step = load_state(run, optimizer)
    # Of one process accelerate wraps the optimizer alone; of many the objective, too.
    model, optimizer = accelerator.prepare(run.objective, optimizer)
    if options.compile:
        run.objective.student.compile(dynamic=True)
    if options.checkpointing:
        _save_memory(run.objective.student)
    model.train()
    batches = _ahead(run.source, accelerator.device, step * options.accumulate)
    chief = accelerator.is_main_process
    with (
        Metrics(run.folder, run.title, step=step, steps=options.steps)
        if chief
        else nullcontext() as metrics
    ):
        log = _Log(metrics)
        while step < last:
            torch.manual_seed(run.seed * 1_000_003 + step)
            rate = _set_rate(optimizer, options, step)
            for part in range(options.accumulate):
                batch = next(batches)
                shared = part + 1 == options.accumulate
                with nullcontext() if shared else accelerator.no_sync(model):
                    loss, parts = model(batch)
                    accelerator.backward(loss / options.accumulate)
                log.add(loss, parts, batch)
            accelerator.clip_grad_norm_(run.trained().values(), options.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            due = step == last or step % options.save_every == 0
            if due or step % options.log_every == 0:
                measured = run.measure() if due and run.measure else {}
                log.write(step, rate, measured, where=run.title)
            if step == run.kept_step and chief:
                _save(_weights(run), run.kept_file)
            if due and chief:
                save_state(run, optimizer, step)
            if metrics is not None:
                metrics.advance(step)
                if due:
                    metrics.flush()
    accelerator.wait_for_everyone()


class _Log:
    """Sums of what the steps since the last row gave; they stay on the device until then."""

    def __init__(self, metrics: Metrics | None) -> None:
        self._metrics = metrics
        self._start = time.monotonic()
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._tokens = torch.zeros((), dtype=torch.int64)

    def add(self, loss: Tensor, parts: Mapping[str, Tensor], batch: Tensors) -> None:
        """A batch's losses."""
        for name, value in {"loss": loss.detach(), **parts}.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value
            self._counts[name] = self._counts.get(name, 0) + 1
        for name, value in batch.items():
            if name.endswith("lengths"):
                self._tokens = self._tokens + value.sum()

    def write(self, step: int, rate: float, measured: Mapping[str, float], where: str) -> None:
        """A row of means; an error where the loss is no number."""
        means = {name: float(value) / self._counts[name] for name, value in self._sums.items()}
        if not math.isfinite(means["loss"]):
            raise TrainingError(
                f"{where}: the loss is {means['loss']} at step {step}: lower lr, or lengthen "
                "warmup; the state of an earlier step is kept."
            )
        if self._metrics is not None:
            seconds = time.monotonic() - self._start
            row = {"step": step, **means, **measured, "lr": rate, "tokens": int(self._tokens)}
            self._metrics.write(row | {"seconds": round(seconds, 3)})
        self._clear()


def _ahead(source: Source, device: torch.device, number: int) -> Iterator[Tensors]:
    """Batches on the device, the next ones gathered by a thread meanwhile."""
    pinned = device.type == "cuda"

    def made(which: int) -> Tensors:
        batch = source.batch(which)
        return {name: t.pin_memory() for name, t in batch.items()} if pinned else batch

    with ThreadPoolExecutor(1, "batches") as thread:
        waiting = [thread.submit(made, number + i) for i in range(_BATCHES_AHEAD)]
        while True:
            number += 1
            batch = waiting.pop(0).result()
            waiting.append(thread.submit(made, number + _BATCHES_AHEAD - 1))
            yield {name: t.to(device, non_blocking=pinned) for name, t in batch.items()}


def _optimizer(run: Run, *, fused: bool) -> torch.optim.Optimizer:
    """AdamW; the embedding table and psi may learn at rates of their own, gains never decay."""
    options = run.options
    own = {"embed_tokens.weight": options.embedding_lr, "projection": options.projection_lr}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in run.trained().items():
        rate = next((r for end, r in own.items() if r and name.endswith(end)), options.lr)
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
    """The learning rate of a step: a rise, then the schedule; returns that of the first group."""
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


def _save_memory(student: Any) -> None:
    """Keep a layer's input alone, and compute its states again for the gradients."""
    renamed = getattr(student, "activation_checkpointing_enable", None)  # transformers 5.23
    (renamed or student.gradient_checkpointing_enable)({"use_reentrant": False})


def _weights(run: Run) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in run.trained().items()}


def save_state(run: Run, optimizer: Any, step: int) -> None:
    """Write what is needed to go on after a step; only the newest states are kept.

    Raises:
        TrainingError: the disk refuses it.
    """
    state = {"step": step, "weights": _weights(run), "optimizer": optimizer.state_dict()}
    _save(state, run.folder / STATES / f"step-{step:08}.pt")
    for _, file in saved_states(run.folder)[: -run.options.keep]:
        file.unlink()


def _save(tensors: Mapping[str, Any], file: Path) -> None:
    with whole_file(file) as unfinished:
        try:
            torch.save(tensors, unfinished)
        except RuntimeError as error:  # so torch calls a full disk
            raise disk_error(file, error) from error


def load_state(run: Run, optimizer: torch.optim.Optimizer) -> int:
    """Go on from the newest state; returns its step, 0 where there is none.

    Raises:
        TrainingError: the state is damaged, or of another model.
    """
    states = saved_states(run.folder)
    if not states:
        return 0
    step, file = states[-1]
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        load_weights(run, state["weights"])
    except Exception as error:
        raise TrainingError(
            f"{file} cannot be continued from ({type(error).__name__}: {error}): remove it to go "
            "on from an earlier state."
        ) from error
    return step


def load_weights(run: Run, weights: Mapping[str, Tensor]) -> None:
    """Put weights by name into the parameters that learn."""
    trained = run.trained()
    if trained.keys() != weights.keys():
        raise TrainingError("the weights are of another model")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])


def saved_states(folder: Path) -> list[tuple[int, Path]]:
    """(step, file) of a run's states, oldest first."""
    home = folder / STATES
    files = home.iterdir() if home.is_dir() else []
    found = [(match, file) for file in files if (match := _STATE.fullmatch(file.name))]
    return sorted((int(match[1]), file) for match, file in found)
